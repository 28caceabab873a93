"""Which rows or columns of a matrix belong to a part of it: fused projections, stacked experts, attention heads.

A matrix on disk is seen as `stacked` matrices (experts; else one) of `rows x columns`. Its outputs are its rows, or its
columns where it lies the other way round (Conv1D of GPT-2, experts of gpt_oss). A part of a fused matrix takes the same
places of every unit of outputs: all outputs are one unit where parts follow one another, those of a head or of a group
of heads where they are fused by those, and as many as there are parts where these are interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.roles import Role

PARTS = {
    "qkv": ("q", "k", "v"),
    "qvk": ("q", "v", "k"),
    "gqkv": ("gate", "q", "k", "v"),
    "kv": ("k", "v"),
    "kv_a": ("latent", "k"),
    "kv_b": ("k", "v"),
    "gate_up": ("gate", "up"),
    "up_gate": ("up", "gate"),
}
"""The parts of fused matrices in their order. The latent of MLA is what keys and values are both made of."""

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_global_key_value_heads")
HEAD_SIZES = ("head_dim", "global_head_dim", "kv_channels", "attention_head_dim", "swa_head_dim")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CODEGEN_GROUPS = 4
"""CodeGen's matrices are those of four accelerators, one after the other, each with parts of its own."""


class Slots(NamedTuple):
    """The outputs of a part: from `start` up to but not including `stop` in every `unit` of them."""

    unit: int
    start: int
    stop: int

    def share(self, outputs: int) -> int:
        """Return how many of all outputs these are."""
        return outputs // self.unit * (self.stop - self.start)


class Grid(NamedTuple):
    """How a matrix lies: `stacked` matrices of `rows x columns`, whose outputs are rows, or `transposed` columns."""

    stacked: int
    rows: int
    columns: int
    transposed: bool = False

    @property
    def outputs(self) -> int:
        """Outputs of each matrix."""
        return self.columns if self.transposed else self.rows

    @property
    def inputs(self) -> int:
        """Inputs of each matrix."""
        return self.rows if self.transposed else self.columns


class Part(NamedTuple):
    """A part of a matrix, or all of it where there are no `slots`."""

    grid: Grid
    slots: tuple[Slots, ...] = ()

    @property
    def elements(self) -> int:
        """Elements of the part."""
        grid = self.grid
        outputs = sum(it.share(grid.outputs) for it in self.slots) if self.slots else grid.outputs
        return grid.stacked * outputs * grid.inputs


class Heads(NamedTuple):
    """Attention heads: `number` equal stretches of some outputs, of all of them, or of the inputs."""

    number: int
    slots: Slots | None = None
    inputs: bool = False


def grid_of(role: Role, shape: Sequence[int], config: Mapping[str, Any]) -> Grid:
    """Return how a tensor lies; a vector is a single row, and what has no layout lies in rows.

    Raises:
        RefusedError: for experts that are stacked row by row, where the config does not say how many they are.
    """
    transposed = role.layout.endswith("in,out")
    if role.layout.startswith("expert,") and len(shape) == 3:
        return Grid(shape[0], shape[1], shape[2], transposed)
    if role.layout.startswith("expert*"):
        nested = config.get("ffn_config")
        count = _first(nested if isinstance(nested, dict) else config, EXPERTS)
        if not count or shape[0] % count:
            raise RefusedError(f"has {shape[0]} rows, and the config does not say of how many experts.")
        return Grid(count, shape[0] // count, shape[1], transposed)
    return Grid(1, shape[0], prod(shape[1:]), transposed) if len(shape) > 1 else Grid(1, 1, prod(shape))


def parts_of(role: Role) -> tuple[str, ...]:
    """Return the parts of a matrix in their order; one that is not fused is its only part."""
    if role.part == "q" and role.fused == "per head":
        return ("q", "gate")
    return PARTS.get(role.part, (role.part,))


def slots_of(role: Role, grid: Grid, config: Mapping[str, Any]) -> dict[str, Slots]:
    """Return where each part of a fused matrix lies among its outputs.

    Raises:
        RefusedError: where that cannot be told from the config.
    """
    parts, outputs = parts_of(role), grid.outputs
    if not role.fused and role.part != "qvk":
        raise RefusedError(f"how {' and '.join(parts)} share this matrix is not known, so they cannot be told apart.")
    unit, sizes = _unit(role, parts, outputs, config)
    if unit < 1 or outputs % unit or sum(sizes) != unit or min(sizes) < 1:
        raise RefusedError(
            f"its {outputs} outputs are not those of {', '.join(parts)} ({role.fused}) with the heads that the config "
            "states, so they cannot be told apart."
        )
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return {part: Slots(unit, end - size, end) for part, size, end in zip(parts, sizes, ends, strict=True)}


def _unit(role: Role, parts: Sequence[str], outputs: int, config: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Return the outputs of a unit, and of each part in it."""
    heads = _first(config, HEADS) or 0
    if role.fused == "interleaved":
        return len(parts), [1] * len(parts)
    if role.part == "qvk":
        return _evenly(outputs // CODEGEN_GROUPS, 3)
    if role.part == "kv_a":
        latent, key = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
        return outputs, [latent, key] if isinstance(latent, int) and isinstance(key, int) else [0]
    if role.part == "kv_b":
        key, value = config.get("qk_nope_head_dim"), config.get("v_head_dim")
        return (key + value, [key, value]) if isinstance(key, int) and isinstance(value, int) else (0, [0])
    if role.fused == "per head":
        return _evenly(outputs // heads if heads and outputs % heads == 0 else 0, len(parts))
    if parts[-2:] != ("k", "v") or "q" not in parts:
        return _evenly(outputs, len(parts))
    several = len(parts) - 2
    for keys in _key_counts(role, config):
        whole = heads * several + 2 * keys
        size = outputs // whole if whole and outputs % whole == 0 else 0
        if size in head_sizes(config):
            break
    else:
        return 0, [0]
    if role.fused == "per group":
        group = heads // keys if keys else 0
        return size * (group + 2), [size * group, size, size]
    return outputs, [*[size * heads] * several, size * keys, size * keys]


def _evenly(unit: int, count: int) -> tuple[int, list[int]]:
    return unit, [unit // count] * count


def _single_key(role: Role, config: Mapping[str, Any]) -> bool:
    """Tell whether all heads share one key and value by a setting of its own, as in GPT-BigCode and older Falcons."""
    kind = str(config.get("model_type"))
    if kind == "gpt_bigcode":
        return role.fused == "blocks"
    falcon = kind == "falcon" or kind.startswith("RefinedWeb")
    return falcon and not config.get("new_decoder_architecture") and config.get("multi_query", True) is True


def _key_counts(role: Role, config: Mapping[str, Any]) -> list[int]:
    """Return how many heads keys and values may have, the likeliest first; the right one gives heads of a known size.

    As many as queries come last: configs may state a count that their model does not read.
    """
    if _single_key(role, config):
        return [1]
    heads = _first(config, HEADS) or 0
    own = config.get("model_type") == "chatglm" and not config.get("multi_query_attention")
    older = config.get("model_type") == "falcon" and not config.get("new_decoder_architecture")
    if own or older or role.fused == "per head":
        return [heads]
    nested = config.get("attn_config")
    stated = [nested.get("kv_n_heads")] if isinstance(nested, dict) else []
    stated += [config.get(key) for key in KEY_HEADS]
    return [*(count for count in stated if isinstance(count, int) and count > 0), heads]


def head_sizes(config: Mapping[str, Any]) -> set[int]:
    """Return what sizes an attention head may have, as the config states them or as its sizes imply."""
    stated = {config[key] for key in HEAD_SIZES if isinstance(config.get(key), int)}
    hidden, heads = _first(config, ("hidden_size", "n_embd", "d_model", "dim")), _first(config, HEADS)
    return stated or ({hidden // heads} if hidden and heads else set())


def heads_of(role: Role, grid: Grid, wanted: frozenset[str], config: Mapping[str, Any]) -> Iterator[Heads]:
    """Yield the attention heads of the wanted parts of a matrix; nothing of parts that have none, nor of norms.

    Raises:
        RefusedError: where the config does not say how many there are.
    """
    parts = parts_of(role) if role.group != "norm" else ()
    slots = slots_of(role, grid, config) if len(parts) > 1 else {}
    for part in parts:
        kind = part.removesuffix("_b")
        if part not in wanted or kind not in ("q", "k", "v", "o") or role.part == "kv_a" or role.mark == "indexer":
            continue
        length = grid.inputs if kind == "o" else slots[part].share(grid.outputs) if slots else grid.outputs
        yield Heads(_count(role, kind, length, config), slots.get(part), kind == "o")


def _count(role: Role, kind: str, length: int, config: Mapping[str, Any]) -> int:
    """Return how many heads a part has: what the config says, if that gives heads of a size that it knows."""
    keys = kind in "kv" and role.part != "kv_b"
    counts = _key_counts(role, config) if keys else [_first(config, HEADS) or 0]
    latent = [config.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    key, rope, value = (it if isinstance(it, int) else 0 for it in latent)
    sizes = {*head_sizes(config), key + rope, key, value} - {0}
    fitting = [count for count in counts if count and length % count == 0 and length // count in sizes]
    if not fitting:
        raise RefusedError(f"its heads cannot be told apart: the config says of no heads that make up {length}.")
    return fitting[0]


def _first(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)
