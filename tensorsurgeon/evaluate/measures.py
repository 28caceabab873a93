"""Measures of next-token distributions, in float64 over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Logits = NDArray[np.float32]
Flags = NDArray[np.bool_]


def log_softmax(logits: NDArray[Any]) -> Array:
    """Return log probabilities, `x - log sum exp x`, with the largest taken out first."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of NaN and infinity there come NaN, which is found later
        shifted = wide - wide.max()
        return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def entropy(logprobs: Array) -> float:
    """Return the entropy in nats, `-sum p log p`; divide by log 2 for bits."""
    held = logprobs[logprobs > -np.inf] if not np.isnan(logprobs).any() else logprobs
    return float(0.0 - (np.exp(held) * held).sum())


def divergence(base: Array, logprobs: Array) -> float:
    """Return the Kullback-Leibler divergence from a base in nats, `sum p_base (log p_base - log p)`."""
    held = base != -np.inf  # what has no probability adds nothing; NaN stays NaN
    return float((np.exp(base[held]) * (base[held] - logprobs[held])).sum())


def top(logprobs: Array, count: int) -> NDArray[np.int64]:
    """Return the most probable tokens, the most probable first; of equal ones the lower number."""
    return np.argsort(-logprobs, kind="stable")[:count]


class Loss(NamedTuple):
    """The negative log-likelihood of a text in nats, of how many tokens and bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """`exp` of the mean loss of a token; infinite where it is too large for a float."""
        mean = self.nats / self.tokens if self.tokens else float("nan")
        return float("inf") if mean > 700 else exp(mean)

    @property
    def bits_per_byte(self) -> float:
        """The loss of a byte of the text in bits, which tokenizers do not change."""
        return self.nats / log(2) / self.bytes if self.bytes else float("nan")


def total(losses: Sequence[Loss]) -> Loss:
    """Return the loss of several texts together."""
    return Loss(sum(it.nats for it in losses), sum(it.tokens for it in losses), sum(it.bytes for it in losses))
