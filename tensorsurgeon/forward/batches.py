"""Prompts as tokens, in batches: rows of one length, filled up on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """Some prompts: `ids` and `mask` are (prompts, length), and the mask is 0 where a row is only filled up."""

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def padded(self) -> bool:
        """Whether some row is filled up."""
        return not bool(self.mask.all())

    @property
    def positions(self) -> torch.Tensor:
        """The position of each token in its own prompt."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def rows(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield what belongs to each prompt of states of shape (prompts, length, ...), without what was filled up."""
        for row, mask in zip(states, self.mask, strict=True):
            yield row[mask.bool()]


def make_batches(prompts: Sequence[Sequence[int]], size: int = 1, filler: int = 0) -> list[Batch]:
    """Return prompts in their order as batches of at most `size`."""
    return [_batch(prompts[start : start + size], filler) for start in range(0, len(prompts), size)]


def _batch(prompts: Sequence[Sequence[int]], filler: int) -> Batch:
    length = max(map(len, prompts))
    ids = torch.tensor([[filler] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Batch(ids, mask)
