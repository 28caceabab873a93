"""What a layer sequence does to config.json: every per-layer field, as tables of rules.

A sequence `seq` of length N over a stack of L layers makes output layer k of source layer `seq[k]`. The count
becomes N, `layer_types` and quantisation skip lists follow; any other per-layer field must be one that the
sequence leaves as it is, or the operation is refused with the field's name.

Field kinds and the models that use them were read off transformers 5 and vLLM 0.32, `configuration_*.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tensorsurgeon.checkpoint import COUNT_KEYS, Checkpoint, text_config_path
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.names import LayerSequence, LayerStack, format_layers, layer_name

Config = Mapping[str, Any]
Rule = Callable[[Any, LayerSequence], bool]
"""Tells whether a sequence leaves the meaning of a field's value as it is."""


def _same_list(value: Any, seq: LayerSequence) -> bool:
    return isinstance(value, Sequence) and len(value) > max(seq) and [value[i] for i in seq] == list(value)


def _same_indices(value: Any, seq: LayerSequence) -> bool:
    return isinstance(value, list) and all((i in value) == (k in value) for k, i in enumerate(seq))


def _same_prefix(value: Any, seq: LayerSequence) -> bool:
    return isinstance(value, int) and all((i < value) == (k < value) for k, i in enumerate(seq))


def _same_period(value: Any, seq: LayerSequence) -> bool:
    if isinstance(value, Sequence):
        return _same_list(value, seq)
    return isinstance(value, int) and all(i % value == k % value for k, i in enumerate(seq))


def _never(value: Any, seq: LayerSequence) -> bool:
    return False


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("layers_block_type", "mlp_layer_types", "no_rope_layers", "layer_rope_theta", "attn_type_list",
         "num_attention_heads_per_layer", "activation_sparsity_pattern", "indexer_types", "index_topk_pattern",
         "hybrid_override_pattern", "hybrid_layer_pattern", "attention_layers", "block_types", "attn_layers",
         "attention_window", "swiglu_limits", "swiglu_limits_shared", "partial_rotary_factors",
         "use_rope_layers", "compress_ratios", "block_configs", "interleaved_sliding_window",
         "kv_source_layers", "expert_swiglu_limit_list"), _same_list),
    **dict.fromkeys(
        ("mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs",
         "rope_scaling_layers", "local_layer_ids"), _same_indices),
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "dense_mlp_idx",
         "num_hash_layers"), _same_prefix),
    **dict.fromkeys(
        ("sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval",
         "no_rope_layer_interval", "decoder_sparse_step", "encoder_sparse_step", "interleave_moe_layer_step",
         "attn_layer_period", "expert_layer_period", "layer_group_size", "moe_layer_freq", "index_topk_freq",
         "moe_layer_interval", "cross_layer_interval", "cross_attention_frequency"), _same_period),
    **dict.fromkeys(
        ("attention_types", "num_kv_shared_layers", "hidden_size_per_layer_input", "per_layer_config",
         "linear_attn_config", "sparse_attention_config", "moe_layers_enum", "ple_layer_ids", "scale_depth",
         "moe_layer_end_index", "moe_layer_start_index", "index_skip_topk_offset", "rescale_every",
         "scale_attn_by_inverse_layer_idx", "num_layers_per_stack", "n_layers_per_attn_res_block",
         "prefix_dense_sliding_window_pattern", "deepstack_layer_map", "spatial_target_layers",
         "aligner_num_add_layers", "use_cla", "is_encoder_decoder", "altup_num_inputs"), _never),
}  # fmt: skip
"""Per-layer fields other than the count and `layer_types`; an empty, null, false or zero value says nothing."""

ONLY_WITH = {"max_window_layers": "use_sliding_window", "attn_layer_offset": "attn_layer_period"}
"""Fields without meaning unless another field is set."""

IMPLIED = {
    **dict.fromkeys(
        ("afmoe", "bailing_hybrid", "beam", "cohere2", "cohere2_moe", "cohere_compass_text", "cwm",
         "deepseek_v4", "diffusion_gemma_text", "dots3_note_text", "embedding_gemma2_text", "exaone4",
         "exaone_moe", "flint", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text",
         "glm5_next_text", "gpt_oss", "granite_swa", "granitemoe_swa", "inkling_text", "kimi_linear",
         "kolibri1", "lfm3", "mimo_v2_flash", "muse_glimmer_text", "muse_spark_text", "neomme", "olmo3",
         "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "t5gemma2_text",
         "ultrabert", "vaultgemma"),
        "layer_types"),
    "smollm3": "no_rope_layers",
    "llama4_text": "no_rope_layers",
    "gpt_neo": "attention_types",
    "recurrent_gemma": "block_types",
    "jamba": "attn_layer_period",
    "nemotron_h": "hybrid_override_pattern",
}  # fmt: skip
"""Model types whose class alternates its layers by a rule of its own where the config does not have the field."""

POSITIONAL = {
    "albert": "all layers share one set of weights",
    "diffllama": "attention depends on a layer's number",
    "flaubert": "a layer's tensors lie in parallel lists",
    "gpt_neox_japanese": "the last layer is special",
    "hrm_text": "there are two stacks",
    "idefics": "cross-attention layers lie between the layers",
    "inkling2_text": "layers attend to earlier ones by number",
    "longcat_flash": "each layer holds two",
    "minicpm": "residuals are scaled by the number of layers",
    "minimax": "attention decay depends on a layer's number",
    "modernbert": "the first layer is special",
    "modernbert-decoder": "the first layer is special",
    "rwkv": "layers are rescaled by number",
    "xlm": "a layer's tensors lie in parallel lists",
    "zamba": "layers share weights",
    "zamba2": "layers share weights",
    "zaya": "the first layer is special",
}
"""Model types in which a layer's place matters beyond any field of the config."""

SKIP_LISTS = (
    "modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules",
    "skip_modules", "exclude",
)  # fmt: skip
"""Keys of a quantization_config that list modules which are not quantised."""

_REMOTE_SUSPECTS = re.compile(r"layer|pattern|period|freq|interval|every|first_k|shared")
_REMOTE_SAFE = re.compile(r"norm|drop|num_hidden_layers|n_shared|num_shared|shared_expert|layer_scale|kv_share")
_REGEX = re.compile(r"[\\*+?()\[\]{}|^$]")


def config_under_sequence(ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> Config:
    """Return the config of the model whose layer k is layer `seq[k]` of `ckpt`.

    Raises:
        RefusedError: naming every field that the sequence does not leave as it is.
    """
    config = ckpt.config.value
    if seq == tuple(range(stack.count)):
        return config
    path = text_config_path(config)
    raise_all(RefusedError, _refusals(ckpt, stack, seq))
    edited = _edit(config, path, lambda part: _layers_edited(part, stack.count, seq))
    if not any(key in ckpt.text_config for key in COUNT_KEYS):
        edited = _edit(edited, path, lambda part: {**part, "num_hidden_layers": len(seq)}, only_last=True)
    return {key: _skip_lists_edited(key, value, ckpt, stack, seq) for key, value in edited.items()}


def without_quantization(config: Config, dtype: str) -> Config:
    """Return a config that describes plain weights of `dtype` (a torch name such as `bfloat16`).

    Removed at every level are `quantization_config`, `compression_config`, `quantization` and `expert_dtype`.
    """
    removed = ("quantization_config", "compression_config", "quantization", "expert_dtype")

    def plain(part: Config) -> Config:
        return {
            key: plain(value) if key.endswith("_config") and isinstance(value, Mapping) else value
            for key, value in part.items()
            if key not in removed
        }

    return with_dtype(plain(config), dtype)


def with_dtype(config: Config, dtype: str) -> Config:
    """Return a config that states `dtype` under the keys that it uses: `dtype`, `torch_dtype`, or both."""
    path = text_config_path(config)
    edited = _edit(config, path, lambda part: {**part, **dict.fromkeys(_dtype_keys(part), dtype)})
    if any(_dtype_keys(part) for part in _parts(config, path)):
        return edited
    return {**edited, "torch_dtype": dtype}


def quantization_config(config: Config) -> Mapping[str, Any]:
    """Return the quantisation settings of a config, wherever they hide; empty where there are none."""
    for part in reversed(list(_parts(config, text_config_path(config)))):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(part.get(key), Mapping) and part[key]:
                return part[key]  # type: ignore[no-any-return]
    return {}


def _dtype_keys(config: Config) -> list[str]:
    return [key for key in ("dtype", "torch_dtype") if key in config]


def _parts(config: Config, path: Sequence[str]) -> Iterator[Config]:
    """Yield the config and each nested one on the path."""
    yield config
    for key in path:
        config = config[key]
        yield config


def _edit(config: Config, path: Sequence[str], edit: Callable[[Config], Config], only_last: bool = False) -> Config:
    """Apply `edit` to the config and every nested one on the path, or to the last of them only."""
    if path:
        config = {**config, path[0]: _edit(config[path[0]], path[1:], edit, only_last)}
    return config if path and only_last else edit(config)


def _layers_edited(part: Config, count: int, seq: LayerSequence) -> Config:
    edited = {key: len(seq) if key in COUNT_KEYS and value == count else value for key, value in part.items()}
    types = part.get("layer_types")
    if types:
        edited["layer_types"] = [types[i] for i in seq] + list(types[count:])
    return edited


def _refusals(ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> Iterator[str]:
    if not seq:
        yield "layers: the sequence is empty; a model keeps at least one layer."
        return
    config = ckpt.text_config
    nested = "_text" if ckpt.text_config_path else ""
    kind = str(config.get("model_type") or f"{ckpt.config.value.get('model_type')}{nested}")
    what = f"under the sequence {format_layers(seq)}"
    if kind in POSITIONAL:
        yield f"model_type {kind!r}: {POSITIONAL[kind]}; no config can say what the layers would be {what}."
    if kind in IMPLIED and not config.get(IMPLIED[kind]):
        yield (
            f"config.json: {IMPLIED[kind]!r} is missing, and {kind} then alternates its layers by a rule of its "
            f"own, which does not hold {what}; write the field out first."
        )
    lengths = (stack.count, stack.count + stack.extra)
    sound = True
    for part in _parts(ckpt.config.value, ckpt.text_config_path):
        types = part.get("layer_types")
        if types and not (isinstance(types, list) and len(types) in lengths):
            sound = False
            yield f"config.json: 'layer_types' is {_shown(types)}, not one entry for each of {stack.count} layers."
        for key, value in part.items():
            if _is_affected(key, value, part, stack.count, seq):
                yield f"config.json: {key!r} is {_shown(value)}, a per-layer setting that would not hold {what}."
    if sound:
        yield from _structure_refusals(ckpt, stack, seq)


def _is_affected(key: str, value: Any, config: Config, count: int, seq: LayerSequence) -> bool:
    if not value or (key in ONLY_WITH and not config.get(ONLY_WITH[key])):
        return False
    if key in RULES:
        return not RULES[key](value, seq)
    if isinstance(value, list) and len(value) == count and key not in ("layer_types", "architectures"):
        return not _same_list(value, seq)
    remote = "auto_map" in config and key not in COUNT_KEYS and key != "layer_types"
    return remote and bool(_REMOTE_SUSPECTS.search(key)) and not _REMOTE_SAFE.search(key)


def _structure_refusals(ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> Iterator[str]:
    """Refuse where layers differ in their tensors in a way that neither the place nor `layer_types` follows."""
    shapes = layer_shapes(ckpt, stack)
    types = ckpt.text_config.get("layer_types") or [None] * stack.count
    by_type: dict[str, set[Any]] = {}
    for layer in range(stack.count):
        by_type.setdefault(str(types[layer]), set()).add(shapes[layer])
    if all(len(found) == 1 for found in by_type.values()):
        return
    moved = [k for k, i in enumerate(seq) if shapes[min(k, stack.count - 1)] != shapes[i]]
    if moved:
        yield (
            f"tensors: layers {format_layers(moved)} would hold other tensors than the model has there "
            "(dense and mixture-of-experts layers, say), and the config cannot be seen to follow."
        )


def layer_shapes(ckpt: Checkpoint, stack: LayerStack) -> list[frozenset[tuple[str, tuple[int, ...]]]]:
    """Return what each layer is made of: the names and shapes of its plain tensors, scales left out."""
    shapes: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(stack.count + stack.extra)]
    for name, tensor in ckpt.tensors.items():
        found = layer_name(name)
        if found and found.prefix == stack.prefix and not found.rest.endswith("scale_inv"):
            shapes[found.index].add((found.rest, tensor.shape))
    return [frozenset(layer) for layer in shapes]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _skip_lists_edited(key: str, value: Any, ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> Any:
    if (
        key.endswith("_config")
        and isinstance(value, Mapping)
        and key not in ("quantization_config", "compression_config")
    ):
        return {inner: _skip_lists_edited(inner, item, ckpt, stack, seq) for inner, item in value.items()}
    if key not in ("quantization_config", "compression_config", "quantization") or not isinstance(value, Mapping):
        return value
    lists = {
        inner: _skip_list_under(item, ckpt, stack, seq)
        for inner, item in value.items()
        if inner in SKIP_LISTS and isinstance(item, list) and all(isinstance(entry, str) for entry in item)
    }
    others = {inner: item for inner, item in value.items() if inner not in lists}
    raise_all(
        RefusedError,
        (f"config.json: {key!r}: {text!r} names a layer by number in a way that cannot be renumbered; "
         "dequantize first." for text in _strings(others) if _names_a_layer(text)),
    )  # fmt: skip
    return {**value, **lists}


def _skip_list_under(entries: Sequence[str], ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> list[str]:
    """Renumber a skip list; an entry that names a whole layer becomes one entry per module of that layer.

    Engines read entries as prefixes, substrings or regular expressions, and `model.layers.1` would then hit
    layers 10 to 19 as well; a full module name is read alike by all of them.
    """
    matrices: dict[int, list[str]] = {}
    prefixes = set()
    for name, tensor in ckpt.tensors.items():
        found = layer_name(name)
        prefixes.add(found.prefix if found else "")
        if found and found.prefix == stack.prefix and len(tensor.shape) > 1:
            matrices.setdefault(found.index, []).append(name)
    edited: dict[str, None] = {}
    for entry in entries:
        tensor_name = f"{entry}.weight"
        found = None if _REGEX.search(entry) else layer_name(tensor_name)
        if found and found.prefix == stack.prefix:
            copies = [k for k, i in enumerate(seq) if i == found.index]
            copies += [found.index - stack.count + len(seq)] if found.index >= stack.count else []
            whole = found.rest.lstrip(".") == "weight"
            names = matrices.get(found.index, []) if whole else [tensor_name]
            edited |= {stack.renamed(name, k).rpartition(".")[0]: None for k in copies for name in names}
        elif found and found.prefix in prefixes:
            edited[entry] = None
        elif _names_a_layer(entry):
            raise RefusedError(
                f"config.json: the quantisation skip list names layers by the pattern {entry!r}, which cannot be "
                "renumbered; dequantize first, or list the modules one by one."
            )
        else:
            edited[entry] = None
    return list(edited)


def _names_a_layer(text: str) -> bool:
    return bool(re.search(r"(layers|layer|h|blocks?)\\?\.[\\(\[]*\d", text))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)
