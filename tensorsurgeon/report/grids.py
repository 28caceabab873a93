"""Tables that can be drawn as layer x role, and which of their tensors stand out.

Page and figures draw what is worked out here, so that both show the same cells, scales and outliers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from statistics import fmean, median
from typing import Any, NamedTuple

from tensorsurgeon.report.rows import columns_of

WIDE = 10
"""A largest magnitude this many times a small one is drawn on a logarithmic scale."""

OUTLYING = 3.5
"""The robust z-score from which a value stands out (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993)."""

OUTLIERS_KEPT = 20

Row = Mapping[str, Any]
Place = tuple[str, str, int | None]


class Outlier(NamedTuple):
    """A row whose value lies `score` robust standard deviations from the `median` of its role."""

    row: int
    median: float
    score: float


class Statistic(NamedTuple):
    """A numeric column of a grid: which row each cell shows, by model, role and layer."""

    name: str
    cells: list[list[list[int | None]]]
    small: float
    """A magnitude below which lie one in twenty: a logarithmic scale is linear there, so that it can have zero."""
    log: bool
    """Whether a logarithmic scale suits it better."""
    signed: bool
    varies: bool
    """Whether tensors of one role differ in it; sizes and the like do not."""
    outliers: list[Outlier]


class Grid(NamedTuple):
    """A table as layer x role, for each model that it tells of; `None` among the layers is outside of them."""

    title: str
    models: list[str]
    roles: list[str]
    layers: list[int | None]
    counts: list[list[list[int]]]
    """How many rows fall in a cell: the experts of a layer share one."""
    statistics: list[Statistic]

    @property
    def default(self) -> int:
        """The statistic to show first: one that differs within a role, and rather one that is never negative."""
        return max(
            range(len(self.statistics)), key=lambda it: (self.statistics[it].varies, not self.statistics[it].signed)
        )


def find_grids(tables: Mapping[str, Sequence[Row]]) -> list[Grid]:
    """Return a grid for each table whose rows have a `layer`, a `role` and a number to draw."""
    grids = (_grid(title, rows) for title, rows in tables.items() if _is_grid(rows))
    return [grid for grid in grids if grid.statistics]


def model_of(row: Row) -> str:
    """Return the model that a row or a detail tells of; one alone needs no name."""
    return str(row.get("model") or "")


def place_of(row: Row) -> Place:
    """Return the model, role and layer of a row."""
    return model_of(row), str(row["role"]), row["layer"] if is_number(row["layer"]) else None


def is_number(value: Any) -> bool:
    """Tell whether a value is a number, NaN and infinities among them."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_grid(rows: Sequence[Row]) -> bool:
    return all("layer" in row and "role" in row for row in rows) and any(is_number(row["layer"]) for row in rows)


def _grid(title: str, rows: Sequence[Row]) -> Grid:
    places: dict[Place, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        places[place_of(row)].append(number)
    models = list(dict.fromkeys(place[0] for place in places))
    roles = list(dict.fromkeys(place[1] for place in places))
    layers = sorted({place[2] for place in places}, key=lambda layer: (layer is not None, layer))
    frame = [[[(model, role, layer) for layer in layers] for role in roles] for model in models]
    counts = [[[len(places.get(place, ())) for place in line] for line in lines] for lines in frame]
    columns = [column for column in columns_of(rows) if column != "layer" and _is_numeric(rows, column)]
    statistics = [_statistic(rows, column, places, frame) for column in columns]
    return Grid(title, models, roles, layers, counts, statistics)


def _is_numeric(rows: Sequence[Row], column: str) -> bool:
    values = [row[column] for row in rows if row.get(column) not in (None, "-")]
    return all(map(is_number, values)) and any(map(isfinite, values))


def _statistic(
    rows: Sequence[Row], column: str, places: Mapping[Place, list[int]], frame: list[list[list[Place]]]
) -> Statistic:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (model, role, _), numbers in places.items():
        groups[model, role] += [number for number in numbers if _is_finite(rows[number].get(column))]
    values = {number: rows[number][column] for numbers in groups.values() for number in numbers}
    medians = {group: median(map(values.__getitem__, numbers)) for group, numbers in groups.items() if numbers}

    def extreme(place: Place) -> int | None:
        """Return the row farthest from the median of its role; none is farther than one that is no finite number."""
        candidates = [number for number in places.get(place, ()) if is_number(rows[number].get(column))]
        centre = medians.get(place[:2], 0)
        return max(candidates, key=lambda it: abs(values[it] - centre) if it in values else inf, default=None)

    cells = [[[extreme(place) for place in line] for line in lines] for lines in frame]
    sizes = sorted(abs(value) for value in values.values() if value) or [1]
    small = sizes[len(sizes) // 20]
    signed = any(value < 0 for value in values.values())
    varies = any(len({values[number] for number in numbers}) > 1 for numbers in groups.values())
    found = [it for group, numbers in groups.items() if numbers for it in _outliers(numbers, values, medians[group])]
    found.sort(key=lambda it: -it.score)
    return Statistic(column, cells, small, sizes[-1] >= WIDE * small, signed, varies, found[:OUTLIERS_KEPT])


def _is_finite(value: Any) -> bool:
    return is_number(value) and isfinite(value)


def _outliers(numbers: Sequence[int], values: Mapping[int, float], centre: float) -> list[Outlier]:
    """Return the rows of one role that stand out.

    The unit is the standard deviation, estimated as 1.4826 times the median distance from the median; where more than
    half of the values are the same, as 1.2533 times the mean distance. Both agree with it for a normal distribution.
    """
    distances = {number: abs(values[number] - centre) for number in numbers}
    unit = 1.4826 * median(distances.values()) or 1.2533 * fmean(distances.values())
    if not unit:
        return []
    return [
        Outlier(number, centre, distance / unit) for number, distance in distances.items() if distance > OUTLYING * unit
    ]
