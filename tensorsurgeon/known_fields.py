"""The keys that speak of single layers, whatever the model.

They, and the models that use them, were read off transformers 5 and vLLM 0.32, `configuration_*.py`. What a model class
makes of a key that is absent, and rules of single classes, are in `families`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorsurgeon.fields import Field, indices, listed, numbered, repeating, runs
from tensorsurgeon.rules import as_is, checked_count, counts, place, searched, windows

LISTS = (
    "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "layer_rope_theta", "attn_type_list",
    "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "activation_sparsity_pattern", "indexer_types",
    "index_topk_pattern", "hybrid_override_pattern", "hybrid_layer_pattern", "attention_layers", "attn_layers",
    "swiglu_limits", "swiglu_limits_shared", "partial_rotary_factors", "use_rope_layers",
    "attention_windows", "compress_ratios", "block_configs", "sparse_attention_config.sparse_attention_freq",
    "expert_swiglu_limit_list",
)  # fmt: skip
"""Lists with an entry for each layer, and nothing else."""

SOMETIMES_LISTS = (
    "intermediate_size", "moe_intermediate_size", "num_experts", "num_shared_expert", "moe_topk", "rope_theta",
    "num_attention_heads", "num_key_value_heads", "num_query_heads", "num_kv_heads", "ffn_multipliers",
    "attention_window",
)  # fmt: skip
"""Settings that some models give for each layer: per layer where they are lists as long as the stack."""

FIELDS: Mapping[str, Field] = {
    **{key: listed(key) for key in LISTS},
    **{key: listed(key, always=False) for key in SOMETIMES_LISTS},
    **{key: repeating(key) for key in ("block_types", "sliding_window", "interleaved_sliding_window")},
    **{
        key: indices(key)
        for key in (
            "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs",
            "rope_scaling_layers", "local_layer_ids", "moe_layers_enum",
        )
    },
    **{
        key: indices(key, base=1)
        for key in ("linear_attn_config.full_attn_layers", "linear_attn_config.kda_layers", "ple_layer_ids")
    },
    **{
        key: searched([key], checked_count(key), counts(key, True))
        for key in ("first_k_dense_replace", "num_dense_layers", "num_hash_layers", "dense_mlp_idx")
    },
    **{
        key: as_is(key)
        for key in (
            "sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval", "layer_group_size",
            "no_rope_layer_interval", "decoder_sparse_step", "interleave_moe_layer_step", "attn_layer_period",
            "expert_layer_period", "index_topk_freq", "moe_layer_freq", "moe_layer_interval", "cross_layer_interval",
            "cross_attention_frequency", "encoder_sparse_step",
        )
    },
    **{
        key: place(key)
        for key in (
            "num_kv_shared_layers", "num_layers_per_stack", "n_layers_per_attn_res_block", "aligner_num_add_layers",
            "use_cla", "is_encoder_decoder", "kv_source_layers",
        )
    },
    **{
        key: place(key, from_the_first=True)
        for key in ("rescale_every", "scale_attn_by_inverse_layer_idx", "prefix_dense_sliding_window_pattern")
    },
    "per_layer_config": numbered("per_layer_config"),
    "attention_types": runs("attention_types"),
    "max_window_layers": searched(
        ["max_window_layers"], windows, lambda meaning, config: [{"max_window_layers": meaning.count(False)}]
    ),
}  # fmt: skip
"""Fields that are per layer wherever they occur."""
