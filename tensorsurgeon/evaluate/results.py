"""What a sweep leaves, read back: a directory with `study.json`, one object, and `records.jsonl`, a record a line.

A sweep may still be at work or have been killed: its last line may be cut off, and variants may be missing. Anything
else that is wrong is said at once, with its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tensorsurgeon.errors import ResultsError, UsageError, nearest, raise_all
from tensorsurgeon.evaluate.records import KINDS, Record, Study

STUDY, RECORDS = "study.json", "records.jsonl"
TOLD = 12
"""Faults of one file that are told one by one."""

NOTEBOOK_FIELDS = (
    "timestamp", "model_name", "degradation_method", "level_value", "std_dev", "param_group_name", "repeat_index",
    "prompt_group", "prompt_id", "prompt_text", "output", "duration", "tokens", "temperature", "do_sample", "seed",
    "batch_size", "perplexity",
)  # fmt: skip
"""What notebooks of the degradation study look up in each record; what a record lacks is null there."""


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
