"""What a sweep leaves, read back: a directory with `study.json`, one object, and `records.jsonl`, a record a line.

A sweep may still be at work or have been killed: its last line may be cut off, and variants may be missing. Anything
else that is wrong is said at once, with its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tensorsurgeon.errors import ResultsError, UsageError, nearest, raise_all

STUDY, RECORDS = "study.json", "records.jsonl"
TOLD = 12
"""Faults of one file that are told one by one."""

NOTEBOOK_FIELDS = (
    "timestamp", "model_name", "degradation_method", "level_value", "std_dev", "param_group_name", "repeat_index",
    "prompt_group", "prompt_id", "prompt_text", "output", "duration", "tokens", "temperature", "do_sample", "seed",
    "batch_size", "perplexity",
)  # fmt: skip
"""What notebooks of the degradation study look up in each record; what a record lacks is null there."""

Number = float | None
"""A number, or nothing where a model gave none."""


class _Part(BaseModel):
    """What is not read is left out, so that a later sweep may say more."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Variant(_Part):
    """A model of a study: its name, the values that it was made with, and the steps that made it."""

    name: str
    values: dict[str, Any] = {}
    source: str | None = None
    steps: list[Any] = []
    base: str | None = None


class Study(_Part):
    """What was swept: the source, the variants in their order, and how often each was made."""

    name: str
    about: str | None = None
    source: str
    suite: str
    repeats: int = Field(1, ge=1)
    seed: int = 0
    baseline: str | None = None
    variants: list[Variant]
    tensorsurgeon: str | None = None


class Record(_Part):
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


class Score(_Part):
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


class Results(NamedTuple):
    """A study and its records, each once: of the same question asked twice, the later answer."""

    directory: Path
    study: Study
    records: list[Record]
    cut: bool
    """Whether the last line was cut off."""
    repeated: int
    """How many records were given again, later."""
    unknown: int
    """How many records are of kinds that are not read."""

    @property
    def expected(self) -> int:
        """How many records there are to be: each question once for each variant and repetition."""
        asked = {(it.record, it.prompt_id) for it in self.records}
        return len(asked) * len(self.study.variants) * self.study.repeats


def read_results(directories: Iterable[str | Path]) -> list[Results]:
    """Read directories of results.

    Raises:
        UsageError: for what is no such directory, and for one that is given twice.
        ResultsError: with all that is wrong in their files.
    """
    places = [Path(it) for it in directories]
    raise_all(UsageError, (f"{it}: there is no {STUDY}; name a directory that 'sweep' has written."
                           for it in places if not (it / STUDY).is_file()))  # fmt: skip
    twice = [it for number, it in enumerate(places) if it.resolve() in [other.resolve() for other in places[:number]]]
    raise_all(UsageError, (f"{it}: is given twice." for it in twice))
    read = [_read(it) for it in places]
    raise_all(ResultsError, (fault for _, faults in read for fault in faults))
    return [results for results, _ in read if results]


def raw_records(results: Results) -> Iterator[Mapping[str, Any]]:
    """Yield the records as they lie, whole, with null for what notebooks of the degradation study would miss."""
    for _, line in _lines(results.directory / RECORDS):
        found = _parsed(line)
        if isinstance(found, dict):
            yield {**dict.fromkeys(NOTEBOOK_FIELDS), **found}


def _read(directory: Path) -> tuple[Results | None, list[str]]:
    where = directory / STUDY
    told = _parsed(where.read_bytes())
    if not isinstance(told, dict):
        return None, [f"{where}: is no JSON object; 'sweep' writes it anew."]
    try:
        study = Study.model_validate(told)
    except ValidationError as problem:
        return None, list(_explained(str(where), problem))
    names = [it.name for it in study.variants]
    faults = [f"{where}: variant {name!r} is there twice." for name in dict.fromkeys(names) if names.count(name) > 1]
    if study.baseline is not None and study.baseline not in names:
        faults.append(f"{where}: the baseline {study.baseline!r} is none of the variants.")
    results, broken = _records(directory, study)
    faults += broken[:TOLD]
    if len(broken) > TOLD:
        faults.append(f"{directory / RECORDS}: and {len(broken) - TOLD} more faults.")
    return results, faults


def _records(directory: Path, study: Study) -> tuple[Results, list[str]]:
    names = {it.name for it in study.variants}
    kept: dict[tuple[Any, ...], Record] = {}
    faults: list[str] = []
    cut, read, unknown = False, 0, 0
    lines = list(_lines(directory / RECORDS))
    for number, (ended, line) in enumerate(lines, 1):
        where = f"{directory / RECORDS}: line {number}"
        found = _parsed(line)
        if found is None and number == len(lines) and not ended:
            cut = True
        elif not isinstance(found, dict) or not isinstance(found.get("record"), str):
            faults.append(f"{where}: is no record; what wrote it was disturbed: 'sweep --force' measures again.")
        elif found["record"] not in KINDS:
            unknown += 1
        else:
            try:
                record = KINDS[found["record"]].model_validate(found)
            except ValidationError as problem:
                faults += _explained(where, problem)
                continue
            if record.variant not in names:
                faults.append(f"{where}: {STUDY} has no variant {record.variant!r}.{nearest(record.variant, names)}")
            read += 1
            kept[record.variant, record.repeat_index, record.record, record.prompt_id] = record
    return Results(directory, study, list(kept.values()), cut, read - len(kept), unknown), faults


def _lines(path: Path) -> Iterator[tuple[bool, bytes]]:
    """Yield the lines of a file that may not be there yet, and whether each was ended."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield line.endswith(b"\n"), line


def _parsed(text: str | bytes) -> Any:
    """Return JSON; nothing for what is none, and for numbers that are none."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except ValueError:
        return None


def _explained(where: str, problem: ValidationError) -> Iterator[str]:
    for error in problem.errors():
        place = ".".join(map(str, error["loc"]))
        yield f"{where}: {place or 'it'}: {error['msg'].removeprefix('Value error, ')}."
