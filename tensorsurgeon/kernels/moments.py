"""Statistics of a tensor's numbers: from its census where that is exact, else from moments of tiles.

Over the n finite numbers x, with m_k = mean((x - mean)^k):

    std = sqrt(m_2)    rms = sqrt(mean(x^2))    skewness = m_3 / m_2^1.5    kurtosis = m_4 / m_2^2 - 3

Of sixteen bits all follow from how often each pattern occurs. Of F32 and F64 extremes
and counts are exact; moments are summed in float64 over tiles that do not depend on how the tensor was read, and merged
in their order (Pebay, "Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order
Statistical Moments", Sandia report SAND2008-6212); quantiles and outliers are read off the census's grid, whose
neighbours are 2^-7 apart, relatively, or less.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorsurgeon.kernels.arrays import Array, as_array
from tensorsurgeon.kernels.census import PATTERNS, Counts
from tensorsurgeon.kernels.fp8 import compiled
from tensorsurgeon.tensor import Block

TILE = 65536
"""Elements whose moments are summed at once: few enough to stay in the cache for two passes."""
QUANTILES = {"0.1%": 0.001, "1%": 0.01, "25%": 0.25, "50%": 0.5, "75%": 0.75, "99%": 0.99, "99.9%": 0.999}
OUTLYING = 6.0
"""Standard deviations off the mean beyond which a number counts as an outlier."""
PER_OCTAVE = 4
WIDE = ("F32", "F64")
"""Dtypes with more numbers than the grid has."""

F16_OVER, F16_UNDER = 65520.0, 2.0**-25
"""The least magnitude that float16 rounds to infinity, and the largest that it rounds to zero."""
E4M3_OVER, E4M3_UNDER = 464.0, 2.0**-10
"""Magnitudes above the first round beyond 448, the largest that E4M3 holds; those up to the second round to zero."""

Numbers = npt.NDArray[np.float64]


class Grid(NamedTuple):
    """What the patterns of a dtype mean: `values` of all 65536, and the finite ones from the least to the greatest."""

    values: Numbers
    ordered: npt.NDArray[np.intp]
    subnormal: npt.NDArray[np.bool_]


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


@cache
def grid(dtype: str) -> Grid:
    """Return what patterns mean in F16, or as the upper half of a float32, which is BF16."""
    bits = np.arange(PATTERNS, dtype=np.uint16)
    narrow = bits.view(np.float16) if dtype == "F16" else (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        values = narrow.astype(np.float64)
    finite = np.isfinite(values)
    # Negative zero before zero: a pattern's place is that of its number.
    keys = np.where(bits >> 15, -(bits.astype(np.int64) & 0x7FFF) - 1, bits)
    ordered = np.argsort(keys, kind="stable")
    magnitudes, least = np.abs(values), 2.0**-14 if dtype == "F16" else 2.0**-126
    subnormal = (magnitudes > 0) & (magnitudes < least)
    return Grid(values, ordered[finite[ordered]], subnormal)


def census_moments(counts: Counts, dtype: str) -> Moments:
    """Return the moments of numbers of sixteen bits, from how often each pattern occurs."""
    known = grid(dtype)
    present = np.flatnonzero(counts)
    values, times = known.values[present], counts[present]
    finite = np.isfinite(values)
    nan = int(times[np.isnan(values)].sum())
    numbers, often = values[finite], times[finite]
    n = int(often.sum())
    counted = _range_counts(numbers, often)
    subnormal = int(often[known.subnormal[present[finite]]].sum())
    infinite = int(times.sum()) - n - nan
    if not n:
        return Moments(nan=nan, infinite=infinite)
    mean = math.fsum(often * numbers) / n
    off = numbers - mean
    squares = often * off**2
    second, third, fourth = (float(it.sum()) for it in (squares, squares * off, squares * off**2))
    least, greatest = float(numbers.min()), float(numbers.max())
    zeros, *beyond = counted
    return Moments(n, mean, second, third, fourth, least, greatest, zeros, nan, infinite, subnormal, *beyond)


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


def _range_counts(numbers: Numbers, often: Counts) -> list[int]:
    """Return how many are zero, and too large and too small for F16 and for E4M3."""
    size = np.abs(numbers)
    masks = [size == 0, size >= F16_OVER, (size > 0) & (size <= F16_UNDER), size > E4M3_OVER]
    return [int(often[mask].sum()) for mask in [*masks, (size > 0) & (size <= E4M3_UNDER)]]


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
            over_f16 += size >= 65520.0
            under_f16 += (size > 0) & (size <= 2.0**-25)
            over_e4m3 += size > 464.0
            under_e4m3 += (size > 0) & (size <= 2.0**-10)
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


def statistics(moments: Moments, counts: Counts, dtype: str) -> dict[str, Any]:
    """Return the statistics of a tensor, by name; None where there is no finite number."""
    n = moments.n
    row: dict[str, Any] = dict.fromkeys(("mean", "std", "min", "max", "absmax", "rms", "skewness", "kurtosis"))
    if n:
        variance = moments.second / n
        std = math.sqrt(variance)
        # What is left of a power of the deviation where all numbers are equal is rounding.
        varies = moments.least < moments.greatest and variance > 0
        row = {
            "mean": moments.mean,
            "std": std if varies else 0.0,
            "min": moments.least,
            "max": moments.greatest,
            "absmax": max(-moments.least, moments.greatest),
            "rms": math.hypot(moments.mean, std),
            "skewness": moments.third / n / variance**1.5 if varies else None,
            "kurtosis": moments.fourth / n / variance**2 - 3 if varies else None,
        }
    row |= {name: getattr(moments, key) for name, key in _COUNTED.items()}
    row |= {f"{name} share": getattr(moments, key) / n if n else None for name, key in _SHARES.items()}
    row |= quantiles(counts, dtype, moments if dtype in WIDE else None)
    row["outlier share"] = _outlier_share(row, counts, dtype, n)
    return row


_COUNTED = {"zeros": "zeros", "NaN": "nan", "Inf": "infinite", "subnormals": "subnormal"}
_SHARES = {
    "F16 overflow": "over_f16",
    "F16 underflow": "under_f16",
    "E4M3 overflow": "over_e4m3",
    "E4M3 underflow": "under_e4m3",
}


def quantiles(counts: Counts, dtype: str, moments: Moments | None = None) -> dict[str, float | None]:
    """Return quantiles as NumPy defines them; of wider numbers, whose `moments` are given, to within the grid."""
    known = grid(dtype)
    times = counts[known.ordered]
    up_to = np.cumsum(times)
    n = int(up_to[-1])
    if not n:
        return dict.fromkeys(QUANTILES)
    values = known.values[known.ordered]

    def ranked(rank: int) -> float:
        place = int(np.searchsorted(up_to, rank, side="right"))
        value = float(values[place])
        if moments is None:
            return value
        # Numbers of a pattern reach from its own to the next larger magnitude.
        width = abs(value) * 2.0**-7
        within = (rank - int(up_to[place]) + int(times[place]) + 0.5) / int(times[place])
        value = value + within * width if value > 0 else value - (1 - within) * width
        return min(max(value, moments.least), moments.greatest)

    found = {}
    for name, share in QUANTILES.items():
        low, part = divmod(share * (n - 1), 1.0)
        first, following = ranked(int(low)), ranked(min(int(low) + 1, n - 1))
        found[name] = first + part * (following - first)
    return found  # type: ignore[return-value]


def _outlier_share(row: dict[str, Any], counts: Counts, dtype: str, n: int) -> float | None:
    """Return the share of outliers; None where the grid is too coarse for them, as of F32 far off zero."""
    if not n:
        return None
    limit = OUTLYING * row["std"]
    if dtype in WIDE and limit < 2.0**-6 * abs(row["mean"]):
        return None
    known = grid(dtype)
    off = np.abs(known.values[known.ordered] - row["mean"])
    return int(counts[known.ordered][off > limit].sum()) / n if limit else 0.0


def histogram(counts: Counts, dtype: str) -> dict[str, Any]:
    """Return counts by quarter octaves of the magnitude: bin i reaches from `2^(octave + i // 4) (1 + i % 4 / 4)` up.

    Subnormals of BF16, below 2^-126, are counted with zero.
    """
    known = grid(dtype)
    present = known.ordered[counts[known.ordered] > 0]
    values, times = known.values[present], counts[present]
    fraction, exponent = np.frexp(np.abs(values))
    small = np.abs(values) < 2.0**-126
    bins = np.where(small, 0, (exponent - 1) * PER_OCTAVE + ((2 * fraction - 1) * PER_OCTAVE).astype(int))
    if small.all():
        return {"octave": 0, "negative": [], "zero": int(times.sum()), "positive": []}
    first = int(bins[~small].min()) // PER_OCTAVE * PER_OCTAVE
    length = int(bins[~small].max()) - first + 1
    sides = []
    for side in ((values < 0) & ~small, (values > 0) & ~small):
        sides.append(np.bincount(bins[side] - first, times[side], length).astype(np.int64).tolist())
    return {
        "octave": first // PER_OCTAVE,
        "negative": sides[0],
        "zero": int(times[small].sum()),
        "positive": sides[1],
    }
