"""Outcomes of studies as charts: measures by level, layers by importance, windows of layers, variants, label sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from tensorsurgeon.charts import Chart, Kind, Panel, Point, Series, scaled
from tensorsurgeon.evaluate.layer_changes import LayerChange
from tensorsurgeon.evaluate.outcome_measures import is_geometric
from tensorsurgeon.evaluate.outcomes import DAMAGE, PERPLEXITY, TIMES, Outcome, Spread, StudyOutcomes

Named = tuple[str, StudyOutcomes]
Draw = Callable[[str], list[Panel]]


def charts_of(studies: Sequence[StudyOutcomes]) -> list[Chart]:
    """Return the charts that suit what was swept, each in every measure that was taken."""
    named = [(it.name if len(studies) > 1 else "", it) for it in studies]
    measures = [it for it in dict.fromkeys(name for _, study in named for name in study.measures) if it != TIMES]
    whole = [(title, study) for title, study in named if not _is_covered(study)]
    charts = [
        *_drawn("By level", "curves", "level", measures, lambda measure: list(_level_panels(named, measure))),
        *_drawn("By layer", "bars", "layer", measures, lambda measure: list(_layer_panels(named, measure))),
        *_drawn("By window of layers", "map", "first layer", measures, lambda it: list(_window_panels(named, it))),
        *_drawn("By variant", "rows", "", measures, lambda measure: list(_variant_panels(whole, measure))),
    ]
    masses = [it for it in measures if it.startswith("mass of ")]
    if masses:
        panels = [_mass_panel(title, study, masses) for title, study in named]
        charts.append(Chart("What words are worth", "mean probability of label sets", "stack", "", panels))
    return charts


def _drawn(title: str, kind: Kind, axis: str, measures: Sequence[str], draw: Draw) -> Iterator[Chart]:
    for measure in measures:
        panels = draw(measure)
        if any(it.value is not None for panel in panels for one in panel.series for it in one.points):
            yield scaled(title, measure, kind, axis, panels, has_zero=not measure.startswith(PERPLEXITY))


def _is_covered(study: StudyOutcomes) -> bool:
    """Tell whether other charts show all variants but the baseline."""
    levels = [it for it in study.measured if it.level]
    windows = [it for it in study.measured if it.change]
    others = [it for it in study.measured if not it.level and not it.change and it is not study.baseline]
    return not others and len(levels) != 1 and len(windows) != 1 and bool(levels or windows)


def _level_panels(studies: Sequence[Named], measure: str) -> Iterator[Panel]:
    for title, study in studies:
        hit = [(it.level, it) for it in study.measured if it.level]
        for method in dict.fromkeys(level.method for level, _ in hit):
            held = [(level, it) for level, it in hit if level.method == method]
            values = list(dict.fromkeys(level.value for level, _ in held))
            if len(values) < 2:
                continue
            places = _places(values)
            series = [
                Series(group, _ordered(
                    _point(places[level.value], study, it, measure, f"{method} {level.value:g}")
                    for level, it in held if level.group == group
                ))
                for group in dict.fromkeys(level.group for level, _ in held)
            ]  # fmt: skip
            ticks = [(place, f"{value:g}") for value, place in sorted(places.items(), key=lambda it: it[1])]
            yield Panel(_joined(title, method), series, ticks, _baseline(study, measure))


def _places(levels: Sequence[float]) -> dict[float, float]:
    """Return where levels lie: by their logarithms where they are geometric, and in the order in which they stand.

    So levels of a quantiser, of which fewer are worse, go down to the right as the study has them.
    """
    sign = -1 if levels[0] > levels[-1] else 1
    if not is_geometric(levels):
        return {it: sign * it for it in levels}
    logs = {it: math.log10(it) for it in levels if it > 0}
    ordered = sorted(logs.values())
    step = (ordered[-1] - ordered[0]) / (len(ordered) - 1)
    # A geometric scale has no zero: it stands one step beside the smallest level.
    return {it: sign * logs.get(it, ordered[0] - step) for it in levels}


def _layer_panels(studies: Sequence[Named], measure: str) -> Iterator[Panel]:
    """Yield a panel for each change of layers of one size, where there are no windows of several sizes."""
    for title, study in studies:
        for kind, sizes in _sizes(study).items():
            for size, held in sizes.items():
                if len(held) < 2 or (size > 1 and len(sizes) > 1):
                    continue
                points = [_point(change.first, study, it, measure, f"{change.name} {kind}") for change, it in held]
                ticks = [(change.first, change.name) for change, _ in held]
                what = kind if size == 1 else f"{kind}, {size} layers at a time"
                yield Panel(
                    _joined(title, what), [Series("", _ordered(points))], sorted(ticks), _baseline(study, measure)
                )


def _window_panels(studies: Sequence[Named], measure: str) -> Iterator[Panel]:
    for title, study in studies:
        for kind, sizes in _sizes(study).items():
            if len(sizes) < 2 or sum(map(len, sizes.values())) < 4:
                continue
            series = [
                Series(f"{size} layer{'s' * (size > 1)}", _ordered(
                    _point(change.first, study, it, measure, f"{change.name} {kind}") for change, it in held
                ))
                for size, held in sorted(sizes.items())
            ]  # fmt: skip
            starts = sorted({int(it.at) for one in series for it in one.points})
            yield Panel(_joined(title, kind), series, [(it, str(it)) for it in starts])


def _sizes(study: StudyOutcomes) -> dict[str, dict[int, list[tuple[LayerChange, Outcome]]]]:
    """Return the variants that delete or double neighbouring layers, by that and by how many."""
    found: dict[str, dict[int, list[tuple[LayerChange, Outcome]]]] = {}
    for change, it in study.changed:
        found.setdefault(change.kind, {}).setdefault(change.size, []).append((change, it))
    return found


def _variant_panels(studies: Sequence[Named], measure: str) -> Iterator[Panel]:
    for title, study in studies:
        held = [it for it in study.by_damage if measure in it.measures]
        if held:
            points = [_point(place, study, it, measure, it.name) for place, it in enumerate(held)]
            ticks = [(place, it.name) for place, it in enumerate(held)]
            yield Panel(title, [Series("", points)], ticks, _baseline(study, measure))


def _mass_panel(title: str, study: StudyOutcomes, masses: Sequence[str]) -> Panel:
    held = [it for it in study.measured if any(name in it.measures for name in masses)]
    series = [
        Series(name.removeprefix("mass of "), [
            _point(place, study, it, name, it.name) for place, it in enumerate(held)
        ])
        for name in masses
    ]  # fmt: skip
    return Panel(title, series, [(place, it.name) for place, it in enumerate(held)])


def _point(at: float, study: StudyOutcomes, outcome: Outcome, measure: str, what: str) -> Point:
    spread = outcome.spread(measure)
    if spread is None:
        return Point(at, None, None, f"{what}: not measured")
    return Point(at, spread.mean, spread.std, f"{what}: {spoken(measure, spread)}")


def spoken(measure: str, spread: Spread) -> str:
    """Return a mean, and its spread where there is one, as people read it."""
    if spread.mean is None:
        return f"{measure} is no number"
    told = f"{measure} {spread.mean:.4g}"
    told += f" ± {spread.std:.2g} (n = {spread.n})" if spread.std is not None else ""
    return told + (f"; in {spread.broken} more no number" if spread.broken else "")


def _ordered(points: Iterator[Point] | Sequence[Point]) -> list[Point]:
    return sorted(points, key=lambda it: it.at)


def _baseline(study: StudyOutcomes, measure: str) -> float | None:
    return study.baseline.mean(measure) if study.baseline and measure != DAMAGE else None


def _joined(*words: str) -> str:
    return ": ".join(filter(None, words))
