"""Draw kitchen.png, the picture of the study of pictures: a busy kitchen in which several things go wrong at once.

An old man reads a newspaper while the pot behind him boils over. Two children play with a ball: it has hit a jar, which
falls off the shelf. A cat on the table has overturned a jug, and the milk runs down. The fridge is open; outside, a dog
runs off with a sausage. The scene is invented, and drawn with no other picture as its model.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Ellipse, Polygon, Rectangle

INK = "#222222"
Point = tuple[float, float]


def box(axes: Axes, left: float, bottom: float, width: float, height: float, colour: str, angle: float = 0) -> None:
    """Draw a rectangle, turned about its lower left corner."""
    axes.add_patch(Rectangle((left, bottom), width, height, angle=angle, facecolor=colour, edgecolor=INK, lw=1.5))


def shape(axes: Axes, colour: str, *points: Point) -> None:
    """Draw a filled polygon."""
    axes.add_patch(Polygon(points, facecolor=colour, edgecolor=INK, lw=1.5))


def oval(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """Draw an ellipse about its centre."""
    axes.add_patch(Ellipse((x, y), width, height, facecolor=colour, edgecolor=INK, lw=1.5))


def line(axes: Axes, *points: Point, colour: str = INK, width: float = 2) -> None:
    """Draw a line through points."""
    axes.plot(*zip(*points, strict=True), color=colour, lw=width, solid_capstyle="round")


def person(axes: Axes, x: float, y: float, size: float, dress: str, hair: str, hands: tuple[Point, Point]) -> None:
    """Draw somebody whose feet are at a point, from the front, with hands where they are told to be."""
    for side in (-1, 1):
        line(axes, (x + 0.12 * side * size, y + 0.8 * size), (x + 0.14 * side * size, y), width=5 * size)
    shape(axes, dress, (x - 0.35 * size, y + 0.6 * size), (x + 0.35 * size, y + 0.6 * size),
          (x + 0.2 * size, y + 1.6 * size), (x - 0.2 * size, y + 1.6 * size))  # fmt: skip
    for side, hand in zip((-1, 1), hands, strict=True):
        line(axes, (x + 0.2 * side * size, y + 1.5 * size), hand, colour="#c98f6b", width=5 * size)
    oval(axes, x, y + 1.98 * size, 0.56 * size, 0.62 * size, hair)
    oval(axes, x, y + 1.9 * size, 0.46 * size, 0.54 * size, "#e8b996")
    for side in (-1, 1):
        axes.add_patch(Circle((x + 0.09 * side * size, y + 1.95 * size), 0.03 * size, color=INK))


def room(axes: Axes) -> None:
    """Draw walls, floor, the window with what is outside, and the open fridge."""
    box(axes, 0, 0, 16, 2.4, "#d8c3a0")
    box(axes, 0, 2.4, 16, 7.6, "#f3ead6")
    box(axes, 6.6, 5.2, 3.6, 3.2, "#bfe3f5")
    box(axes, 6.6, 5.2, 3.6, 1.0, "#8fbf6a")
    oval(axes, 9.5, 7.8, 0.7, 0.7, "#ffd84d")
    # The dog runs off to the left.
    oval(axes, 8.6, 6.1, 1.1, 0.4, "#8a5a33")
    oval(axes, 7.95, 6.35, 0.4, 0.35, "#8a5a33")
    for x in (8.2, 8.45, 8.8, 9.05):
        line(axes, (x, 6.0), (x - 0.15, 5.6), colour="#8a5a33", width=3)
    line(axes, (9.1, 6.2), (9.4, 6.55), colour="#8a5a33", width=3)
    line(axes, (7.5, 6.2), (7.95, 6.28), colour="#c0452f", width=5)
    line(axes, (8.4, 5.2), (8.4, 8.4))
    box(axes, 13.6, 1.6, 2.0, 5.6, "#fff7c9")
    for y in (3.0, 4.4, 5.8):
        line(axes, (13.6, y), (15.6, y))
    for x, y, colour in (
        (14.0, 3.0, "#c0452f"),
        (14.7, 3.0, "#4d8f4d"),
        (14.3, 4.4, "#e0a030"),
        (15.0, 5.8, "#6a7fc0"),
    ):
        box(axes, x, y, 0.45, 0.7, colour)
    shape(axes, "#e4e8ea", (13.6, 1.6), (12.7, 1.2), (12.7, 7.5), (13.6, 7.2))


def stove(axes: Axes) -> None:
    """Draw the stove, and the pot that boils over."""
    box(axes, 10.2, 1.6, 2.2, 2.4, "#b8bec4")
    box(axes, 10.5, 1.9, 1.6, 1.3, "#5b6166")
    box(axes, 10.7, 4.0, 1.2, 0.8, "#6f7f8f")
    oval(axes, 11.3, 4.85, 1.3, 0.35, "#ffffff")
    for x in (10.75, 11.85):
        shape(axes, "#ffffff", (x - 0.12, 4.8), (x + 0.12, 4.8), (x + 0.08, 4.1), (x - 0.08, 3.9))
    for x in (11.0, 11.4, 11.7):
        line(axes, (x, 5.1), (x + 0.15, 5.4), (x - 0.1, 5.7), (x + 0.1, 6.0), colour="#9aa7b0")


def children(axes: Axes) -> None:
    """Draw the boy who threw, the girl who wanted to catch, the ball, and the jar that it has hit."""
    box(axes, 0.6, 7.2, 3.9, 0.2, "#9a6b3f")
    for x, colour in ((0.9, "#c0452f"), (1.6, "#e0a030"), (2.3, "#6a7fc0")):
        box(axes, x, 7.4, 0.5, 0.8, colour)
    box(axes, 4.3, 7.05, 0.5, 0.8, "#4d8f4d", angle=-35)
    oval(axes, 3.6, 7.85, 0.8, 0.8, "#e0602f")
    line(axes, (1.9, 5.0), (2.3, 6.0), (2.9, 7.0), (3.2, 7.4), colour="#b9a98a", width=1.5)
    person(axes, 1.3, 0.9, 1.7, "#4a7fb5", "#5a3a1e", ((0.5, 2.6), (1.9, 4.8)))
    person(axes, 4.0, 1.1, 1.55, "#d86a8a", "#e0b040", ((3.3, 4.8), (4.7, 4.8)))


def table(axes: Axes) -> None:
    """Draw the table, the cat on it, and the jug at its edge."""
    box(axes, 5.4, 2.7, 3.6, 0.25, "#9a6b3f")
    for x in (5.6, 8.6):
        box(axes, x, 0.7, 0.2, 2.0, "#9a6b3f")
    oval(axes, 7.5, 3.3, 1.3, 0.7, "#777777")
    oval(axes, 6.85, 3.8, 0.6, 0.55, "#777777")
    for x in (6.7, 7.0):
        shape(axes, "#777777", (x - 0.12, 4.0), (x + 0.12, 4.0), (x, 4.3))
    line(axes, (8.1, 3.3), (8.5, 3.8), (8.4, 4.2), colour="#777777", width=5)
    line(axes, (6.9, 3.3), (6.05, 3.45), colour="#777777", width=5)
    box(axes, 5.3, 2.95, 0.6, 0.9, "#7ab0d8", angle=14)
    shape(axes, "#a9d3ee", (5.1, 3.8), (5.25, 3.75), (4.95, 2.2), (4.85, 2.2))


def main(out: Path = Path(__file__).parent / "suites" / "kitchen.png") -> None:
    """Draw all of it, the farthest first."""
    figure = plt.figure(figsize=(8, 5), dpi=96)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 16), ylim=(0, 10))
    axes.set_axis_off()
    room(axes)
    stove(axes)
    person(axes, 9.6, 0.6, 2.1, "#7a9f6a", "#c8c8c8", ((9.0, 3.2), (10.2, 3.2)))
    box(axes, 8.95, 2.95, 1.3, 1.0, "#ffffff")
    line(axes, (9.6, 2.95), (9.6, 3.95))
    for y in (3.15, 3.3, 3.45, 3.6, 3.75):
        for x in (9.05, 9.7):
            line(axes, (x, y), (x + 0.45, y), width=1)
    table(axes)
    children(axes)
    figure.savefig(out, metadata={"Software": None})


if __name__ == "__main__":
    main()
