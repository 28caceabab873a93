"""Take a subspace out of matrices, block by block, or keep nothing else, in float32.

With orthonormal columns U a matrix becomes `m W + s U U'W`: `m = 1, s = -a` takes (1 a projection, 2 a reflection),
`m = 0, s = 1` keeps. What lies the other way round becomes `m W + s W U U'`. A vector w of squared length q, of which c
lies in the subspace, then has the squared length `m^2 q + (2 m s + s^2) c`; where lengths are kept it gets q back.

Products are made of tiles whose size the width decides, each on one thread: bytes depend on neither blocks nor threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from tensorsurgeon.kernels.archives import Numbers
from tensorsurgeon.kernels.arrays import as_float32
from tensorsurgeon.kernels.casting import TORCH, as_block, round_into
from tensorsurgeon.kernels.deltas import one_thread_each
from tensorsurgeon.tensor import Block, Pieces

TILE = 2**18
"""Elements of a tile, about: few enough to stay in the cache while they are used twice."""
TALLEST = 128
GONE = 1e-5
"""Share of a vector's squared length under which what is left of it is taken for rounding, and gets no length back."""

Tensor = torch.Tensor


class Change(NamedTuple):
    """How a matrix changes: `m W + s U U'W`, with the lengths of its output vectors kept or not.

    `vectors` are U', in float32.
    """

    vectors: Tensor
    m: float
    s: float
    preserve: bool

    def after(self, squares: Tensor, inside: Tensor) -> Tensor:
        """Return squared lengths of changed vectors, before they get their own back."""
        return (self.m**2 * squares + (2 * self.m * self.s + self.s**2) * inside).clamp(min=0)

    def factors(self, squares: Tensor, inside: Tensor) -> Tensor:
        """Return what vectors are multiplied by to have the lengths that they had; one that is gone stays so."""
        left = self.after(squares, inside)
        gone = left <= GONE * squares
        return torch.where(gone, 0.0, (squares / torch.where(gone, 1.0, left)).sqrt())


def make_change(vectors: Numbers, m: float, s: float, preserve: bool) -> Change:
    """Return the change for orthonormal rows of float64."""
    return Change(torch.from_numpy(vectors).float().contiguous(), m, s, preserve)


class Sums(NamedTuple):
    """Sums of squares of a matrix: of all of it, of what lies in the subspace, and of all after the change."""

    before: float
    inside: float
    after: float


def tile_rows(width: int) -> int:
    """Return how many rows are multiplied at once, a power of two."""
    rows = max(1, TILE // max(1, width))
    return min(TALLEST, 1 << (rows.bit_length() - 1))


@one_thread_each()
def reduce_outputs(pieces: Pieces, change: Change) -> Block:
    """Return U'W and below it the squared length of each column of W (out, in), in float32."""
    made: Tensor | None = None
    for start, block in pieces:
        step = tile_rows(block.shape[1])
        for begin, tile in _tiles(block, step):
            if made is None:
                made = torch.zeros(len(change.vectors) + 1, tile.shape[1], dtype=torch.float64)
            place = slice(start + begin, start + begin + len(tile))
            made[:-1] += change.vectors[:, place] @ tile
            made[-1] += tile.square().sum(0)
    assert made is not None
    return as_block(made, "F32")


def sums_of_outputs(reduced: Block, change: Change) -> Sums:
    """Return the sums of a matrix from what `reduce_outputs` gave."""
    numbers = torch.from_numpy(as_float32(reduced)).double()
    squares, inside = numbers[-1], numbers[:-1].square().sum(0)
    return _sums(squares, inside, change)


@one_thread_each()
def project_outputs(start: int, weight: Block, reduced: Block, change: Change, dtype: str) -> Block:
    """Return rows `start` and on of a changed W (out, in), from what `reduce_outputs` gave."""
    numbers = torch.from_numpy(as_float32(reduced))
    squares, parts = numbers[-1], numbers[:-1]
    factors = change.factors(squares, parts.square().sum(0)) if change.preserve else None
    made = torch.empty(weight.shape, dtype=TORCH[dtype])
    for begin, tile in _tiles(weight, tile_rows(weight.shape[1])):
        rows = change.vectors[:, start + begin : start + begin + len(tile)].T.contiguous()
        result = torch.addmm(tile, rows, parts, beta=change.m, alpha=change.s)
        if factors is not None:
            result *= factors
        round_into(made[begin : begin + len(tile)].view(-1), result.view(-1), dtype)
    return as_block(made, dtype)


@one_thread_each()
def project_rows(weight: Block, change: Change, dtype: str) -> Block:
    """Return changed vectors, each a row of the last dimension."""
    made = torch.empty(weight.shape, dtype=TORCH[dtype])
    # Matrix by matrix: tiles of stacked ones would else lie otherwise in other blocks.
    for matrix, results in zip(_matrices(weight), _planes(made), strict=True):
        for begin, tile in _tiles(matrix, tile_rows(weight.shape[-1])):
            inside = tile @ change.vectors.T
            result = torch.addmm(tile, inside, change.vectors, beta=change.m, alpha=change.s)
            if change.preserve:
                result *= change.factors(tile.square().sum(1), inside.square().sum(1))[:, None]
            round_into(results[begin : begin + len(tile)].view(-1), result.view(-1), dtype)
    return as_block(made, dtype)


@one_thread_each()
def sums_of_rows(pieces: Pieces, change: Change) -> Sums:
    """Return the sums of vectors that are rows of the last dimension."""
    found = torch.zeros(3, dtype=torch.float64)
    for _, block in pieces:
        for matrix in _matrices(block):
            for _, tile in _tiles(matrix, tile_rows(block.shape[-1])):
                inside = (tile @ change.vectors.T).square().sum(1).double()
                sums = _sums(tile.square().sum(1).double(), inside, change)
                found += torch.tensor(sums, dtype=torch.float64)
    return Sums(*found.tolist())


def project_experts(weight: Block, change: Change, dtype: str) -> Block:
    """Return changed matrices (out, in), one for each expert."""
    made = [
        project_outputs(0, expert, reduce_outputs(iter([(0, expert)]), change), change, dtype)
        for expert in _matrices(weight)
    ]
    return Block(dtype, weight.shape, b"".join(it.data for it in made))


def sums_of_experts(pieces: Pieces, change: Change) -> Sums:
    """Return the sums of matrices (out, in), one for each expert."""
    found = torch.zeros(3, dtype=torch.float64)
    for _, block in pieces:
        for expert in _matrices(block):
            reduced = reduce_outputs(iter([(0, expert)]), change)
            found += torch.tensor(sums_of_outputs(reduced, change), dtype=torch.float64)
    return Sums(*found.tolist())


def _sums(squares: Tensor, inside: Tensor, change: Change) -> Sums:
    after = change.after(squares, inside)
    if change.preserve:
        after = after * change.factors(squares, inside).square()
    return Sums(float(squares.sum()), float(inside.sum()), float(after.sum()))


def _tiles(block: Block, step: int) -> Iterator[tuple[int, Tensor]]:
    """Yield tiles of rows in float32, each with the number of its first."""
    row = len(block.data) // max(1, block.shape[0])
    view = memoryview(block.data)
    for begin in range(0, block.shape[0], step):
        end = min(begin + step, block.shape[0])
        part = Block(block.dtype, (end - begin, *block.shape[1:]), view[begin * row : end * row])
        yield begin, torch.from_numpy(as_float32(part))


def _matrices(block: Block) -> Iterator[Block]:
    """Yield stacked matrices one by one; a vector is a matrix of one row."""
    count = block.shape[0] if len(block.shape) > 2 else 1
    shape = block.shape[1:] if len(block.shape) > 2 else block.shape if len(block.shape) == 2 else (1, *block.shape)
    size = len(block.data) // max(1, count)
    view = memoryview(block.data)
    for number in range(count):
        yield Block(block.dtype, shape, view[number * size : (number + 1) * size])


def _planes(tensor: Tensor) -> Tensor:
    """Return stacked matrices of which `_matrices` gives the blocks."""
    return tensor.view(-1, *((1, *tensor.shape)[-2:]))
