"""Leading singular subspaces of several matrices that are read together, and how they lie to each other.

Block Krylov iteration with a fixed number of passes (Musco and Musco, "Randomized Block Krylov Methods for Stronger
and Faster Approximate Singular Value Decomposition", NeurIPS 2015): the spaces of all matrices grow in the same passes
over their tiles. Directions that stand out from the rest are found to many digits. Noise has a flat spectrum, of which
no leading subspace is well defined, as a gap near 0 behind the last value says: values are one to three per cent low
there, and about half of the exact subspace is found. Each matrix starts from random columns of its own: flat ones would
else be found to have the start in common.

For subspaces of p and q dimensions of R^n with orthonormal bases V and W, cosines of the principal angles are the
singular values of V'W (Bjoerck and Golub, 1973). For random ones the sum of their squares, the trace of the product of
the two projections, has

    mean = p q / n    variance = 2 p q (n - p)(n - q) / (n^2 (n - 1)(n + 2))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from tensorsurgeon.kernels.lowrank import NOISE, Matrix, Tensor, exact_factors, is_exact, orthogonal_to

SPARE = 16
"""Columns that a block has besides the rank: what it captures converges the faster for them."""
STEPS = 4
"""Blocks of a Krylov space: as many passes over the tiles are made, and one before; where it is done exactly, two
or more for each matrix."""

Tiles = Callable[[], Iterable[Sequence[Tensor]]]
"""Reads tiles of rows, the same ones each time: of each matrix one, in float32."""


class Subspace(NamedTuple):
    """Leading singular vectors of a matrix, and its singular values.

    `left` (rows, k) and `right` (columns, k) have orthonormal columns of float64; k is less than the rank that was
    asked for where the matrix has no more. `values` go one beyond k where there is one; `total` is the sum of squares.
    """

    left: Tensor
    right: Tensor
    values: list[float]
    total: float

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return self.left.shape[1]

    @property
    def gap(self) -> float | None:
        """By how much the first singular value left out is less than the last one taken: near 0 for flat spectra."""
        return 1 - self.values[self.rank] / self.values[self.rank - 1] if len(self.values) > self.rank else None

    @property
    def prominence(self) -> float:
        """The largest singular value over that of independent elements, `|X| (1/sqrt(rows) + 1/sqrt(columns))`."""
        edge = math.sqrt(self.total) * (len(self.left) ** -0.5 + len(self.right) ** -0.5)
        return float(self.values[0] / edge)


class Angles(NamedTuple):
    """Principal angles between two subspaces, in degrees, the smallest first, and what their cosines come to.

    `overlap` is the mean squared cosine, `chance` its mean for random subspaces, and `z` how many standard deviations
    of theirs lie between, if there is room for any.
    """

    angles: list[float]
    overlap: float
    chance: float
    z: float | None


def find_subspaces(
    tiles: Tiles, shape: tuple[int, int], totals: Sequence[float], rank: int, seed: int
) -> list[Subspace]:
    """Return the leading subspaces of matrices of one shape, whose sums of squares are `totals`, none of them zero."""
    width = rank + SPARE
    if is_exact(shape, width):
        return [_exact(_only(tiles, place, shape, total), rank) for place, total in enumerate(totals)]
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape[1], width, generator=generator) for _ in totals]
    _, mapped = _pass(tiles, start)
    bases = [mapped_one[:, :0] for mapped_one in mapped]
    images = [torch.zeros(shape[0], 0) for _ in totals]
    for _ in range(STEPS):
        following = [_orthonormal(basis, block) for basis, block in zip(bases, mapped, strict=True)]
        found, mapped = _pass(tiles, following)
        bases = [torch.cat([basis, block], 1) for basis, block in zip(bases, following, strict=True)]
        images = [torch.cat([image, block], 1) for image, block in zip(images, found, strict=True)]
    return [_ritz(*them, rank) for them in zip(bases, images, totals, strict=True)]


def angles_between(one: Tensor, other: Tensor) -> Angles:
    """Return the principal angles between the spaces of orthonormal columns."""
    n, p, q = len(one), one.shape[1], other.shape[1]
    cosines = torch.linalg.svdvals(one.T @ other).clamp(max=1)
    squares, fewer = float((cosines**2).sum()), min(p, q)
    variance = 2 * p * q * (n - p) * (n - q) / (n**2 * max(n - 1, 1) * (n + 2))
    z = (squares - p * q / n) / math.sqrt(variance) if variance else None
    return Angles(torch.rad2deg(torch.acos(cosines)).tolist(), squares / fewer, max(p, q) / n, z)


def energies(tiles: Tiles, place: int, total: float, inside: Sequence[Subspace]) -> list[tuple[float, float]]:
    """Return which shares of a matrix's sum of squares lie in right and in left subspaces, in one pass.

    They are `|X V|^2 / |X|^2` and `|U'X|^2 / |X|^2`; a random subspace of k of n dimensions has k / n.
    """
    sides = [(it.left.float(), it.right.float()) for it in inside]
    right = [0.0 for _ in sides]
    mapped = [torch.zeros(left.shape[1], len(columns)) for left, columns in sides]
    begin = 0
    for tile in (parts[place] for parts in tiles()):
        for number, (left, columns) in enumerate(sides):
            right[number] += float(torch.linalg.vector_norm(tile @ columns, dtype=torch.float64)) ** 2
            mapped[number] += left[begin : begin + len(tile)].T @ tile
        begin += len(tile)
    squares = [float(torch.linalg.vector_norm(it, dtype=torch.float64)) ** 2 for it in mapped]
    return [(one / total, other / total) for one, other in zip(right, squares, strict=True)]


def memory_needed(shape: tuple[int, int], rank: int, matrices: int) -> int:
    """Return the bytes that bases, their images and what is made of them take."""
    width = rank + SPARE
    if is_exact(shape, width):
        return 32 * min(shape) ** 2 + matrices * 16 * sum(shape) * rank
    return matrices * 4 * sum(shape) * (2 * STEPS * width + 4 * rank)


def _only(tiles: Tiles, place: int, shape: tuple[int, int], total: float) -> Matrix:
    return Matrix(shape, lambda: (parts[place] for parts in tiles()), total)


def _exact(matrix: Matrix, rank: int) -> Subspace:
    factors = exact_factors(matrix, lambda squares, _: min(rank + 1, len(squares)))
    return _subspace(factors.left, factors.right, factors.squares, matrix.total, rank)


def _ritz(basis: Tensor, images: Tensor, total: float, rank: int) -> Subspace:
    """Return what a space holds of a matrix X, from its basis Q and from X Q."""
    exact = images.double()
    values, vectors = torch.linalg.eigh(exact.T @ exact)
    squares, vectors = values.flip(0).clamp(min=0)[: rank + 1], vectors.flip(1)[:, : rank + 1]
    return _subspace(exact @ vectors, basis.double() @ vectors, squares, total, rank)


def _subspace(left: Tensor, right: Tensor, squares: Tensor, total: float, rank: int) -> Subspace:
    """Return the subspace of vectors that may be longer than one and askew by rounding, the most important first."""
    known = max(1, int((squares[:rank] > NOISE * total).sum()))
    left, right = (torch.linalg.qr(side[:, :known].double())[0] for side in (left, right))
    return Subspace(left, right, squares[: known + 1].sqrt().tolist(), total)


def _pass(tiles: Tiles, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return X Q and X'X Q of each matrix X and its block Q."""
    images: list[list[Tensor]] = [[] for _ in blocks]
    mapped = [torch.zeros_like(block) for block in blocks]
    for parts in tiles():
        for place, (tile, block) in enumerate(zip(parts, blocks, strict=True)):
            images[place].append(tile @ block)
            mapped[place] += tile.T @ images[place][-1]
    return [torch.cat(them) for them in images], mapped


def _orthonormal(basis: Tensor, block: Tensor) -> Tensor:
    """Return orthonormal columns for what a block adds to a basis."""
    # What was nearly nothing is made as long as the rest by the first turn, and its rounding with it.
    for _ in range(2):
        block = torch.linalg.qr(orthogonal_to(basis, block))[0]
    return block
