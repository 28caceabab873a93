"""What lies between two blocks of numbers: sums over tiles, in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tensorsurgeon.kernels.arrays import Array, as_array, as_float32
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.tensor import Block

TILE = 65536
"""Elements whose sums are taken at once."""


class Difference(NamedTuple):
    """Sums over pairs of finite numbers x and y, and counts.

    Attributes:
        elements: Number of pairs.
        unequal: Pairs of different numbers; NaN equals NaN.
        broken: Pairs of which one is not finite and the other is not the same.
        largest: Greatest `|y - x|`.
        absolute: Sum of `|y - x|`.
        squares: Sum of `(y - x)^2`.
        first, second: Sums of `x^2` and of `y^2`.
        product: Sum of `x y`.
    """

    elements: int = 0
    unequal: int = 0
    broken: int = 0
    largest: float = 0.0
    absolute: float = 0.0
    squares: float = 0.0
    first: float = 0.0
    second: float = 0.0
    product: float = 0.0

    def statistics(self) -> dict[str, Any]:
        """Return what the sums say, by name.

            relative error = |y - x| / |x|    cosine = x y / (|x| |y|)    SNR = 10 log10(|x|^2 / |y - x|^2)

        SNR is in decibels. None stands for what is not defined, and for the SNR of equal numbers.
        """
        both = math.sqrt(self.first * self.second)
        return {
            "unequal share": self.unequal / self.elements if self.elements else None,
            "largest difference": self.largest,
            "mean difference": self.absolute / self.elements if self.elements else None,
            "relative error": math.sqrt(self.squares / self.first) if self.first else None,
            "cosine": self.product / both if both else None,
            "SNR": 10 * math.log10(self.first / self.squares) if self.squares and self.first else None,
        }


def sum_differences(parts: list[Difference]) -> Difference:
    """Return the sums of all parts together, each rounded once, so that their order does not matter."""
    if not parts:
        return Difference()
    elements, unequal, broken = (sum(part[place] for part in parts) for place in range(3))
    sums = [math.fsum(part[place] for part in parts) for place in range(4, 9)]
    return Difference(int(elements), int(unequal), int(broken), max(part.largest for part in parts), *sums)


def compare_blocks(one: Block, other: Block) -> list[Difference]:
    """Return the sums of each tile of two blocks of one shape, of dtypes F64, F32, F16 and BF16."""
    exact = "F64" in (one.dtype, other.dtype)
    x, y = (_numbers(block, exact) for block in (one, other))
    found = []
    for begin in range(0, len(x), TILE):
        counts, sums = np.zeros(2, np.int64), np.zeros(6)
        _compare(x[begin : begin + TILE], y[begin : begin + TILE], counts, sums)
        largest, *others = map(float, sums)
        found.append(Difference(min(TILE, len(x) - begin), int(counts[0]), int(counts[1]), largest, *others))
    return found


def _numbers(block: Block, exact: bool) -> Array:
    numbers: Array = as_array(block) if block.dtype == "F64" else as_float32(block)
    return (numbers.astype(np.float64, copy=False) if exact else numbers).reshape(-1)


@compiled
def _compare(x: Array, y: Array, counts: Array, sums: Array) -> None:
    unequal: Any = 0
    broken: Any = 0
    largest, absolute, squares = 0.0, 0.0, 0.0
    first, second, product = 0.0, 0.0, 0.0
    for place in range(x.size):
        a, b = np.float64(x[place]), np.float64(y[place])
        if abs(a) < np.inf and abs(b) < np.inf:
            d = b - a
            size = abs(d)
            unequal += size > 0
            largest = max(largest, size)
            absolute += size
            squares += d * d
            first += a * a
            second += b * b
            product += a * b
        elif not (a == b or (a != a and b != b)):
            unequal += 1
            broken += 1
    counts[0], counts[1] = unequal, broken
    sums[0], sums[1], sums[2] = largest, absolute, squares
    sums[3], sums[4], sums[5] = first, second, product
