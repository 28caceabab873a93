"""Add low-rank factors to rows of a weight, in float32, and round once.

Each product is made on one thread: of a high rank, a library shares sums among threads, which changes their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tensorsurgeon.kernels.arrays import as_float32
from tensorsurgeon.kernels.casting import as_block, cast_block
from tensorsurgeon.kernels.deltas import one_thread_each
from tensorsurgeon.tensor import Block


class Term(NamedTuple):
    """How one adapter enters: its scale, whether its product is transposed, and whether rows get a length (DoRA)."""

    scale: float
    transposed: bool
    dora: bool


@one_thread_each()
def add_factors(
    start: int, weight: Block, others: tuple[Block, ...], terms: tuple[Term, ...], tile: int, dtype: str
) -> Block:
    """Return rows `start` and on of `W + s B A`, one term after the other, in `dtype`.

    `tile` rows are multiplied at once. `others` are, for each term, A, B and, for DoRA, the lengths; all of them
    whole. Of a transposed product `(B A)'` is added. DoRA (Liu et al., 2024, arXiv 2402.09353) gives each row of
    the sum its length: `W' = m (W + s B A) / |W + s B A|`.
    """
    numbers = torch.from_numpy(as_float32(weight))
    left = list(others)
    for scale, transposed, dora in terms:
        a, b = (torch.from_numpy(as_float32(left.pop(0))) for _ in range(2))
        rows, columns = (a.T, b.T) if transposed else (b, a)
        lengths = torch.from_numpy(as_float32(left.pop(0))).reshape(-1) if dora else None
        for begin in range(0, len(numbers), tile):
            part = slice(begin, min(begin + tile, len(numbers)))
            place = slice(start + part.start, start + part.stop)
            numbers[part] += scale * (rows[place].contiguous() @ columns.contiguous())
            if lengths is not None:
                numbers[part] *= (lengths[place] / numbers[part].norm(dim=1))[:, None]
    return cast_block(as_block(numbers, "F32"), dtype)
