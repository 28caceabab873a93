"""Walk through a part of a matrix, in slabs of whole rows and in runs of neighbours that belong to the part."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorsurgeon.fused import Part, Slots
from tensorsurgeon.kernels.arrays import Array, as_array
from tensorsurgeon.kernels.draws import CHUNK, inlined
from tensorsurgeon.tensor import Block

SLAB = 2**18
"""Elements of a slab at least, where a matrix has as many: few enough to stay in the cache, many enough to pay."""
INFINITY = 0x7F800000
ROUNDED_UP = 0x7F7F8000
"""Magnitudes from here on, as bits of a float32, are not finite once they are BF16."""

Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Runs(NamedTuple):
    """Stretches of a slab, of CHUNK elements at most and each within a row.

    Where each begins and ends is counted from the slab's first element; `rows` and `columns` say where in the matrix.
    """

    begins: Places
    ends: Places
    rows: Places
    columns: Places


class Slab(NamedTuple):
    """Some rows of one of the stacked matrices.

    `begin` and `end` count elements from the block's first, `place` is the first one's in the tensor, `row` its row in
    the matrix of number `stacked`.
    """

    begin: int
    end: int
    place: int
    stacked: int
    row: int
    runs: Runs


def mask_of(part: Part) -> Mask:
    """Return which outputs belong to a part."""
    return slots_mask(part.slots, part.grid.outputs) if part.slots else np.ones(part.grid.outputs, np.bool_)


def slots_mask(slots: tuple[Slots, ...], outputs: int) -> Mask:
    """Return which of some outputs lie in any of the slots."""
    places = np.arange(outputs)
    inside = np.zeros(outputs, np.bool_)
    for unit, start, stop in slots:
        inside |= (places % unit >= start) & (places % unit < stop)
    return inside


def first_row(start: int, block: Block, part: Part) -> int:
    """Return the row of all stacked ones that a block begins with, which is row `start` of its tensor."""
    return start * prod(block.shape[1:]) // part.grid.columns


def slabs(start: int, block: Block, part: Part) -> Iterator[Slab]:
    """Yield the slabs of a block that begins with row `start` of its tensor; they depend on that and its shape."""
    _, rows, columns = part.grid[:3]
    mask = mask_of(part)
    first = first_row(start, block, part)
    last = first + prod(block.shape) // columns if columns else first
    step = max(1, SLAB // max(1, columns))
    at = first
    while at < last:
        row = at % rows
        upto = min(at + step, last, at - row + rows)
        count = upto - at
        runs = _runs(mask, part, row, count)
        begin = (at - first) * columns
        yield Slab(begin, begin + count * columns, at * columns, at // rows, row, runs)
        at = upto


def _runs(mask: Mask, part: Part, row: int, count: int) -> Runs:
    width = part.grid.columns
    if not part.grid.transposed:
        chosen = np.flatnonzero(mask[row : row + count])
        return _in_chunks(Runs(chosen * width, (chosen + 1) * width, row + chosen, np.zeros_like(chosen)))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    lines = np.arange(count)[:, None]
    begins, ends = (lines * width + edges[side::2] for side in (0, 1))
    each = len(edges) // 2
    long = Runs(begins.reshape(-1), ends.reshape(-1), np.repeat(row + lines, each), np.tile(edges[::2], count))
    return _in_chunks(long)


def _in_chunks(long: Runs) -> Runs:
    """Return runs cut into chunks, each counted from where its run begins."""
    counts = -(-(long.ends - long.begins) // CHUNK)
    of = np.repeat(np.arange(len(counts)), counts)
    past = CHUNK * (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts))
    begins = long.begins[of] + past
    return Runs(begins, np.minimum(begins + CHUNK, long.ends[of]), long.rows[of], long.columns[of] + past)


def as_bits(block: Block) -> tuple[Array, int]:
    """Return numbers as whole numbers that, shifted to the left, are float32 bits, as a vector; F16 is widened."""
    array = as_array(block).reshape(-1)
    if block.dtype == "BF16":
        return array, 16
    return array.astype(np.float32, copy=False).view(np.uint32), 0


@inlined
def load(source: Any, shift: Any, bits: Any) -> None:
    """Put float32 bits of some elements into a vector."""
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << np.uint32(shift)


@inlined
def rank_of(source: Any, shift: Any, flip: Any, i: Any) -> Any:
    """Return the magnitude of an element as 31 bits of a float32, in reverse order where `flip` is all of them."""
    return np.uint64(((np.uint32(source[i]) << np.uint32(shift)) & np.uint32(0x7FFFFFFF)) ^ flip)


@inlined
def store(bits: Any, shift: Any, target: Any) -> bool:
    """Write float32 bits, rounded to BF16 where `shift` is 16; tell whether any is not finite then."""
    largest = np.uint32(0)
    if shift:
        for i in range(target.size):
            u = bits[i]
            largest = max(largest, u & np.uint32(0x7FFFFFFF))
            target[i] = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        for i in range(target.size):
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
            target[i] = bits[i]
    return bool(largest >= np.uint32(ROUNDED_UP if shift else INFINITY))


@inlined
def lost(source: Any, taken: Any, target: Any, given: Any, bits: Any) -> int:
    """Return how many finite elements have become something else; NaN is written anew, as rounding bits spoils it."""
    gone = 0
    for i in range(source.size):
        was = (np.uint32(source[i]) << np.uint32(taken)) & np.uint32(0x7FFFFFFF)
        u = bits[i]
        if (u & np.uint32(0x7FFFFFFF)) > np.uint32(INFINITY) and given:
            target[i] = (u >> np.uint32(16)) | np.uint32(0x40)
        is_now = (np.uint32(target[i]) << np.uint32(given)) & np.uint32(0x7FFFFFFF)
        if was < np.uint32(INFINITY) and is_now >= np.uint32(INFINITY):
            gone += 1
    return gone
