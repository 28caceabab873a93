"""From the records of a study to its outcomes: what is measured of each variant, and which of it tells of damage.

Damage is, of each repetition, how much longer a text is to the variant than to the baseline: the difference of log
perplexities in nats a token. Of several texts it is the one that the baseline reads best: what it cannot read itself
tells nothing of what was lost. Where there is no text, damage is the mean divergence of the probes from the baseline's,
else the share of right answers that was lost. A study may say which of the three it means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from tensorsurgeon.evaluate.layer_changes import layer_change
from tensorsurgeon.evaluate.outcomes import (
    DAMAGE,
    DIVERGENCE,
    PERPLEXITY,
    RIGHT,
    TIMES,
    Level,
    Outcome,
    StudyOutcomes,
)
from tensorsurgeon.evaluate.records import (
    BilingualRecord,
    Number,
    OpenRecord,
    ProbeRecord,
    QuestionRecord,
    Record,
    Study,
    TaskRecord,
    TextRecord,
    Variant,
)
from tensorsurgeon.evaluate.results import Results

Measures = dict[str, dict[int, Number]]


def outcomes_of(results: Results) -> StudyOutcomes:
    """Return what became of each variant of a study."""
    held: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in results.records:
        held[record.variant][record.repeat_index].append(record)
    texts = list(dict.fromkeys(it.prompt_id for it in results.records if isinstance(it, TextRecord)))
    variants = results.study.variants
    measured = {it.name: _by_measure(held[it.name], texts) for it in variants}
    perplexities = [PERPLEXITY if len(texts) == 1 else f"{PERPLEXITY} of {it}" for it in texts]
    damage = _add_damage(measured, perplexities, results.study)
    axes = _axes(variants)
    found = [
        _outcome(
            place, it, [record for records in held[it.name].values() for record in records], measured[it.name], axes
        )
        for place, it in enumerate(variants)
    ]
    return StudyOutcomes(results, found, damage)


def _outcome(
    place: int, variant: Variant, records: Sequence[Record], measures: Measures, axes: Sequence[str]
) -> Outcome:
    layers = next((it.layers for it in records if it.layers is not None), None)
    told = next((it.source_layers for it in records if it.source_layers is not None), None)
    change = layer_change(layers, len(told) if isinstance(told, list) else told)
    ordered = {DAMAGE: measures.pop(DAMAGE), **measures} if DAMAGE in measures else measures
    return Outcome(variant, place, layers, change, _level(variant, records, axes), ordered)


def _by_measure(repetitions: Mapping[int, Sequence[Record]], texts: Sequence[str | int]) -> Measures:
    found: Measures = defaultdict(dict)
    for repetition, records in sorted(repetitions.items()):
        for name, value in _measures(records, texts):
            found[name][repetition] = value
    return dict(found)


def _measures(records: Iterable[Record], texts: Sequence[str | int]) -> Iterator[tuple[str, Number]]:
    """Yield each measure of one variant in one repetition."""
    kinds: dict[type[Record], list[Any]] = defaultdict(list)
    for record in records:
        kinds[type(record)].append(record)
    for text in kinds[TextRecord]:
        yield PERPLEXITY if len(texts) == 1 else f"{PERPLEXITY} of {text.prompt_id}", text.perplexity
    yield from _of_probes(kinds[ProbeRecord])
    questions: list[QuestionRecord] = kinds[QuestionRecord]
    if questions:
        yield RIGHT, _share(it.right for it in questions)
        groups = dict.fromkeys(it.prompt_group for it in questions)
        for group in groups if len(groups) > 1 else ():
            yield f"{RIGHT}: {group}", _share(it.right for it in questions if it.prompt_group == group)
    for language in dict.fromkeys(it.language for it in kinds[BilingualRecord]):
        yield from _of_language(language, [it for it in kinds[BilingualRecord] if it.language == language])
    yield from _of_tasks(kinds[TaskRecord])
    answers: list[OpenRecord] = kinds[OpenRecord]
    lengths = [it.tokens for it in answers if it.tokens is not None]
    if lengths:
        yield "tokens of long answers", fmean(lengths)


def _of_probes(probes: Sequence[ProbeRecord]) -> Iterator[tuple[str, Number]]:
    if not probes:
        return
    broken = any(it.entropy_nats is None for it in probes)
    divergences = [it.kl for it in probes if it.kl is not None]
    if divergences or broken:
        yield DIVERGENCE, None if broken else fmean(divergences)
    yield "entropy", None if broken else fmean(it.entropy_nats or 0 for it in probes)
    for label in dict.fromkeys(name for it in probes for name in it.mass):
        masses = [it.mass[label] for it in probes if label in it.mass]
        known = [it for it in masses if it is not None]
        yield f"mass of {label}", None if broken or not known else fmean(known)


def _of_tasks(records: Sequence[TaskRecord]) -> Iterator[tuple[str, Number]]:
    scores = [score for it in records for score in it.scores]
    for score in scores:
        alike = [it for it in scores if (it.task, it.metric) == (score.task, score.metric)]
        name = f"{score.task}: {score.metric}"
        yield name if len(alike) == 1 else f"{name} ({score.filter})", score.value


def _of_language(language: str, answers: Sequence[BilingualRecord]) -> Iterator[tuple[str, Number]]:
    yield f"{RIGHT} in {language}", _share(it.right for it in answers)
    for unit, places in (("word", [it.answer_word for it in answers]), ("token", [it.answer_token for it in answers])):
        known = [it for it in places if it is not None]
        if known:
            yield f"first answer in {language}, {unit}", fmean(known)
    yield f"{language} answered in {language}", _share(it.answer_language == language for it in answers)


def _share(values: Iterable[bool]) -> float:
    return fmean(map(float, values))


def _add_damage(measured: Mapping[str, Measures], perplexities: Sequence[str], study: Study) -> str:
    """Add the damage of each variant to its measures, and return what it is, in words."""
    wanted, baseline = study.damage, study.baseline
    read = _best_read(measured, perplexities, baseline)
    if read and wanted in (None, "perplexity"):
        logs = {
            name: {place: math.log(value) if value else None for place, value in of[read].items()}
            for name, of in measured.items() if read in of
        }  # fmt: skip
        base = _mean(logs[baseline].values()) if baseline in logs else None
        for name, of_each in logs.items():
            damage = {place: None if value is None else value - (base or 0) for place, value in of_each.items()}
            measured[name][DAMAGE] = damage
            if base is not None:
                # What exceeds every number of 64 bits is as bad as none.
                measured[name][TIMES] = {place: _power(value) for place, value in damage.items()}
        above = " above the baseline's, in nats a token" if base is not None else ""
        return f"log {read}{above}"
    if wanted in (None, "kl") and any(DIVERGENCE in it for it in measured.values()):
        if baseline and DIVERGENCE not in measured[baseline]:
            # Nothing diverges from itself.
            measured[baseline][DIVERGENCE] = dict.fromkeys(measured[baseline].get("entropy", ()), 0.0)
        for of_variant in measured.values():
            if DIVERGENCE in of_variant:
                of_variant[DAMAGE] = dict(of_variant[DIVERGENCE])
        return "the mean divergence of the probes from the baseline's, in nats"
    asked = sorted(
        {name for it in measured.values() for name in it if name == RIGHT or name.startswith(f"{RIGHT} in ")}
    )
    if not asked or wanted not in (None, "right"):
        return ""
    shares = {name: _mean_of([it[one] for one in asked if one in it]) for name, it in measured.items()}
    whole = _mean(shares[baseline].values()) if baseline else None
    for name, share in shares.items():
        if share:
            measured[name][DAMAGE] = {it: (1.0 if whole is None else whole) - value for it, value in share.items()}
    return "the share of right answers below the baseline's" if whole is not None else "the share of wrong answers"


def _best_read(measured: Mapping[str, Measures], perplexities: Sequence[str], baseline: str | None) -> str | None:
    """Return the perplexity that is lowest for the baseline, or for all variants where there is none."""
    of_baseline = [it for it in perplexities if baseline and it in measured[baseline]]
    asked = [measured[baseline]] if baseline and of_baseline else measured.values()
    means = {name: _mean(value for it in asked for value in it.get(name, {}).values()) for name in perplexities}
    known = {name: mean for name, mean in means.items() if mean is not None}
    return min(known, key=lambda it: known[it]) if known else next(iter(perplexities), None)


def _mean_of(several: Sequence[Mapping[int, Number]]) -> dict[int, float]:
    """Return the mean of measures for each repetition."""
    repetitions = sorted({it for one in several for it in one})
    return {it: fmean(value for one in several if (value := one.get(it)) is not None) for it in repetitions}


def _mean(values: Iterable[Number]) -> Number:
    known = [it for it in values if it is not None]
    return fmean(known) if known else None


def _power(value: Number) -> Number:
    return None if value is None or value > math.log(1e300) else math.exp(value)


def _axes(variants: Sequence[Variant]) -> list[str]:
    """Return the names of values that are numbers in every variant that has them, and not all the same."""
    found: dict[str, set[Any]] = defaultdict(set)
    for variant in variants:
        for name, value in variant.values.items():
            found[name].add(value if isinstance(value, int | float | str) else str(value))
    return [
        name for name, values in found.items()
        if len(values) > 1 and all(isinstance(it, int | float) and not isinstance(it, bool) for it in values)
    ]  # fmt: skip


def _level(variant: Variant, records: Sequence[Record], axes: Sequence[str]) -> Level | None:
    """Return the level of a variant: what its records tell of it, else its only value that is a number and varies."""
    told = next((it for it in records if it.level_value is not None), None)
    if told is not None and told.level_value is not None:
        return Level(told.degradation_method or "level", told.param_group_name or "all", told.level_value)
    if len(axes) != 1 or axes[0] not in variant.values:
        return None
    others = [f"{name} {value}" for name, value in variant.values.items() if name != axes[0]]
    return Level(axes[0], ", ".join(others) or "all", float(variant.values[axes[0]]))


def is_geometric(levels: Sequence[float]) -> bool:
    """Tell whether levels above zero are spread by factors rather than by differences."""
    ordered = sorted(it for it in set(levels) if it > 0)
    if len(ordered) < 3:
        return False
    steps = [after - before for before, after in pairwise(ordered)]
    factors = [math.log(after / before) for before, after in pairwise(ordered)]
    return max(factors) / min(factors) < max(steps) / min(steps)
