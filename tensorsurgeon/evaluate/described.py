"""What a record says of a variant: its layers, and the damage done to it in the words of the degradation study.

Source: the schema of that study's outputs, whose notebooks read `degradation_method`, `level_value`, `std_dev` (which
is the level under its oldest name) and `param_group_name`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tensorsurgeon.checkpoint import Checkpoint, Step
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.format import Span
from tensorsurgeon.names import layer_name
from tensorsurgeon.registry import apply_steps

ARRANGING = ("select-layers", "drop-layers", "repeat-layers", "reverse-layers", "keep-layers")
METHODS = {"mult-gauss": "mult_gauss", "ablate": "ablation", "uniform-quant": "uni_quant"}
GROUPS = {"attention-v": "attn_only", "mlp": "mlp_only", "embedding": "embed_only"}


def damage(steps: Sequence[Step], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return method, level and group of the first step that perturbs, or the number that is called level."""
    step = next((it.parameters for it in steps if it.name == "perturb"), {})
    method, group = step.get("method"), step.get("group", ())
    groups = [group] if isinstance(group, str) else [str(it) for it in group]
    # Of a step it may be written as a text, as YAML takes 1e-3 for one; a variant may call anything else its level.
    told = float(step["level"]) if isinstance(step.get("level"), str) else step.get("level", values.get("level"))
    level = told if isinstance(told, int | float) and not isinstance(told, bool) else None
    return {
        "degradation_method": METHODS.get(str(method), method),
        "level_value": level,
        "std_dev": level,
        "param_group_name": ", ".join(GROUPS.get(it, it) for it in groups) or None,
    }


def layers_of(source: Checkpoint, steps: Sequence[Step]) -> list[int] | None:
    """Return the source layers of a variant in output order; none where that cannot be said.

    Steps that arrange layers move bytes and no more: where a layer's bytes lie tells which one it was.
    """
    if any(it.name == "stitch" for it in steps):
        return None
    with suppress(SurgeonError):
        origin: dict[Span | None, int] = {}
        for name, tensor in source.tensors.items():
            found = layer_name(name)
            if found and found.prefix == source.layers.prefix:
                origin.setdefault(tensor.span, found.index)
        arranged = apply_steps(source, [it for it in steps if it.name in ARRANGING])
        places: dict[int, int] = {}
        for name, tensor in arranged.tensors.items():
            found = layer_name(name)
            if found and found.prefix == arranged.layers.prefix and tensor.span in origin:
                places.setdefault(found.index, origin[tensor.span])
        return [places[place] for place in range(arranged.layers.count)]
    return None
