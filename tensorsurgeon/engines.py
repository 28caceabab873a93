"""Where an engine reads a config otherwise than transformers does: what is right for one is wrong for the other.

Read off vLLM 0.32, `vllm/model_executor/models/*.py`. Nothing here depends on what was done to a checkpoint: the
config alone tells whether both read the same model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import Config
from tensorsurgeon.errors import CheckpointError, RefusedError, raise_all
from tensorsurgeon.families import FAMILIES
from tensorsurgeon.families.attention import CHUNKED, FULL, LINEAR, SLIDING, every
from tensorsurgeon.families.mlp import DENSE, SPARSE
from tensorsurgeon.fields import Field, Fill, InexpressibleError, Meaning, lookup
from tensorsurgeon.notation import format_layers
from tensorsurgeon.rules import number

Engine = Literal["vllm", "transformers"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
"""Engines that may be named as the target of what is written."""


class Reading(NamedTuple):
    """What vLLM makes of a config where transformers goes by the field that has `key`, and what comes of it."""

    key: str
    fill: Fill
    consequence: str
    points: bool = False


def _first_dense(default: int) -> Fill:
    def fill(config: Config, count: int) -> Meaning:
        first, freq = number(config, "first_k_dense_replace", default), number(config, "moe_layer_freq", 1)
        return [SPARSE if layer >= first and layer % freq == 0 else DENSE for layer in range(count)]

    return fill


def _indexers(config: Config, count: int) -> Meaning:
    pattern = lookup(config, "index_topk_pattern")
    if pattern:
        return ["shared" if entry == "S" else "full" for entry in pattern[:count]]
    freq, offset = number(config, "index_topk_freq", 1), number(config, "index_skip_topk_offset", 2)
    return ["full" if max(layer - offset + 1, 0) % freq == 0 else "shared" for layer in range(count)]


def _gemma3n(config: Config, count: int) -> Meaning:
    first = count - number(config, "num_kv_shared_layers", 15)
    types = _of(FAMILIES["gemma3n_text"], "layer_types").read(config, count) or []
    return [layer if layer < first else first - (2 if types[layer] == SLIDING else 1) for layer in range(count)]


def _alike(config: Config, count: int) -> Meaning:
    types = _of(FAMILIES["qwen2"], "layer_types").read(config, count) or []
    return types if len(set(types)) == 1 else [None] * count


WRONG_WINDOW = "layers attend to other tokens, and it answers other things without a word"
NOT_LOADED = "it looks for other tensors than there are, and does not load the model"

VLLM: Mapping[str, tuple[Reading, ...]] = {
    "gpt_oss": (Reading("layer_types", every(2), f"slides in layers of even number: {WRONG_WINDOW}"),),
    "llama4_text": (
        Reading("moe_layers", every(1, True, False, key="interleave_moe_layer_step"),
                f"goes by interleave_moe_layer_step: {NOT_LOADED}"),
    ),
    "gemma3n_text": (
        Reading("num_kv_shared_layers", _gemma3n,
                "takes shared keys and values from the last two layers before them: it answers other things without a "
                "word", points=True),
    ),
    **dict.fromkeys(
        ("qwen2", "qwen3"),
        (Reading("layer_types", _alike, "has no model of this kind in which some layers slide and others do not: it "
                 "refuses to load it"),),
    ),
    "qwen2_moe": (
        Reading("layer_types", lambda config, count: [FULL] * count,
                f"has no sliding layers in this model: {WRONG_WINDOW}"),
    ),
    **{
        kind: (Reading("mlp_layer_types", _first_dense(default), f"goes by first_k_dense_replace: {NOT_LOADED}"),)
        for kind, default in (("glm4_moe_lite", 1), ("hy_v3", 1), ("axk2", 1), ("kimi_linear", 1))
    },
    **{
        kind: (
            Reading("mlp_layer_types", _first_dense(3), f"goes by first_k_dense_replace: {NOT_LOADED}"),
            Reading("indexer_types", _indexers, "goes by index_topk_pattern: it answers other things without a word"),
        )
        for kind in ("deepseek_v32", "glm_moe_dsa")
    },
    "bailing_hybrid": (
        Reading("layer_types", every(6, FULL, LINEAR, key="layer_group_size"),
                f"goes by layer_group_size: {NOT_LOADED}"),
    ),
}  # fmt: skip

ATTENTION = (FULL, SLIDING, CHUNKED, "attention", "indexed_attention", "hybrid", "hybrid_sliding", "*")
RECURRENT = (LINEAR, "mamba", "recurrent", "conv", "M")


def with_engine_warnings(ckpt: Checkpoint, target: Engine | None = None) -> Checkpoint:
    """Return a checkpoint with what engines would read otherwise among its warnings.

    Raises:
        RefusedError: for what the engine that is the `target` would read otherwise.
    """
    try:
        count = ckpt.layers.count
    except CheckpointError:
        return ckpt
    found = engine_warnings(ckpt.model_type, ckpt.text_config, count)
    if target:
        raise_all(RefusedError, (f"config.json: {text}" for text in found[target]))
    texts = (f"config.json: {text}" for warnings in found.values() for text in warnings)
    return ckpt.warn(*(text for text in texts if text not in ckpt.warnings))


def engine_warnings(kind: str, config: Config, count: int) -> dict[Engine, list[str]]:
    """Return what each engine does otherwise than it should with the config of a language model of type `kind`."""
    return {
        "vllm": list(vllm_warnings(kind, config, count)),
        "transformers": list(transformers_warnings(kind, config, count)),
    }


def vllm_warnings(kind: str, config: Config, count: int) -> Iterator[str]:
    """Yield where vLLM reads the config of a language model of type `kind` otherwise than transformers."""
    for key, fill, consequence, _ in VLLM.get(kind, ()):
        wanted = _read(_of(FAMILIES[kind], key), config, count)
        wrong = [
            layer for layer, (one, other) in enumerate(zip(wanted, fill(config, count), strict=False)) if one != other
        ]
        if wrong:
            yield f"vLLM {consequence} (layers {format_layers(wrong)} of {kind})."
    if kind in ("exaone4", "exaone_moe") and config.get("sliding_window", 4096) is not None:
        types = _read(_of(FAMILIES[kind], "layer_types"), config, count)
        if types and SLIDING not in types:
            yield (
                f"vLLM turns rotary positions on in all layers of {kind} where none slides, and transformers does not: "
                "it answers other things without a word."
            )


def transformers_warnings(kind: str, config: Config, count: int) -> Iterator[str]:
    """Yield what transformers cannot do with a config that it loads."""
    for key in ("layer_types", "layers_block_type"):
        types = next((_read(it, config, count) for it in FAMILIES.get(kind, ()) if key in it.keys), None)
        types = types or config.get(key) or []
        if any(it in RECURRENT for it in types) and not any(it in ATTENTION for it in types):
            yield "transformers cannot generate with a cache where no layer has attention; it computes without one."
            return


def _of(fields: tuple[Field, ...], key: str) -> Field:
    return next(field for field in fields if key in field.keys)


def _read(field: Field, config: Config, count: int) -> list[Any]:
    try:
        return field.read(config, count) or []
    except InexpressibleError:
        return []
