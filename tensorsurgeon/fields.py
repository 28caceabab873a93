"""The per-layer fields of config.json, as tables of rules.

A sequence `seq` of length N over a stack of L layers makes output layer k of source layer `seq[k]`. A field
keeps its meaning where what it says of layer k is what it said of layer `seq[k]`.

Kinds of fields and the models that use them were read off transformers 5 and vLLM 0.32, `configuration_*.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensorsurgeon.config import COUNT_KEYS, Config
from tensorsurgeon.names import LayerSequence

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

_REMOTE_SUSPECTS = re.compile(r"layer|pattern|period|freq|interval|every|first_k|shared")
_REMOTE_SAFE = re.compile(r"norm|drop|num_hidden_layers|n_shared|num_shared|shared_expert|layer_scale|kv_share")


def is_affected(key: str, value: Any, config: Config, count: int, seq: LayerSequence) -> bool:
    """Tell whether a sequence over `count` layers changes what a field of the config says of each layer."""
    if not value or (key in ONLY_WITH and not config.get(ONLY_WITH[key])):
        return False
    if key in RULES:
        return not RULES[key](value, seq)
    if isinstance(value, list) and len(value) == count and key not in ("layer_types", "architectures"):
        return not _same_list(value, seq)
    remote = "auto_map" in config and key not in COUNT_KEYS and key != "layer_types"
    return remote and bool(_REMOTE_SUSPECTS.search(key)) and not _REMOTE_SAFE.search(key)
