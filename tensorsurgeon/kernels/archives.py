"""Read arrays of numbers from safetensors and `.npz` files, one at a time; nothing in them is executed.

An `.npz` is a zip of `.npy` files, which may hold Python objects as pickle: those are refused by their header.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorsurgeon.errors import CheckpointError, FormatError, RefusedError, UsageError, raise_all
from tensorsurgeon.format import Span, read_header
from tensorsurgeon.kernels.arrays import as_numbers
from tensorsurgeon.tensor import LazyTensor

Numbers = npt.NDArray[np.float64]

FLOATS = ("F64", "F32", "F16", "BF16")
PICKLED = "holds Python objects, which only pickle can read; save plain arrays of numbers, or safetensors"


class Entry(NamedTuple):
    """An array in a file: its shape and, in safetensors, where it lies."""

    shape: tuple[int, ...]
    tensor: LazyTensor | None = None


class Archive(NamedTuple):
    """A file of arrays, by name."""

    path: Path
    entries: Mapping[str, Entry]

    def read(self, name: str) -> Numbers:
        """Read one array in float64.

        Raises:
            CheckpointError: where the file does not hold what its header promised.
        """
        tensor = self.entries[name].tensor
        if tensor:
            return as_numbers(tensor.read())
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return np.asarray(arrays[name], np.float64)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as problem:
            raise CheckpointError(f"{self.path}: {name}: {problem}; the file is damaged.") from None


def open_archive(path: Path) -> Archive:
    """Read the headers of a safetensors or `.npz` file.

    Raises:
        UsageError: for a file that is not there or of another kind.
        RefusedError: for arrays of anything but floating-point numbers, pickled objects above all.
        FormatError: for a damaged file.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file.")
    if path.suffix == ".safetensors":
        entries = dict(_tensors(path))
    elif path.suffix == ".npz":
        entries = dict(_members(path))
    else:
        raise UsageError(f"{path}: is neither .safetensors nor .npz; other formats, pickle above all, are never read.")
    if not entries:
        raise UsageError(f"{path}: holds no arrays.")
    return Archive(path, entries)


def _tensors(path: Path) -> Iterator[tuple[str, Entry]]:
    header = read_header(path)
    raise_all(
        RefusedError,
        (f"{path}: {name}: is {entry.dtype}, not one of {', '.join(FLOATS)}."
         for name, entry in header.entries.items() if entry.dtype not in FLOATS),
    )  # fmt: skip
    for name, entry in header.entries.items():
        span = Span(path, header.data_offset + entry.begin, entry.end - entry.begin)
        yield name, Entry(entry.shape, LazyTensor(entry.dtype, entry.shape, span))


def _members(path: Path) -> Iterator[tuple[str, Entry]]:
    if not zipfile.is_zipfile(path):
        raise FormatError(f"{path}: is no .npz, a zip of arrays; pickle is never read. Save it by numpy.savez.")
    problems = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            try:
                shape, dtype, begin = _header(archive, info)
            except (ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as problem:
                problems.append(f"{path}: {name}: is not an array: {' '.join(str(problem).split())}.")
                continue
            if dtype.hasobject:
                problems.append(f"{path}: {name}: {PICKLED}.")
            elif dtype.kind != "f" or dtype.itemsize > 8:
                problems.append(f"{path}: {name}: is {dtype}, not float16, float32 or float64.")
            elif np.prod(shape, dtype=object) * dtype.itemsize > info.file_size - begin:
                problems.append(f"{path}: {name}: has fewer bytes than its shape {list(shape)} needs; it is damaged.")
            yield name, Entry(shape)
    raise_all(RefusedError, problems)


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[np.generic], int]:
    """Return shape and dtype of a member, and where its data begins."""
    with archive.open(info) as file:
        layout: Any = np.lib.format
        version = layout.read_magic(file)
        read = {(1, 0): layout.read_array_header_1_0, (2, 0): layout.read_array_header_2_0}.get(version)
        if not read:
            raise ValueError(f"version {version} of the format is not known")
        shape, _, dtype = read(file)
        return shape, dtype, file.tell()
