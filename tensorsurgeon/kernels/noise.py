"""Sums over what quantisation takes from weights, and over what it takes from those of two models.

Of a weight A and its quantised form A', both of n elements, the noise is N = A - A'. In one pass over tiles that do
not depend on how the tensor was read, in float64:

    SNR = 10 log10(|A|^2 / |N|^2)    relative noise = |N| / |A|    size correlation = Pearson of |a| and |n|
    kurtosis = m4 / m2^2 - 3, with m_k = mean((n - mean)^k); of numbers spread evenly it is -1.2

Of a second pair B and B' with the noise M, and the change D = B - A, of which quantisation makes D' = D - (M - N):

    cosine = <N, M> / (|N| |M|)       cancelled = 1 - |N - M|^2 / (|N|^2 + |M|^2)
    z = cosine sqrt(n)                sign z = <N, M> / sqrt(sum n_i^2 m_i^2)
    delta SNR = 10 log10(|D|^2 / |D' - D|^2)    delta cosine = <D, D'> / (|D| |D'|)

`cancelled` is 1 where N = M, 0 where they have nothing to do with each other, and -1 where N = -M. The cosine of n
independent elements of one size has the standard deviation 1 / sqrt(n); where the sizes differ and go together, as
those of FP8 do with the weights, it is larger. `sign z` holds for any sizes: its null is that signs are independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorsurgeon.kernels.arrays import Array, as_array, as_numbers
from tensorsurgeon.kernels.census import PATTERNS, Census, Counts, grid
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.tensor import Block

TILE = 65536
"""Elements that are summed at once, in whole rows: few enough to stay in the cache."""
KS_LIMIT = 1.628
"""Two samples of n and m differ with 99% confidence beyond `1.628 sqrt((n + m) / (n m))` (Smirnov's limit)."""
NEGATIVE_ZERO = PATTERNS // 2
HUGE = 1e75
"""Numbers beyond this have no fourth power in float64."""
OWN, BETWEEN = 10, 6

Numbers = npt.NDArray[np.float64]


class Tally:
    """Sums of one pair of a weight and its quantised form, or of two, and how often each size of noise occurs.

    `broken` are the places of models, in the order in which their blocks come, that hold NaN, infinity or more than can
    be summed.
    """

    def __init__(self, rows: int, columns: int, pairs: int) -> None:
        self.elements = rows * columns
        self.step = max(1, TILE // columns)
        self.own = np.zeros((pairs, OWN))
        self.between = np.zeros(BETWEEN)
        self.censuses = [Census(rows, columns) for _ in range(pairs)]
        self.broken: set[int] = set()

    def add(self, blocks: Sequence[Block], start: int) -> None:
        """Sum rows of A and A', and of B and B' if there are two pairs; the first is row `start`."""
        for first in range(0, blocks[0].shape[0], self.step):
            numbers = [as_numbers(_rows(block, first, first + self.step)) for block in blocks]
            noises = [np.empty_like(numbers[0]) for _ in self.censuses]
            with np.errstate(invalid="ignore"):
                for pair, noise in enumerate(noises):
                    weights, quantised = numbers[2 * pair : 2 * pair + 2]
                    _sum_own(weights.reshape(-1), quantised.reshape(-1), noise.reshape(-1), self.own[pair])
                    self.censuses[pair].add(Block("F64", noise.shape, noise.data.cast("B")), start + first)
                if len(noises) > 1:
                    _sum_between(*(it.reshape(-1) for it in (numbers[0], numbers[2], *noises)), self.between)
            if not np.isfinite(self.own).all():
                self.broken |= {place for place, it in enumerate(numbers) if not (np.abs(it) < HUGE).all()}

    def is_silent(self, pair: int) -> bool:
        """Tell whether a pair has no noise at all."""
        return bool(self.own[pair, 9] == self.elements)

    def own_statistics(self, pair: int) -> dict[str, float | None]:
        """Return what is to be said of the noise of one pair, by name."""
        n = self.elements
        squares, noise, dot, size, noise_size, sizes, total, third, fourth, zeros = map(float, self.own[pair])
        return {
            "SNR": decibels(squares, noise),
            "relative noise": ratio(math.sqrt(noise), math.sqrt(squares)),
            "cosine to weights": ratio(dot, math.sqrt(squares) * math.sqrt(noise)),
            "size correlation": _pearson(n, sizes, size, noise_size, squares, noise),
            "kurtosis": _kurtosis(n, total, noise, third, fourth),
            "zero share": zeros / n,
        }

    def joint_statistics(self) -> dict[str, float | None]:
        """Return what is to be said of the noise of two pairs, by name."""
        n = self.elements
        dot, products, apart, delta, kept, quantised = map(float, self.between)
        one, other = float(self.own[0, 1]), float(self.own[1, 1])
        cosine = ratio(dot, math.sqrt(one) * math.sqrt(other))
        return {
            "cancelled": None if not one + other else 1 - apart / (one + other),
            "cosine": cosine,
            "cosine by chance": 1 / math.sqrt(n),
            "z": None if cosine is None else cosine * math.sqrt(n),
            "sign z": ratio(dot, math.sqrt(products)),
            "norm ratio": ratio(math.sqrt(other), math.sqrt(one)),
            "KS": ks_distance(self.censuses[0].counts, self.censuses[1].counts),
            "KS limit": KS_LIMIT * math.sqrt(2 / n),
            "delta ratio": ratio(math.sqrt(delta), math.sqrt(one)),
            "delta SNR": decibels(delta, apart),
            "delta cosine": ratio(kept, math.sqrt(delta) * math.sqrt(quantised)),
        }


def difference(one: Block, other: Block) -> npt.NDArray[np.float32]:
    """Return one matrix less another, in float64 and rounded once."""
    made = np.empty(one.shape, np.float32)
    step = max(1, TILE // one.shape[1])
    for first in range(0, len(made), step):
        last = first + step
        made[first:last] = as_numbers(_rows(one, first, last)) - as_numbers(_rows(other, first, last))
    return made


def ks_distance(one: Counts, other: Counts) -> float:
    """Return the greatest distance between two distributions, which are known on the census's grid; 0 and -0 are one.

    What differs only within a step of the grid, 2^-7 of a number, is not seen.
    """
    ordered = grid("F32").ordered
    shares = []
    for counts in (one, other):
        merged = counts.copy()
        merged[0] += merged[NEGATIVE_ZERO]
        merged[NEGATIVE_ZERO] = 0
        shares.append(np.cumsum(merged[ordered]) / merged.sum())
    return float(np.abs(shares[0] - shares[1]).max())


def ratio(one: float, other: float) -> float | None:
    """Return a quotient, and None where there is none."""
    found = one / other if other else math.nan
    return found if math.isfinite(found) else None


def decibels(signal: float, noise: float) -> float | None:
    """Return how far one sum of squares is above another."""
    found = ratio(signal, noise)
    return 10 * math.log10(found) if found else None


def _rows(block: Block, first: int, last: int) -> Block:
    part = as_array(block)[first:last]
    return Block(block.dtype, part.shape, part.data.cast("B"))


def _pearson(n: int, products: float, one: float, other: float, squares: float, others: float) -> float | None:
    spread = n * squares - one**2, n * others - other**2
    # What is left where all are of one size is rounding.
    if spread[0] <= 1e-12 * n * squares or spread[1] <= 1e-12 * n * others:
        return None
    return ratio(n * products - one * other, math.sqrt(spread[0]) * math.sqrt(spread[1]))


def _kurtosis(n: int, total: float, squares: float, third: float, fourth: float) -> float | None:
    mean, square = total / n, squares / n
    variance = square - mean**2
    if variance <= 1e-12 * square:
        return None
    found = ratio(fourth / n - 4 * mean * third / n + 6 * mean**2 * square - 3 * mean**4, variance**2)
    return None if found is None else found - 3


@compiled
def _sum_own(weights: Array, quantised: Array, noise: Array, sums: Array) -> None:
    squares, noises, dot, size, noise_size, sizes = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    total, third, fourth = 0.0, 0.0, 0.0
    zeros: Any = 0
    for place in range(weights.size):
        x = weights[place]
        n = x - quantised[place]
        noise[place] = n
        product, square = x * n, n * n
        squares += x * x
        noises += square
        dot += product
        size += abs(x)
        noise_size += abs(n)
        sizes += abs(product)
        total += n
        third += square * n
        fourth += square * square
        zeros += n == 0
    sums += np.array([squares, noises, dot, size, noise_size, sizes, total, third, fourth, np.float64(zeros)])


@compiled
def _sum_between(one: Array, other: Array, noise: Array, others: Array, sums: Array) -> None:
    dot, products, apart, delta, kept, quantised = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for place in range(one.size):
        n, m = noise[place], others[place]
        change = other[place] - one[place]
        distance = m - n
        left = change - distance
        product = n * m
        dot += product
        products += product * product
        apart += distance * distance
        delta += change * change
        kept += change * left
        quantised += left * left
    sums += np.array([dot, products, apart, delta, kept, quantised])
