"""What the noise of two quantised models comes to, in words: of a matrix, and of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIGNIFICANT = 5.0
"""Standard deviations from which a cosine is more than chance: none of the ten thousand matrices of a large model
comes that far by chance."""
CANCELLING = 0.9
"""What has to be cancelled of two noises for them to be called the same: their difference is then less than half
as large as either, and 10 dB below that of independent ones."""
NOTICEABLE = 0.1
"""What has to be cancelled, or added, to matter: less changes what is left of the noise by under half a decibel. With
as many elements as matrices have, a hundredth of it is significant already."""
HOLDING = 0.9
"""Share of all elements in matrices whose noise cancels from which the claim holds for a model."""
SURVIVING = 10.0
"""Decibels by which a change exceeds its error if it survives: it is then off by less than a third of itself."""

VERDICTS = ("adds up", "independent", "partly", "cancels")
"""From the noise that is opposite to the one that is the same."""

Row = Mapping[str, Any]


def verdict_of(row: Row) -> tuple[str, str]:
    """Return the verdict on a matrix with the statistics behind it, from its `cancelled` and `sign z`."""
    cancelled, z = row["cancelled"], row["sign z"]
    size = f"cancelled {cancelled:.3g}"
    if z is None or abs(z) < SIGNIFICANT:
        return "independent", f"{size} is no more than chance: z {z or 0:.1f}, below {SIGNIFICANT:g}"
    if abs(cancelled) < NOTICEABLE:
        return "independent", f"{size} is significant (z {z:.1f}) but small, below {NOTICEABLE:g}"
    if cancelled >= CANCELLING:
        return "cancels", f"{size}, at least {CANCELLING:g} (z {z:.1f})"
    if cancelled > 0:
        return "partly", f"{size}, between {NOTICEABLE:g} and {CANCELLING:g} (z {z:.1f})"
    return "adds up", f"{size}, at most {-NOTICEABLE:g} (z {z:.1f})"


def overall(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what all matrices come to: the median verdict, by elements, how many have each, and two claims.

    Noise that is the same cancels, but that alone does not save the change from one model to the other: where both are
    rounded to the same numbers, the noise that cancels is the change.
    """
    weights = [row["elements"] for row in rows]
    places = [VERDICTS.index(row["verdict"]) for row in rows]
    same = sum(row["elements"] for row in rows if row["verdict"] == "cancels") / sum(weights)
    found = {
        "verdict": VERDICTS[int(_middle(places, weights))],
        **{f"matrices: {verdict}": places.count(VERDICTS.index(verdict)) for verdict in reversed(VERDICTS)},
        "the noise is the same and cancels": f"{_claim(same >= HOLDING)}: it cancels in {same:.1%} of the elements",
    }
    strength = weighted_median(rows, "delta SNR")
    if strength is not None:
        error = f"{_claim(strength >= SURVIVING)}: it is off by {10 ** (-strength / 20):.1%} of itself"
        found["the change B - A survives"] = error
    return found


def weighted_median(rows: Sequence[Row], key: str) -> float | None:
    """Return the median of a column, each row weighed by its elements; rows without a value do not count."""
    known = [(row[key], row["elements"]) for row in rows if row.get(key) is not None]
    return _middle(*zip(*known, strict=True)) if known else None


def _claim(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def _middle(values: Sequence[float], weights: Sequence[int]) -> float:
    """Return the least value that, with all below it, has at least half of the weight."""
    order = sorted(range(len(values)), key=values.__getitem__)
    reached = 0
    for place in order:
        reached += weights[place]
        if 2 * reached >= sum(weights):
            break
    return values[place]
