"""Moments of numbers, merged from tiles that do not depend on how a tensor was read.

With m_k = mean((x - mean)^k) over the n finite numbers x:

    std = sqrt(m_2)    rms = sqrt(mean(x^2))    skewness = m_3 / m_2^1.5    kurtosis = m_4 / m_2^2 - 3

Sums of powers of what numbers are off their mean are merged in float64 (Pebay, "Formulas for Robust, One-Pass Parallel
Computation of Covariances and Arbitrary-Order Statistical Moments", Sandia report SAND2008-6212).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tensorsurgeon.kernels.arrays import Array, as_array
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.tensor import Block

TILE = 65536
"""Elements whose moments are summed at once: few enough to stay in the cache for two passes."""
F16_OVER, F16_UNDER = 65520.0, 2.0**-25
"""The least magnitude that float16 rounds to infinity, and the largest that it rounds to zero."""
E4M3_OVER, E4M3_UNDER = 464.0, 2.0**-10
"""Magnitudes above the first round beyond 448, the largest that E4M3 holds; those up to the second round to zero."""


class Moments(NamedTuple):
    """Mean of `n` finite numbers, and sums of powers of what they are off it; extremes and counts of all."""

    n: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf
    zeros: int = 0
    nan: int = 0
    infinite: int = 0
    subnormal: int = 0
    over_f16: int = 0
    under_f16: int = 0
    over_e4m3: int = 0
    under_e4m3: int = 0

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of numbers."""
        n, a, b = self.n + other.n, self.n, other.n
        extremes = min(self.least, other.least), max(self.greatest, other.greatest)
        counts = (one + more for one, more in zip(self[7:], other[7:], strict=True))
        if not a or not b:
            only = self if a else other
            return Moments(n, only.mean, only.second, only.third, only.fourth, *extremes, *counts)
        d = other.mean - self.mean
        return Moments(
            n,
            self.mean + d * b / n,
            self.second + other.second + d**2 * a * b / n,
            self.third + other.third + d**3 * a * b * (a - b) / n**2 + 3 * d * (a * other.second - b * self.second) / n,
            self.fourth
            + other.fourth
            + d**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * d**2 * (a * a * other.second + b * b * self.second) / n**2
            + 4 * d * (a * other.third - b * self.third) / n,
            *extremes,
            *counts,
        )


def block_moments(block: Block, columns: int, rows: int) -> list[Moments]:
    """Return the moments of each tile of a block of F32 or F64; each `rows` rows are cut into tiles of their own."""
    numbers = as_array(block).reshape(-1)
    band = rows * columns
    tiles = (
        numbers[begin : min(begin + TILE, first + band)]
        for first in range(0, len(numbers), band)
        for begin in range(first, min(first + band, len(numbers)), TILE)
    )
    least = 2.0**-126 if block.dtype == "F32" else 2.0**-1022
    found = []
    for tile in tiles:
        counts, sums = np.zeros(9, np.int64), np.zeros(6)
        _sum_tile(tile, least, counts, sums)
        n, *others = map(int, counts)
        mean, second, third, fourth, low, high = map(float, sums)
        found.append(Moments(n, mean, second, third, fourth, low, high, *others))
    return found


@compiled
def _sum_tile(numbers: Array, least: float, counts: Array, sums: Array) -> None:
    n: Any = 0
    zeros, nan, infinite, subnormal = n, n, n, n
    over_f16, under_f16, over_e4m3, under_e4m3 = n, n, n, n
    total, low, high = 0.0, np.inf, -np.inf
    for place in range(numbers.size):
        x = np.float64(numbers[place])
        size = abs(x)
        if size < np.inf:
            n += 1
            total += x
            low = min(low, x)
            high = max(high, x)
            zeros += size == 0
            subnormal += (size > 0) & (size < least)
            over_f16 += size >= F16_OVER
            under_f16 += (size > 0) & (size <= F16_UNDER)
            over_e4m3 += size > E4M3_OVER
            under_e4m3 += (size > 0) & (size <= E4M3_UNDER)
        elif size == np.inf:
            infinite += 1
        else:
            nan += 1
    mean = total / max(n, 1)
    second, third, fourth = 0.0, 0.0, 0.0
    for place in range(numbers.size):
        x = np.float64(numbers[place])
        if abs(x) < np.inf:
            d = x - mean
            second += d * d
            third += d * d * d
            fourth += d * d * d * d
    sums[:] = np.array([mean, second, third, fourth, low, high])
    counts[:] = np.array([n, zeros, nan, infinite, subnormal, over_f16, under_f16, over_e4m3, under_e4m3])
