"""What a probe measures: every way to say a label, the mass of each set of them, entropy, and the likeliest tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensorsurgeon.evaluate.engine import Engine
from tensorsurgeon.evaluate.labels import counted
from tensorsurgeon.evaluate.measures import Array, divergence, entropy, top
from tensorsurgeon.evaluate.questionnaire import Questionnaire

TOP = 20

Distributions = dict[str, tuple[list[int], Array]]
"""Of each probe, by its id: its tokens, and the log probabilities of the whole vocabulary after them."""


def continuations(
    engine: Engine, prompt: Sequence[int], asked: Questionnaire, logprobs: Array
) -> dict[tuple[int, ...], float]:
    """Return the log probability of each variant of several tokens, by its tokens, but for those that cannot matter."""
    given = several(asked, logprobs)
    scores = engine.score([[*prompt, *tokens] for tokens in given]) if given else []
    return {tokens: float(it.logprobs[-len(tokens) :].sum()) for tokens, it in zip(given, scores, strict=True)}


def several(asked: Questionnaire, logprobs: Array | None = None) -> list[tuple[int, ...]]:
    """Return the variants of several tokens, of which the log probabilities of the next token leave out some."""
    least = math.log(asked.suite.least) if asked.suite.least else -math.inf
    given = dict.fromkeys(it.tokens for it in asked.variants if not it.single)
    # Not "less than": what NaN makes unknown is to be scored.
    return [it for it in given if logprobs is None or not _at(logprobs, it[0]) < least]


def _at(logprobs: Array, token: int) -> float:
    """Return the log probability of a token; the head may have fewer rows than the tokenizer has tokens."""
    return float(logprobs[token]) if token < len(logprobs) else -math.inf


def distribution(
    asked: Questionnaire, logits: Any, logprobs: Array, scored: Mapping[tuple[int, ...], float], contrast: Sequence[str]
) -> dict[str, Any]:
    """Return what a probe measures: each variant, the mass of each set, one set against another, entropy and top."""

    held = {it: _at(logprobs, it.tokens[0]) if it.single else scored.get(it.tokens) for it in asked.variants}
    share = {it: 0.0 if value is None else math.exp(value) for it, value in held.items()}
    labels = [
        {
            "set": it.set,
            "label": it.label,
            "spelling": it.spelling,
            "tokens": list(it.tokens),
            "kind": "token" if it.single else "continuation" if value is not None else "not scored",
            "logit": float(logits[it.tokens[0]]) if it.single and it.tokens[0] < len(logits) else None,
            "logprob": value,
            "probability": None if value is None else share[it],
            "first_probability": math.exp(_at(logprobs, it.tokens[0])),
        }
        for it, value in held.items()
    ]
    mass = {
        name: sum(share[it] for it in counted(it for it in asked.variants if it.set == name))
        for name in asked.suite.labels
    }
    both = mass[contrast[0]] + mass[contrast[1]]
    nats = entropy(logprobs)
    return {
        "labels": labels,
        "mass": mass,
        # Of two tiny numbers one may well be the larger: the mass tells what the ratio is worth.
        "contrast_mass": both,
        "contrast_ratio": mass[contrast[0]] / both if both else None,
        "vocabulary": len(logprobs),
        "entropy_nats": nats,
        "entropy_bits": nats / math.log(2),
        "top": [
            {
                "token": int(token),
                "spelling": asked.tokens.spelling(int(token)),
                "logit": float(logits[token]),
                "probability": float(np.exp(logprobs[token])),
            }
            for token in top(logprobs, TOP)
        ],
    }


def divergence_from(base: tuple[list[int], Array] | None, prompt: list[int], logprobs: Array) -> float | None:
    """Return the divergence from a base in nats; none where it was asked in other tokens, or has other ones."""
    if base is None or base[0] != prompt or len(base[1]) != len(logprobs):
        return None
    return divergence(base[1], logprobs)
