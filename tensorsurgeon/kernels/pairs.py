"""Small sums over the factors of an adapter."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.kernels.arrays import as_float32, from_float32
from tensorsurgeon.tensor import Block


def product_squares(a: Block, b: Block) -> float:
    """Return the sum of squares of B A, which is the trace of (B'B)(AA'), in float64."""
    left, right = as_float32(b).astype(np.float64), as_float32(a).astype(np.float64)
    return float(np.sum((left.T @ left) * (right @ right.T)))


def difference_squares(one: Block, other: Block) -> float:
    """Return the sum of squares of a difference, in float64."""
    return float(np.sum((as_float32(one).astype(np.float64) - as_float32(other)) ** 2))


def scaled(rows: Block, scale: float, columns: int, dtype: str) -> Block:
    """Return rows times a number, with columns of zeros up to `columns`."""
    numbers = np.zeros((rows.shape[0], columns), np.float32)
    numbers[:, : rows.shape[1]] = as_float32(rows) * np.float32(scale)
    return Block(dtype, numbers.shape, from_float32(numbers, dtype).data.cast("B"))


def beside(one: Block, factor: float, other: Block, other_factor: float) -> Block:
    """Return rows of F32 in which two blocks, each times a number, stand side by side."""
    numbers = np.concatenate([as_float32(one) * np.float32(factor), as_float32(other) * np.float32(other_factor)], 1)
    return Block("F32", numbers.shape, np.ascontiguousarray(numbers).data.cast("B"))


def zeros_like(rows: Block) -> Block:
    """Return as many zeros of F32."""
    return Block("F32", rows.shape, bytearray(4 * int(np.prod(rows.shape))))
