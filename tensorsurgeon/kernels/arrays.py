"""Blocks as NumPy arrays and back; dtypes that NumPy lacks are kept as the unsigned integers of their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tensorsurgeon.tensor import Block

Array = npt.NDArray[Any]

STORAGE: dict[str, npt.DTypeLike] = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16, "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8, "U8": np.uint8, "I8": np.int8, "I32": np.int32, "U32": np.uint32, "I64": np.int64,
}  # fmt: skip


def as_array(block: Block) -> Array:
    """Return the block's elements in its shape, without a copy."""
    return np.frombuffer(block.data, STORAGE[block.dtype]).reshape(block.shape)


def as_float32(block: Block) -> npt.NDArray[np.float32]:
    """Return the block's numbers widened to float32, exactly: F32, F16, BF16 and integers up to 2^24 all fit.

    BF16 is the upper half of a float32: `float32 = bits << 16`.
    """
    array = as_array(block)
    if block.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_float32(numbers: npt.NDArray[np.float32], dtype: str) -> Array:
    """Return float32 numbers rounded once, to nearest, ties to even, in the storage of F32, F16 or BF16.

    For BF16: `bits = (u + 0x7fff + ((u >> 16) & 1)) >> 16` with u the bits of the float32.
    """
    if dtype == "F32":
        return numbers
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16)
    bits = numbers.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(numbers), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def as_numbers(block: Block) -> npt.NDArray[np.float64]:
    """Return the block's numbers as float64, in its shape."""
    return (as_array(block) if block.dtype == "F64" else as_float32(block)).astype(np.float64)


def as_bytes(block: Block) -> npt.NDArray[np.uint8]:
    """Return the bytes of each row: (rows, bytes), without a copy."""
    return np.frombuffer(block.data, np.uint8).reshape(block.shape[0] if block.shape else 1, -1)
