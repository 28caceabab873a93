"""Outcomes of studies as tables: variants by damage, levels, layers, every repetition, probes, answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorsurgeon.charts import Pivot
from tensorsurgeon.evaluate.outcomes import (
    DAMAGE,
    DIVERGENCE,
    PERPLEXITY,
    RIGHT,
    TIMES,
    Outcome,
    StudyOutcomes,
    spread_of,
)
from tensorsurgeon.evaluate.records import BilingualRecord, OpenRecord, ProbeRecord, QuestionRecord
from tensorsurgeon.notation import format_layers

Rows = list[dict[str, Any]]

VARIANTS, ANSWERS = "variants, the least damaged first", "answers"
SHOWN = {
    VARIANTS: ("study", "variant", DAMAGE, f"{DAMAGE}, std", PERPLEXITY, TIMES, DIVERGENCE, RIGHT, "n"),
    "levels": ("study", "method", "group", "level", DAMAGE, f"{DAMAGE}, std", PERPLEXITY, DIVERGENCE, RIGHT, "n"),
    "layers": ("study", "change", "layers", DAMAGE, PERPLEXITY, TIMES, DIVERGENCE, RIGHT, "n"),
    "every repetition": ("study", "variant", "repetition", DAMAGE, PERPLEXITY, DIVERGENCE, RIGHT),
    "probes": ("study", "variant", "probe", "share", "mass", "entropy", DIVERGENCE, "n"),
    ANSWERS: ("study", "variant", "repetition", "prompt", "expected", "right", "tokens"),
}
"""Columns that a terminal has room for."""


def tables_of(studies: Sequence[StudyOutcomes]) -> dict[str, Rows]:
    """Return the tables of studies, without those that would be empty; the study is named where there are several."""
    made = {
        "study": [_study(it) for it in studies],
        VARIANTS: _variants(studies),
        "levels": _levels(studies),
        "layers": _layers(studies),
        "every repetition": [row for it in studies for row in _repetitions(it, _named(studies, it))],
        "probes": [row for it in studies for row in _probes(it, _named(studies, it))],
        ANSWERS: [row for it in studies for row in _answers(it, _named(studies, it))],
    }
    return {title: rows for title, rows in made.items() if rows}


def pivots_of(studies: Sequence[StudyOutcomes]) -> list[Pivot]:
    """Return how answers are laid side by side: to begin with the baseline's, the least damaged, and the most."""
    study = studies[0]
    others = [it for it in study.by_damage if it is not study.baseline]
    ends = dict.fromkeys(it.name for it in (study.baseline, *others[:1], *others[-1:]) if it)
    column = ("study", "variant") if len(studies) > 1 else ("variant",)
    first = [", ".join((study.name, it)) if len(studies) > 1 else it for it in ends]
    rows = ("group", "prompt", "language", "question", "expected", "repetition")
    return [Pivot("Answers side by side", ANSWERS, rows, column, "answer", ("right", "tokens", "ended"), first)]


def changed(outcome: Outcome) -> str:
    """Return what was done to the layers of a variant, as far as it is a selection of them."""
    if outcome.change:
        return f"{outcome.change.name} {outcome.change.kind}"
    return format_layers(outcome.layers) if outcome.layers else ""


def _named(studies: Sequence[StudyOutcomes], study: StudyOutcomes) -> dict[str, Any]:
    return {"study": study.name} if len(studies) > 1 else {}


def _study(it: StudyOutcomes) -> dict[str, Any]:
    study, results = it.results.study, it.results
    return {
        "name": study.name,
        "source": study.source,
        "suite": study.suite,
        "variants": len(study.variants),
        "repetitions": study.repeats,
        "records": len(results.records),
        "records to be": results.expected,
        "baseline": study.baseline,
        "seed": study.seed,
        "damage is": it.damage or None,
        "results": str(results.directory),
        "made by": study.tensorsurgeon,
    }


def _variants(studies: Sequence[StudyOutcomes]) -> Rows:
    columns = _columns(studies)
    found = [(it, study) for study in studies for it in study.by_damage]
    if len({study.damage for study in studies}) == 1:
        found.sort(key=lambda pair: pair[0].badness[:3])
    return [
        {
            **_named(studies, study),
            "variant": it.name,
            "layers": changed(it) or None,
            **_measured(it, columns),
            "no number": it.broken,
        }
        for it, study in found
    ]


def _levels(studies: Sequence[StudyOutcomes]) -> Rows:
    columns = _columns(studies)
    return [
        {
            **_named(studies, study),
            "method": it.level.method,
            "group": it.level.group,
            "level": it.level.value,
            **_measured(it, columns),
            "no number": it.broken,
        }
        for study in studies
        for it in study.measured
        if it.level
    ]


def _layers(studies: Sequence[StudyOutcomes]) -> Rows:
    columns = _columns(studies)
    found = [(change, it, study) for study in studies for change, it in study.changed]
    return [
        {
            **_named(studies, study),
            "change": change.kind,
            "layers": change.name,
            "first": change.first,
            "size": change.size,
            **_measured(it, columns),
            "no number": it.broken,
        }
        for change, it, study in sorted(found, key=lambda it: (it[0].kind, it[0].size, it[0].first))
    ]


def _columns(studies: Iterable[StudyOutcomes]) -> dict[str, bool]:
    """Return the measures of all studies, each with whether there is a spread to tell."""
    found: dict[str, bool] = {}
    for study in studies:
        for name in study.measures:
            spreads = [it.spread(name) for it in study.outcomes]
            found[name] = found.get(name, False) or any(it and it.std is not None for it in spreads)
    first = [it for it in (DAMAGE, PERPLEXITY, TIMES, DIVERGENCE, RIGHT) if it in found]
    return {name: found[name] for name in dict.fromkeys([*first, *found])}


def _measured(outcome: Outcome, columns: Mapping[str, bool]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, spreads in columns.items():
        spread = outcome.spread(name)
        row[name] = spread.mean if spread else None
        if spreads:
            row[f"{name}, std"] = spread.std if spread else None
    row["n"] = max((len(it) for it in outcome.measures.values()), default=0)
    return row


def _repetitions(study: StudyOutcomes, named: Mapping[str, Any]) -> Rows:
    return [
        {
            **named,
            "variant": it.name,
            "repetition": repetition,
            **{name: it.measures[name].get(repetition) if name in it.measures else None for name in study.measures},
        }
        for it in study.measured
        for repetition in sorted({number for values in it.measures.values() for number in values})
    ]


def _probes(study: StudyOutcomes, named: Mapping[str, Any]) -> Rows:
    held: dict[tuple[str, str | int], list[ProbeRecord]] = defaultdict(list)
    for record in study.results.records:
        if isinstance(record, ProbeRecord):
            held[record.variant, record.prompt_id].append(record)
    return [
        {
            **named,
            "variant": variant,
            "group": records[0].prompt_group,
            "probe": prompt,
            "for": records[0].contrast[0] if records[0].contrast else None,
            "against": records[0].contrast[-1] if records[0].contrast else None,
            "share": spread_of(it.contrast_ratio for it in records).mean,
            "mass": spread_of(it.contrast_mass for it in records).mean,
            **{f"mass of {name}": spread_of(it.mass.get(name) for it in records).mean for name in records[0].mass},
            "entropy": spread_of(it.entropy_nats for it in records).mean,
            DIVERGENCE: spread_of(it.kl for it in records).mean,
            "n": len(records),
        }
        for variant in (it.name for it in study.outcomes)
        for (name, prompt), records in held.items()
        if name == variant
    ]


def _answers(study: StudyOutcomes, named: Mapping[str, Any]) -> Rows:
    place = {it.name: it.place for it in study.outcomes}
    answers = [it for it in study.results.records if isinstance(it, OpenRecord)]
    answers.sort(key=lambda it: (place[it.variant], it.repeat_index))
    return [
        {
            **named,
            "variant": it.variant,
            "repetition": it.repeat_index,
            "group": it.prompt_group,
            "prompt": str(it.prompt_id),
            "language": it.language if isinstance(it, BilingualRecord) else None,
            "question": it.prompt_text,
            "answer": it.output,
            "expected": ", ".join(it.expected) if isinstance(it, QuestionRecord) else None,
            "right": it.right if isinstance(it, QuestionRecord) else None,
            "tokens": it.tokens,
            "ended": it.ended,
        }
        for it in answers
    ]
