"""What the distributions of the next token say, in float64 over the whole vocabulary, many positions at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch


class Reading(NamedTuple):
    """Numbers of some positions, each a tensor with a row for each: of a distribution and of the final one.

    `top` and `shares` hold the most probable tokens and their probabilities; `rank` and `share` are those of the
    token that the final distribution has first, and `kl` is the divergence from the final one, in nats. `tracked` and
    `tracked_ranks` are the probability of each tracked set of tokens, and the rank of the best of them.
    """

    entropy: torch.Tensor
    top: torch.Tensor
    shares: torch.Tensor
    rank: torch.Tensor
    share: torch.Tensor
    kl: torch.Tensor
    tracked: torch.Tensor
    tracked_ranks: torch.Tensor

    @property
    def bits(self) -> torch.Tensor:
        """The entropy in bits."""
        return self.entropy / log(2)


def read(logits: torch.Tensor, final: torch.Tensor, count: int, tracked: Sequence[Sequence[int]] = ()) -> Reading:
    """Return what logits of shape (positions, vocabulary) say, held against the final ones.

    With `p = softmax(x)` entropy is `-sum p log p`, and the divergence is `sum f (log f - log p)` of the final `f`.
    """
    wide, last = logits.double().log_softmax(1), final.double().log_softmax(1)
    probabilities = wide.exp()
    top = most_probable(logits, count)
    predicted = most_probable(final, 1)
    sets = [torch.tensor(list(tokens)) for tokens in tracked]
    rows = len(logits)
    return Reading(
        -_times_log(probabilities, wide).sum(1),
        top,
        probabilities.gather(1, top),
        ranks(logits, predicted)[:, 0],
        probabilities.gather(1, predicted)[:, 0],
        _times_log(last.exp(), last - wide).sum(1),
        torch.stack([probabilities[:, it].sum(1) for it in sets], 1) if sets else torch.empty(rows, 0),
        torch.stack([ranks(logits, it.expand(rows, -1)).min(1).values for it in sets], 1)
        if sets
        else torch.empty(rows, 0, dtype=torch.int64),
    )


def most_probable(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Return the most probable tokens of each row, the most probable first; of equal ones the lower number."""
    count = min(count, logits.shape[1])
    values, tokens = logits.topk(min(count + 1, logits.shape[1]), 1)
    found = []
    for row, value, token in zip(logits, values, tokens, strict=True):
        # Where the last that is wanted is as probable as the next, topk may have chosen any of the equal ones.
        tied = len(value) > count and bool(value[count] == value[count - 1])
        chosen = (row >= value[count - 1]).nonzero()[:, 0] if tied else token[:count].sort().values
        order = row[chosen].sort(descending=True, stable=True).indices
        found.append(chosen[order][:count])
    return torch.stack(found) if found else tokens


def ranks(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the rank of some tokens in each row, 1 for the most probable; of equal ones the lower number is first."""
    numbers = torch.arange(logits.shape[1])
    columns = []
    for column in tokens.T:
        value = logits.gather(1, column[:, None])
        before = (logits > value) | ((logits == value) & (numbers < column[:, None]))
        columns.append(before.sum(1) + 1)
    return torch.stack(columns, 1)


def settled(top: Sequence[int]) -> int:
    """Return from which place on a sequence of first tokens is the last one, to its end."""
    place = len(top) - 1
    while place and top[place - 1] == top[-1]:
        place -= 1
    return place


def _times_log(weights: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Return `p log q`, which is nothing where p is nothing."""
    return torch.where(weights > 0, weights * logs, torch.zeros((), dtype=weights.dtype))
