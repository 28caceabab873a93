"""bitsandbytes' arithmetic: scales over a run of codes, scales that are quantised themselves, and rows of 8 bits."""

from __future__ import annotations

import numpy as np

from tensorsurgeon.kernels.arrays import STORAGE, Array
from tensorsurgeon.kernels.codes import INT8, Table
from tensorsurgeon.kernels.scaling import Numbers, Scaling, decode
from tensorsurgeon.kernels.unpacking import transposed, unpack_high_first
from tensorsurgeon.tensor import Block

RECIPROCAL = 7.874015718698502e-3
"""What bitsandbytes takes for 1 / 127."""
ROW = 4096
"""Codes of a run that are decoded at once: what fits the first-level cache."""


def decode_run(stream: Array, count: int, table: Table, scales: Numbers, size: int, dtype: str) -> Block:
    """Decode a run of `count` codes of four bits, the first of each byte in its high half, `size` to a scale."""
    # A run has no rows: it is cut into rows of whole scales, the last of which is filled up.
    width = size * max(1, ROW // size)
    rows = -(-count // width)
    codes = unpack_high_first(stream, rows * width).reshape(rows, width)
    grid = np.zeros(rows * width // size, np.float32)
    grid[: len(scales)] = scales
    decoded = decode(codes, table, Scaling(grid.reshape(rows, -1), 1, size), dtype)
    return Block(dtype, (count,), memoryview(decoded.data)[: count * np.dtype(STORAGE[dtype]).itemsize])


def nested_scales(codes: Array, table: Table, outer: Numbers, start: int, size: int, offset: float) -> Numbers:
    """Return `table[code[k]] * outer[k // size] + offset` of scales, the first of which is number `start` of all."""
    groups = (np.arange(len(codes)) + start) // size
    scaled: Numbers = table[codes] * outer[groups]
    return scaled + np.float32(offset)


def decode_rows(codes: Array, largest: Numbers, reciprocal_last: bool, dtype: str) -> Block:
    """Return codes of 8 bits in two's complement times the largest magnitude of their row over 127.

    With `reciprocal_last` it is `q * largest * (1 / 127)` in this order, else `q * (largest / 127)`: the last bit may
    differ.
    """
    factors = np.full(codes.shape[1] * reciprocal_last, RECIPROCAL, np.float32)
    scales = largest if reciprocal_last else largest / np.float32(127)
    return decode(codes, INT8, Scaling(scales.reshape(-1, 1), 1, codes.shape[1], factors=factors), dtype)


def exchanged(block: Block) -> Block:
    """Return the transpose of a matrix."""
    matrix = np.frombuffer(block.data, f"u{np.dtype(STORAGE[block.dtype]).itemsize}").reshape(block.shape)
    turned = transposed(matrix)
    return Block(block.dtype, turned.shape, memoryview(turned.data).cast("B"))
