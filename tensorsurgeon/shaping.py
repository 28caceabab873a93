"""Tensors whose rows are rows of others."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tensorsurgeon.format import Span, nbytes
from tensorsurgeon.tensor import Block, Input, LazyTensor, Rows


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
    """Return a tensor as a matrix of its last dimension where that can be, so that few of its rows can be read."""
    if tensor.folded and len(tensor.flat.shape) == 2:
        return tensor.flat
    if tensor.span is None or len(tensor.shape) < 3:
        return tensor
    return LazyTensor(tensor.dtype, (prod(tensor.shape[:-1]), tensor.shape[-1]), tensor.span)


def apart(tensor: LazyTensor) -> list[LazyTensor]:
    """Return each row of a tensor in one file as a tensor of its own, without the first dimension.

    Raises:
        ValueError: for a tensor that is computed.
    """
    if tensor.span is None:
        raise ValueError("only of a tensor that lies in one file can rows be had as tensors.")
    size = tensor.row_bytes
    spans = (Span(tensor.span.path, tensor.span.offset + place * size, size) for place in range(tensor.rows))
    return [LazyTensor(tensor.dtype, tensor.shape[1:], span) for span in spans]


def viewed(tensor: LazyTensor, dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    """Return a tensor in one file under another dtype or shape of as many bytes, without a change of them.

    Raises:
        ValueError: for a tensor that is computed, and for another number of bytes.
    """
    if tensor.span is None or nbytes(dtype, shape) != tensor.nbytes:
        raise ValueError(f"{tensor.dtype} {list(tensor.shape)} cannot be seen as {dtype} {list(shape)}.")
    return LazyTensor(dtype, shape, tensor.span)


def folded(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Return a tensor of another shape with the same bytes, of which each row is several rows of the given one.

    Raises:
        ValueError: for a shape with another number of elements, or whose rows are no whole rows of the given tensor.
    """
    if prod(shape) != prod(tensor.shape) or tensor.rows % shape[0]:
        raise ValueError(f"{list(tensor.shape)} cannot be folded to {list(shape)}.")

    def fold(block: Block) -> Block:
        return Block(block.dtype, (block.shape[0] * shape[0] // tensor.rows, *shape[1:]), block.data)

    inputs = (Input(tensor, 1, tensor.rows // shape[0]),)
    return LazyTensor(tensor.dtype, shape, None, fold, inputs, history="fold", folded=True)
