"""Change the numbers of a matrix, or of a part of it: noise, coarse grids, zeros, permutations.

Each function takes the number of a block's first row and the block, then what was found out of the whole matrix, and
returns the block with the places of `part` changed. Results are computed in float32 and rounded once, to nearest, ties
to even. What is random is keyed by a seed, the tensor's name and the place in the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.fused import Heads, Part
from tensorsurgeon.kernels.arrays import STORAGE, Array, as_array, from_float32
from tensorsurgeon.kernels.casting import cast_block
from tensorsurgeon.kernels.draws import draws_plainly, key_of, normal_table
from tensorsurgeon.kernels.places import add_noise, prune, shuffle, thin, to_grid
from tensorsurgeon.kernels.slabs import Mask, Slab, as_bits, first_row, mask_of, slabs, slots_mask
from tensorsurgeon.tensor import Block

Words = tuple[str, ...]
"""What a key is made of besides the seed."""


def noisy(
    start: int, block: Block, *deviation: Block, dtype: str, part: Part, seed: int, words: Words, level: float
) -> Block:
    """Return `w (1 + level n)`, or, given the standard deviation of each stacked matrix, `w + level std n`."""
    key, table = key_of(seed, *words), normal_table()
    exact = level * np.frombuffer(deviation[0].data, np.float64) if deviation else np.full(part.grid.stacked, level)
    # What is too large for a scale makes numbers too large, which are refused by name.
    with np.errstate(over="ignore"):
        scales = exact.astype(np.float32)

    def change(slab: Slab, source: Array, taken: int, target: Array, given: int) -> int:
        runs, scale = slab.runs, scales[slab.stacked]
        add = bool(deviation)
        return int(add_noise(source, taken, target, given, runs.begins, runs.ends, slab.place, key, table, scale, add))

    return _computed(start, block, dtype, part, change)


def gridded(start: int, block: Block, extremes: Block, *, dtype: str, part: Part, level: int, channels: bool) -> Block:
    """Return the nearest of `level` numbers at even distances: `rint((w - min) / step) step + min`, ties to even.

    `step = (max - min) / (level - 1)`; where that is 0, numbers stay. `extremes` has the least and the largest of each
    stacked matrix, or of each of its outputs where these are `channels`.
    """
    known = np.frombuffer(extremes.data, np.float32).reshape(part.grid.stacked, 2, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = (known[:, 1] - known[:, 0]) / np.float32(level - 1)
    if not np.isfinite(steps).all():
        raise RefusedError("its numbers lie too far apart for a grid in float32.")
    # Where the channel of an element is: nowhere, in its row, or in its column.
    by = 0 if not channels else 2 if part.grid.transposed else 1

    def change(slab: Slab, source: Array, taken: int, target: Array, given: int) -> int:
        least, step = known[slab.stacked, 0], steps[slab.stacked]
        return int(to_grid(source, taken, target, given, *slab.runs, np.ascontiguousarray(least), step, by))

    return _computed(start, block, dtype, part, change)


def _computed(
    start: int, block: Block, dtype: str, part: Part, change: Callable[[Slab, Array, int, Array, int], int]
) -> Block:
    """Return a block in another dtype, its part changed slab by slab by a function on float32 bits.

    Raises:
        RefusedError: where a finite number becomes infinite.
    """
    flat = as_array(block).reshape(-1)
    made = _copied(block, dtype) if part.slots else np.empty(flat.shape, STORAGE[dtype])
    for slab in slabs(start, block, part):
        place = slice(slab.begin, slab.end)
        source, taken = as_bits(Block(block.dtype, (slab.end - slab.begin,), flat[place].data.cast("B")))
        if dtype == "F16":
            wide = np.left_shift(source, taken, dtype=np.uint32)
            gone = change(slab, source, taken, wide, 0)
            made[place] = from_float32(wide.view(np.float32), dtype)
            gone += int((np.isinf(made[place]) & ~np.isinf(wide.view(np.float32))).sum())
        else:
            given = 16 if dtype == "BF16" else 0
            gone = change(slab, source, taken, made[place] if given else made[place].view(np.uint32), given)
        if gone:
            raise RefusedError(f"{gone} numbers become too large for {dtype}; choose a lower level.")
    return _as_block(made, dtype, block)


def thinned(start: int, block: Block, *, dtype: str, part: Part, seed: int, words: Words, level: float) -> Block:
    """Return the block with each number of the part zero with probability `level`."""
    key, limit = key_of(seed, *words), _limit(level)
    made = _copied(block, dtype)
    bits = _raw(made)
    for slab in slabs(start, block, part):
        thin(bits[slab.begin : slab.end], slab.runs.begins, slab.runs.ends, slab.place, key, limit)
    return _as_block(made, dtype, block)


def pruned(
    start: int, block: Block, limits: Block, *, dtype: str, part: Part, seed: int, words: Words, largest: bool
) -> Block:
    """Return the block without the numbers of the part whose magnitudes come first, up to the `limits`."""
    key = key_of(seed, *words)
    order, chance = np.frombuffer(limits.data, np.uint64).reshape(-1, 2).T
    flat, made = as_array(block).reshape(-1), _copied(block, dtype)
    bits = _raw(made)
    flip = np.uint32(0x7FFFFFFF if largest else 0)
    for slab in slabs(start, block, part):
        piece = Block(block.dtype, (slab.end - slab.begin,), flat[slab.begin : slab.end].data.cast("B"))
        source, taken = as_bits(piece)
        at = slab.stacked
        prune(source, taken, bits[slab.begin : slab.end], *slab.runs[:2], slab.place, key, flip, order[at], chance[at])
    return _as_block(made, dtype, block)


def without_units(
    start: int,
    block: Block,
    *,
    dtype: str,
    part: Part,
    seed: int,
    words: Words,
    level: float,
    inputs: bool = False,
    heads: tuple[Heads, ...] = (),
) -> Block:
    """Return the block without some of the part's outputs, inputs, or attention heads, each with probability `level`.

    Heads are drawn by their number alone, so that those of several matrices of a layer go together.
    """
    grid = part.grid
    key, limit = key_of(seed, *words), _limit(level)
    length = grid.inputs if inputs else grid.outputs
    drawn = (draws_plainly(key, 0, length * (1 if heads else grid.stacked)) < limit).reshape(-1, length)
    if not heads:
        return _zeroed(start, block, dtype, part, lambda stacked: (drawn[stacked], inputs))
    gone = {False: np.zeros(grid.outputs, np.bool_), True: np.zeros(grid.inputs, np.bool_)}
    for it in heads:
        mask = gone[it.inputs]
        places = np.flatnonzero(slots_mask((it.slots,), len(mask))) if it.slots else np.arange(len(mask))
        drawn_heads = draws_plainly(key_of(seed, *words, str(it.number)), 0, it.number) < limit
        mask[places] = np.repeat(drawn_heads, len(places) // it.number)
    made = _zeroed(start, block, dtype, part, lambda _: (gone[False], False))
    return _zeroed(start, made, dtype, part, lambda _: (gone[True], True)) if gone[True].any() else made


def zeroed(start: int, block: Block, *, dtype: str, part: Part) -> Block:
    """Return the block with the part zero."""
    whole = np.ones(part.grid.inputs, np.bool_)
    return _zeroed(start, block, dtype, part, lambda _: (whole, True))


def _zeroed(start: int, block: Block, dtype: str, part: Part, chosen: Callable[[int], tuple[Mask, bool]]) -> Block:
    """Return the block with zeros where the part meets the outputs or inputs that are chosen of a stacked matrix."""
    made = _copied(block, dtype)
    for rows, stacked, row in _matrices(start, block, part, made):
        chosen_places, inputs = chosen(stacked)
        outputs = mask_of(part) if inputs else mask_of(part) & chosen_places
        others = chosen_places if inputs else np.ones(part.grid.inputs, np.bool_)
        along_rows, along_columns = (others, outputs) if part.grid.transposed else (outputs, others)
        here = np.flatnonzero(along_rows[row : row + len(rows)])
        if along_columns.all():
            rows[here] = 0
        else:
            rows[np.ix_(here, np.flatnonzero(along_columns))] = 0
    return _as_block(made, dtype, block)


def shuffled(start: int, block: Block, *, dtype: str, part: Part, seed: int, words: Words) -> Block:
    """Return the block with the part's numbers in another order; whole matrices are given."""
    made = _copied(block, dtype)
    mask, key = mask_of(part), key_of(seed, *words)
    for rows, stacked, _ in _matrices(start, block, part, made):
        place = stacked * rows.size
        if mask.all():
            shuffle(rows.reshape(-1), key, place)
            continue
        index = np.ix_(np.arange(len(rows)), np.flatnonzero(mask)) if part.grid.transposed else np.flatnonzero(mask)
        numbers = rows[index]
        shuffle(numbers.reshape(-1), key, place)
        rows[index] = numbers
    return _as_block(made, dtype, block)


def _matrices(start: int, block: Block, part: Part, made: Array) -> Iterator[tuple[Array, int, int]]:
    """Yield, as bits, the rows of each stacked matrix in a block, the matrix's number, and that of the first row."""
    height, width = part.grid.rows, part.grid.columns
    rows = _raw(made).reshape(-1, width)
    first = first_row(start, block, part)
    for stacked in range(first // height, -(-(first + len(rows)) // height)):
        begin, end = max(first, stacked * height), min(first + len(rows), (stacked + 1) * height)
        yield rows[begin - first : end - first], stacked, begin - stacked * height


def _copied(block: Block, dtype: str) -> Array:
    """Return a vector of a block's numbers in a dtype, to be changed."""
    same = block if block.dtype == dtype else cast_block(block, dtype)
    return np.array(as_array(same)).reshape(-1)


def _raw(numbers: Array) -> Array:
    return numbers.view(np.uint32 if numbers.itemsize == 4 else np.uint16)


def _as_block(made: Array, dtype: str, like: Block) -> Block:
    assert made.dtype == STORAGE[dtype]
    data: Any = made.view(np.uint8).data
    return Block(dtype, like.shape, data)


def _limit(level: float) -> np.uint64:
    return np.uint64(round(level * 2**32))


METHODS: dict[str, Callable[..., Block]] = {
    "noise": noisy, "grid": gridded, "thin": thinned, "prune": pruned, "units": without_units, "zero": zeroed,
    "shuffle": shuffled,
}  # fmt: skip
"""The functions by what they do."""
