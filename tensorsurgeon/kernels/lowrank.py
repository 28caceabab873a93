"""Leading singular vectors of a matrix that is read in tiles of rows.

Block Krylov iteration with Rayleigh-Ritz: from a random block the space spanned by X'Y, (X'X)X'Y, ... grows until the
squared singular values found in it are those of X to the wanted precision (Musco and Musco, "Randomized Block Krylov
Methods for Stronger and Faster Approximate Singular Value Decomposition", NeurIPS 2015). Flat spectra, on which a
fixed number of power iterations is one or two per cent off, only take more steps. Where the space would become nearly
the whole one, the eigenvectors of the Gram matrix in float64 are exact and cost less.

Sums run over the same tiles whatever the memory, on one thread: the factors have the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

TILE = 2**20
"""Elements of a tile of rows: few enough to stay in the cache while they are used twice."""
STRIPE = 1024
"""Columns of a wide matrix that are taken to float64 at once."""
EXCESS = 2.5e-4
"""How much larger the error may be than the least possible, relatively, as far as the iteration can foresee."""
SMALL = 384
"""Matrices whose shorter side is no longer than this are decomposed exactly at once."""
NOISE = 1e-11
"""Share of all squares that is taken for rounding."""

Tensor = torch.Tensor
Enough = Callable[[Tensor, float], int | None]
"""Takes squared singular values found so far, in descending order, and the sum of all; gives the rank, or None."""


class Matrix(NamedTuple):
    """A matrix of float32 as tiles of rows, which may be read anew each time, and the sum of its squares."""

    shape: tuple[int, int]
    tiles: Callable[[], Iterable[Tensor]]
    total: float

    def times(self, other: Tensor) -> Tensor:
        """Return X other."""
        return torch.cat([tile @ other for tile in self.tiles()])

    def transposed_times(self, other: Tensor) -> Tensor:
        """Return X' other."""
        made = torch.zeros(self.shape[1], other.shape[1], device=other.device)
        begin = 0
        for tile in self.tiles():
            made += tile.T @ other[begin : begin + len(tile)]
            begin += len(tile)
        return made

    def image(self, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return X other and X'X other, in one pass."""
        images = []
        mapped = torch.zeros_like(other)
        for tile in self.tiles():
            images.append(tile @ other)
            mapped += tile.T @ images[-1]
        return torch.cat(images), mapped


class Factors(NamedTuple):
    """X is about `left @ right.T`: one has orthonormal columns, the other those times the singular values.

    `weighted` tells whether that is the left. `squares` are the squared singular values; `slack` is the most by which
    a better choice of as many vectors could raise their sum, provided that no direction was missed altogether.
    """

    left: Tensor
    right: Tensor
    weighted: bool
    squares: Tensor
    slack: float


def tile_rows(columns: int) -> int:
    """Return the number of rows of a tile: whole blocks of block FP8, where there is room for one."""
    rows = max(1, TILE // max(1, columns))
    return rows // 128 * 128 or rows


def is_exact(shape: tuple[int, int], hint: int) -> bool:
    """Tell whether a matrix is decomposed exactly at once; `hint` is the rank that is expected, or a guess at it."""
    return min(shape) <= SMALL or 4 * hint >= min(shape)


def balanced(factors: Factors, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return B (rows, rank) and A (rank, columns) with B A = left right', the singular values shared evenly.

    Columns beyond those that were found are zero.
    """
    norms = factors.squares.clamp(min=0).sqrt()
    kept = norms > norms[:1] * NOISE**0.5
    roots = torch.where(kept, norms, torch.ones_like(norms)).sqrt().float()
    left = (factors.left / roots if factors.weighted else factors.left * roots)[:, kept]
    right = (factors.right * roots if factors.weighted else factors.right / roots)[:, kept]
    missing = rank - left.shape[1]
    pad = torch.nn.functional.pad
    return pad(left, (0, missing)).to(dtype), pad(right, (0, missing)).T.contiguous().to(dtype)


def squared_error(matrix: Matrix, left: Tensor, right: Tensor) -> float:
    """Return the sum of squares of X - left @ right, of the factors as they are stored."""
    begin, found = 0, 0.0
    left, right = left.float(), right.float()
    for tile in matrix.tiles():
        found += quick_squares(tile - left[begin : begin + len(tile)] @ right)
        begin += len(tile)
    return found


def sum_of_squares(tile: Tensor) -> float:
    """Return the sum of squares, summed in float64."""
    return float(torch.linalg.vector_norm(tile, dtype=torch.float64)) ** 2


def quick_squares(tile: Tensor) -> float:
    """Return the sum of squares, summed in float32 by the tile: to six digits or so."""
    flat = tile.reshape(-1)
    return float(torch.dot(flat, flat))


def gram_matrix(matrix: Matrix) -> Tensor:
    """Return X X' or X'X, whichever is smaller, in float64."""
    rows, columns = matrix.shape
    gram = torch.zeros(min(rows, columns), min(rows, columns), dtype=torch.float64)
    if rows < columns:
        for begin in range(0, columns, STRIPE):
            exact = torch.cat([tile[:, begin : begin + STRIPE] for tile in matrix.tiles()]).double()
            gram = gram.to(exact.device).addmm_(exact, exact.T)
    else:
        for tile in matrix.tiles():
            exact = tile.double()
            gram = gram.to(exact.device).addmm_(exact.T, exact)
    return gram


def exact_factors(matrix: Matrix, enough: Enough) -> Factors:
    """Return factors of the rank that is enough, by the Gram matrix of the shorter side, in float64."""
    rows, columns = matrix.shape
    values, vectors = torch.linalg.eigh(gram_matrix(matrix))
    squares = values.flip(0).clamp(min=0)
    rank = enough(squares, matrix.total) or len(squares)
    basis = vectors.flip(1)[:, :rank].float()
    if rows < columns:
        return Factors(basis, matrix.transposed_times(basis), False, squares[:rank], 0.0)
    return Factors(matrix.times(basis), basis, True, squares[:rank], 0.0)


def krylov_factors(matrix: Matrix, enough: Enough, hint: int, seed: int, device: str = "cpu") -> Factors | None:
    """Return factors of the rank that is enough, or None where a Krylov space of a third of the dimensions is not."""
    rows, columns = matrix.shape
    width = min(-(-hint // 32) * 32, 128)
    generator = torch.Generator().manual_seed(seed)

    def random_block() -> Tensor:
        return matrix.image(torch.randn(columns, width, generator=generator).to(device))[1]

    following = torch.linalg.qr(random_block())[0]
    basis, images = following[:, :0], following.new_zeros(rows, 0)
    # What X'X makes of the newest columns, which the space does not hold yet.
    pending = basis
    gram = torch.zeros(0, 0, dtype=torch.float64, device=device)
    sums: list[float] = []
    confirmed = 0.0
    while basis.shape[1] + following.shape[1] <= min(rows, columns) // 3:
        image, mapped = matrix.image(following)
        side = _gram(images, image)
        gram = torch.cat([torch.cat([gram, side], 1), torch.cat([side.T, _gram(image, image)], 1)])
        basis, images = torch.cat([basis, following], 1), torch.cat([images, image], 1)
        pending = torch.cat([pending, mapped], 1)
        following, coupling = torch.linalg.qr(orthogonal_to(basis, pending))
        # What was nearly nothing has been made as long as the rest, and its rounding with it.
        following = torch.linalg.qr(orthogonal_to(basis, following))[0]
        values, vectors = torch.linalg.eigh(gram)
        squares, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        exhausted = matrix.total - float(squares.sum()) <= NOISE * matrix.total
        rank = enough(squares, matrix.total) or (len(squares) if exhausted else None)
        if rank:
            sums.append(float(squares[:rank].sum()))
            residual = coupling.double() @ vectors[-pending.shape[1] :, :rank]
            slack = float(torch.linalg.matrix_norm(residual, "nuc"))
            missing = _missing(residual, squares, rank)
            if exhausted or _converged(sums, slack, missing, matrix.total):
                # A space that X'X maps into itself may lack directions all the same, where more singular values are
                # equal than a block has columns: it must not gain by another random block either.
                known = exhausted or rank <= width or sums[-1] - confirmed <= _allowed(sums[-1], matrix.total) / 4
                if known:
                    chosen = vectors[:, :rank].float()
                    return Factors(images @ chosen, basis @ chosen, True, squares[:rank], 0.0 if exhausted else slack)
                confirmed, sums = sums[-1], []
                following = torch.linalg.qr(orthogonal_to(basis, random_block()))[0]
                continue
        pending = pending[:, :0]
    return None


def orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """Return what of a block is orthogonal to the basis; twice, as once leaves rounding."""
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
    return block


def _missing(residual: Tensor, squares: Tensor, rank: int) -> float:
    """Return about how much the sum of squares lacks: `|r|^2 / (theta - next)` of each vector, and at most `|r|`."""
    lengths = torch.linalg.vector_norm(residual, dim=0)
    following = squares[rank] if len(squares) > rank else squares[rank - 1]
    gaps = (squares[:rank] - following).clamp(min=1e-300)
    return float(torch.minimum(lengths, lengths**2 / gaps).sum())


def _converged(sums: list[float], slack: float, missing: float, total: float) -> bool:
    """Tell whether the sum of squares can grow by no more than what the wanted precision of the error allows.

    The residual bounds that, or tells about how much it is while the bound is near; or the gains, which shrink at
    least geometrically, add up to too little.
    """
    allowed = _allowed(sums[-1], total)
    if slack <= allowed or (missing <= allowed / 8 and slack <= 16 * allowed):
        return True
    if len(sums) < 3:
        return False
    gain, before = sums[-1] - sums[-2], max(sums[-2] - sums[-3], 1e-300)
    ratio = min(max(gain / before, 0.0), 0.95)
    return gain * ratio / (1 - ratio) <= allowed / 4


def _allowed(found: float, total: float) -> float:
    """Return by how much the sum of squares may be too small for the wanted precision of the error."""
    return 2 * EXCESS * max(total - found, 0.0) + 1e-9 * total


def _gram(one: Tensor, other: Tensor) -> Any:
    """Return one' other, summed in float64."""
    begins = range(0, len(one), 8192)
    return sum(one[begin : begin + 8192].double().T @ other[begin : begin + 8192].double() for begin in begins)
