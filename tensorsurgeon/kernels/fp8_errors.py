"""What block FP8 takes from weights: the difference between them and what their codes decode to in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tensorsurgeon.kernels.arrays import Array, as_array
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.kernels.fp8_encoding import (
    HALF,
    Numbers,
    Recipe,
    bits_of,
    largest_of,
    scale,
    scales_of,
    spread,
    widen,
)
from tensorsurgeon.tensor import Block

FIGURES = ("squares of errors", "squares", "zeros", "largest error", "absmax", "bound", "of the bound")
"""What is found of each row of blocks: three sums, and four of which the largest counts.

The bound is half of E4M3's last step, `16 scale`, with what five roundings of float32 may add to it.
"""
SUMS = 3
HALF_STEP = 16 * (1 + 2.0**-16)

Sums = npt.NDArray[np.float64]


def measure_errors(numbers: Block, recipe: Recipe) -> Block:
    """Return FIGURES of each row of blocks in F64, sums in an order that nothing but the shape decides.

    Raises:
        RefusedError: for NaN, infinity and numbers from 2^127, and for a scale that its dtype cannot hold.
    """
    bits = bits_of(numbers)
    largest = largest_of(bits, recipe)
    scales = scales_of(largest, recipe)
    found = np.zeros((len(largest), len(FIGURES)))
    found[:, 4] = largest.max(axis=1, initial=0)
    found[:, 5] = HALF_STEP * scales.numbers.max(axis=1, initial=0).astype(np.float64)
    _measure(bits, scales.factors, scales.numbers, recipe.rows, recipe.columns, found)
    return Block("F64", found.shape, memoryview(found.data).cast("B") if found.size else b"")


def combined(blocks: Sequence[Block]) -> dict[str, float]:
    """Return the figures of a tensor by name, from those of all its rows of blocks."""
    rows = np.concatenate([as_array(it) for it in blocks])
    totals = [*rows[:, :SUMS].sum(axis=0), *rows[:, SUMS:].max(axis=0, initial=0)]
    return dict(zip(FIGURES, map(float, totals), strict=True))


@compiled
def _measure(bits: Array, factors: Numbers, scales: Numbers, rows: int, columns: int, found: Sums) -> None:
    numbers = np.empty(bits.shape[1], np.float32)
    by, scaled, small, back = (
        np.empty_like(numbers),
        np.empty_like(numbers),
        np.empty_like(numbers),
        np.empty_like(numbers),
    )
    number_bits, scaled_bits, small_bits = numbers.view(np.uint32), scaled.view(np.uint32), small.view(np.uint32)
    for g in range(factors.shape[0]):
        spread(factors[g], columns, by)
        spread(scales[g], columns, back)
        errors, squares = np.zeros(bits.shape[1]), np.zeros(bits.shape[1])
        largest, zeros = np.zeros(bits.shape[1], np.float32), np.zeros(bits.shape[1], np.uint32)
        for r in range(g * rows, min((g + 1) * rows, bits.shape[0])):
            widen(bits[r], number_bits)
            scale(numbers, by, scaled, small)
            _lower(small)
            _nearest(scaled_bits, small_bits)
            _compare(numbers, scaled, back, zeros, largest)
            _add_squares(scaled, errors)
            _add_squares(numbers, squares)
        for c in range(bits.shape[1]):
            found[g, 0] += errors[c]
            found[g, 1] += squares[c]
            found[g, 2] += zeros[c]
            found[g, 3] = max(found[g, 3], largest[c])
            found[g, 6] = max(found[g, 6], largest[c] / (HALF_STEP * back[c]))


@compiled
def _lower(small: Numbers) -> None:
    for c in range(small.shape[0]):
        small[c] = np.float32(small[c] - np.float32(HALF))


@compiled
def _nearest(bits: Array, small: Array) -> None:
    """Replace float32 by the nearest number of E4M3, without its sign."""
    for c in range(bits.shape[0]):
        size = min(np.uint32(bits[c] & np.uint32(0x7FFFFFFF)), np.uint32(0x43E00000))
        odd = np.uint32(np.uint32(size >> np.uint32(20)) & np.uint32(1))
        normal = np.uint32(np.uint32(np.uint32(size + np.uint32(0x7FFFF)) + odd) & np.uint32(0xFFF00000))
        bits[c] = small[c] if size < np.uint32(0x3C800000) else normal


@compiled
def _compare(numbers: Numbers, codes: Numbers, scales: Numbers, zeros: Array, largest: Numbers) -> None:
    """Replace codes by errors, which float32 holds exactly: a number and its code are within a factor of two."""
    for c in range(numbers.shape[0]):
        code = codes[c]
        error = np.float32(np.float32(code * scales[c]) - np.float32(abs(numbers[c])))
        codes[c] = error
        zeros[c] += np.uint32(code == np.float32(0))
        largest[c] = max(largest[c], np.float32(abs(error)))


@compiled
def _add_squares(numbers: Numbers, sums: Sums) -> None:
    for c in range(numbers.shape[0]):
        number = np.float64(numbers[c])
        sums[c] += number * number
