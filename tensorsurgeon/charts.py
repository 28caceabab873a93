"""Charts as data: what a page and figures draw of findings, so that both show the same.

A chart has panels of the same kind, and a panel has series of points. Where the points lie along the axis, and what
stands below them, is settled here, logarithmic axes too: `ticks` are places with their texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal, NamedTuple

WIDE = 10
"""Values are drawn on a logarithmic scale where the largest is this many times a middling one."""
SIDE = 0.05
"""Values are of both signs where those below zero reach this share of the largest."""

Kind = Literal["curves", "bars", "rows", "stack", "map"]
"""Curves with a band around them; bars upward; bars to the right, one a row; rows of shares on each other; cells."""


class Point(NamedTuple):
    """A value at a place, how far it spreads to both sides, and what is said of it; no value is drawn as a cross."""

    at: float
    value: float | None
    spread: float | None
    text: str


class Series(NamedTuple):
    """Points that belong together: a curve, bars of a colour, a row of cells."""

    label: str
    points: Sequence[Point]


class Panel(NamedTuple):
    """Series over one axis; `baseline` is a value to compare with."""

    title: str
    series: Sequence[Series]
    ticks: Sequence[tuple[float, str]]
    baseline: float | None = None


class Chart(NamedTuple):
    """Panels side by side with the same scale; charts of one title show one thing in several measures."""

    title: str
    measure: str
    kind: Kind
    axis: str
    panels: Sequence[Panel]
    log: bool = False
    """Whether a logarithmic scale suits the values better."""
    small: float | None = None
    """A magnitude below which that scale is linear, so that it can have zero and both signs; none needs neither."""
    signed: bool = False
    """Whether values go far to both sides of zero, so that colours have to tell which."""


def scaled(title: str, measure: str, kind: Kind, axis: str, panels: Sequence[Panel], has_zero: bool = True) -> Chart:
    """Return a chart with the scale that suits its values; those of which none comes near zero need none."""
    values = [it.value or 0.0 for panel in panels for series in panel.series for it in series.points]
    sizes = sorted(abs(it) for it in values if it) or [1.0]
    # A little below zero is next to zero: colours for both signs would leave all others half of their range.
    signed = -min(values, default=0.0) > SIDE * sizes[-1]
    # A scale of more than a thousandfold would make much of what is next to nothing.
    near_zero = max(sizes[len(sizes) // 20], sizes[-1] / 1000)
    small = near_zero if has_zero else None
    return Chart(title, measure, kind, axis, panels, sizes[-1] > WIDE * median(sizes), small, signed)


class Pivot(NamedTuple):
    """A table of texts laid side by side: the columns of it that make a row, a column, and a cell."""

    title: str
    table: str
    rows: Sequence[str]
    column: Sequence[str]
    text: str
    marks: Sequence[str] = ()
    """Columns whose values are told with a text."""
    first: Sequence[str] = ()
    """Columns to begin with, of those that there are."""
