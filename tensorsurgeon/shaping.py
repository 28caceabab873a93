"""Tensors whose rows are rows of others."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tensorsurgeon.tensor import LazyTensor, Rows


def stacked(parts: Sequence[Rows]) -> LazyTensor:
    """Return the tensor whose rows are those of the parts, one after the other.

    Raises:
        ValueError: for parts whose dtypes or rows differ.
    """
    kinds = {(part.tensor.dtype, part.tensor.shape[1:]) for part in parts}
    if len(kinds) != 1:
        raise ValueError(f"rows of {len(kinds)} kinds cannot be stacked: {sorted(kinds)}.")
    ((dtype, row_shape),) = kinds
    rows = sum(part.stop - part.start for part in parts)
    return LazyTensor(dtype, (rows, *row_shape), parts=tuple(parts), history="stack rows")


def flattened(tensor: LazyTensor) -> LazyTensor:
    """Return a tensor that lies in one file as a matrix of its last dimension, so that few of its rows can be read."""
    if tensor.span is None or len(tensor.shape) < 3:
        return tensor
    return LazyTensor(tensor.dtype, (prod(tensor.shape[:-1]), tensor.shape[-1]), tensor.span)
