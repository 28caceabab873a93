"""Figures of a lens: what would be said next at each layer and position, and how models settle with depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from tensorsurgeon.report.chart_figures import plain
from tensorsurgeon.report.rows import columns_of

POSITIONS_SHOWN = 24
"""Positions of a prompt that a picture has room for, the last ones."""
TOKEN_SHOWN = 8
CURVES = (("bits", "entropy, bits"), ("kl", "divergence from the end, nats"), ("agrees", "share that says the same"))

Row = Mapping[str, Any]


def lens_figures(tables: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, Any]]:
    """Yield figures with their titles for tables that a lens has made: none for any others."""
    for title, rows in tables.items():
        columns = set(columns_of(rows))
        if {"prompt", "position", "depth", "top tokens"} <= columns and title != "next token":
            yield from _prompts(title, rows)
        elif {"relative depth", "depth", "agrees"} <= columns:
            for column, label in CURVES:
                yield f"{column} by depth", _by_depth(rows, column, label)


def _prompts(title: str, rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    groups: dict[tuple[Any, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.get("model"), row["prompt"]].append(row)
    for (model, prompt), held in groups.items():
        yield " ".join(filter(None, (title, f"prompt {prompt}", model))), _tokens(held)


def _visible(token: str) -> str:
    """Return a token as it can be seen in a picture: a space alone would be nothing."""
    shown = token.replace("\n", "\\n")
    shown = "".join(it if it.isprintable() else "·" for it in shown)
    return shown if shown.strip() else "␣" * len(shown)


def _tokens(rows: Sequence[Row]) -> Any:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    positions = sorted({row["position"] for row in rows})[-POSITIONS_SHOWN:]
    depths = sorted({row["depth"] for row in rows})
    cells = {(row["depth"], row["position"]): row for row in rows}
    values = [[cells[depth, position]["bits"] for position in positions] for depth in depths]
    figure = Figure(figsize=(1.5 + 0.62 * len(positions), 1.0 + 0.24 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap=colormaps["viridis"], aspect="auto", origin="lower", interpolation="nearest")
    middle = sum(image.get_clim()) / 2
    for y, depth in enumerate(depths):
        for x, position in enumerate(positions):
            row = cells[depth, position]
            ink = "black" if row["bits"] > middle else "white"
            text = _visible(row["top"])[:TOKEN_SHOWN]
            axes.text(x, y, text, ha="center", va="center", fontsize=6, color=ink, parse_math=False)
    heads = [_visible(cells[depths[0], position]["token"])[:TOKEN_SHOWN] for position in positions]
    axes.set_xticks(range(len(positions)), heads, rotation=45, ha="left", fontsize=7, parse_math=False)
    axes.xaxis.tick_top()
    every = ceil(len(depths) / 16)
    axes.set_yticks(range(0, len(depths), every), [str(depth) for depth in depths[::every]])
    axes.set_ylabel("layers that were run")
    figure.colorbar(image, ax=axes, label="entropy, bits", pad=0.01)
    return figure


def _by_depth(rows: Sequence[Row], column: str, label: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 2.8), layout="constrained")
    axes = figure.subplots()
    models = list(dict.fromkeys(row.get("model") for row in rows))
    for model in models:
        held = [row for row in rows if row.get("model") == model]
        xs, ys = [row["relative depth"] for row in held], [row[column] for row in held]
        axes.plot(xs, ys, marker="o", markersize=2.5, linewidth=1, label=model and plain(model))
    if len(models) > 1:
        axes.legend(fontsize=7)
    axes.set_xlabel("relative depth")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    return figure
