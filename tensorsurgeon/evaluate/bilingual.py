"""Arithmetic in English and Chinese: the problems of the kernel surgery study, drawn from a seed.

One stream of chance draws 40 problems of each category, a second one from the same seed shuffles all 200, and of each
category the first few in that order are asked. So the twenty of seed 42 are the study's: same numbers, same answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from math import comb
from typing import Any, NamedTuple

SEED, EACH, POOL = 42, 4, 40
LANGUAGES = ("en", "zh")

KINDS = ("plus", "times", "combinatorics", "modular", "geometry", "sequences")
"""The kinds of problems that a suite has wordings for, in each language."""


class Problem(NamedTuple):
    """One problem: its category, its kind, its numbers, and its answer."""

    category: str
    kind: str
    numbers: Mapping[str, int]
    answer: int

    def text(self, wordings: Mapping[str, str]) -> str:
        """Return the problem in words, of which each kind has its own."""
        return wordings[self.kind].format(**self.numbers)


def _arithmetic(rng: random.Random) -> Problem:
    a, b = rng.randint(10, 999), rng.randint(10, 999)
    sign = rng.choice(["plus", "times"])
    return Problem("arithmetic", sign, {"a": a, "b": b}, a + b if sign == "plus" else a * b)


def _combinatorics(rng: random.Random) -> Problem:
    n = rng.randint(5, 20)
    k = rng.randint(1, min(n - 1, 8))
    return Problem("combinatorics", "combinatorics", {"n": n, "k": k}, comb(n, k))


def _modular(rng: random.Random) -> Problem:
    a, b = rng.randint(50, 9999), rng.randint(3, 37)
    return Problem("modular", "modular", {"a": a, "b": b}, a % b)


def _geometry(rng: random.Random) -> Problem:
    w, h = rng.randint(2, 50), rng.randint(2, 50)
    return Problem("geometry", "geometry", {"w": w, "h": h}, w * h)


def _sequences(rng: random.Random) -> Problem:
    a, d, n = rng.randint(1, 20), rng.randint(1, 10), rng.randint(5, 30)
    return Problem("sequences", "sequences", {"a": a, "d": d, "n": n}, n * (2 * a + (n - 1) * d) // 2)


# In the order in which the study draws from its one stream.
CATEGORIES: tuple[Callable[[random.Random], Problem], ...] = (
    _arithmetic, _combinatorics, _modular, _geometry, _sequences,
)  # fmt: skip


def problems(seed: int = SEED, each: int = EACH) -> list[Problem]:
    """Return so many problems of each category, up to 40, in the order of the study's test set."""
    draws = random.Random(seed)
    drawn = [make(draws) for make in CATEGORIES for _ in range(POOL)]
    random.Random(seed).shuffle(drawn)
    chosen: dict[str, list[Problem]] = {}
    for problem in drawn:
        held = chosen.setdefault(problem.category, [])
        if len(held) < each:
            held.append(problem)
    return [problem for held in chosen.values() for problem in held]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each model and language: accuracy, first-answer positions, and the languages of the answers."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model_name"], row["language"]), []).append(row)
    return [
        {
            "model": model,
            "language": language,
            "right": sum(row["right"] for row in held),
            "of": len(held),
            "accuracy": sum(row["right"] for row in held) / len(held),
            "first answer, words": _mean(row["answer_word"] for row in held),
            "first answer, tokens": _mean(row["answer_token"] for row in held),
            "in Chinese": sum(row["answer_language"] == "zh" for row in held),
            "in English": sum(row["answer_language"] == "en" for row in held),
            "in neither": sum(row["answer_language"] is None for row in held),
            "share of CJK": _mean(row["cjk"] for row in held),
            "share of Latin": _mean(row["latin"] for row in held),
        }
        for (model, language), held in found.items()
    ]


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def unworded(seed: int, wordings: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield what wordings lack for the problems of a seed, or ask of them that they do not have."""
    for language in LANGUAGES:
        held = wordings.get(language, {})
        lacking = [kind for kind in KINDS if kind not in held]
        if lacking:
            yield f"bilingual: wordings of {language} lack {', '.join(lacking)}; 'extends: bilingual' has them."
            continue
        for kind, problem in {it.kind: it for it in problems(seed, POOL)}.items():
            try:
                problem.text(held)
            except (KeyError, IndexError, ValueError) as wrong:
                yield f"bilingual: wording {kind} of {language}: {wrong} is not among {', '.join(problem.numbers)}."
