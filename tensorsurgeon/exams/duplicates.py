"""Find layers that hold the same bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.exams.streaming import same_bytes
from tensorsurgeon.exams.verdict import DUPLICATED, Rule
from tensorsurgeon.names import layer_name
from tensorsurgeon.notation import format_layers


def same_layers(
    ckpt: Checkpoint, fingerprints: Mapping[str, str], rules: Sequence[Rule]
) -> list[tuple[Rule, str, str]]:
    """Return layers whose tensors all hold the same bytes as those of an earlier layer, under the rule for that.

    Fingerprints of all tensors tell which layers are worth comparing.
    """
    rule = next((rule for rule in rules if rule.name == DUPLICATED.name), None)
    try:
        stack = ckpt.layers
    except CheckpointError:
        return []
    if rule is None:
        return []
    made: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, fingerprint in fingerprints.items():
        layer = stack.layer_of(name)
        if layer is not None:
            made[layer].append((_rest(name), fingerprint))
    alike: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for layer, parts in sorted(made.items()):
        alike[tuple(sorted(parts))].append(layer)
    found = []
    for same, group in alike.items():
        twins = [group[0]]
        twins += [layer for layer in group[1:] if _same(ckpt, stack.prefix, same, group[0], layer)]
        if len(twins) > 1:
            found.append((rule, f"layers {format_layers(twins)}", "hold the same bytes in every tensor."))
    return found


def _same(ckpt: Checkpoint, prefix: str, parts: Sequence[tuple[str, str]], one: int, other: int) -> bool:
    """Compare two layers byte by byte."""
    return all(same_bytes(ckpt[f"{prefix}{one}.{rest}"], ckpt[f"{prefix}{other}.{rest}"]) for rest, _ in parts)


def _rest(name: str) -> str:
    found = layer_name(name)
    assert found
    return found.rest
