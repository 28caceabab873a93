"""Lazy tensors, read in blocks of rows, held against torch on the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tensorsurgeon.errors import CheckpointError, FormatError
from tensorsurgeon.format import Span, read_header
from tensorsurgeon.forward.mapping import map_span
from tensorsurgeon.reading import read_span
from tensorsurgeon.shaping import stacked
from tensorsurgeon.tensor import Block, LazyTensor, Pieces, RowFunction, Rows

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}

Store = Callable[[torch.Tensor], LazyTensor]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a function that saves a tensor between two others and opens it lazily."""

    def save(tensor: torch.Tensor) -> LazyTensor:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        around = torch.full((3,), 77, dtype=torch.int64)
        save_file({"front": around, "w": tensor, "z": torch.full((5,), 77, dtype=torch.uint8)}, path)
        header = read_header(path)
        entry = header.entries["w"]
        return LazyTensor(
            entry.dtype, entry.shape, Span(path, header.data_offset + entry.begin, entry.end - entry.begin)
        )

    return save


def torch_of(block: Block) -> torch.Tensor:
    if not len(block.data):
        return torch.empty(block.shape, dtype=TORCH[block.dtype])
    return torch.frombuffer(bytearray(block.data), dtype=TORCH[block.dtype]).reshape(block.shape)


def block_of(tensor: torch.Tensor) -> Block:
    names = {dtype: name for name, dtype in TORCH.items()}
    return Block(names[tensor.dtype], tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def recording(function: Callable[..., torch.Tensor], seen: list[tuple[int, ...]]) -> RowFunction:
    """Return a row function over torch that notes how many rows of each input it was given."""

    def apply(*blocks: Block) -> Block:
        seen.append(tuple(block.shape[0] for block in blocks))
        return block_of(function(*map(torch_of, blocks)))

    return apply


def scaled_by(grain: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda rows, scale: rows * scale.repeat_interleave(grain, 0)[: len(rows)]


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 1), (3, 5), (6, 7), (4, 4), (0, 0), (7, 7)])
def test_rows_of_a_stored_tensor(store: Store, start: int, stop: int) -> None:
    whole = numbers(7, 3, 2)
    block = store(whole).read(start, stop)
    assert block.shape == (stop - start, 3, 2)
    assert torch.equal(torch_of(block), whole[start:stop])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (0, 4), (4, 0), (2, 3)])
def test_a_whole_stored_tensor(store: Store, shape: tuple[int, ...]) -> None:
    whole = numbers(*shape) if shape else torch.tensor(2.5)
    tensor = store(whole)
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("F32", shape, whole.nbytes)
    assert torch.equal(torch_of(tensor.read()), whole)
    assert tensor.rows == (shape[0] if shape else 1)


def test_rows_from_the_middle_to_the_end(store: Store) -> None:
    whole = numbers(6, 2)
    assert torch.equal(torch_of(store(whole).read(4)), whole[4:])


def test_rows_of_four_bit_numbers_that_fill_whole_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(9)))
    tensor = LazyTensor("F4", (4, 3), Span(tmp_path / "f", 1, 6))
    assert bytes(tensor.read().data) == bytes(range(1, 7))
    assert bytes(tensor.read(2, 4).data) == bytes(range(4, 7))


def test_rows_that_begin_within_a_byte_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(9))
    with pytest.raises(FormatError, match="whole bytes"):
        LazyTensor("F4", (4, 3), Span(tmp_path / "f", 0, 6)).read(1, 3)


def test_mapped_spans_keep_no_file_open_and_go_when_nothing_holds_them(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    held = [map_span(Span(path, number, 100)) for number in range(2000)]
    assert [it[0] for it in held] == [number % 256 for number in range(2000)]
    assert not [it for it in Path("/proc/self/fd").iterdir() if it.exists() and it.samefile(path)]
    assert Path("/proc/self/maps").read_text().count(str(path)) == 2000
    kept = torch.frombuffer(bytearray(held[7]), dtype=torch.uint8)
    view = memoryview(held[9])[3:]
    held.clear()
    assert (kept[0], view[0]) == (7, 12)
    assert Path("/proc/self/maps").read_text().count(str(path)) == 1


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 5), (4095, 3), (4096, 0), (5000, 9000), (8192, 4096)])
def test_a_mapped_span_is_the_one_that_is_read_and_cannot_be_written(tmp_path: Path, offset: int, nbytes: int) -> None:
    path = tmp_path / "file"
    content = bytes(number % 251 for number in range(20000))
    path.write_bytes(content)
    span = Span(path, offset, nbytes)
    mapped = map_span(span)
    assert bytes(mapped) == bytes(read_span(span)) == content[offset : offset + nbytes]
    assert mapped.readonly


def test_a_truncated_file_is_refused(store: Store) -> None:
    tensor = store(numbers(100, 2))
    assert tensor.span
    path = tensor.span.path
    path.write_bytes(path.read_bytes()[: tensor.span.offset + 50])
    assert len(tensor.read(0, 6).data) == 48
    with pytest.raises(CheckpointError, match=rf"ends at byte {tensor.span.offset + 50}, before byte"):
        tensor.read(0, 7)
    with pytest.raises(CheckpointError):
        tensor.read()
    with pytest.raises(CheckpointError, match="it was changed while it was read"):
        map_span(tensor.span)


def test_a_span_that_starts_behind_the_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"123")
    assert read_span(Span(tmp_path / "f", 1, 2)) == b"23"
    assert read_span(Span(tmp_path / "f", 9, 0)) == b""
    with pytest.raises(CheckpointError, match="ends at byte 9, before byte 10"):
        read_span(Span(tmp_path / "f", 9, 1))


@pytest.mark.parametrize("grain", [1, 2, 3, 4, 128])
def test_every_range_of_a_computed_tensor(store: Store, grain: int) -> None:
    whole, scale = numbers(10, 3), numbers(-(-10 // grain))[:, None] + 1
    seen: list[tuple[int, ...]] = []
    function = recording(scaled_by(grain), seen)
    tensor = store(whole).rowwise(function, store(scale), dtype="F32", history="scale", grain=grain)
    expected = whole * torch.tensor([float(row // grain + 1) for row in range(10)])[:, None]
    for start in range(10):
        for stop in range(start + 1, 11):
            block = tensor.read(start, stop)
            assert block.shape == (stop - start, 3)
            assert torch.equal(torch_of(block), expected[start:stop])
    assert {rows % grain for rows, _ in seen} <= {0, 10 % grain}


def test_two_rows_of_scales_for_192_rows_are_grains_of_128(store: Store) -> None:
    whole, scale = torch.ones(192, 4), torch.tensor([[2.0], [3.0]])
    tensor = store(whole).rowwise(recording(scaled_by(128), []), store(scale), dtype="F32", history="scale", grain=128)
    factors = torch_of(tensor.read())[:, 0]
    assert factors.tolist() == [2.0] * 128 + [3.0] * 64
    assert torch_of(tensor.read(100, 130))[:, 0].tolist() == [2.0] * 28 + [3.0] * 2


def test_a_range_within_a_grain_computes_that_grain_only(store: Store) -> None:
    seen: list[tuple[int, ...]] = []
    function = recording(scaled_by(4), seen)
    tensor = store(numbers(10, 2)).rowwise(function, store(numbers(3, 1)), dtype="F32", history="scale", grain=4)
    assert torch_of(tensor.read(5, 7)).shape == (2, 2)
    assert torch_of(tensor.read(9, 10)).shape == (1, 2)
    assert torch_of(tensor.read(3, 5)).shape == (2, 2)
    assert seen == [(4, 1), (2, 1), (8, 2)]


def test_an_other_with_as_many_rows_goes_row_for_row(store: Store) -> None:
    one, two = numbers(6, 3), numbers(6, 3).flip(0)
    tensor = store(one).rowwise(recording(torch.add, []), store(two), dtype="F32", history="add", grain=4)
    assert torch.equal(torch_of(tensor.read(1, 5)), (one + two)[1:5])


def test_an_output_of_another_width_is_cut_by_its_own_bytes(store: Store) -> None:
    whole = numbers(9, 5)
    function = recording(lambda rows: rows.to(torch.bfloat16), [])
    tensor = store(whole).rowwise(function, dtype="BF16", history="cast", grain=4)
    assert (tensor.nbytes, tensor.row_bytes) == (90, 10)
    assert torch.equal(torch_of(tensor.read(3, 6)), whole[3:6].to(torch.bfloat16))


def test_a_computed_scalar(store: Store) -> None:
    def doubled(block: Block) -> Block:
        return Block("F32", block.shape, (torch_of(block) * 2).numpy().tobytes())

    tensor = store(torch.tensor(2.5)).rowwise(doubled, dtype="F32", history="double")
    assert tensor.shape == ()
    assert torch.equal(torch_of(tensor.read()), torch.tensor(5.0))


def test_nested_computations_meet_at_common_grains(store: Store) -> None:
    whole, small, large = numbers(30, 2), numbers(8, 1) + 1, numbers(5, 1) + 1
    inner_seen: list[tuple[int, ...]] = []
    outer_seen: list[tuple[int, ...]] = []
    inner = store(whole).rowwise(
        recording(scaled_by(4), inner_seen), store(small), dtype="F32", history="by 4", grain=4
    )
    outer = inner.rowwise(recording(scaled_by(6), outer_seen), store(large), dtype="F32", history="by 6", grain=6)
    expected = torch.stack([row * (i // 4 + 1) * (i // 6 + 1) for i, row in enumerate(whole)])
    assert outer.grain == 12
    for start, stop in ((0, 30), (5, 7), (11, 13), (29, 30), (23, 25)):
        assert torch.equal(torch_of(outer.read(start, stop)), expected[start:stop])
    assert inner_seen == [(30, 8), (12, 3), (24, 6), (6, 2), (18, 5)]
    assert outer_seen == [(30, 5), (12, 2), (24, 4), (6, 1), (18, 3)]


def test_a_computed_scale_goes_with_grains_of_the_weight(store: Store) -> None:
    whole, scale, bias = numbers(20, 2), numbers(5, 1), numbers(3, 1)
    computed = store(scale).rowwise(
        recording(lambda rows, more: rows + more.repeat_interleave(2, 0)[: len(rows)], []),
        store(bias), dtype="F32", history="add", grain=2,
    )  # fmt: skip
    tensor = store(whole).rowwise(recording(scaled_by(4), []), computed, dtype="F32", history="scale", grain=4)
    factors = torch.tensor([[float(row // 4 + row // 8)] for row in range(20)])
    assert tensor.grain == 8
    for start, stop in ((0, 20), (3, 5), (7, 9), (19, 20)):
        assert torch.equal(torch_of(tensor.read(start, stop)), (whole * factors)[start:stop])


@pytest.mark.parametrize(("rows", "grain"), [(1, 128), (3, 128), (3, 96), (193, 128), (0, 128), (191, 1)])
def test_an_other_whose_rows_fit_neither_way_is_refused(store: Store, rows: int, grain: int) -> None:
    other = store(numbers(rows, 1))
    with pytest.raises(ValueError, match=f"{rows} rows do not go with 192 rows in grains of {grain}"):
        store(numbers(192, 1)).rowwise(recording(torch.add, []), other, dtype="F32", history="add", grain=grain)


@given(rows=st.integers(0, 300), grain=st.integers(1, 40), memory=st.integers(0, 4000))
def test_blocks_cover_a_tensor_once_in_whole_grains_within_memory(rows: int, grain: int, memory: int) -> None:
    tensor = LazyTensor("F32", (rows, 3), grain=grain)
    blocks = list(tensor.blocks(memory))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    for start, stop in blocks:
        assert start % grain == 0
        assert stop % grain == 0 or stop == rows
        assert (stop - start) * 12 <= memory or stop - start <= grain
    # A smaller number of blocks would not fit.
    if len(blocks) > 1:
        assert (blocks[0][1] + grain) * 12 > memory


def test_blocks_put_together_are_the_tensor(store: Store) -> None:
    whole = numbers(50, 3)
    tensor = store(whole).rowwise(recording(lambda rows: rows + 1, []), dtype="F32", history="add", grain=7)
    parts = [torch_of(tensor.read(start, stop)) for start, stop in tensor.blocks(300)]
    assert len(parts) > 2
    assert torch.equal(torch.cat(parts), whole + 1)


def test_the_memory_of_a_row_counts_every_step() -> None:
    weight = LazyTensor("F8_E4M3", (256, 512), Span(Path("f"), 0, 256 * 512))
    scale = LazyTensor("F32", (2, 4), Span(Path("f"), 0, 32))
    assert (weight.row_memory, scale.row_memory) == (512, 16)
    decoded = weight.rowwise(torch_of, scale, dtype="BF16", history="decode", grain=128)  # type: ignore[arg-type]
    assert decoded.row_memory == 1024 + 512 + 1
    cast = decoded.rowwise(torch_of, dtype="F32", history="cast")  # type: ignore[arg-type]
    assert cast.row_memory == 2048 + 1024 + 512 + 1


def test_the_spans_of_a_tensor_are_those_of_all_its_inputs() -> None:
    one, two, three = (Span(Path(name), 0, 8) for name in "abc")
    first, second, third = (LazyTensor("F32", (2,), span) for span in (one, two, three))
    inner = first.rowwise(torch_of, second, dtype="F32", history="add")  # type: ignore[arg-type]
    outer = inner.rowwise(torch_of, third, dtype="F32", history="add")  # type: ignore[arg-type]
    assert list(outer.spans()) == [one, two, three]


def test_descriptions_differ_where_anything_that_decides_the_bytes_does() -> None:
    def stored(file: str = "a", offset: int = 0, length: int = 32) -> LazyTensor:
        return LazyTensor("F32", (length // 4,), Span(Path(file), offset, length))

    def computed(*inputs: LazyTensor, history: str = "scale", dtype: str = "F32", grain: int = 4) -> LazyTensor:
        first, *others = inputs
        return first.rowwise(torch_of, *others, dtype=dtype, history=history, grain=grain)  # type: ignore[arg-type]

    scale = stored("s", length=8)
    different = [
        stored(),
        stored("b"),
        stored(offset=4),
        stored(length=36),
        computed(stored()),
        computed(stored(), history="cast"),
        computed(stored(), dtype="F16"),
        computed(stored("b")),
        computed(stored(), stored("b")),
        computed(stored("b"), stored()),
        computed(stored(), scale),
        computed(stored(length=20), scale, grain=3),
        computed(stored(length=20), scale, grain=4),
        computed(computed(stored(), scale)),
        computed(computed(stored()), scale),
        computed(computed(stored(), history="cast"), scale),
        computed(computed(stored(), dtype="F16"), scale),
    ]
    descriptions = [tensor.describe() for tensor in different]
    assert len(set(descriptions)) == len(descriptions)
    assert computed(stored(), scale).describe() == computed(stored(), scale).describe()


def test_a_tensor_nobody_touched_keeps_its_span_and_has_no_history(store: Store) -> None:
    tensor = store(numbers(2, 2))
    assert tensor.span
    assert tensor.history == ""
    assert tensor.rowwise(recording(torch.neg, []), dtype="F32", history="negate").span is None


def test_stacked_rows_are_those_of_the_parts_in_order(tmp_path: Path) -> None:
    made = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    save_file({"w": made}, tmp_path / "t.safetensors")
    header = read_header(tmp_path / "t.safetensors")
    entry = header.entries["w"]
    whole = LazyTensor("F32", (6, 4), Span(tmp_path / "t.safetensors", header.data_offset + entry.begin, 96))
    picks = [(4, 6), (0, 1), (4, 6), (2, 3)]
    tensor = stacked([Rows(whole, *pick) for pick in picks])
    wanted = torch.cat([made[begin:end] for begin, end in picks])
    assert tensor.shape == (6, 4)
    for start in range(7):
        for stop in range(start, 7):
            block = tensor.read(start, stop)
            assert bytes(block.data) == wanted[start:stop].numpy().tobytes()
            assert block.shape == (stop - start, 4)
    assert list(tensor.spans()) == [whole.span]
    with pytest.raises(ValueError, match="cannot be stacked"):
        stacked([Rows(whole, 0, 1), Rows(LazyTensor("F32", (6, 3)), 0, 1)])


def test_a_reduction_is_made_once_from_pieces_of_all_rows(tmp_path: Path) -> None:
    calls = []

    def count(pieces: Pieces) -> Block:
        calls.append([(start, block.shape) for start, block in pieces])
        return Block("U8", (2,), bytes([7, len(calls)]))

    (tmp_path / "f").write_bytes(bytes(600 * 5000))
    tensor = LazyTensor("U8", (600, 5000), Span(tmp_path / "f", 0, 600 * 5000))
    small = tensor.reduced(count, dtype="U8", shape=(2,), history="count")
    assert calls == []
    assert [bytes(small.read(*rows).data) for rows in ((0, 2), (1, 2), (0, 1))] == [b"\7\1", b"\1", b"\7"]
    assert calls == [[(0, (256, 5000)), (256, (256, 5000)), (512, (88, 5000))]]
    assert small.fixed_memory == 256 * 5000
    assert small.describe() == f"count: U8({tensor.describe()}/0:1)"
    assert list(small.spans()) == [tensor.span]
