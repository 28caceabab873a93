"""Statistics of a tensor's numbers, from its census; of wide numbers, with moments that were summed beside.

Of sixteen bits everything follows, exactly, from how often each number occurs. Of F32 and F64 quantiles and outliers
are read off the census's grid, whose neighbours are 2^-7 apart, relatively, or less.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tensorsurgeon.kernels.census import Counts, Numbers, grid
from tensorsurgeon.kernels.moments import E4M3_OVER, E4M3_UNDER, F16_OVER, F16_UNDER, Moments

QUANTILES = {"0.1%": 0.001, "1%": 0.01, "25%": 0.25, "50%": 0.5, "75%": 0.75, "99%": 0.99, "99.9%": 0.999}
OUTLYING = 6.0
"""Standard deviations off the mean beyond which a number counts as an outlier."""
PER_OCTAVE = 4
WIDE = ("F32", "F64")
"""Dtypes with more numbers than the grid has."""
LEAST_NORMAL = {"F16": 2.0**-14, "BF16": 2.0**-126}


class Present(NamedTuple):
    """The numbers that occur, finite ones from the least to the greatest, and how often each does.

    Of F32 and F64 they are those of the grid, each for all up to the next larger magnitude. Negative zero is a number
    of its own.
    """

    dtype: str
    values: Numbers
    times: Counts
    nan: int
    infinite: int

    @property
    def n(self) -> int:
        """How many finite numbers there are."""
        return int(self.times.sum())


def present(counts: Counts, dtype: str) -> Present:
    """Return which numbers occur, from how often each pattern does."""
    known = grid(dtype)
    places = known.ordered[counts[known.ordered] > 0]
    times = counts[places]
    others = int(counts.sum() - times.sum())
    nan = int(counts[np.isnan(known.values)].sum()) if others else 0
    return Present(dtype, known.values[places], times, nan, others - nan)


def exact_moments(numbers: Present) -> Moments:
    """Return the moments of numbers of sixteen bits."""
    n, values, times = numbers.n, numbers.values, numbers.times
    if not n:
        return Moments(nan=numbers.nan, infinite=numbers.infinite)
    mean = math.fsum(times * values) / n
    off, size = values - mean, np.abs(values)
    squares = times * off**2
    second, third, fourth = (float(it.sum()) for it in (squares, squares * off, squares * off**2))
    small = size > 0

    def count(mask: Any) -> int:
        return int(times[mask].sum())

    return Moments(
        n,
        mean,
        second,
        third,
        fourth,
        float(values[0]),
        float(values[-1]),
        count(~small),
        numbers.nan,
        numbers.infinite,
        count(small & (size < LEAST_NORMAL[numbers.dtype])),
        count(size >= F16_OVER),
        count(small & (size <= F16_UNDER)),
        count(size > E4M3_OVER),
        count(small & (size <= E4M3_UNDER)),
    )


def statistics(numbers: Present, moments: Moments) -> dict[str, Any]:
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
            "skewness": _quotient(moments.third / n, variance, 1.5) if varies else None,
            "kurtosis": _quotient(moments.fourth / n, variance, 2, 3) if varies else None,
        }
    row |= {name: getattr(moments, key) for name, key in _COUNTED.items()}
    row |= {f"{name} share": getattr(moments, key) / n if n else None for name, key in _SHARES.items()}
    row |= quantiles(numbers, moments)
    row["outlier share"] = _outlier_share(numbers, row)
    return row


def _quotient(moment: float, variance: float, power: float, less: float = 0) -> float | None:
    """Return `moment / variance^power - less`; None where float64 cannot hold what that takes."""
    with np.errstate(all="ignore"):
        found = float(moment / np.float64(variance) ** power)
    return found - less if math.isfinite(found) else None


_COUNTED = {"zeros": "zeros", "NaN": "nan", "Inf": "infinite", "subnormals": "subnormal"}
_SHARES = {
    "F16 overflow": "over_f16",
    "F16 underflow": "under_f16",
    "E4M3 overflow": "over_e4m3",
    "E4M3 underflow": "under_e4m3",
}


def quantiles(numbers: Present, moments: Moments) -> dict[str, float | None]:
    """Return quantiles as NumPy defines them; of wide numbers to within the grid, and within their extremes."""
    values, times, n = numbers.values, numbers.times, numbers.n
    if not n:
        return dict.fromkeys(QUANTILES)
    up_to = np.cumsum(times)

    def ranked(rank: int) -> float:
        place = int(np.searchsorted(up_to, rank, side="right"))
        value = float(values[place])
        if numbers.dtype not in WIDE:
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


def _outlier_share(numbers: Present, row: dict[str, Any]) -> float | None:
    """Return the share of outliers; None where the grid is too coarse for them, as of F32 far off zero."""
    if not numbers.n:
        return None
    limit = OUTLYING * row["std"]
    if numbers.dtype in WIDE and limit < 2.0**-6 * abs(row["mean"]):
        return None
    outlying = numbers.times[np.abs(numbers.values - row["mean"]) > limit]
    return int(outlying.sum()) / numbers.n if limit else 0.0


def histogram(numbers: Present) -> dict[str, Any]:
    """Return counts by quarter octaves of the magnitude: bin i reaches from `2^(octave + i // 4) (1 + i % 4 / 4)` up.

    Subnormals of BF16, below 2^-126, are counted with zero.
    """
    values, times = numbers.values, numbers.times
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
