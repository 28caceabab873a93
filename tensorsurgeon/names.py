"""Tensor names: globs, and the decoder layers in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate

from tensorsurgeon.errors import CheckpointError, UsageError
from tensorsurgeon.notation import LayerSequence, format_layers

_LAYER = re.compile(
    r"^(?P<prefix>(?:.*?\.)?(?:layers|layer|h|blocks|block)\.)(?P<index>0|[1-9][0-9]{0,5})\.(?P<rest>.+)$"
)
_NOT_THE_STACK = re.compile(r"vision|visual|audio|image|speech|qformer|perceiver|talker|code2wav|(^|\.)mtp")

COMPANION = (
    r"\.weight_(?:scale(?:_2|_inv|_inverse)?|packed|shape|zero_point|global_scale|g_idx|format|scb)|\.SCB|\.bitmask"
    r"|_scale_inv|_weight_scale(?:_2)?|_input_scale|_blocks|_scales|\.qweight|\.qzeros|\.scales|\.g_idx|\.trellis"
    r"|\.weight[._](?:absmax|quant_map|nested_\w+|quant_state(?:\.\w+)?)|\._weight_\w+|\.compressed|[._]pre_quant_scale"
    r"|\.svdquant_lora_[ab]|(?<=[kv]_proj)\.[kv]_bias|_activation_scale|\.activation_scale"
    r"|\.input_(?:scale(?:_ub)?|global_scale|zero_point)|\.output_scale|\.[kvq]_scale"
)
"""How names end of tensors that describe a quantised weight: the quantised formats of transformers 5 and vLLM 0.32."""

_COMPANION = re.compile(rf"(?P<module>.+?)(?:{COMPANION})$")


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that the glob matches; `*` crosses dots, and a comma separates alternatives."""
    alternatives = re.compile("|".join(translate(part.strip()) for part in pattern.split(",")))
    return [name for name in names if alternatives.match(name)]


def companions(names: Iterable[str]) -> dict[str, str]:
    """Return the tensors that describe a quantised weight, each with the module it belongs to."""
    found = ((name, _COMPANION.match(name)) for name in names)
    return {name: match["module"] for name, match in found if match}


@dataclass(frozen=True)
class LayerName:
    """A tensor name taken apart: `prefix` + `index` + `.` + `rest`."""

    prefix: str
    index: int
    rest: str


def layer_name(name: str) -> LayerName | None:
    """Take a name apart at its first numbered layer; experts and blocks inside a layer do not count."""
    match = _LAYER.match(name)
    return LayerName(match["prefix"], int(match["index"]), match["rest"]) if match else None


def is_tower(prefix: str) -> bool:
    """Tell whether layers under a prefix are those of a vision or audio tower, or of multi-token prediction."""
    return bool(_NOT_THE_STACK.search(prefix))


@dataclass(frozen=True)
class LayerStack:
    """The decoder layers of a model: `count` of them, named `prefix` + index.

    `extra` layers follow the stack under the next indices: the multi-token prediction layers of DeepSeek-V3
    and its kin.
    """

    prefix: str
    count: int
    extra: int = 0

    def layer_of(self, name: str) -> int | None:
        """Return the layer that the tensor `name` belongs to, or None for a tensor outside the stack."""
        found = layer_name(name)
        return found.index if found and found.prefix == self.prefix else None

    def renamed(self, name: str, index: int) -> str:
        """Return `name`, a tensor of the stack, as a tensor of layer `index`."""
        found = layer_name(name)
        assert found
        return f"{self.prefix}{index}.{found.rest}"

    def check(self, layers: Iterable[int]) -> None:
        """Raise UsageError for a layer that the stack does not have."""
        beyond = sorted({layer for layer in layers if not 0 <= layer < self.count})
        if beyond:
            raise UsageError(
                f"layers: there is no layer {', '.join(map(str, beyond))}; "
                f"the model has {self.count} layers, 0 to {self.count - 1}."
            )

    def without(self, layers: Iterable[int]) -> LayerSequence:
        """Return the sequence of all layers but `layers`."""
        gone = set(layers)
        self.check(gone)
        return tuple(layer for layer in range(self.count) if layer not in gone)


def layer_stacks(names: Iterable[str]) -> Mapping[str, set[int]]:
    """Return every prefix under which layers are numbered, the indices found there, towers and MTP left out."""
    stacks: dict[str, set[int]] = {}
    for name in names:
        found = layer_name(name)
        if found and not is_tower(found.prefix):
            stacks.setdefault(found.prefix, set()).add(found.index)
    return stacks


def find_stack(names: Iterable[str], count: int | None = None, extra: int = 0, gaps: bool = False) -> LayerStack:
    """Find the stack of decoder layers among tensor names.

    `count` is what the config says, or None where it does not say; `extra` is the number of multi-token
    prediction layers that may follow the stack under the next indices. With `gaps` not every layer has tensors.

    Raises:
        CheckpointError: for no stack, more than one, gaps in its numbers, or another count than the config's.
    """
    stacks = layer_stacks(names)
    fitting = {prefix: found for prefix, found in stacks.items() if count and max(found) + 1 in (count, count + extra)}
    chosen = fitting or stacks
    if len(chosen) != 1:
        listed = ", ".join(f"{prefix}N (0 to {max(found)})" for prefix, found in stacks.items()) or "none"
        raise CheckpointError(f"cannot tell which tensors are the decoder layers; numbered stacks found: {listed}.")
    ((prefix, found),) = chosen.items()
    present = max(found) + 1
    missing = [layer for layer in range(present) if layer not in found]
    if missing and not gaps:
        listed = format_layers(missing)
        raise CheckpointError(f"layers {listed} have no tensors under {prefix}N; the checkpoint is incomplete.")
    if count is None and extra:
        raise CheckpointError("config.json counts layers for multi-token prediction, but not the layers before them.")
    if count is None or present == count:
        return LayerStack(prefix, present)
    if present == count + extra:
        return LayerStack(prefix, count, extra)
    raise CheckpointError(
        f"config.json says {count} layers, but there are tensors of {present} under {prefix}N; "
        "the config does not belong to these weights."
    )
