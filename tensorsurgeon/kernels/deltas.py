"""What lies between two tensors: the sum of squares of their difference, and low-rank factors of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch

from tensorsurgeon.errors import UsageError
from tensorsurgeon.kernels.casting import TORCH, as_block
from tensorsurgeon.kernels.lowrank import (
    Factors,
    Matrix,
    Tensor,
    balanced,
    exact_factors,
    is_exact,
    krylov_factors,
    quick_squares,
    squared_error,
    sum_of_squares,
    tile_rows,
)
from tensorsurgeon.progress import Advance
from tensorsurgeon.running import Budget
from tensorsurgeon.tensor import Block, LazyTensor

GUESS = 32
"""The rank that is expected where a share is asked for."""


class Delta(NamedTuple):
    """The first `rows` rows of one tensor less those of another; `padded` rows of nothing follow them."""

    tuned: LazyTensor
    base: LazyTensor
    rows: int
    padded: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; more than one further dimension counts as one."""
        whole = self.rows + self.padded
        return whole, int(np.prod(self.base.shape[1:], dtype=int))

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return self.tuned.row_bytes * self.rows + self.base.row_bytes * self.rows


class Sums(NamedTuple):
    """Sums of squares of a delta and of the base, and which of the two tensors holds NaN or infinity."""

    delta: float
    base: float
    broken: str = ""


class Goal(NamedTuple):
    """How much of a delta is to be captured: a `rank`, a share of its `energy`, or a relative `error`."""

    kind: Literal["rank", "energy", "error"]
    value: float

    def enough(self, squares: Tensor, total: float) -> int | None:
        """Return the least rank that reaches the goal, or None where more singular values have to be known."""
        if self.kind == "rank":
            return int(self.value) if len(squares) >= self.value else None
        wanted = self.value if self.kind == "energy" else 1 - self.value**2
        reached = torch.nonzero(squares.cumsum(0) >= wanted * total * (1 - 1e-12))
        return int(reached[0, 0]) + 1 if len(reached) else None


class Pair(NamedTuple):
    """Low-rank factors as they are stored, `left` of (rows, rank) and `right` of (rank, columns), and what they hold.

    `captured` is the sum of squares of the singular values, `error` that of what is left, and `least` that of what
    any factors of this rank leave at least.
    """

    left: Tensor
    right: Tensor
    rank: int
    captured: float
    error: float
    least: float

    @property
    def stored(self) -> int:
        """The rank with the zeros that fill it up."""
        return self.left.shape[1]

    def blocks(self, transposed: bool) -> tuple[Block, Block]:
        """Return A and B, for a weight that is B A or the transpose of it."""
        a, b = (self.left.T, self.right.T) if transposed else (self.right, self.left)
        return _block(a), _block(b)


def require_device(device: str) -> None:
    """Raise UsageError where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: torch finds no GPU here; leave --device out to compute on the processor.")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let each matrix be computed on one thread, so that sums come out the same however many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Found(NamedTuple):
    """What was found of a delta: its sums, and factors where they were asked for and it is not zero."""

    sums: Sums
    pair: Pair | None = None


class Wish(NamedTuple):
    """How the factors of a delta are to be: how much they capture, which ranks they have, and where they are computed.

    The rank is raised to the next of `steps`, if there are any.
    """

    goal: Goal
    steps: tuple[int, ...]
    dtype: str
    seed: int
    device: str


def explore(delta: Delta, wish: Wish | None, budget: Budget, advance: Advance) -> Found:
    """Return the sums of a delta and, where there is a wish, its factors; what fits the memory is read once."""
    if wish is None:
        with budget.reserve(4 * _tile_bytes(delta)):
            return Found(_sums(delta, None, advance))
    hint = int(wish.goal.value) if wish.goal.kind == "rank" else GUESS
    rows, columns = delta.shape
    whole, tile = 4 * rows * columns, 4 * _tile_bytes(delta)
    space = 12 * (rows + columns) * min(min(rows, columns) // 3, 16 * hint)
    decomposition = 32 * min(rows, columns) ** 2
    at_once = is_exact(delta.shape, hint)
    # What does not fit is read again for each product.
    held = 2 * whole + tile <= budget.limit
    with budget.reserve(tile + (whole if held else 0) + (decomposition if at_once else space)):
        kept: list[Tensor] | None = [] if held else None
        sums = _sums(delta, kept, advance)
        if sums.broken or not sums.delta:
            return Found(sums)
        matrix = _matrix(delta, sums, kept, wish.device)
        factors = None if at_once else krylov_factors(matrix, wish.goal.enough, hint, wish.seed, wish.device)
        if factors or at_once:
            factors = factors or exact_factors(matrix, wish.goal.enough)
            return Found(sums, _stored(matrix, factors, wish.steps, wish.dtype))
    del matrix, kept
    with budget.reserve(tile + (whole if held else 0) + decomposition):
        kept = list(_tiles(delta)) if held else None
        matrix = _matrix(delta, sums, kept, wish.device)
        return Found(sums, _stored(matrix, exact_factors(matrix, wish.goal.enough), wish.steps, wish.dtype))


def _tile_bytes(delta: Delta) -> int:
    return 4 * tile_rows(delta.shape[1]) * delta.shape[1]


def _sums(delta: Delta, kept: list[Tensor] | None, advance: Advance) -> Sums:
    """Return the sums of squares, and keep the tiles where there is a list for them."""
    total = base = 0.0
    broken = ""
    for tuned, original in _tile_pairs(delta):
        base += quick_squares(original)
        difference = tuned - original
        found = sum_of_squares(difference)
        total += found
        if not np.isfinite(found):
            broken = "tuned" if not bool(torch.isfinite(tuned).all()) else "base"
        if kept is not None:
            kept.append(difference)
        advance(len(tuned) * (delta.tuned.row_bytes + delta.base.row_bytes))
    if kept is not None and delta.padded:
        kept.append(torch.zeros(delta.padded, delta.shape[1]))
    return Sums(total, base, broken)


def _tiles(delta: Delta) -> Iterator[Tensor]:
    for tuned, original in _tile_pairs(delta):
        yield tuned - original
    if delta.padded:
        yield torch.zeros(delta.padded, delta.shape[1])


def _matrix(delta: Delta, sums: Sums, kept: list[Tensor] | None, device: str) -> Matrix:
    if kept is None:
        return Matrix(delta.shape, lambda: (tile.to(device) for tile in _tiles(delta)), sums.delta)
    tiles = [tile.to(device) for tile in kept]
    return Matrix(delta.shape, lambda: tiles, sums.delta)


def _stored(matrix: Matrix, factors: Factors, rank_step: tuple[int, ...], dtype: str) -> Pair:
    found = len(factors.squares)
    rank = next((step for step in rank_step if step >= found), found)
    left, right = balanced(factors, rank, TORCH[dtype])
    captured = float(factors.squares.sum())
    least = max(matrix.total - captured - factors.slack, 0.0)
    return Pair(left, right, found, captured, squared_error(matrix, left, right), least)


def _tile_pairs(delta: Delta) -> Iterator[tuple[Tensor, Tensor]]:
    step = tile_rows(delta.shape[1])
    for start in range(0, delta.rows, step):
        stop = min(start + step, delta.rows)
        tuned, base = (_numbers(it.read(start, stop), delta.shape[1]) for it in (delta.tuned, delta.base))
        yield tuned, base


def _numbers(block: Block, columns: int) -> Tensor:
    return torch.frombuffer(block.data, dtype=TORCH[block.dtype]).float().reshape(-1, columns)


def _block(tensor: Tensor) -> Block:
    return as_block(tensor, "BF16" if tensor.dtype == torch.bfloat16 else "F32")
