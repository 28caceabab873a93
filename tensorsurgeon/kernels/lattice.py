"""Tell whether plain weights were once E4M3 codes, and whether every block was multiplied by its own scale.

A code is `(8 + m) 2^e` with m from 0 to 7, so codes times one scale have no more than eight significands, whatever
dtype they are rounded to: trained weights have all 128 of BF16. A quantiser that makes `s = absmax / 448` of each block
lets every block reach the same code, `448 s`, and where weights are smooth, products with the right scales are so
across the edges of blocks. A dequantiser that got block or scale wrong breaks one of the three.

Source: arXiv:2209.05433 for E4M3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SIDE, WIDTH = 256, 512
"""Rows and columns of a probe."""
BLOCKS = (256, 128, 64, 32)
FEW = 6
"""Numbers of a block that share its largest magnitude, at most, unless they were clipped: a block has one or two."""
CORNER = 32
"""Side of the part of a probe that is looked at first."""
SIGNIFICANDS = 8
"""Significands of E4M3, those of subnormal codes among them."""
OCTAVES = 2.0**6
"""How far below the largest magnitude of a tile numbers still have all their bits, in float16 too."""

MARKS = 1024
"""Significands that are told apart."""

Numbers = npt.NDArray[np.float64]
Tile = tuple[slice, slice]


class Lattice(NamedTuple):
    """What a probe of E4M3 codes times scales shows.

    Attributes:
        block: Side of the largest tiles with one scale each, of 32, 64, 128 and 256.
        bounded: Whether larger tiles were looked at, and have several scales.
        top: How many of those tiles have a largest magnitude of the same code, by its significand, such as 448.
        tiles: Number of those tiles.
        equal: How many tiles of half the side reach the same magnitude as the tile that they are part of, and hardly
            any number of theirs does: blocks of codes that had scales of their own.
        halves: Number of tiles of half the side.
        jump: How much more neighbouring strips differ in size across edges of tiles than inside of them, as a ratio of
            mean squares of logarithms; the lesser of both directions.
        least, largest: The least and the greatest of the tiles' largest magnitudes.
        unscaled: Whether the numbers are E4M3 codes themselves.
    """

    block: int
    bounded: bool
    top: int
    tiles: int
    equal: int
    halves: int
    jump: float
    least: float
    largest: float
    unscaled: bool


def may_be_lattice(corner: Numbers) -> bool:
    """Tell from a few numbers, which costs next to nothing, whether a probe could show anything."""
    sizes = np.abs(corner)
    if min(sizes.shape) < CORNER or not np.isfinite(sizes).all():
        return False
    # Four bits on a uniform grid have as few significands, but only eight magnitudes.
    return len(_significands(sizes, _marks(sizes))) <= SIGNIFICANDS and len(np.unique(sizes)) > 2 * SIGNIFICANDS


def find_lattice(numbers: Numbers) -> Lattice | None:
    """Return what a probe shows whose first row and column begin a block, or None for numbers that were never E4M3."""
    sizes = np.abs(numbers)
    if not may_be_lattice(sizes[:CORNER, :CORNER]) or not np.isfinite(sizes).all():
        return None
    marks = _marks(sizes)
    fitting = [side for side in BLOCKS if side <= min(sizes.shape)]
    for side in fitting:
        tiles = list(_tiles(sizes.shape, side))
        held = [_significands(sizes[tile], marks[tile]) for tile in tiles]
        if sum(len(it) <= SIGNIFICANDS for it in held) >= 0.95 * len(tiles):
            break
    else:
        return None
    largest = [float(sizes[tile].max()) for tile in tiles]
    codes = Counter(_top_code(it, top) for it, top in zip(held, largest, strict=True))
    halves = list(_tiles((side, side), side // 2))
    reached = [
        int((sizes[tile][half] == top).sum()) for tile, top in zip(tiles, largest, strict=True) for half in halves
    ]
    return Lattice(
        side,
        side < fitting[0],
        codes.most_common(1)[0][1],
        len(tiles),
        sum(0 < count <= FEW for count in reached),
        len(reached),
        min(_jump(sizes, min(side, 128)), _jump(sizes.T, min(side, 128))),
        min(largest),
        max(largest),
        bool((np.concatenate(held) * SIGNIFICANDS % 1 == 0).all()),
    )


def _tiles(shape: tuple[int, ...], side: int) -> Iterator[Tile]:
    for r in range(0, shape[0] - side + 1, side):
        for c in range(0, shape[1] - side + 1, side):
            yield slice(r, r + side), slice(c, c + side)


def _marks(sizes: Numbers) -> npt.NDArray[np.int16]:
    """Return the first ten bits behind the point of each significand, those of 1.0 up to 2.0."""
    return ((2 * np.frexp(sizes)[0] - 1) * MARKS).astype(np.int16)


def _significands(sizes: Numbers, marks: npt.NDArray[np.int16]) -> Numbers:
    """Return the different significands of a tile, from 1 up to 2."""
    seen = np.zeros(MARKS, np.bool_)
    seen[marks[sizes >= max(sizes.max() / OCTAVES, 1e-300)]] = True
    return 1 + np.flatnonzero(seen) / MARKS


def _top_code(significands: Numbers, largest: float) -> int:
    """Return the significand, from 8 to 15, of the largest magnitude's code; 0 where several would fit, or none."""
    fitting = []
    for code in range(SIGNIFICANDS, 2 * SIGNIFICANDS) if largest else ():
        codes = np.frexp(significands * (code / largest))[0] * 2 * SIGNIFICANDS
        # Rounding to BF16 moves significands by less than a hundredth of them; neighbours are a fifteenth apart.
        if (np.abs(codes - np.round(codes)) <= 0.01 * codes).all():
            fitting.append(code)
    return fitting[0] if len(fitting) == 1 else 0


def _jump(sizes: Numbers, side: int) -> float:
    """Return how much more strips differ across the edges that lie every `side` columns than elsewhere."""
    strip = side // 4
    count = sizes.shape[1] // strip
    rows = sizes.shape[0] // side
    if count < 5 or not rows:
        return 0.0
    squares = sizes[: rows * side, : count * strip].reshape(rows, side, count, strip) ** 2
    steps = np.diff(np.log(squares.mean((1, 3)) + 1e-300), axis=1) ** 2
    at_edge = np.arange(1, count) % 4 == 0
    inside = float(steps[:, ~at_edge].mean())
    return float(steps[:, at_edge].mean()) / inside if inside else 0.0
