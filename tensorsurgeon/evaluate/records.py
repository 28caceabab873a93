"""What a sweep leaves, as data: its study, and the records of each kind that are read back."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Damage = Literal["perplexity", "kl", "right"]
"""What tells how much a variant was damaged."""
Number = float | None
"""A number, or nothing where a model gave none."""


class Part(BaseModel):
    """What is not read is left out, so that a later sweep may say more."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Variant(Part):
    """A model of a study: its name, the values that it was made with, and the steps that made it."""

    name: str
    values: dict[str, Any] = {}
    source: str | None = None
    steps: list[Any] = []
    base: str | None = None


class Study(Part):
    """What was swept: the source, the variants in their order, how often each was made, and what tells of damage."""

    name: str
    about: str | None = None
    source: str
    suite: str
    repeats: int = Field(1, ge=1)
    seed: int = 0
    damage: Damage | None = None
    baseline: str | None = None
    variants: list[Variant]
    tensorsurgeon: str | None = None


class Record(Part):
    """What all records tell: which variant, in which repetition, was asked what."""

    record: str
    variant: str
    repeat_index: int = Field(ge=0)
    prompt_id: str | int
    prompt_group: str = ""
    layers: list[int] | None = None
    source_layers: int | list[int] | None = None
    degradation_method: str | None = None
    level_value: Number = None
    param_group_name: str | None = None


class TextRecord(Record):
    """The perplexity of a text."""

    perplexity: Number


class ProbeRecord(Record):
    """The distribution of the next token after a prompt."""

    mass: dict[str, Number]
    contrast: list[str] = []
    contrast_mass: Number = None
    contrast_ratio: Number = None
    entropy_nats: Number
    kl: Number = None


class OpenRecord(Record):
    """An answer that is kept as it is."""

    output: str
    prompt_text: str = ""
    tokens: int | None = None
    ended: bool | None = None


class QuestionRecord(OpenRecord):
    """An answer that is right or wrong."""

    right: bool
    expected: list[str] = []


class BilingualRecord(QuestionRecord):
    """An answer to a problem that is asked in several languages."""

    language: str
    answer_word: int | None = None
    answer_token: int | None = None
    answer_language: str | None = None
    cjk: Number = None


class Score(Part):
    """What a benchmark found by one metric, perhaps of a part of it."""

    task: str
    metric: str
    filter: str
    value: Number


class TaskRecord(Record):
    """The scores of a benchmark."""

    scores: list[Score]


KINDS: dict[str, type[Record]] = {
    "text": TextRecord,
    "probe": ProbeRecord,
    "open": OpenRecord,
    "question": QuestionRecord,
    "bilingual": BilingualRecord,
    "task": TaskRecord,
}
