"""What the changes between two checkpoints come to: of all, by layer, by role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.notation import format_layers

Row = Mapping[str, Any]


def summary(
    one: Checkpoint, two: Checkpoint, rows: Sequence[Row], absent: Sequence[Row], others: Mapping[str, int], whole: bool
) -> dict[str, Any]:
    """Return what two checkpoints come to, from a row for each pair of tensors and for each that has no pair.

    `others` is how many are in another dtype or shape; `whole` tells that nothing was left out by choice.
    """
    changes = [str(row["change"]).split(", ") for row in rows]
    same_bytes = sum(not {"values", "bytes", "same numbers"} & set(it) for it in changes)
    same_numbers = sum("same numbers" in it for it in changes)
    moved = sum(it[0] == "renamed" or it[0].startswith("from layer") for it in changes)
    equal = "no"
    if same_bytes + same_numbers == len(rows) and not absent:
        equal = "every number" if same_numbers else "every byte"
        equal += (" of every tensor" if whole else " of what was chosen") + (", under other names" if moved else "")
    return {
        "first": one.sources[0].name,
        "second": two.sources[0].name,
        "equal": equal,
        "tensors compared": len(rows),
        "of the same bytes": same_bytes,
        "of the same numbers": same_numbers,
        "changed": len(rows) - same_bytes - same_numbers,
        "renamed or moved": moved,
        **others,
        "in another shard": sum("shard" in it for it in changes),
        "removed": sum(row["change"] == "removed" for row in absent),
        "added": sum(row["change"] == "added" for row in absent),
    }


def by_layer(one: Checkpoint, layers: Sequence[int | None], rows: Sequence[Row]) -> tuple[str, list[dict[str, Any]]]:
    """Return in words which layers the second model has, and a row for each, those that changed most first."""
    if not layers:
        return "not clear in one of the two models", []
    count = one.layers.count
    known = [layer for layer in layers if layer is not None]
    gone = sorted(set(range(count)) - set(known))
    text = f"the same {count}" if tuple(layers) == tuple(range(count)) else f"{format_layers(known)} of {count}"
    text += f"; {format_layers(gone)} are gone" if gone else ""
    text += f"; {len(layers) - len(known)} are new" if len(known) < len(layers) else ""
    made = []
    for layer, origin in enumerate(layers):
        held = [row for row in rows if row["layer"] == layer]
        if held:
            made.append({"layer of the second": layer, "of the first": origin, **_most(held)})
    return text, sorted(made, key=lambda row: -(row["largest relative error"] or 0))


def by_role(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a row for each role, those that changed most first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["role"] or "other"].append(row)
    made = [{"tensors of": role, **_most(held)} for role, held in groups.items()]
    return sorted(made, key=lambda row: -(row["largest relative error"] or 0))


def _most(rows: Sequence[Row]) -> dict[str, Any]:
    errors = [row["relative error"] for row in rows if row["relative error"] is not None]
    return {
        "number": len(rows),
        "changed": sum(row["unequal share"] != 0 for row in rows),
        "largest relative error": max(errors, default=None),
        "rms relative error": sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None,
    }
