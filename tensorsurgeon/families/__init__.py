"""What model classes make of a config: the lists that they fill in, and the rules that no list can replace.

Each entry is a model type (`model_type` of config.json) with its fields, in the order in which they are
written: a later rule may read what an earlier one wrote. Rules were read off transformers 5,
`models/*/configuration_*.py` and `modeling_*.py`; the tests compare every one with the class itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorsurgeon.families.attention import (
    DEEPSEEK_V4,
    FULL,
    GEMMA4,
    INKLING,
    KIMI,
    LFM2,
    LINEAR,
    NEMOTRON,
    NO_ROPE,
    SLIDING,
    WINDOWS,
    all_alike,
    cohere2_moe,
    dots1_windows,
    exaone4,
    first_window,
    llama4,
    muse,
    olmo_hybrid,
    qwen2_moe_windows,
    smollm3,
    types,
)
from tensorsurgeon.families.mlp import (
    MLP_BY_FREQ,
    SPARSE_STEPS,
    dense_first,
    dense_layers,
    gemma3n_sparsity,
    llama4_layers,
    llama4_moe,
    mlp_fixed,
    mlp_ordinals,
    mlp_types,
    moe_range,
    moe_ranges,
    sparse_steps,
)
from tensorsurgeon.families.states import INDEXERS, indexer_types, period_offset, residual_scale, shared_kv
from tensorsurgeon.fields import Field, listed, pointers, runs
from tensorsurgeon.rules import implied, periods, searched

FAMILIES: Mapping[str, tuple[Field, ...]] = {
    **dict.fromkeys(("gemma2", "vaultgemma", "gpt_oss", "t5_gemma_module"), (types(2),)),
    **dict.fromkeys(
        ("gemma3_text", "t5gemma2_text", "t5gemma2_decoder"), (types(6, key="sliding_window_pattern"),)
    ),
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text", "diffusion_gemma_text"), (GEMMA4, shared_kv(0, GEMMA4))
    ),
    **dict.fromkeys(("embedding_gemma2_text", "neomme"), (GEMMA4,)),
    **dict.fromkeys(
        ("qwen3_next",), (types(4, FULL, LINEAR, key="full_attention_interval"), SPARSE_STEPS)
    ),
    **dict.fromkeys(
        ("qwen3_5_text", "qwen3_5_moe_text"), (types(4, FULL, LINEAR, key="full_attention_interval"),)
    ),
    **dict.fromkeys(("cwm", "granite_swa", "granitemoe_swa"), (types(4, first=True),)),
    **dict.fromkeys(
        ("modernbert", "modernbert-decoder"), (types(3, key="global_attn_every_n_layers", first=True),)
    ),
    **dict.fromkeys(
        ("qwen2", "qwen3", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text",
         "deepseek_ocr2_encoder"), (WINDOWS,)
    ),
    **dict.fromkeys(("exaone4",), (implied(
        "layer_types", exaone4, ["sliding_window_pattern"], periods("sliding_window_pattern")),)),
    **dict.fromkeys(("deepseek_v3", "kimi_k2"), (dense_first(3),)),
    **dict.fromkeys(("deepseek_v2", "mistral4"), (dense_first(0),)),
    **dict.fromkeys(("glm4_moe", "glm4v_moe_text"), (dense_first(1),)),
    **dict.fromkeys(
        ("glm4_moe_lite", "hy_v3", "laguna", "ernie4_5_vl_moe_text"), (mlp_fixed(1),)
    ),
    "axk1": (dense_first(1),),
    "axk2": (MLP_BY_FREQ,),
    "bailing_hybrid": (types(6, FULL, LINEAR, key="layer_group_size"), mlp_types(2)),
    "dots3_note_text": (
        MLP_BY_FREQ,
        implied("layer_types", lambda config, count: [
            "indexed_attention" if layer < 2 or layer % 4 == 1 else SLIDING for layer in range(count)]),
    ),
    "flint": (
        implied("layer_types", lambda config, count: [
            FULL if layer < 2 or layer % 4 == 1 or layer == count - 1 else SLIDING for layer in range(count)]),
        searched(["decoder_sparse_step", "mlp_only_layers"],
                 lambda config, count: sparse_steps({"mlp_only_layers": [0, 1], **config}, count), dense_layers),
    ),
    "kolibri1": (types(5),),
    "lfm3": (
        implied("layer_types", lambda config, count: [
            FULL if layer % 4 == 2 else SLIDING if layer and layer % 4 == 0 else "conv" for layer in range(count)]),
    ),
    "mistral_large4_text": (
        NO_ROPE, pointers("kv_source_layers"), *INDEXERS, mlp_types(1), all_alike("indexed_attention"),
    ),
    "ultrabert": (types(3),),
    "unlimited_ocr_text": (mlp_types(1),),
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text"), (SPARSE_STEPS,)),
    "afmoe": (types(4, key="global_attn_every_n_layers"), dense_first(1, "num_dense_layers")),
    "cohere2": (types(4, key="sliding_window_pattern"),),
    "cohere2_moe": (
        mlp_types(0),
        implied("layer_types", cohere2_moe, ["sliding_window_pattern", "prefix_dense_sliding_window_pattern"]),
    ),
    "deepseek_v32": (mlp_types(3), all_alike("indexed_attention"), *INDEXERS),
    "deepseek_v4": (
        *DEEPSEEK_V4,
        mlp_types(3, "num_hash_layers", "hash_moe", "moe"),
    ),
    "dots1": (
        dense_first(0),
        implied("layer_types", dots1_windows, ["max_window_layers"], first_window, stale=first_window),
    ),
    "ernie4_5_moe": (
        searched([f"moe_layer_{key}" for key in ("start_index", "end_index", "interval")], moe_range, moe_ranges),
    ),
    "exaone_moe": (
        mlp_types(1),
        implied("layer_types", exaone4, ["sliding_window_pattern"], periods("sliding_window_pattern")),
    ),
    "gemma3n_text": (
        types(5), shared_kv(15, types(5)), implied("activation_sparsity_pattern", gemma3n_sparsity),
    ),
    "glm5_next_text": (mlp_fixed(3), types(4, "indexed_attention", LINEAR), *INDEXERS),
    "glm_moe_dsa": (mlp_types(3), all_alike("indexed_attention"), *INDEXERS),
    "gpt_neo": (runs("attention_types", default=[[["global", "local"], 12]]),),
    "hy_v4": (
        mlp_fixed(1),
        all_alike("indexed_attention"),
        *indexer_types(lambda config, count: ["full" if layer == 0 or layer % 4 == 1 else "shared"
                                              for layer in range(count)]),
    ),
    "inkling_text": (
        *INKLING,
        mlp_types(0, "dense_mlp_idx"),
    ),
    "jamba": (period_offset("attn", 8, 4), period_offset("expert", 2, 1)),
    "kimi_linear": (
        *KIMI, mlp_types(1),
    ),
    "lfm2": LFM2,
    "lfm2_moe": (dense_first(2, "num_dense_layers"), listed("layer_types")),
    "llama4_text": (
        NO_ROPE,
        implied("layer_types", llama4),
        searched(["moe_layers", "interleave_moe_layer_step"], llama4_moe, llama4_layers),
    ),
    "mimo_v2_flash": (
        implied("layer_types", lambda config, count: [
            FULL if layer == 0 or (layer + 1) % 6 == 0 else SLIDING for layer in range(count)]),
        mlp_fixed(1),
    ),
    **dict.fromkeys(("minicpm", "minicpm3"), (residual_scale(),)),
    "minimax": (types(2, FULL, LINEAR, first=True),),
    "ministral": (
        implied("layer_types", lambda config, count: [SLIDING if config.get("sliding_window", 4096) else FULL] * count),
    ),
    "muse_glimmer_text": muse(10000.0),
    "muse_spark_text": muse(500000.0),
    "nemotron_h": (*NEMOTRON, mlp_ordinals()),
    "olmo3": (types(4),),
    "olmo_hybrid": (implied("layer_types", olmo_hybrid),),
    "qwen2_moe": (
        implied("layer_types", qwen2_moe_windows, ["max_window_layers"], stale=first_window), SPARSE_STEPS,
    ),
    "qwen4_exp_text": (types(4, "indexed_attention", LINEAR, key="full_attention_interval"),),
    "smollm3": (NO_ROPE, implied("layer_types", smollm3)),
}  # fmt: skip
"""Fields of the model types whose class has rules of its own, in the order in which they are written."""


FIRST_STAYS = {
    "modernbert": "it has no attention norm",
    "modernbert-decoder": "it has no attention norm",
    "zaya": "its router has no states to mix in",
}
"""Model types whose first layer is built otherwise than the rest, by its number."""


REFUSED = {
    "albert": "all layers share one set of weights",
    "beam": "residuals are mixed by a layer's number",
    "diffllama": "attention depends on a layer's number",
    "flaubert": "a layer's tensors lie in parallel lists",
    "gpt_neox_japanese": "the last layer is built otherwise, by its number",
    "hrm_text": "there are two stacks",
    "idefics": "cross-attention layers lie between the layers",
    "inkling2_text": "layers attend to earlier ones by number",
    "longcat_flash": "each layer holds two",
    "reformer": "layers are reversible pairs",
    "rwkv": "layers are rescaled by number",
    "xlm": "a layer's tensors lie in parallel lists",
    "zamba": "layers share weights",
    "zamba2": "layers share weights",
}
"""Model types in which no config can say what re-ordered layers would be."""


BUFFERED = {"minimax": ("slope_rate", "attention decay depends on a layer's number, and the checkpoint holds none")}
"""Model types that compute a layer's tensor from its number where the checkpoint does not hold it."""


NEEDS = {
    "neomme": (FULL,),
    "olmo_hybrid": (FULL, LINEAR),
}
"""Kinds of layers of which the class wants at least one."""
