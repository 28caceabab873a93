"""What a change of a matrix has to know of all of it: deviation, extremes, and the magnitude that a share lies below.

Each function takes the pieces of a tensor, in order, and returns a small block with something of each stacked matrix.
The pieces depend on nothing but the shape, and so do the bits of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.fused import Part
from tensorsurgeon.kernels.arrays import Array, as_array
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.kernels.draws import CHUNK, key_of, mix
from tensorsurgeon.kernels.slabs import INFINITY, Slab, as_bits, load, rank_of, slabs
from tensorsurgeon.tensor import Block, Pieces

LANES = 8
"""Sums that elements are added to by turns, so that none waits for the one before it."""
BINS = 65536
ALL = 2**64 - 1
"""As a limit of 64 bits: everything."""


def deviations(pieces: Pieces, *, part: Part) -> Block:
    """Return the standard deviation of each stacked matrix, of the population, in float64.

    The mean and the sum of squares about it of each slab are joined with those before (Chan, Golub and LeVeque, 1983):
    `M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b)`.
    """
    joined = np.zeros((part.grid.stacked, 3))
    for slab, source, taken in _slabs(pieces, part):
        count, mean, squares = _moments(source, taken, slab.runs.begins, slab.runs.ends)
        _require_finite(squares)
        if count:
            known = joined[slab.stacked]
            total, distance = known[0] + count, mean - known[1]
            known += (count, distance * count / total, squares + distance * distance * known[0] * count / total)
    with np.errstate(invalid="ignore"):
        return _as_block(np.sqrt(joined[:, 2] / np.maximum(joined[:, 0], 1)), "F64")


def extremes(pieces: Pieces, *, part: Part, channels: bool) -> Block:
    """Return the least and the largest number of each stacked matrix, or of each of its outputs, in float32.

    They are (stacked, 2, outputs), or (stacked, 2, 1).
    """
    found = np.empty((part.grid.stacked, 2, part.grid.outputs if channels else 1), np.float32)
    found[:, 0], found[:, 1] = np.inf, -np.inf
    by = 0 if not channels else 2 if part.grid.transposed else 1
    for slab, source, taken in _slabs(pieces, part):
        _require_finite(0.0 if _extend(source, taken, *slab.runs, *found[slab.stacked], by) else np.nan)
    # Outputs that are not of the part are not looked at again.
    found[np.isinf(found)] = 0
    return _as_block(found.reshape(len(found), -1), "F32")


def _require_finite(number: float) -> None:
    if not np.isfinite(number):
        raise RefusedError("holds NaN or infinity, which have no place in its deviation, least or largest number.")


def count_ranks(pieces: Pieces, *known: Block, part: Part, level: float, largest: bool, words: Any, seed: int) -> Block:
    """Narrow down which numbers are the `level` share of the smallest, or largest, magnitudes, by 16 bits a pass.

    Numbers are sorted by rank, their magnitude's 31 bits as a float32, in reverse where the `largest` come first, and
    those of one rank by 64 bits drawn at their places. `known`, and what is returned, has for each stacked matrix the
    depth, the rank and the upper 16 of the drawn bits as far as they are settled, and how many numbers that begin so
    are still to be taken.
    """
    state = np.zeros((part.grid.stacked, 4), np.uint64)
    if known:
        state = np.frombuffer(known[0].data, np.uint64).reshape(-1, 4).copy()
    key, flip = key_of(seed, *words), np.uint32(0x7FFFFFFF if largest else 0)
    counts, at = np.zeros(BINS, np.int64), -1

    def settle() -> None:
        depth, rank, drawn, left = map(int, state[at])
        if depth == 0:
            left = round(level * int(counts.sum()))
        below = np.cumsum(counts)
        place = int(np.searchsorted(below, left)) if left else 0
        left -= int(below[place - 1]) if place else 0
        rank, drawn = (rank << 16 | place, drawn) if depth < 2 else (rank, place)
        state[at] = (depth + 1, rank, drawn, left)

    for slab, source, taken in _slabs(pieces, part):
        if slab.stacked != at:
            if at >= 0:
                settle()
            at = slab.stacked
            counts[:] = 0
        depth, rank, _, _ = state[at]
        _count_ranks(source, taken, *slab.runs[:2], slab.place, key, flip, depth, rank, counts)
    settle()
    return _as_block(state, "U64")


def limits(pieces: Pieces, known: Block, *, part: Part, largest: bool, words: Any, seed: int) -> Block:
    """Return, for each stacked matrix, up to which rank + 1 numbers are taken, and of that rank up to which drawn bits.

    Of the numbers that share all that is `known`, few are left, which are sorted.
    """
    state = np.frombuffer(known.data, np.uint64).reshape(-1, 4)
    key, flip = key_of(seed, *words), np.uint32(0x7FFFFFFF if largest else 0)
    found: list[list[Array]] = [[] for _ in state]
    for slab, source, taken in _slabs(pieces, part):
        _, rank, drawn, left = state[slab.stacked]
        if left:
            found[slab.stacked].append(_ties(source, taken, *slab.runs[:2], slab.place, key, flip, rank, drawn))
    made = np.zeros((len(state), 2), np.uint64)
    for at, (_, rank, _, left) in enumerate(state):
        if left:
            made[at] = rank + np.uint64(1), np.sort(np.concatenate(found[at]))[int(left) - 1]
    return _as_block(made, "U64")


def _slabs(pieces: Pieces, part: Part) -> Iterator[tuple[Slab, Array, int]]:
    for start, block in pieces:
        flat = as_array(block).reshape(-1)
        for slab in slabs(start, block, part):
            numbers = flat[slab.begin : slab.end]
            yield slab, *as_bits(Block(block.dtype, numbers.shape, numbers.data.cast("B")))


def _as_block(made: Array, dtype: str) -> Block:
    data: Any = np.ascontiguousarray(made).reshape(-1).view(np.uint8).data
    return Block(dtype, made.shape, data)


REDUCTIONS: dict[str, Callable[..., Block]] = {
    "deviations": deviations, "extremes": extremes, "count ranks": count_ranks, "limits": limits,
}  # fmt: skip
"""The functions by what they find."""


@compiled
def _moments(source: Array, taken: int, begins: Array, ends: Array) -> tuple[int, float, float]:
    """Return the count of the elements in the runs, their mean, and the sum of squares about it."""
    numbers = np.empty(CHUNK, np.float32)
    bits = numbers.view(np.uint32)
    sums = np.zeros(LANES)
    count, mean = 0, 0.0
    for turn in range(2):
        sums[:] = 0.0
        for run in range(begins.size):
            begin, size = begins[run], ends[run] - begins[run]
            load(source[begin : begin + size], taken, bits)
            if turn == 0:
                count += size
            for i in range(0, size - size % LANES, LANES):
                for lane in range(LANES):
                    distance = np.float64(numbers[i + lane]) - mean
                    sums[lane] += distance * distance if turn else distance
            for i in range(size - size % LANES, size):
                distance = np.float64(numbers[i]) - mean
                sums[0] += distance * distance if turn else distance
        if turn == 0 and count:
            mean = sums.sum() / count
    return count, mean, sums.sum()


@compiled
def _extend(
    source: Array, taken: int, begins: Array, ends: Array, rows: Array, columns: Array, least: Array, largest: Array,
    by: int,
) -> bool:  # fmt: skip
    """Take the elements of the runs into account; return whether all of them are finite."""
    numbers = np.empty(CHUNK, np.float32)
    bits = numbers.view(np.uint32)
    for run in range(begins.size):
        begin, count = begins[run], ends[run] - begins[run]
        load(source[begin : begin + count], taken, bits)
        for i in range(count):
            if (bits[i] & np.uint32(0x7FFFFFFF)) >= np.uint32(INFINITY):
                return False
        at = rows[run] if by == 1 else columns[run] if by == 2 else 0
        if by == 2:
            for i in range(count):
                least[at + i] = min(least[at + i], numbers[i])
                largest[at + i] = max(largest[at + i], numbers[i])
            continue
        low, high = least[at], largest[at]
        for i in range(count):
            low, high = min(low, numbers[i]), max(high, numbers[i])
        least[at], largest[at] = low, high
    return True


@compiled
def _count_ranks(
    source: Array, taken: int, begins: Array, ends: Array, place: int, key: Any, flip: Any, depth: Any, rank: Any,
    counts: Array,
) -> None:  # fmt: skip
    for run in range(begins.size):
        for i in range(begins[run], ends[run]):
            own = rank_of(source, taken, flip, i)
            if depth == np.uint64(0):
                counts[own >> np.uint64(16)] += 1
            elif depth == np.uint64(1):
                if own >> np.uint64(16) == rank:
                    counts[own & np.uint64(0xFFFF)] += 1
            elif own == rank:
                counts[mix(key, place + i) >> np.uint64(48)] += 1


@compiled
def _ties(
    source: Array, taken: int, begins: Array, ends: Array, place: int, key: Any, flip: Any, rank: Any, drawn: Any
) -> Any:
    """Return the drawn bits of the elements of a rank that begin with `drawn`."""
    found = np.empty(64, np.uint64)
    count = 0
    for run in range(begins.size):
        for i in range(begins[run], ends[run]):
            if rank_of(source, taken, flip, i) == rank:
                bits = mix(key, place + i)
                if bits >> np.uint64(48) == drawn:
                    if count == found.size:
                        larger = np.empty(2 * count, np.uint64)
                        larger[:count] = found
                        found = larger
                    found[count] = bits
                    count += 1
    return found[:count]
