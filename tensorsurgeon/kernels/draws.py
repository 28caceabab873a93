"""Random draws by place: whole numbers and standard normals that depend on a key and a place, and on nothing else.

Draw `i` of a key is half of `mix(key + (i // 2 + 1) * GAMMA)`: the lower 32 bits for an even `i`, the upper for an odd
one. `mix` is the finalizer of SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA
2014). It maps 64 bits one to one, and every place is reached at once, so blocks, threads and shards change nothing.

A normal is the inverse of the normal distribution at a draw: bit 31 is the sign, and the other 31 bits `v` give the
probability `(v + 1/2) / 2^32` of what lies beyond, down to 6.2 standard deviations. It is split hierarchically, by
octaves towards the tail and evenly within each (Cheung, Lee, Luk and Villasenor, Hardware Generation of Arbitrary
Random Number Distributions From Uniform Distributions Via the Inversion Method, IEEE TVLSI 2007): exponent and upper
bits of the float32 of `v + 1/2` are the segment, the lower bits the argument of its cubic polynomial. Only IEEE sums
and products of float32 take part, and the table is made with decimal numbers: every machine gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache
from statistics import NormalDist
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from tensorsurgeon.kernels.arrays import Array
from tensorsurgeon.kernels.compiling import compiled

GAMMA = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

SPLIT = 4
"""Bits that tell the segments of an octave apart."""
REST = 23 - SPLIT
"""Bits of a float32 that tell places within a segment apart."""
LOWEST = (126 << 23) >> REST
"""The first segment: that of the exponent of 1/2."""
SEGMENTS = 32 << SPLIT
"""Segments from 1/2 to 2^31, the last of which is the median."""
CHECKSUM = "417f3e77192faa5e1062e3fccb962f4fd80f38b0cddc233dbb0688676d27635d"
"""SHA-256 of the table's bytes."""

Floats = npt.NDArray[np.float32]


def key_of(seed: int, *words: str) -> np.uint64:
    """Return a key of 64 bits for draws that a seed and some words stand for."""
    text = "\0".join((str(seed), *words))
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


@cache
def normal_table() -> Floats:
    """Return the coefficients of each segment's polynomial, from the constant up: (4, SEGMENTS + 1).

    Each goes through the inverse at the four Chebyshev nodes of its segment.

    Raises:
        AssertionError: where it comes out otherwise than everywhere else.
    """
    table = np.zeros((4, SEGMENTS + 1), np.float32)
    with localcontext(prec=40):
        root = Decimal(2).sqrt()
        near, far = (2 - root).sqrt() / 2, (2 + root).sqrt() / 2
        nodes = [(1 + cosine) / 2 for cosine in (-far, -near, near, far)]
        for segment in range(SEGMENTS):
            exponent, upper = divmod(segment, 1 << SPLIT)
            begin = Decimal((1 << SPLIT) + upper) * Decimal(2) ** (exponent - 1 - SPLIT)
            width = Decimal(2) ** (exponent - 1 - SPLIT)
            heights = [_inverse((begin + width * node) / 2**32) for node in nodes]
            # The argument is the rest as a whole number.
            polynomial = _through(nodes, heights)
            table[:, segment] = [float(it / Decimal(2) ** (REST * power)) for power, it in enumerate(polynomial)]
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    assert digest == CHECKSUM, f"the table of the normal distribution has come out as {digest}"
    return table


def _inverse(tail: Decimal) -> Decimal:
    """Return how far out a probability lies beyond, by a step of Newton and Halley from a float64's answer."""
    start = Decimal(-NormalDist().inv_cdf(float(tail)))
    density = (-start * start / 2).exp() / (2 * _PI).sqrt()
    step = (_beyond(start, density) - tail) / density
    return start + step / (1 - start * step / 2)


_PI = Decimal("3.14159265358979323846264338327950288419716939937510")


def _beyond(x: Decimal, density: Decimal) -> Decimal:
    """Return the probability beyond `x`: `1/2 - density * (x + x^3/3 + x^5/15 + ...)` (Marsaglia, 2004)."""
    total = term = x
    divisor = 1
    while abs(term) > Decimal("1e-36"):
        divisor += 2
        term *= x * x / divisor
        total += term
    return Decimal("0.5") - density * total


def _through(nodes: list[Decimal], heights: list[Decimal]) -> list[Decimal]:
    """Return the coefficients, from the constant up, of the polynomial through some points: divided differences."""
    differences = list(heights)
    for order in range(1, len(nodes)):
        for place in range(len(nodes) - 1, order - 1, -1):
            span = nodes[place] - nodes[place - order]
            differences[place] = (differences[place] - differences[place - 1]) / span
    polynomial = [Decimal(0)]
    for node, difference in zip(reversed(nodes), reversed(differences), strict=True):
        shifted = [Decimal(0), *polynomial]
        polynomial = [high - node * low for high, low in zip(shifted, [*polynomial, Decimal(0)], strict=True)]
        polynomial[0] += difference
    return polynomial[: len(nodes)]


def draws_plainly(key: np.uint64, start: int, count: int) -> npt.NDArray[np.uint32]:
    """Return draws `start` and on, in the plain way that the formula states."""
    places = np.arange(start, start + count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = key + (places // np.uint64(2) + np.uint64(1)) * np.uint64(GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
        z = z ^ (z >> np.uint64(31))
    return np.where(places % 2, z >> np.uint64(32), z & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def normals_plainly(draws: npt.NDArray[np.uint32]) -> Floats:
    """Return the standard normals of draws, in the plain way that the formula states."""
    bits = ((draws & np.uint32(0x7FFFFFFF)).astype(np.float32) + np.float32(0.5)).view(np.uint32)
    c0, c1, c2, c3 = normal_table()[:, (bits >> REST) - LOWEST]
    t = (bits & np.uint32((1 << REST) - 1)).astype(np.float32)
    magnitude = ((c3 * t + c2) * t + c1) * t + c0
    return np.where(draws >> 31, -magnitude, magnitude).astype(np.float32)


def normals(key: np.uint64, start: int, count: int) -> Floats:
    """Return standard normals `start` and on of a key."""
    made = np.empty(count, np.float32)
    _normals(key, start, made, normal_table())
    return made


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of loops into each loop that calls it."""
    return numba.njit(nogil=True, inline="always")(function)  # type: ignore[no-any-return]


@inlined
def mix(key: Any, place: Any) -> Any:
    """Return the 64 bits of two neighbours, `place` being half of the first one's."""
    z = key + np.uint64(place + 1) * np.uint64(GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))


@inlined
def fill_draws(key: Any, first: Any, count: Any, draws: Any) -> None:
    """Put draws into a vector: from `first` on, which is even, `count` of them or one more."""
    half = first // 2
    for pair in range((count + 1) // 2):
        z = mix(key, half + pair)
        draws[2 * pair] = np.uint32(z & np.uint64(0xFFFFFFFF))
        draws[2 * pair + 1] = np.uint32(z >> np.uint64(32))


@inlined
def as_normals(draws: Any, count: Any, made: Any, table: Any) -> None:
    """Put the normals of draws into a vector."""
    bits = made.view(np.uint32)
    c0, c1, c2, c3 = table[0], table[1], table[2], table[3]
    for i in range(count):
        made[i] = np.float32(np.int32(draws[i] & np.uint32(0x7FFFFFFF))) + np.float32(0.5)
    for i in range(count):
        at = np.uint64((bits[i] >> np.uint32(REST)) - np.uint32(LOWEST))
        t = np.float32(np.int32(bits[i] & np.uint32((1 << REST) - 1)))
        made[i] = ((c3[at] * t + c2[at]) * t + c1[at]) * t + c0[at]
    for i in range(count):
        bits[i] ^= draws[i] & np.uint32(0x80000000)


CHUNK = 1024
"""Elements in hand at once, so that what is drawn for them stays in the first-level cache; an even number."""


@compiled
def _normals(key: Any, start: int, made: Array, table: Array) -> None:
    draws = np.empty(CHUNK + 2, np.uint32)
    chunk = np.empty(CHUNK + 2, np.float32)
    for begin in range(0, made.size, CHUNK):
        count = min(CHUNK, made.size - begin)
        odd = (start + begin) % 2
        fill_draws(key, start + begin - odd, count + odd, draws)
        as_normals(draws, count + odd, chunk, table)
        made[begin : begin + count] = chunk[odd : odd + count]
