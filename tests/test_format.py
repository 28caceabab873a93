"""The safetensors format, held against the safetensors library; one test for each attack on a header."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from tensorsurgeon.errors import CheckpointError, FormatError
from tensorsurgeon.format import BITS, HEADER_LIMIT, Entry, header_bytes, is_plain_file_name, load_json, nbytes
from tensorsurgeon.format import read_header as read

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F4": torch.float4_e2m1fn_x2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
WITHOUT_TORCH = {"F6_E2M3": 6, "F6_E3M2": 6}
WIDTHS = {**{name: dtype.itemsize * 8 for name, dtype in TORCH.items() if name != "F4"}, "F4": 4, **WITHOUT_TORCH}
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 8), (0,), (2, 0, 5), (2, 1, 4)]


def pack(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def described(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def refuse(directory: Path, content: bytes, *words: str) -> None:
    """Check that a file is refused at once, with an error that holds the words."""
    path = directory / "model.safetensors"
    path.write_bytes(content)
    begun = time.process_time()
    with pytest.raises(FormatError) as caught:
        read(path)
    assert time.process_time() - begun < 3
    assert all(problem.startswith("model.safetensors: ") for problem in caught.value.problems)
    for word in words:
        assert word in str(caught.value)


def test_the_widths_of_dtypes_are_those_of_torch() -> None:
    assert WIDTHS == BITS


@pytest.mark.parametrize(
    ("dtype", "shape"), [(dtype, shape) for dtype in TORCH for shape in SHAPES if shape or dtype != "F4"]
)
def test_a_file_of_the_library_is_read_as_it_was_meant(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel() * TORCH[dtype].itemsize
    content = torch.arange(count, dtype=torch.uint8) % 2
    tensor = content.view(TORCH[dtype]).reshape(shape)
    save_file({"w": tensor, "other": torch.ones(2)}, tmp_path / "f", {"format": "pt", "é": "ü"})
    header = read(tmp_path / "f")
    entry = header.entries["w"]
    # Torch counts pairs of 4-bit numbers, safetensors counts the numbers.
    assert (entry.dtype, entry.shape) == (dtype, (*shape[:-1], shape[-1] * 2) if dtype == "F4" else shape)
    assert header.metadata == {"format": "pt", "é": "ü"}
    assert header.file_size == (tmp_path / "f").stat().st_size
    data = (tmp_path / "f").read_bytes()[header.data_offset :]
    assert data[entry.begin : entry.end] == content.numpy().tobytes()


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("shape", [(0,), (3, 8), (2, 0, 5), (2, 1, 4)])
def test_the_library_reads_what_a_written_header_describes(dtype: str, shape: tuple[int, ...]) -> None:
    length = torch.Size(shape).numel() * WIDTHS[dtype] // 8
    data = bytes(n % 2 for n in range(length))
    content = header_bytes({"w": (dtype, shape), "x": ("U8", (2,))}, {}) + data + b"ab"
    tensors = dict(safetensors.deserialize(content))
    assert (tensors["w"]["dtype"], tuple(tensors["w"]["shape"])) == (dtype, shape)
    assert bytes(tensors["w"]["data"]) == data
    assert bytes(tensors["x"]["data"]) == b"ab"


@pytest.mark.parametrize("dtype", TORCH)
def test_torch_gets_the_numbers_back(tmp_path: Path, dtype: str) -> None:
    packed = (3, 8) if dtype != "F4" else (3, 4)
    numbers = (torch.arange(torch.Size(packed).numel() * TORCH[dtype].itemsize) % 2).to(torch.uint8)
    (tmp_path / "f").write_bytes(header_bytes({"w": (dtype, (3, 8))}, {}) + numbers.numpy().tobytes())
    with safetensors.safe_open(tmp_path / "f", "pt") as file:
        loaded = file.get_tensor("w")
    assert (loaded.dtype, loaded.shape) == (TORCH[dtype], packed)
    assert torch.equal(loaded.view(torch.uint8).flatten(), numbers)


def test_a_scalar_round_trips(tmp_path: Path) -> None:
    content = header_bytes({"s": ("F32", ())}, {}) + torch.tensor(1.5).numpy().tobytes()
    assert torch.equal(load(content)["s"], torch.tensor(1.5))
    (tmp_path / "f").write_bytes(content)
    assert read(tmp_path / "f").entries == {"s": Entry("F32", (), 0, 4)}


def test_golden_bytes() -> None:
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"U8","shape":[1,3],"data_offsets":[8,11]}}'
    )
    assert len(text) == 140
    golden = b"\x90\0\0\0\0\0\0\0" + text + b" " * 4
    assert header_bytes({"a": ("F32", (2,)), "b": ("U8", (1, 3))}, {"format": "pt"}) == golden


def test_metadata_reaches_the_library(tmp_path: Path) -> None:
    metadata = {"format": "pt", "quote": '"\\', "zeichen": "ß\U0001f600"}
    (tmp_path / "f").write_bytes(header_bytes({"naïve": ("U8", (1,))}, metadata) + b"\1")
    with safetensors.safe_open(tmp_path / "f", "pt") as file:
        assert file.metadata() == metadata
        assert list(file.keys()) == ["naïve"]


def test_without_metadata_the_library_sees_none(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(header_bytes({"w": ("U8", (1,))}, {}) + b"\1")
    with safetensors.safe_open(tmp_path / "f", "pt") as file:
        assert file.metadata() is None


@pytest.mark.parametrize("length", range(1, 10))
def test_the_data_begins_at_a_multiple_of_eight(length: int) -> None:
    written = header_bytes({"n" * length: ("U8", (1,))}, {})
    assert len(written) % 8 == 0
    assert written[8:9] == b"{"
    assert written[8:].rstrip(b" ").endswith(b"}")


def test_entries_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    header = {"last": described(offsets=[8, 12]), "first": described(offsets=[0, 4]), "mid": described(offsets=[4, 8])}
    (tmp_path / "f").write_bytes(pack(header, bytes(12)))
    assert list(read(tmp_path / "f").entries) == ["first", "mid", "last"]


def test_empty_tensors_may_share_an_offset_with_others(tmp_path: Path) -> None:
    empty = described(shape=[0], offsets=[4, 4])
    header = {"behind": empty, "w": described(), "in front": described(shape=[0], offsets=[0, 0]), "too": empty}
    content = pack(header, bytes(4))
    assert len(safetensors.deserialize(content)) == 4
    (tmp_path / "f").write_bytes(content)
    assert set(read(tmp_path / "f").entries) == set(header)


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(save({}))
    assert read(tmp_path / "f").entries == {}


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_tensor_that_ends_within_a_byte_is_refused(tmp_path: Path, dtype: str) -> None:
    content = pack({"w": described(dtype, [3], [0, 2])}, bytes(2))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    refuse(tmp_path, content, "'w'", "whole bytes")
    with pytest.raises(FormatError, match="whole bytes"):
        nbytes(dtype, (3,))


def test_a_truncated_shard_names_the_tensor_and_the_bytes(tmp_path: Path) -> None:
    header = {"a": described(offsets=[0, 4]), "cut": described(offsets=[4, 8]), "gone": described(offsets=[8, 12])}
    refuse(tmp_path, pack(header, bytes(12))[:-6], "'cut'", "byte 8", "has 6", "fetch it again")


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    refuse(tmp_path, (90).to_bytes(8, "little") + b"{}", "byte 98", "has 10", "fetch it again")


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_huge(tmp_path: Path, length: int) -> None:
    refuse(tmp_path, length.to_bytes(8, "little") + b"{}" + bytes(100), str(length), "100000000")


@pytest.mark.parametrize(
    ("length", "complaint"), [(HEADER_LIMIT, "invalid header length"), (HEADER_LIMIT + 1, "large")]
)
def test_the_limit_of_the_header_is_that_of_the_library(length: int, complaint: str) -> None:
    with pytest.raises(safetensors.SafetensorError, match=complaint):
        safetensors.deserialize(length.to_bytes(8, "little") + b"{}")


def test_an_empty_file(tmp_path: Path) -> None:
    refuse(tmp_path, b"", "0 bytes are too few")


def test_a_file_of_seven_bytes(tmp_path: Path) -> None:
    refuse(tmp_path, b"1234567", "7 bytes are too few")


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n"
    refuse(tmp_path, pointer, "Git LFS pointer", "git lfs pull")


def test_a_pickle_is_not_opened_as_one(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pickle")
    refuse(tmp_path, (tmp_path / "pickle").read_bytes())


@pytest.mark.parametrize("text", [b"", b" {}", b"[]", b"null", b'"x"', b"\xef\xbb\xbf{}", b"(lambda: 0)()"])
def test_a_header_that_is_no_object(tmp_path: Path, text: bytes) -> None:
    refuse(tmp_path, pack(text), "does not begin with '{'")


@pytest.mark.parametrize("text", [b"{", b"{}}", b"{} x", b"{'a': 1}", b"{}\0", b'{"a":}', b'{"a\n":{}}', b'{"\\x":{}}'])
def test_a_header_that_is_not_json(tmp_path: Path, text: bytes) -> None:
    refuse(tmp_path, pack(text), "not valid JSON")


@pytest.mark.parametrize("name", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80"])
def test_a_header_that_is_not_utf8(tmp_path: Path, name: bytes) -> None:
    text = b'{"' + name + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    refuse(tmp_path, pack(text), "not valid JSON", "utf-8")


@pytest.mark.parametrize("name", ["\\ud800", "\\uDFFF", "a\\udc00\\ud800"])
def test_half_of_a_surrogate_pair_is_no_name(tmp_path: Path, name: str) -> None:
    content = pack(f'{{"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}'.encode())
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    refuse(tmp_path, content, "not valid JSON")


def test_a_whole_surrogate_pair_is_a_name(tmp_path: Path) -> None:
    text = b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "f").write_bytes(pack(text))
    assert list(read(tmp_path / "f").entries) == ["\U0001f600"]


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [200, 1_000_000])
def test_deep_nesting(tmp_path: Path, opening: str, depth: int) -> None:
    refuse(tmp_path, pack(b'{"x":' + opening.encode() * depth))
    closing = {"[": "]", '{"a":': "1}"}[opening]
    text = '{"x":' + opening * depth + closing[:-1] + closing[-1] * depth + "}"
    refuse(tmp_path, pack(text.encode()))


def test_a_key_that_occurs_twice(tmp_path: Path) -> None:
    one = b'"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    refuse(tmp_path, pack(b"{" + one + b"," + one + b"}", bytes(4)), "'w' occurs twice")


def test_a_key_that_occurs_twice_within_a_tensor(tmp_path: Path) -> None:
    text = b'{"w":{"dtype":"U8","shape":[4],"shape":[4],"data_offsets":[0,4]}}'
    refuse(tmp_path, pack(text, bytes(4)), "'shape' occurs twice")


def test_a_metadata_key_that_occurs_twice(tmp_path: Path) -> None:
    refuse(tmp_path, pack(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' occurs twice")


def test_an_overlap(tmp_path: Path) -> None:
    header = {"a": described(offsets=[0, 4]), "b": described(offsets=[2, 6])}
    refuse(tmp_path, pack(header, bytes(6)), "an overlap of 2 bytes between 'a' and 'b'")


def test_two_tensors_in_the_same_place(tmp_path: Path) -> None:
    refuse(tmp_path, pack({"a": described(), "b": described()}, bytes(4)), "an overlap of 4 bytes between 'a' and 'b'")


def test_a_gap(tmp_path: Path) -> None:
    header = {"a": described(offsets=[0, 4]), "b": described(offsets=[7, 11])}
    refuse(tmp_path, pack(header, bytes(11)), "a gap of 3 bytes between 'a' and 'b'")


def test_a_gap_in_front(tmp_path: Path) -> None:
    refuse(tmp_path, pack({"a": described(offsets=[8, 12])}, bytes(12)), "a gap of 8 bytes between the header and 'a'")


def test_an_empty_tensor_within_another(tmp_path: Path) -> None:
    content = pack({"a": described(), "b": described(shape=[0], offsets=[2, 2])}, bytes(4))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    refuse(tmp_path, content, "'b'")


def test_trailing_bytes(tmp_path: Path) -> None:
    refuse(tmp_path, pack({"a": described()}, bytes(9)), "5 bytes follow 'a' that no tensor owns")


def test_bytes_behind_an_empty_header(tmp_path: Path) -> None:
    refuse(tmp_path, pack({}, b"x"), "1 bytes follow the header")


SIZES = [-1, -(2**64), 2**64, 10**400, True, False, 1.0, 4.5, None, "4", [4], {}]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size)[:20])
def test_a_shape_that_is_not_of_whole_numbers(tmp_path: Path, size: Any) -> None:
    refuse(tmp_path, pack({"w": described(shape=[size])}, bytes(4)), "'w'", "is not a list of whole numbers from 0")


@pytest.mark.parametrize(
    "size", ["-0", "1e0", "NaN", "Infinity", "-Infinity", "1E400", "9" * 5000], ids=lambda it: it[:9]
)
def test_a_shape_with_a_number_that_only_python_reads_as_whole(tmp_path: Path, size: str) -> None:
    text = f'{{"w":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,0]}}}}'
    refuse(tmp_path, pack(text.encode()), "'w'", "is not a list of whole numbers from 0")


@pytest.mark.parametrize("shape", [None, 4, "4", {"0": 4}, True])
def test_a_shape_that_is_no_list(tmp_path: Path, shape: Any) -> None:
    refuse(tmp_path, pack({"w": described(shape=shape)}, bytes(4)), "is not a list of whole numbers from 0")


@pytest.mark.parametrize(
    "shape",
    [[2**63, 2], [2**32, 2**32, 0], [2**61], [2**63] * 200_000, [2**62 + 1, 4]],
    ids=["past 64 bits", "past 64 bits, then 0", "past 64 bits of bits", "many", "wraps round to 4"],
)
def test_a_shape_whose_product_overflows(tmp_path: Path, shape: list[int]) -> None:
    content = pack({"w": described(shape=shape)}, bytes(4))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    refuse(tmp_path, content, "'w'", "larger than any file")


@pytest.mark.parametrize("offsets", [[0, 3], [0, 5], [1, 4]])
def test_offsets_that_disagree_with_dtype_and_shape(tmp_path: Path, offsets: list[int]) -> None:
    span = offsets[1] - offsets[0]
    refuse(tmp_path, pack({"w": described(offsets=offsets)}, bytes(5)), f"span {span} bytes, but U8 [4] takes 4")


def test_offsets_that_run_backwards(tmp_path: Path) -> None:
    refuse(tmp_path, pack({"w": described(offsets=[4, 0])}, bytes(4)), "'w'", "span -4 bytes")


@pytest.mark.parametrize(
    "offsets", [[0], [0, 4, 8], [], None, "04", {"0": 4}, [-4, 0], [0.0, 4.0], [False, 4], [0, 2**64]]
)
def test_offsets_that_are_no_two_whole_numbers(tmp_path: Path, offsets: Any) -> None:
    refuse(tmp_path, pack({"w": described(offsets=offsets)}, bytes(4)), "'w'", "not two whole numbers from 0")


@pytest.mark.parametrize("dtype", ["F128", "u8", "", None, 8, ["U8"], {"U8": 1}])
def test_an_unknown_dtype(tmp_path: Path, dtype: Any) -> None:
    refuse(tmp_path, pack({"w": described(dtype)}, bytes(4)), "'w'", f"unknown dtype {dtype!r}")


def test_a_key_too_many(tmp_path: Path) -> None:
    refuse(tmp_path, pack({"w": described(strides=[1])}, bytes(4)), "'w'", "just the keys")


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_a_key_too_few(tmp_path: Path, key: str) -> None:
    value = described()
    del value[key]
    refuse(tmp_path, pack({"w": value}, bytes(4)), "'w'", "just the keys")


@pytest.mark.parametrize("value", [None, 4, "U8", [], ["U8", [4], [0, 4]]])
def test_a_tensor_that_is_no_object(tmp_path: Path, value: Any) -> None:
    refuse(tmp_path, pack({"w": value}, bytes(4)), "'w'", "just the keys")


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}, [], "a", None, 0])
def test_metadata_that_is_not_of_strings(tmp_path: Path, metadata: Any) -> None:
    refuse(tmp_path, pack({"__metadata__": metadata}), "'__metadata__' is not a map from strings to strings")


def test_all_faulty_tensors_are_named_at_once(tmp_path: Path) -> None:
    header = {"a": described("F7"), "good": described(), "b": described(shape=[-1]), "c": described(offsets=[0, 9])}
    refuse(tmp_path, pack(header, bytes(4)), "'a'", "'b'", "'c'")
    with pytest.raises(FormatError) as caught:
        read(tmp_path / "model.safetensors")
    assert len(caught.value.problems) == 3


def test_a_missing_file_stays_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere")


def test_a_format_error_is_a_fault_of_the_checkpoint() -> None:
    assert issubclass(FormatError, CheckpointError)
    assert FormatError.exit_status == 1


GOOD = pack(
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
    b'"b\\u00e9":{"dtype":"U8","shape":[],"data_offsets":[12,13]},"c":{"dtype":"F4","shape":[4],"data_offsets":[13,15]}}',
    bytes(range(15)),
)
HEADER_END = len(GOOD) - 15
TOKENS = re.compile(rb'"[^"]*"|[0-9]+|[{}\[\],:]')
STRANGE = [
    b"0", b"-0", b"-1", b"1", b"1.0", b"1e0", b"2", b"3", b"12", b"13", b"true", b"null", b'""', b'"a"', b'"U8"',
    b'"F4"', b'"F6_E2M3"', b'"\\ud800"', b'"\\u0000"', b"[]", b"{}", b"[0]", b"[0,0]", b"18446744073709551615",
    b"18446744073709551616", b"9223372036854775808", b",", b":", b"]", b"}", b" ", b"\t", b"\n", b"\xff", b"",
]  # fmt: skip


def with_byte(content: bytes, place: int, byte: int) -> bytes:
    return content[:place] + bytes([byte]) + content[place + 1 :]


def with_length(text: bytes) -> bytes:
    return pack(text, GOOD[HEADER_END:])


@st.composite
def tokens_replaced(draw: st.DrawFn) -> bytes:
    tokens = TOKENS.findall(GOOD[8:HEADER_END])
    for place in draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=3)):
        tokens[place] = draw(st.sampled_from([*STRANGE, tokens[place] * 2, tokens[(place + 1) % len(tokens)]]))
    return with_length(b"".join(tokens))


@st.composite
def bytes_changed(draw: st.DrawFn) -> bytes:
    content = GOOD
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, HEADER_END - 1))
        content = draw(
            st.sampled_from(
                [
                    with_byte(content, place, draw(st.integers(0, 255))),
                    with_byte(content, place, content[place] ^ 1 << draw(st.integers(0, 7))),
                    with_length(content[8:place] + draw(st.binary(min_size=1, max_size=4)) + content[place:HEADER_END]),
                    content[: draw(st.integers(0, len(GOOD)))].ljust(HEADER_END + 1),
                ]
            )
        )
    return content


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations") / "f"


def accepted_by_the_library(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (it["dtype"], tuple(it["shape"]), bytes(it["data"])) for name, it in found}


@settings(max_examples=600, deadline=None)
@given(content=tokens_replaced() | bytes_changed() | st.binary(max_size=40).map(with_length) | st.binary(max_size=60))
@example(content=GOOD)
@example(content=GOOD[:-1])
@example(content=GOOD + b"x")
def test_what_is_read_of_a_mutated_file_the_library_reads_alike(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    try:
        header = read(scratch)
    except FormatError:
        assert content != GOOD
        return
    data = content[header.data_offset :]
    ours = {name: (it.dtype, it.shape, data[it.begin : it.end]) for name, it in header.entries.items()}
    assert accepted_by_the_library(content) == ours


@pytest.mark.parametrize("byte", list(b'\0 "-0:[]{}e9\xff'))
def test_no_byte_of_a_header_can_change_to_something_the_library_rejects(scratch: Path, byte: int) -> None:
    changed = [with_byte(GOOD, place, byte) for place in range(HEADER_END)]
    rejected = [content for content in changed if accepted_by_the_library(content) is None]
    assert len(rejected) > 50
    for content in rejected:
        scratch.write_bytes(content)
        with pytest.raises(FormatError):
            read(scratch)


@pytest.mark.parametrize("name", ["model.safetensors", "..safetensors", "a b", "ü", "...", "~", "C:x"])
def test_plain_file_names(name: str) -> None:
    assert is_plain_file_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\\b", "a\0b", "a\nb", "a\n"])
def test_names_that_reach_elsewhere(name: str) -> None:
    assert not is_plain_file_name(name)


@pytest.mark.parametrize("text", ['{"a":1,"a":1}', '{"b":{"a":1,"c":2,"a":3}}', '[{"a":1,"a":2}]'])
def test_json_with_a_duplicate_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="'a' occurs twice"):
        load_json(text)


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udc00": 1}', '["a", {"b": "\\uD83D"}]'])
def test_json_with_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        load_json(text)


def test_json_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 100_000)


def test_json_is_read_as_the_library_of_python_reads_it() -> None:
    text = '{"a": [1, 2.5, -0.0, 1e3, true, null, "\\ud83d\\ude00 \\\\ud800"], "b": {}}'
    assert load_json(text) == json.loads(text)
