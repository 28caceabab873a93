"""Figures of a lens: for each prompt its positions by layers, with the token that would be said next in each cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from tensorsurgeon.report.rows import columns_of

POSITIONS_SHOWN = 24
"""Positions of a prompt that a picture has room for, the last ones."""
TOKEN_SHOWN = 8

Row = Mapping[str, Any]


def token_figures(tables: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, Any]]:
    """Yield a figure with its title for each prompt of tables that a lens has made: none for any others."""
    for title, rows in tables.items():
        if {"prompt", "position", "depth", "top tokens"} <= {*columns_of(rows)} and title != "next token":
            yield from _prompts(title, rows)


def _prompts(title: str, rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    groups: dict[tuple[Any, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.get("model"), row["prompt"]].append(row)
    for (model, prompt), held in groups.items():
        yield " ".join(filter(None, (title, f"prompt {prompt}", model))), _tokens(held)


def _visible(token: str) -> str:
    """Return as much of a token as a cell has room for, with what could not be seen by itself spelled out."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    inner = shown.strip(" ")
    ends = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    shown = "␣" * ends[0] + inner + "␣" * ends[1] if inner else "␣" * len(shown)
    shown = "".join(it if it.isprintable() else "·" for it in shown)
    return shown if len(shown) <= TOKEN_SHOWN else shown[: TOKEN_SHOWN - 1] + "…"


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
            text = _visible(row["top"])
            axes.text(x, y, text, ha="center", va="center", fontsize=6, color=ink, parse_math=False)
    heads = [_visible(cells[depths[0], position]["token"]) for position in positions]
    axes.set_xticks(range(len(positions)), heads, rotation=45, ha="left", fontsize=7, parse_math=False)
    axes.xaxis.tick_top()
    every = ceil(len(depths) / 16)
    axes.set_yticks(range(0, len(depths), every), [str(depth) for depth in depths[::every]])
    axes.set_ylabel("layers that were run")
    figure.colorbar(image, ax=axes, label="entropy, bits", pad=0.01)
    return figure
