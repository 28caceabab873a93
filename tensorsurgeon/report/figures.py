"""Findings as figures for papers: PNG and SVG, by matplotlib."""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from math import ceil, isfinite, log10, nan
from pathlib import Path
from typing import Any

from tensorsurgeon.errors import UsageError
from tensorsurgeon.registry import Findings
from tensorsurgeon.report.chart_figures import chart_figure, plain
from tensorsurgeon.report.destination import file_stem, make_directory, write_report
from tensorsurgeon.report.grids import Grid, Place, Row, Statistic, find_grids, model_of, place_of
from tensorsurgeon.report.histograms import Histogram, floor_of, outline
from tensorsurgeon.report.token_heatmaps import token_figures

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "tensorsurgeon",  # Names inside of an SVG are otherwise random.
}

DASHES = ("-", "--", ":", "-.")

Detail = Mapping[str, Any]
Laid = tuple[int | None, Mapping[str, Any]]
"""What lies over each other of one layer, by its labels; a single one needs none."""


def write_figures(findings: Findings, directory: Path) -> list[Path]:
    """Write findings as PNG (200 dpi) and SVG figures, and return their paths.

    They are the findings' charts; heatmaps of layer x role, for each statistic that differs within a role; and for each
    role its histograms and spectra, a few layers over each other. The same findings give the same bytes of SVG.

    Raises:
        UsageError: where matplotlib is not installed.
        DestinationError: where the directory cannot be made or written.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UsageError('--plot needs matplotlib: pip install "tensorsurgeon[report]"') from None
    make_directory(directory)
    taken: set[str] = set()
    paths = []
    with rc_context(STYLE), warnings.catch_warnings():
        # Tokens are of all scripts, and a font of only some: the others stand as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for title, figure in _figures(findings):
            stem = file_stem(title, taken)
            for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                content = io.BytesIO()
                figure.savefig(content, format=kind, dpi=200, metadata=metadata)
                paths.append(write_report(directory / f"{stem}.{kind}", content.getvalue()))
    return paths


def _figures(findings: Findings) -> Iterator[tuple[str, Any]]:
    """Yield figures with their titles, one at a time: each holds its pixels as long as it lives."""
    for chart in findings.charts:
        yield f"{chart.title} {chart.measure}", chart_figure(chart)
    yield from token_figures(findings.tables)
    for grid in find_grids(findings.tables):
        rows = findings.tables[grid.title]
        for statistic in grid.statistics:
            if statistic.varies:
                yield f"{grid.title} {statistic.name}", _heatmap(grid, statistic, rows)
    for (model, role), details in _by_role(findings).items():
        title = " ".join(filter(None, (role, model)))
        for key, most, figure in KINDS:
            laid = _laid(key, details, most)
            if laid:
                yield f"{key} {title}", figure(title, laid)


def _heatmap(grid: Grid, statistic: Statistic, rows: Sequence[Row]) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import AsinhNorm, Normalize
    from matplotlib.figure import Figure

    def value(number: int | None) -> float:
        found = nan if number is None else rows[number][statistic.name]
        return found if isfinite(found) else nan

    shown = [[[value(number) for number in line] for line in lines] for lines in statistic.cells]
    finite = [it for lines in shown for line in lines for it in line if isfinite(it)]
    low, high = min(finite), max(finite)
    if statistic.signed:
        low, high = -max(-low, high), max(-low, high)
    norm = AsinhNorm(statistic.small, low, high) if statistic.log else Normalize(low, high)
    colours = colormaps["PuOr_r" if statistic.signed else "viridis"].with_extremes(bad="0.85")
    width = 1.6 + len(grid.models) * max(2.0, 0.13 * len(grid.layers))
    figure = Figure(figsize=(width, 1.1 + 0.2 * len(grid.roles)), layout="constrained")
    row = figure.subplots(1, len(grid.models), sharey=True, squeeze=False)[0]
    for axes, model, lines in zip(row, grid.models, shown, strict=True):
        image = axes.imshow(lines, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        axes.set_title(plain(model), loc="left", fontsize=9)
        axes.set_xlabel("layer")
        every = ceil(len(grid.layers) / 12)
        ticks = [place for place, layer in enumerate(grid.layers) if layer is not None and layer % every == 0]
        axes.set_xticks(ticks, [str(grid.layers[place]) for place in ticks])
        axes.set_yticks(range(len(grid.roles)), map(plain, grid.roles))
    figure.colorbar(image, ax=row, label=plain(statistic.name), pad=0.01)
    return figure


def _by_role(findings: Findings) -> dict[tuple[str, str], list[tuple[int | None, Detail]]]:
    """Return the details of each model's roles, with their layers; one whose row is nowhere stands by its own name."""
    grids = [findings.tables[grid.title] for grid in find_grids(findings.tables)]
    places: dict[tuple[str, str], Place] = {
        (model_of(row), row["name"]): place_of(row) for rows in grids for row in rows if "name" in row
    }
    found = defaultdict(list)
    for detail in findings.details:
        model, name = model_of(detail), detail["name"]
        _, role, layer = places.get((model, name), (model, name, None))
        found[model, role].append((layer, detail))
    return found


def _laid(key: str, details: Sequence[tuple[int | None, Detail]], most: int) -> list[Laid]:
    """Return what the details of a few layers hold by its labels, evenly spread from the first layer to the last."""
    held = [(layer, detail[key]) for layer, detail in details if detail.get(key)]
    held.sort(key=lambda it: (it[0] is not None, it[0]))
    steps = min(most, len(held)) - 1
    few = [held[round(step * (len(held) - 1) / max(1, steps))] for step in range(steps + 1)]
    return [(layer, it if key == "histograms" else {"": it}) for layer, it in few]


def _curves(title: str, laid: Sequence[Laid], draw: Callable[[Any, Any, dict[str, Any]], None]) -> tuple[Any, Any]:
    """Return a figure and its axes, with a shade for each layer and a dash for each label."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(plain(title), loc="left", fontsize=9)
    axes.set_yscale("log")
    for place, (layer, labelled) in enumerate(laid):
        shade = colormaps["viridis"](0.85 * place / max(1, len(laid) - 1))
        for (label, held), dash in zip(labelled.items(), cycle(DASHES)):
            words = ", ".join(filter(None, (label, "" if layer is None else f"layer {layer}")))
            draw(axes, held, {"label": plain(words) or None, "color": shade, "linestyle": dash, "linewidth": 1})
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    return figure, axes


def _histograms(title: str, laid: Sequence[Laid]) -> Any:
    floor = min(floor_of(histogram) for _, labelled in laid for histogram in labelled.values())

    def draw(axes: Any, histogram: Histogram, style: dict[str, Any]) -> None:
        densities, edges = outline(histogram, floor)
        axes.stairs(densities, edges, baseline=None, **style)

    figure, axes = _curves(title, laid, draw)
    axes.set_xscale("symlog", linthresh=floor, linscale=0.3)
    powers = _powers(floor, max(map(abs, axes.get_xlim())))
    axes.set_xticks([*(-(10.0**it) for it in powers), 0, *(10.0**it for it in powers)])
    axes.minorticks_off()
    axes.set_ylim(bottom=0.5)
    axes.set_xlabel("value")
    axes.set_ylabel("elements per octave")
    return figure


def _powers(low: float, high: float) -> range:
    """Return at most four powers of ten between two magnitudes, the lowest of them clear of zero's place."""
    first, last = ceil(log10(low) + 0.5), int(log10(high) // 1)
    return range(last, first - 1, -max(1, ceil((last - first + 1) / 4)))


def _spectra(title: str, laid: Sequence[Laid]) -> Any:
    def draw(axes: Any, spectrum: Mapping[str, Any], style: dict[str, Any]) -> None:
        values, step = spectrum["values"], spectrum["step"]
        axes.plot(range(1, step * len(values) + 1, step), values, **style)

    figure, axes = _curves(title, laid, draw)
    axes.set_xlabel("index")
    axes.set_ylabel("singular value")
    return figure


KINDS = (("histogram", 6, _histograms), ("histograms", 3, _histograms), ("spectrum", 6, _spectra))
"""What is drawn of details, of how many layers at most, and by what."""
