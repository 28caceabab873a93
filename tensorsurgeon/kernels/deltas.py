"""What lies between two tensors: the sum of squares of their difference, and low-rank factors of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from tensorsurgeon.kernels.arrays import as_float32
from tensorsurgeon.kernels.lowrank import (
    Factors,
    Matrix,
    Tensor,
    balanced,
    exact_factors,
    is_exact,
    krylov_factors,
    squared_error,
    sum_of_squares,
    tile_rows,
)
from tensorsurgeon.progress import Advance
from tensorsurgeon.running import Budget
from tensorsurgeon.tensor import Block, LazyTensor

GUESS = 32
"""The rank that is expected where a share is asked for."""
CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let each matrix be computed on one thread, so that sums come out the same however many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(delta: Delta, advance: Advance) -> Sums:
    """Return the sums of squares, in float64."""
    total = base = 0.0
    broken = ""
    for tuned, original in _tile_pairs(delta):
        found = sum_of_squares(tuned - original)
        if not np.isfinite(found):
            broken = "tuned" if not bool(torch.isfinite(tuned).all()) else "base"
        total += found
        base += sum_of_squares(original)
        advance((tuned.nbytes + original.nbytes) // 2)
    return Sums(total, base, broken)


def factorize(
    delta: Delta, sums: Sums, goal: Goal, rank_step: tuple[int, ...], dtype: str, seed: int, budget: Budget, device: str
) -> Pair:
    """Return factors of a delta that reach the goal; the rank is raised to the next of `rank_step`, if any is given."""
    rows, columns = delta.shape
    hint = int(goal.value) if goal.kind == "rank" else GUESS
    tile = 4 * tile_rows(columns) * columns
    side = min(delta.shape)
    whole = 4 * rows * columns
    space = 12 * (rows + columns) * min(side // 3, 16 * hint)
    decomposition = 32 * side**2
    # What does not fit is read again for each product.
    held = 2 * whole + 4 * tile <= budget.limit

    def needed(work: int) -> int:
        return 4 * tile + work + (whole if held else 0)

    if not is_exact(delta.shape, hint):
        with budget.reserve(needed(space)):
            matrix = _matrix(delta, sums, held, device)
            factors = krylov_factors(matrix, goal.enough, hint, seed, device)
            if factors:
                return _stored(matrix, factors, rank_step, dtype)
    with budget.reserve(needed(decomposition)):
        matrix = _matrix(delta, sums, held, device)
        return _stored(matrix, exact_factors(matrix, goal.enough), rank_step, dtype)


def _matrix(delta: Delta, sums: Sums, held: bool, device: str) -> Matrix:
    def tiles() -> Iterator[Tensor]:
        for tuned, base in _tile_pairs(delta):
            yield tuned.sub_(base).to(device)
        if delta.padded:
            yield torch.zeros(delta.padded, delta.shape[1], device=device)

    if not held:
        return Matrix(delta.shape, tiles, sums.delta)
    kept = list(tiles())
    return Matrix(delta.shape, lambda: kept, sums.delta)


def _stored(matrix: Matrix, factors: Factors, rank_step: tuple[int, ...], dtype: str) -> Pair:
    found = len(factors.squares)
    rank = next((step for step in rank_step if step >= found), found)
    left, right = balanced(factors, rank, DTYPES[dtype])
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
    return torch.from_numpy(as_float32(block)).reshape(-1, columns)


def as_block(tensor: Tensor, dtype: str) -> Block:
    """Return a tensor as rows of a dtype, rounded to nearest, ties to even."""
    made = tensor.to(CODES[dtype]).contiguous().cpu()
    data: Any = made.view(torch.uint8).numpy().data
    return Block(dtype, tuple(tensor.shape), data.cast("B"))


def _block(tensor: Tensor) -> Block:
    return as_block(tensor, "BF16" if tensor.dtype == torch.bfloat16 else "F32")
