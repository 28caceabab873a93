"""Lazy tensors that are decoded as they are read; every format makes its own with one of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm, prod
from typing import Any, NamedTuple

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.shaping import apart, folded, stacked
from tensorsurgeon.tensor import Block, Input, LazyTensor, Rows

Decode = Callable[..., Block]
"""Takes the number of the first row and a Block of each input, and gives those rows."""

BlockSize = tuple[int, int]


class Codes(NamedTuple):
    """Codes that lie row by row: each row is a bit stream of `bits` a code; `kind` is a table of `kernels.codes`."""

    tensor: LazyTensor
    bits: int
    kind: str
    shape: tuple[int, int]


class Scales(NamedTuple):
    """What codes are multiplied with: one number for each `block` of rows and columns, in row-major order.

    Less `zeros`, with one for each scale, in numbers; `outer` is one more scale of all scales, which divides them or
    multiplies; `biases`, one for each scale, are added to the products; `factors` is one for each column. Where
    `divides`, the scales do.
    """

    tensor: LazyTensor
    block: BlockSize
    zeros: LazyTensor | None = None
    outer: LazyTensor | None = None
    outer_divides: bool = False
    factors: LazyTensor | None = None
    divides: bool = False
    biases: LazyTensor | None = None


def grid_shape(shape: Sequence[int], block: BlockSize) -> tuple[int, int]:
    """Return how many blocks, the last of which may be smaller, cover a matrix."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def lazily(
    function: Decode, *inputs: Input, dtype: str, shape: tuple[int, ...], label: str, grain: int = 1
) -> LazyTensor:
    """Return a tensor whose rows `function` decodes from what its inputs hold for them.

    Rows are computed in whole multiples of those that an input's rows go with. `label` says the format and every
    parameter that is not in the inputs.
    """
    grain = lcm(grain, *(it.rows for it in inputs if it.rows))
    history = f"decode {label} to {dtype}"

    def decode(start: int, *blocks: Block) -> Block:
        try:
            return function(start, *blocks)
        except RefusedError as problem:
            files = ", ".join(sorted({span.path.name for it in inputs for span in it.tensor.spans()}))
            raise RefusedError(*(f"{text} (in {files})" for text in problem.problems)) from None

    # A byte for each code, and for float16 the float32 that it is rounded from.
    working = prod(shape[1:]) * (5 if dtype == "F16" else 1)
    return LazyTensor(dtype, shape, None, decode, inputs, grain=grain, history=history, placed=True, working=working)


def scaled(codes: Codes, scales: Scales, label: str, dtype: str) -> LazyTensor:
    """Return the weight that codes in rows and a grid of scales are; `label` tells all formats and blocks apart."""
    rows = scales.block[0]
    whole = scales.tensor.nbytes == 0 or prod(grid_shape(codes.shape, scales.block)) == 1 or rows >= codes.shape[0]
    each = Input(scales.tensor, 0) if whole else Input(scales.tensor, rows)
    zeros = [each._replace(tensor=scales.zeros)] if scales.zeros else []
    biases = [each._replace(tensor=scales.biases)] if scales.biases else []
    rest = [Input(it, 0) for it in (scales.outer, scales.factors) if it]

    def decode(start: int, packed: Block, block: Block, *others: Block) -> Block:
        from tensorsurgeon.kernels import codes as tables
        from tensorsurgeon.kernels.arrays import as_bytes, as_float32
        from tensorsurgeon.kernels.scaling import Scaling
        from tensorsurgeon.kernels.unpacking import unpack_rows

        more = list(others)
        columns = grid_shape(codes.shape, scales.block)[1]
        numbers = tables.scale_numbers(block)
        grouping = Scaling(numbers.reshape(-1, columns), *scales.block, divide=scales.divides)
        if zeros:
            grouping = grouping._replace(zeros=as_float32(more.pop(0)).reshape(-1, columns))
        if biases:
            grouping = grouping._replace(biases=tables.scale_numbers(more.pop(0)).reshape(-1, columns))
        if scales.outer:
            outer = tables.scale_numbers(more.pop(0)).reshape(1, 1)
            numbers = grouping.scales / outer if scales.outer_divides else grouping.scales * outer
            grouping = grouping._replace(scales=numbers)
        if scales.factors:
            grouping = grouping._replace(factors=tables.scale_numbers(more.pop(0)).reshape(-1))
        grouping = grouping._replace(rows=codes.shape[0]) if whole else grouping._replace(start=start)
        unpacked = unpack_rows(as_bytes(packed), codes.bits, codes.shape[1])
        return decode_codes(unpacked, tables.named(codes.kind), grouping, dtype, 2**codes.bits)

    inputs = (Input(codes.tensor), each, *zeros, *biases, *rest)
    return lazily(decode, *inputs, dtype=dtype, shape=codes.shape, label=label)


def each_matrix(decode: Callable[..., LazyTensor], *tensors: LazyTensor | None) -> LazyTensor:
    """Decode tensors of three dimensions matrix by matrix, and stack what each gives, so that a piece may be small.

    `decode` takes a matrix of each tensor, or None for one that is None.
    """
    split: list[Sequence[Any]] = [apart(it) if it else () for it in tensors]
    count = max(map(len, split))
    decoded = [decode(*(it[place] if it else None for it in split)) for place in range(count)]
    flat = stacked([Rows(it, 0, it.rows) for it in decoded])
    return folded(flat, (count, *decoded[0].shape))


def decode_codes(codes: Any, table: Any, scaling: Any, dtype: str, levels: int = 256) -> Block:
    """Decode rows of codes, which are less than `levels`, in the fastest of three ways, which give the same bytes."""
    from tensorsurgeon.kernels import scaling as arithmetic
    from tensorsurgeon.kernels import tables

    if tables.few(scaling, levels, codes.shape[1], dtype):
        return tables.look_up_places(codes, table, scaling, levels, dtype)
    way = tables.look_up if tables.worthwhile(scaling, dtype) else arithmetic.decode
    return way(codes, table, scaling, dtype)
