"""What became of each variant of a study: its measures in each repetition, their spread, and its damage.

A measure is one number for a variant and a repetition, such as the perplexity of a text, or the mean divergence over
all probes. Over repetitions its mean, its standard deviation (n - 1) and the number of repetitions are told; where a
model gave no number, NaN, that repetition is left out of both and counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev
from typing import NamedTuple

from tensorsurgeon.evaluate.layer_changes import LayerChange
from tensorsurgeon.evaluate.records import Number, Variant
from tensorsurgeon.evaluate.results import Results

DAMAGE, PERPLEXITY, TIMES, DIVERGENCE, RIGHT = "damage", "perplexity", "times the baseline", "kl", "right"


class Spread(NamedTuple):
    """The mean over `n` repetitions and their standard deviation; apart from them `broken` ones that gave no number."""

    mean: Number
    std: Number
    n: int
    broken: int = 0


def spread_of(values: Iterable[Number]) -> Spread:
    """Return the spread of values; of a single one there is no standard deviation."""
    given = list(values)
    known = [it for it in given if it is not None]
    mean = fmean(known) if known else None
    return Spread(mean, stdev(known) if len(known) > 1 else None, len(known), len(given) - len(known))


class Level(NamedTuple):
    """How hard a variant was hit: by what, in which part of the model, and to which level."""

    method: str
    group: str
    value: float


@dataclass(frozen=True)
class Outcome:
    """A variant, and what was measured of it: for each measure its value in each repetition that has it."""

    variant: Variant
    place: int
    layers: list[int] | None = None
    change: LayerChange | None = None
    level: Level | None = None
    measures: Mapping[str, Mapping[int, Number]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.variant.name

    def spread(self, measure: str) -> Spread | None:
        """Return the spread of a measure over the repetitions; nothing where it was not taken."""
        return spread_of(self.measures[measure].values()) if measure in self.measures else None

    def mean(self, measure: str) -> Number:
        """Return the mean of a measure."""
        spread = self.spread(measure)
        return spread.mean if spread else None

    @property
    def broken(self) -> int:
        """The repetitions in which its damage is no number."""
        spread = self.spread(DAMAGE)
        return spread.broken if spread else 0

    @property
    def badness(self) -> tuple[bool, int, float, int]:
        """What variants are sorted by, the least damaged first: what has no number is worse than all numbers."""
        spread = self.spread(DAMAGE)
        mean = math.inf if spread is None or spread.mean is None else spread.mean
        return spread is None, self.broken, mean, self.place


@dataclass(frozen=True)
class StudyOutcomes:
    """A study read: the outcome of each of its variants, and what its damage is."""

    results: Results
    outcomes: Sequence[Outcome]
    damage: str
    """What damage is, in words; empty where nothing tells of it."""

    @property
    def name(self) -> str:
        """The study's name."""
        return self.results.study.name

    @cached_property
    def baseline(self) -> Outcome | None:
        """The variant that all others are compared with."""
        return next((it for it in self.outcomes if it.name == self.results.study.baseline), None)

    @cached_property
    def measures(self) -> list[str]:
        """All measures of the study, damage first."""
        return list(dict.fromkeys(name for it in self.outcomes for name in it.measures))

    @property
    def measured(self) -> list[Outcome]:
        """The variants of which there are records."""
        return [it for it in self.outcomes if it.measures]

    @property
    def changed(self) -> list[tuple[LayerChange, Outcome]]:
        """The variants that delete or double neighbouring layers, one of those that do so to the same ones."""
        found: dict[LayerChange, Outcome] = {}
        for it in self.measured:
            if it.change:
                found.setdefault(it.change, it)
        return list(found.items())

    @property
    def by_damage(self) -> list[Outcome]:
        """The variants of which there are records, the least damaged first."""
        return sorted(self.measured, key=lambda it: it.badness)
