"""Charts as figures, by matplotlib; `assets/charts.js` draws the same on a page."""

from __future__ import annotations

from math import ceil, log10, nan
from typing import Any

from tensorsurgeon.charts import Chart, Panel, Point, Series

COLOURS = ("#2f6690", "#c8701a", "#8f7ac2", "#4f9d7c", "#b5658c", "#8a8f98")
QUIET, ALARM = "0.45", "#b3261e"
TICKS = 16
"""Most texts below an axis."""
ROOM = 6.0
"""Inches for the cells of a map, at most; and at most as many texts beside it as have room there."""


def plain(text: str) -> str:
    """Return a text as matplotlib shows it unchanged: between dollars it takes it for a formula."""
    return text.replace("$", r"\$")


def chart_figure(chart: Chart) -> Any:
    """Return a chart as a figure: its panels side by side, or below each other where each has a line for a variant."""
    from matplotlib.figure import Figure

    lying = chart.kind in ("rows", "stack", "map")
    heights = [_height(chart, panel) for panel in chart.panels]
    count = len(chart.panels)
    across = 1 if lying else min(count, 3)
    down = ceil(count / across)
    size = (7.0, sum(heights)) if lying else (max(4.5, 3.6 * across), 2.9 * down)
    figure = Figure(figsize=size, layout="constrained")
    ratios = {"height_ratios": heights} if lying else {}
    grid = figure.subplots(
        down, across, squeeze=False, sharey=not lying, sharex=chart.kind == "rows", gridspec_kw=ratios
    )
    for axes in grid.flat[count:]:
        axes.remove()
    drawing = {"curves": _curves, "bars": _bars, "rows": _bars, "stack": _stack, "map": _map}[chart.kind]
    for axes, panel in zip(grid.flat, chart.panels, strict=False):
        drawing(axes, chart, panel)
        title = ": ".join(filter(None, (chart.title, panel.title)))
        axes.set_title(plain(title), loc="left", fontsize=9)
    return figure


def _height(chart: Chart, panel: Panel) -> float:
    if chart.kind == "map":
        return 1.2 + min(0.3 * len(panel.series), ROOM)
    return 1.2 + 0.17 * len(panel.ticks)


def _known(series: Series) -> list[tuple[Point, float]]:
    return [(it, it.value) for it in series.points if it.value is not None]


def _scaled(axis: Any, chart: Chart) -> None:
    """Set the scale of an axis of values, and ticks as people write numbers."""
    from matplotlib.ticker import LogFormatter

    if not chart.log:
        return
    if chart.small is None:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())
        return
    getattr(axis.axes, f"set_{axis.axis_name}scale")("asinh", linear_width=chart.small)
    values = [value for panel in chart.panels for series in panel.series for _, value in _known(series)]
    powers = [10.0**it for it in range(ceil(log10(chart.small)), ceil(log10(max(map(abs, values)) or 1)) + 1)]
    below = [-it for it in powers if min(values) <= -it]
    ticks = [*below, 0.0, *(it for it in powers if it <= max(values))]
    axis.set_ticks(ticks, [f"{it:g}" for it in ticks])
    axis.set_ticks([], minor=True)


def _upright(axes: Any, chart: Chart, panel: Panel) -> None:
    """Set the axes of a panel whose values go up: scale, ticks, the baseline, and crosses for what is no number."""
    _scaled(axes.yaxis, chart)
    shown = panel.ticks[:: ceil(len(panel.ticks) / TICKS)]
    axes.set_xticks([at for at, _ in shown], [plain(text) for _, text in shown])
    axes.set_xlabel(plain(chart.axis))
    axes.set_ylabel(plain(chart.measure))
    if panel.baseline is not None:
        axes.axhline(panel.baseline, color=QUIET, linewidth=0.8, linestyle=":")
    if broken := _broken(panel):
        ends = [1.0] * len(broken)
        axes.plot(broken, ends, "x", color=ALARM, transform=axes.get_xaxis_transform(), clip_on=False)


def _lying(axes: Any, chart: Chart, panel: Panel) -> None:
    """Set the axes of a panel that has a line for each tick, and its values go to the right."""
    axes.set_yticks([at for at, _ in panel.ticks], [plain(text) for _, text in panel.ticks], fontsize=7)
    axes.set_ylim(len(panel.ticks) - 0.4, -0.6)
    axes.set_xlabel(plain(chart.measure))
    if panel.baseline is not None:
        axes.axvline(panel.baseline, color=QUIET, linewidth=0.8, linestyle=":")
    if broken := _broken(panel):
        ends = [1.0] * len(broken)
        axes.plot(ends, broken, "x", color=ALARM, transform=axes.get_yaxis_transform(), clip_on=False)


def _broken(panel: Panel) -> list[float]:
    return [it.at for series in panel.series for it in series.points if it.value is None]


def _curves(axes: Any, chart: Chart, panel: Panel) -> None:
    for number, series in enumerate(panel.series):
        known, colour = _known(series), COLOURS[number % len(COLOURS)]
        places, values = [it.at for it, _ in known], [value for _, value in known]
        axes.plot(places, values, "o-", color=colour, linewidth=1.2, markersize=3, label=plain(series.label))
        low = [value - (it.spread or 0) for it, value in known]
        high = [value + (it.spread or 0) for it, value in known]
        if any(it.spread for it, _ in known):
            axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    _upright(axes, chart, panel)
    if any(series.label for series in panel.series):
        axes.legend(fontsize=7)


def _bars(axes: Any, chart: Chart, panel: Panel) -> None:
    """Draw bars, or dots where the scale has no zero for bars to begin at, with their spread."""
    flat = chart.kind == "rows"
    for series in panel.series:
        known = _known(series)
        places, values = [it.at for it, _ in known], [value for _, value in known]
        across, up = (values, places) if flat else (places, values)
        if chart.log and chart.small is None:
            axes.plot(across, up, "o", color=COLOURS[0], markersize=4)
        elif flat:
            axes.barh(places, values, height=0.7, color=COLOURS[0])
        else:
            axes.bar(places, values, width=0.7, color=COLOURS[0])
        if any(it.spread for it, _ in known):
            spreads = {"xerr" if flat else "yerr": [it.spread or 0 for it, _ in known]}
            axes.errorbar(across, up, fmt="none", color=QUIET, linewidth=0.8, capsize=2, **spreads)
    if not flat:
        _upright(axes, chart, panel)
        return
    _scaled(axes.xaxis, chart)
    _lying(axes, chart, panel)


def _stack(axes: Any, chart: Chart, panel: Panel) -> None:
    ends = {at: 0.0 for at, _ in panel.ticks}
    for number, series in enumerate(panel.series):
        known, colour = _known(series), COLOURS[number % len(COLOURS)]
        lefts = [ends[it.at] for it, _ in known]
        widths = [value for _, value in known]
        axes.barh([it.at for it, _ in known], widths, left=lefts, height=0.8, color=colour, label=plain(series.label))
        ends |= {it.at: left + value for (it, value), left in zip(known, lefts, strict=True)}
    _lying(axes, chart, panel)
    axes.set_xlim(0, 1)
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(panel.series))


def _map(axes: Any, chart: Chart, panel: Panel) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import AsinhNorm, LogNorm, Normalize

    everywhere = [value for one in chart.panels for series in one.series for _, value in _known(series)]
    low, high = min(everywhere), max(everywhere)
    if chart.signed:
        low, high = -max(-low, high), max(-low, high)
    norm = Normalize(low, high)
    if chart.log:
        norm = LogNorm(low, high) if chart.small is None else AsinhNorm(chart.small, low, high)
    colours = colormaps["PuOr_r" if chart.signed else "viridis"].with_extremes(bad="0.95")
    held = [{it.at: value for it, value in _known(series)} for series in panel.series]
    cells = [[line.get(at, nan) for at, _ in panel.ticks] for line in held]
    image = axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", origin="lower")
    shown = list(enumerate(panel.ticks))[:: ceil(len(panel.ticks) / TICKS)]
    axes.set_xticks([place for place, _ in shown], [text for _, (_, text) in shown])
    labels = list(enumerate(panel.series))[:: ceil(0.17 * len(panel.series) / ROOM)]
    axes.set_yticks([place for place, _ in labels], [plain(series.label) for _, series in labels])
    axes.set_xlabel(plain(chart.axis))
    places = {at: place for place, (at, _) in enumerate(panel.ticks)}
    for line, series in enumerate(panel.series):
        broken = [places[it.at] for it in series.points if it.value is None]
        axes.plot(broken, [line] * len(broken), "x", color=ALARM)
    axes.figure.colorbar(image, ax=axes, label=plain(chart.measure), pad=0.01)
