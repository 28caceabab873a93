"""What a selection of layers did to a model, in one word: a window of neighbouring layers deleted, or doubled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

Kind = Literal["deleted", "doubled", "doubled as a block"]


class LayerChange(NamedTuple):
    """Neighbouring source layers that were deleted, or that stand twice."""

    kind: Kind
    first: int
    size: int

    @property
    def name(self) -> str:
        """The layers, as their notation has them."""
        return f"{self.first}" if self.size == 1 else f"{self.first}-{self.first + self.size - 1}"


def layer_change(layers: Sequence[int] | None, source_layers: int | None) -> LayerChange | None:
    """Return what became of the source's layers; nothing where all stayed, or where it is neither of the two.

    A window is doubled where each of its layers follows itself, and as a block where all of it does.
    """
    if layers is None or source_layers is None:
        return None
    missing = [it for it in range(source_layers) if it not in set(layers)]
    if missing and list(layers) == [it for it in range(source_layers) if it not in missing]:
        return LayerChange("deleted", missing[0], len(missing)) if _neighbours(missing) else None
    twice = sorted(it for it, count in Counter(layers).items() if count > 1)
    if twice and _neighbours(twice):
        before, after = list(range(twice[0])), list(range(twice[-1] + 1, source_layers))
        if list(layers) == [*before, *sorted([*twice, *twice]), *after]:
            return LayerChange("doubled", twice[0], len(twice))
        if list(layers) == [*before, *twice, *twice, *after]:
            return LayerChange("doubled as a block", twice[0], len(twice))
    return None


def _neighbours(layers: Sequence[int]) -> bool:
    return layers[-1] - layers[0] + 1 == len(layers)
