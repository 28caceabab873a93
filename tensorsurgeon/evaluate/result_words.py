"""What a study found, in a few sentences made from its figures; and what of its records is missing or no number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorsurgeon.evaluate.outcomes import DAMAGE, DIVERGENCE, PERPLEXITY, RIGHT, TIMES, Outcome, StudyOutcomes
from tensorsurgeon.evaluate.records import Number


def summary_of(studies: Sequence[StudyOutcomes]) -> list[str]:
    """Return a paragraph for each study: what was swept, what hurt least and most, and what is missing."""
    return [" ".join(_sentences(it)) for it in studies]


def problems_of(studies: Sequence[StudyOutcomes]) -> Iterator[str]:
    """Yield which variants gave numbers that are none."""
    for study in studies:
        for it in study.measured:
            broken = [(name, it.measures[name]) for name in it.measures if name != DAMAGE]
            counts = {name: sum(value is None for value in values.values()) for name, values in broken}
            worst = max(counts.values(), default=0)
            if worst:
                names = ", ".join(name for name, count in counts.items() if count)
                of = max(len(values) for _, values in broken)
                told = f"{names} {_is(names)} no number in {worst} of {_count(of, 'repetition')}"
                yield f"{study.name}: {it.name}: {told}."


def _sentences(it: StudyOutcomes) -> Iterator[str]:
    study, results = it.results.study, it.results
    yield f"{study.name}:"
    if study.about:
        about = study.about.strip()
        yield about if about.endswith((".", "?", "!")) else f"{about}."
    times = f", each {study.repeats} times" if study.repeats > 1 else ""
    variants = _count(len(study.variants), "variant")
    yield f"{variants} of {study.source} {_were(len(study.variants))} asked the suite {study.suite}{times}."
    if len(results.records) < results.expected:
        # How many there are to be of each variant is known when the second has begun.
        begun = {(one.variant, one.repeat_index) for one in results.records}
        expected = f"{'at least ' * (len(begun) == 1)}{results.expected:,}"
        so_far = f"{len(results.records):,} of {expected} records"
        yield f"So far there are {so_far}, of {_count(len(it.measured), 'variant')}."
    elif results.records:
        yield f"All {results.expected:,} records are there."
    else:
        yield "There are no records yet."
    if results.cut:
        yield "The last line is cut off and was left out."
    if results.repeated:
        yield f"Of {_count(results.repeated, 'record')} there is a later one, which counts."
    if results.unknown:
        yield f"{_count(results.unknown, 'record')} of other kinds {_were(results.unknown)} left out."
    yield from _damage(it)


def _damage(it: StudyOutcomes) -> Iterator[str]:
    others = [one for one in it.by_damage if one is not it.baseline and one.spread(DAMAGE)]
    if others:
        yield f"Damage is {it.damage}."
    if it.baseline and _facts(it.baseline):
        yield f"The baseline has {_facts(it.baseline)}."
    broken = [one for one in others if one.broken]
    known = [one for one in others if not one.broken]
    if len(known) == 1:
        yield f"{known[0].name} has {_facts(known[0])}."
    elif known:
        yield f"{known[0].name} hurt least: {_facts(known[0])}. {known[-1].name} hurt most: {_facts(known[-1])}."
    if broken:
        yield f"{_count(len(broken), 'variant')} gave no numbers at times, the worst {broken[-1].name}."
    for kind in ("deleted", "doubled"):
        single = [
            change.name
            for change, one in sorted(it.changed, key=lambda pair: pair[1].badness)
            if one in known and change.kind == kind and change.size == 1
        ]
        if len(single) > 2:
            yield f"Of single layers {kind}, {single[0]} mattered least and {single[-1]} most."
    yield from _levels([one for one in it.measured if one.level])


def _levels(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield for each method and part of the model the levels at both ends, and what became of the damage."""
    held: dict[tuple[str, str], list[tuple[float, Number]]] = {}
    for it in outcomes:
        if it.level and DAMAGE in it.measures:
            held.setdefault((it.level.method, it.level.group), []).append((it.level.value, it.mean(DAMAGE)))
    for (method, group), pairs in held.items():
        if len(pairs) > 1:
            (first, before), (last, after) = pairs[0], pairs[-1]
            what = " ".join(filter(None, (method, "" if group == "all" else f"of {group}")))
            yield f"{what}: damage {_number(before)} at level {first:g}, {_number(after)} at level {last:g}."


def _number(value: Number) -> str:
    return "no number" if value is None else f"{value:.3g}"


def _facts(it: Outcome) -> str:
    """Return the main figures of a variant, with their standard deviations where there are several repetitions."""
    names = [one for one in it.measures if one.startswith(PERPLEXITY)] or [DAMAGE]
    told = []
    for name in (*names, DIVERGENCE, RIGHT, *(one for one in it.measures if one.startswith(f"{RIGHT} in "))):
        spread = it.spread(name)
        # Of a baseline the divergence from itself is no news.
        if not spread or spread.mean is None or (name == DIVERGENCE and not spread.mean):
            continue
        form, deviation = (".0%", ".0%") if name.startswith(RIGHT) else (".3g", ".2g")
        figure = f"{spread.mean:{form}}" + (f" ± {spread.std:{deviation}}" if spread.std else "")
        told.append(f"{figure} {name}" if name.startswith(RIGHT) else f"{name} {figure}")
    times = it.mean(TIMES)
    if times is not None and times != 1:
        told.insert(len(names), f"{times:.3g} times the baseline's")
    return ", ".join(told)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _is(names: str) -> str:
    return "are" if "," in names else "is"
