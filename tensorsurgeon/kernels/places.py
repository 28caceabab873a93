"""The compiled loops over the places of a part: each takes runs of a slab, and numbers as bits that it shifts."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorsurgeon.kernels.arrays import Array
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.kernels.draws import CHUNK, as_normals, fill_draws, mix
from tensorsurgeon.kernels.slabs import load, lost, rank_of, store


@compiled
def add_noise(
    source: Array, taken: int, target: Array, given: int, begins: Array, ends: Array, place: int, key: Any,
    table: Array, scale: Any, add: bool,
) -> int:  # fmt: skip
    """Make each element `w + scale n`, or else `w (1 + scale n)`; return how many are lost to infinity."""
    draws, normals = np.empty(CHUNK + 2, np.uint32), np.empty(CHUNK + 2, np.float32)
    numbers = np.empty(CHUNK, np.float32)
    bits = numbers.view(np.uint32)
    gone = 0
    for run in range(begins.size):
        begin, count = begins[run], ends[run] - begins[run]
        odd = (place + begin) % 2
        fill_draws(key, place + begin - odd, count + odd, draws)
        as_normals(draws, count + odd, normals, table)
        noise = normals[odd:]
        before, after = source[begin : begin + count], target[begin : begin + count]
        load(before, taken, bits)
        if add:
            for i in range(count):
                numbers[i] = numbers[i] + scale * noise[i]
        else:
            for i in range(count):
                numbers[i] = numbers[i] * (np.float32(1) + scale * noise[i])
        if store(bits, given, after):
            gone += lost(before, taken, after, given, bits)
    return gone


@compiled
def to_grid(
    source: Array, taken: int, target: Array, given: int, begins: Array, ends: Array, rows: Array, columns: Array,
    least: Array, steps: Array, by: int,
) -> int:  # fmt: skip
    """Round each element to its grid: the only one, or that of its row (`by` 1) or column (2); count those lost."""
    numbers = np.empty(CHUNK, np.float32)
    bits = numbers.view(np.uint32)
    gone = 0
    for run in range(begins.size):
        begin, count = begins[run], ends[run] - begins[run]
        before, after = source[begin : begin + count], target[begin : begin + count]
        load(before, taken, bits)
        at = rows[run] if by == 1 else columns[run] if by == 2 else 0
        along = 1 if by == 2 else 0
        for i in range(count):
            low, step = least[at + along * i], steps[at + along * i]
            if step > np.float32(0):
                numbers[i] = np.rint((numbers[i] - low) / step) * step + low
        if store(bits, given, after):
            gone += lost(before, taken, after, given, bits)
    return gone


@compiled
def thin(target: Array, begins: Array, ends: Array, place: int, key: Any, limit: Any) -> None:
    """Set each element to zero whose draw is below a limit."""
    draws = np.empty(CHUNK + 2, np.uint32)
    for run in range(begins.size):
        begin, count = begins[run], ends[run] - begins[run]
        odd = (place + begin) % 2
        fill_draws(key, place + begin - odd, count + odd, draws)
        drawn, after = draws[odd:], target[begin : begin + count]
        for i in range(count):
            after[i] = 0 if np.uint64(drawn[i]) < limit else after[i]


@compiled
def prune(
    source: Array, taken: int, target: Array, begins: Array, ends: Array, place: int, key: Any, flip: Any, order: Any,
    chance: Any,
) -> None:  # fmt: skip
    """Set each element to zero whose rank + 1 is below `order`, or equal to it with drawn bits up to `chance`."""
    for run in range(begins.size):
        for i in range(begins[run], ends[run]):
            rank = rank_of(source, taken, flip, i) + np.uint64(1)
            if rank < order or (rank == order and mix(key, place + i) <= chance):
                target[i] = 0


@compiled
def shuffle(numbers: Array, key: Any, place: int) -> None:
    """Permute a vector (Fisher and Yates), by the 64 bits that are drawn at each place."""
    for i in range(numbers.size - 1, 0, -1):
        other = np.int64(mix(key, place + i) % np.uint64(i + 1))
        kept = numbers[i]
        numbers[i] = numbers[other]
        numbers[other] = kept
