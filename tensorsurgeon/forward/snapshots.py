"""The residual stream at every depth, all prompts one under the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.forward.batches import make_batches
from tensorsurgeon.forward.shelf import Shelf
from tensorsurgeon.forward.skeleton import Dtype
from tensorsurgeon.forward.stream import Stream


def snapshots(
    ckpt: Checkpoint,
    prompts: Sequence[Sequence[int]],
    dtype: Dtype,
    last_only: bool,
    advance: Callable[[int], object],
) -> tuple[Shelf, int]:
    """Return states of shape (samples, width) by the number of layers that were run, and how many samples there are."""
    shelf, count = Shelf(), 0
    for depth, states in Stream(ckpt, make_batches(prompts), dtype).walk():
        rows = torch.cat([it[0, -1:] if last_only else it[0] for it in states])
        shelf.put(depth, rows)
        count = len(rows)
        advance(1)
    return shelf, count
