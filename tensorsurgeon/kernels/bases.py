"""Orthonormal bases of subspaces, made of arrays of directions, and the angles between them; all in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.archives import Numbers

DEPENDENT = 1e-6
"""Length, beside that of the whole vector, of a part that is taken for rounding."""
ASKEW = 1e-3
"""How far products of orthonormal vectors may be off, as numbers of 16 bits round them, without a word."""
PROJECTOR = 1e-3
"""How far a projector may be off, element by element."""


class Basis(NamedTuple):
    """A subspace: `vectors` (k, width) are orthonormal; those of the `complement` are what a projector takes away.

    `changed` tells that the vectors that were given were not orthonormal, `projector` that none were given.
    """

    vectors: Numbers
    complement: bool = True
    changed: bool = False
    projector: bool = False

    def digest(self) -> str:
        """Return a SHA-256 of the vectors in float32, in hexadecimal."""
        return hashlib.sha256(self.vectors.astype("<f4").tobytes()).hexdigest()


def make_basis(array: Numbers, width: int, rank: int | None) -> Basis:
    """Return the basis that an array stands for: vectors as rows, or as columns where only that fits, or a projector.

    Raises:
        RefusedError: for what is no basis, with all reasons.
    """
    require_finite(array)
    if array.shape == (width, width) and width > 1:
        return _from_projector(array, rank)
    if not array.size:
        raise RefusedError(f"has shape {list(array.shape)}, and so no directions.")
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim == 2 and rows.shape[1] != width and rows.shape[0] == width:
        rows = rows.T
    if rows.ndim != 2 or rows.shape[1] != width:
        raise RefusedError(f"has shape {list(array.shape)}, but the residual stream is {width} wide.")
    if rank and rank > len(rows):
        raise RefusedError(f"has {len(rows)} directions, not the {rank} of rank.")
    return _orthonormal(rows[:rank])


def require_finite(array: Numbers, name: str = "") -> None:
    """Raise RefusedError for NaN and infinity."""
    if not np.isfinite(array).all():
        raise RefusedError(f"{name}: holds NaN or infinity." if name else "holds NaN or infinity.")


def _orthonormal(rows: Numbers) -> Basis:
    """Return a basis of the span of vectors; that of the first so many is spanned by the first so many."""
    lengths = np.linalg.norm(rows, axis=1)
    zero = [number for number, length in enumerate(lengths) if not length]
    if zero:
        raise RefusedError(*(f"direction {number} is zero." for number in zero))
    if len(rows) > rows.shape[1]:
        raise RefusedError(f"holds {len(rows)} directions of {rows.shape[1]} numbers; they depend on each other.")
    basis = np.zeros_like(rows)
    dependent = []
    for number, row in enumerate(rows / lengths[:, None]):
        left, length = _without(basis[:number], row)
        if length < DEPENDENT:
            dependent.append(f"direction {number} depends on those before it.")
        else:
            basis[number] = left
    if dependent:
        raise RefusedError(*dependent)
    off = np.abs(rows @ rows.T - np.eye(len(rows))).max()
    return Basis(basis, changed=bool(off > ASKEW))


def _without(basis: Numbers, row: Numbers) -> tuple[Numbers, float]:
    """Return what a basis leaves of a vector, with length 1, and the length that was left: a step of Gram-Schmidt.

    Done twice, which is as exact as Householder's QR (Giraud, Langou and Rozloznik, 2005). Sums are not left to LAPACK,
    whose last bits depend on the number of threads: the same file always gives the same basis.
    """
    length = 0.0
    for again in range(2):
        row = row - ((basis * row).sum(1)[:, None] * basis).sum(0)
        size = float(np.sqrt(np.square(row).sum()))
        length = length if again else size
        row = row / size if size else row
    return row, length


def _from_projector(array: Numbers, rank: int | None) -> Basis:
    """Return the basis of what a projector takes away, or of what it keeps, whichever is smaller."""
    askew = np.abs(array - array.T).max()
    off = np.abs(array @ array - array).max()
    problems = []
    if askew > PROJECTOR:
        problems.append(f"is square, but no projector: it differs from its transpose by up to {askew:.3g}.")
    if off > PROJECTOR:
        problems.append(f"is square, but no projector: it differs from its square by up to {off:.3g}.")
    if rank:
        problems.append("is a projector, whose directions have no order to take the first of; leave rank out.")
    if problems:
        raise RefusedError(*problems)
    width = len(array)
    kept = round(float(np.trace(array)))
    if kept in (0, width):
        raise RefusedError(f"is a projector that {'changes' if kept else 'leaves'} nothing.")
    complement = 2 * kept >= width
    smaller = (np.eye(width) if complement else 0) + (array + array.T) * (-0.5 if complement else 0.5)
    return Basis(_range(smaller, width - kept if complement else kept), complement, projector=True)


def _range(projector: Numbers, rank: int) -> Numbers:
    """Return an orthonormal basis of the range of a projector: each time of the column of which most is left."""
    basis = np.zeros((rank, len(projector)))
    left = np.diag(projector).copy()
    for number in range(rank):
        basis[number], _ = _without(basis[:number], projector[int(left.argmax())])
        left -= basis[number] ** 2
    return basis


def largest_angle(one: Numbers, other: Numbers) -> float:
    """Return the largest principal angle between two spaces, of orthonormal rows, in degrees.

    Cosines are the singular values of `V W'` (Bjoerck and Golub, 1973).
    """
    cosines = np.linalg.svd(one @ other.T, compute_uv=False)
    return round(float(np.degrees(np.arccos(np.clip(cosines.min(), 0, 1)))), 4)


def neighbouring_angles(bases: Sequence[Numbers]) -> list[float | None]:
    """Return for each space the largest principal angle to the next one."""
    following = [largest_angle(one, other) for one, other in pairwise(bases)]
    return [*following, None]
