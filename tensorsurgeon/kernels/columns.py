"""Pick groups of columns out of the rows of one or several tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorsurgeon.tensor import Block


def gather_columns(blocks: Sequence[Block], picks: Sequence[tuple[int, int]], width: int) -> Block:
    """Return rows whose k-th group of `width` columns is group `picks[k][1]` of block `picks[k][0]`.

    Bytes are moved and never read as numbers, so any dtype of whole bytes will do.
    """
    rows = blocks[0].shape[0]
    groups = [np.frombuffer(block.data, np.uint8).reshape(rows, block.shape[1] // width, -1) for block in blocks]
    out = np.empty((rows, len(picks), groups[0].shape[2]), np.uint8)
    for place, (block, group) in enumerate(picks):
        out[:, place] = groups[block][:, group]
    return Block(blocks[0].dtype, (rows, len(picks) * width), memoryview(out.data).cast("B"))
