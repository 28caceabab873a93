"""The safetensors format, byte by byte: a strict header reader, a header writer, and spans of files.

A file is `<u64 little-endian header length N><N bytes of JSON><data>`. The JSON maps each tensor name to its
dtype, shape and `data_offsets` [begin, end) in the data, and `__metadata__` to a flat map of strings. The data
has neither gaps nor overlaps and ends where the file ends.
Source: https://github.com/huggingface/safetensors, README and `safetensors/src/tensor.rs`.

Only the standard library is used here, so that looking at a checkpoint starts at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon.errors import FormatError, raise_all

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Width in bits of every dtype that safetensors knows."""

HEADER_LIMIT = 100_000_000
"""Longest header in bytes; the reference implementation refuses more, and so do vLLM and transformers."""

COUNTABLE = 2**64
"""Numbers in a header and bits of a tensor stay below; the reference implementation counts in 64 bits."""

LENGTH_BYTES = 8
ALIGNMENT = 8

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Span(NamedTuple):
    """A range of bytes in a file."""

    path: Path
    offset: int
    nbytes: int


def join(one: Span, other: Span) -> Span | None:
    """Return two spans as one where the other follows at once."""
    if (other.path, other.offset) != (one.path, one.offset + one.nbytes):
        return None
    return Span(one.path, one.offset, one.nbytes + other.nbytes)


class Entry(NamedTuple):
    """One tensor as a header describes it; `begin` and `end` count from the first byte of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A header: `entries` by name in file order, `metadata`, the offset of the data, and the file's size."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_offset: int
    file_size: int


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor: `prod(shape) * bits / 8`; sub-byte dtypes must fill whole bytes."""
    elements = 1
    for size in shape:
        elements *= size
        if elements >= COUNTABLE:
            break
    bits = elements * BITS[dtype]
    if bits >= COUNTABLE:
        raise FormatError(f"a {dtype} tensor of shape {list(shape)} is larger than any file.")
    if bits % 8:
        raise FormatError(f"a {dtype} tensor of shape {list(shape)} does not fill whole bytes.")
    return bits // 8


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FormatError: for anything that the format forbids; it names the file, the tensor and the bytes.
    """
    size = os.stat(path).st_size
    with open(path, "rb", buffering=0) as file:
        text = _header_text(path, size, file.read(LENGTH_BYTES), file)
    data_offset = LENGTH_BYTES + len(text)
    raw = _parse(path, text)
    metadata = _metadata(path, raw.pop("__metadata__", {}))
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for name, value in raw.items():
        try:
            entries[name] = _entry(value)
        except (FormatError, ValueError) as problem:
            problems.append(f"{path.name}: tensor {name!r}: {problem}")
    raise_all(FormatError, problems)
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    raise_all(FormatError, _layout_problems(path, entries, size - data_offset))
    return Header(entries, metadata, data_offset, size)


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], alignment: int = ALIGNMENT
) -> bytes:
    """Return the header of a file that holds `tensors` (name to dtype and shape) one after the other.

    The JSON is padded with spaces so that the data begins at a multiple of `alignment`, by default of 8 bytes as
    in the reference implementation, for whoever maps the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % alignment)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def is_plain_file_name(name: str) -> bool:
    """Tell whether `name` names a file in the directory at hand and cannot reach outside of it."""
    return bool(re.fullmatch(r"[^/\\\x00-\x1f]+", name)) and name not in (".", "..")


def load_json(text: str, **options: Any) -> Any:
    """Parse JSON and refuse what Python lets pass: a key that occurs twice, and half of a surrogate pair.

    Raises:
        ValueError: for text that is not JSON, is nested too deeply, or has one of these faults.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, **options)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return mapping


def _header_text(path: Path, size: int, prefix: bytes, file: Any) -> bytes:
    if len(prefix) < LENGTH_BYTES:
        raise FormatError(f"{path.name}: {size} bytes are too few for a safetensors file; fetch it again.")
    if prefix == b"version ":
        raise FormatError(f"{path.name}: this is a Git LFS pointer, not the file itself; run 'git lfs pull'.")
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT:
        raise FormatError(
            f"{path.name}: the header claims {length} bytes, more than the {HEADER_LIMIT} that the format "
            "allows; this is not a safetensors file, or it is damaged."
        )
    if LENGTH_BYTES + length > size:
        raise FormatError(
            f"{path.name}: the header ends at byte {LENGTH_BYTES + length} but the file has {size}; "
            "the download is incomplete, fetch it again."
        )
    text: bytes = file.read(length)
    if not text.startswith(b"{"):
        raise FormatError(f"{path.name}: the header does not begin with '{{'; this is not a safetensors file.")
    return text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = load_json(text.decode(), parse_int=_whole)
    except ValueError as problem:
        raise FormatError(f"{path.name}: the header is not valid JSON: {problem}.") from None
    assert isinstance(header, dict)
    return header


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise FormatError(f"{path.name}: '__metadata__' is not a map from strings to strings.")


def _whole(text: str) -> int | float:
    """Take `-0`, and what 64 bits do not hold, for a float, as the reference implementation does."""
    return int(text) if text.isdigit() and float(text) < COUNTABLE else float(text)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _entry(value: Any) -> Entry:
    """Check one tensor's description by itself: its keys, their types, and its length."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("its description does not have just the keys dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"unknown dtype {dtype!r}; a newer tensorsurgeon may know it.")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise FormatError(f"the shape {shape!r} is not a list of whole numbers from 0.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise FormatError(f"data_offsets {offsets!r} are not two whole numbers from 0.")
    begin, end = offsets
    if end - begin != nbytes(dtype, shape):
        raise FormatError(f"data_offsets span {end - begin} bytes, but {dtype} {shape} takes {nbytes(dtype, shape)}.")
    return Entry(dtype, tuple(shape), begin, end)


def _layout_problems(path: Path, entries: Mapping[str, Entry], available: int) -> Iterable[str]:
    """Tell where the tensors, in file order, leave a gap, overlap, or miss the end of the file."""
    position, before = 0, "the header"
    for name, entry in entries.items():
        if entry.begin != position:
            what = "a gap" if entry.begin > position else "an overlap"
            yield (
                f"{path.name}: {what} of {abs(entry.begin - position)} bytes between {before} and {name!r}; "
                "the file is damaged, fetch it again."
            )
        position, before = entry.end, repr(name)
    if position > available:
        name = next(name for name, entry in entries.items() if entry.end > available)
        yield (
            f"{path.name}: tensor {name!r} ends at byte {entries[name].end} of the data but the file has "
            f"{available}; the download is incomplete, fetch it again."
        )
    elif position < available:
        yield f"{path.name}: {available - position} bytes follow {before} that no tensor owns; the file is damaged."
