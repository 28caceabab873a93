"""Histograms over quarters of octaves, as details of findings hold them, and how they are drawn.

Bin i counts the magnitudes from edge(i) to edge(i + 1), edge(i) = 2^(octave + i // 4) * (1 + (i % 4) / 4), of positive
and of negative values apart; zero is counted by itself. The page draws the same in `assets/plots.js`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise, zip_longest
from math import log2
from typing import Any

Histogram = Mapping[str, Any]


def edge(histogram: Histogram, number: int) -> float:
    """Return the lower edge of a bin."""
    return float(2.0 ** (histogram["octave"] + number // 4) * (1 + number % 4 / 4))


def floor_of(histogram: Histogram) -> float:
    """Return the magnitude from which bins are worth drawing: below it lie at most 2 in 1000 of the elements."""
    counts = [sum(pair) for pair in zip_longest(histogram["negative"], histogram["positive"], fillvalue=0)]
    limit = 0.002 * sum(counts)
    first = next((number for number, below in enumerate(accumulate(counts)) if below > limit), 0)
    return edge(histogram, first)


def outline(histogram: Histogram, floor: float) -> tuple[list[float], list[float]]:
    """Return elements per octave for each drawn bin, and the edges between the bins, one more.

    Quarters of an octave are not equally wide, so that counts alone would draw stairs. All that is smaller than
    `floor` is one bin in the middle, drawn as one octave wide.
    """
    sides, within = [], histogram["zero"]
    for counts in (histogram["negative"], histogram["positive"]):
        used = max((number + 1 for number, count in enumerate(counts) if count), default=0)
        drawn = [number for number in range(used) if edge(histogram, number) >= floor]
        within += sum(counts[:used]) - sum(counts[number] for number in drawn)
        edges = [edge(histogram, number) for number in [*drawn, used][: len(drawn) + bool(drawn)]] or [floor]
        widths = [log2(high / low) for low, high in pairwise(edges)]
        sides.append(([counts[it] / width for it, width in zip(drawn, widths, strict=True)], edges))
    (negative, low), (positive, high) = sides
    return [*reversed(negative), within, *positive], [*(-it for it in reversed(low)), *high]
