"""Tiny models of many architectures, and an oracle of what their layers compute in another order.

Every model is random, its layers differ, and its windows are shorter than its inputs: a layer in the wrong place, or
with the wrong attention, changes the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

VOCABULARY = 96
LAYERS = 6
LAYER_LISTS = ("layers", "layer", "h", "blocks")

TOKENS = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))

SEQUENCES = {
    "drop": [0, 1, 3, 4, 5],
    "duplicate": [0, 1, 2, 2, 3, 4, 5],
    "reverse": [5, 4, 3, 2, 1, 0],
    "repeat": [0, 1, 2, 3, 3, 3, 4, 5],
    "skip": [0, 2, 4],
    "block twice": [0, 1, 2, 3, 2, 3, 4, 5],
    "last alone": [5],
}

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"n_layer": LAYERS, "n_head": 4, "n_embd": 32, "n_positions": 64, "n_inner": 48}
WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
ALL = tuple(SEQUENCES)

SERVED: dict[str, Any] = {"hidden_size": 128, "num_key_value_heads": 2, "head_dim": 32}
SERVED_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
"""Sizes for which vLLM has kernels on a CPU."""


@dataclass(frozen=True)
class Architecture:
    """A model type with tiny settings.

    `implied` are keys that the class fills in by itself: with and without them the config means the same. `refused`
    are the sequences, by name, that its config cannot say. `vllm` are settings with which vLLM serves it on a CPU,
    and `cached` tells whether transformers decodes the original with a cache, to what it does without.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    implied: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    vllm: dict[str, Any] | None = None
    cached: bool = True
    why: str = ""


def _named(*architectures: Architecture) -> dict[str, Architecture]:
    return {it.model_type + (f" ({it.why})" if it.why else ""): it for it in architectures}


A = Architecture
PREFIX = ("reverse", "last alone")
ARCHITECTURES = _named(
    A("llama", vllm=SERVED),
    A("mistral", {"sliding_window": None}, vllm=SERVED),
    A("mixtral", {"num_local_experts": 4}, vllm=SERVED),
    A("qwen2", {"use_sliding_window": False}, vllm=SERVED),
    A("qwen2", {"use_sliding_window": True, "max_window_layers": 3, **WINDOW}, ("layer_types",), why="sliding"),
    A("qwen3", vllm=SERVED),
    A("qwen3", {"use_sliding_window": True, "max_window_layers": 3, **WINDOW}, ("layer_types",), why="sliding"),
    A("qwen2_moe", {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 16, **EXPERTS}, ("layer_types",),
      vllm=SERVED),
    A("qwen3_moe", {"mlp_only_layers": [1, 4], **EXPERTS}, vllm=SERVED),
    A("qwen3_next", {"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                     "linear_key_head_dim": 8, "linear_value_head_dim": 8, "full_attention_interval": 3, **EXPERTS},
      ("layer_types",)),
    A("qwen3_5_text", {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                       "linear_value_head_dim": 8, "full_attention_interval": 3}, ("layer_types",)),
    A("gemma", vllm=SERVED),
    A("gemma2", WINDOW, ("layer_types",),
      vllm=SERVED),
    A("gemma3_text", {"sliding_window_pattern": 3, **WINDOW}, ("layer_types",),
      vllm=SERVED),
    A("gemma3n_text", {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 8, **WINDOW,
                       "layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": 96,
                       "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0]},
      refused=("drop", "reverse", "last alone")),
    A("gemma4_text", {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "global_head_dim": 8, **WINDOW,
                      "layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": 96},
      refused=("drop", "reverse", "skip", "last alone")),
    A("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW}, ("layer_types",)),
    A("cohere", vllm=SERVED),
    A("cohere2", {"sliding_window_pattern": 3, **WINDOW}, ("layer_types",)),
    A("olmo", vllm=SERVED),
    A("olmo2", vllm=SERVED),
    A("olmo3", WINDOW, ("layer_types",), vllm=SERVED),
    A("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}, vllm=SERVED),
    A("exaone4", {"sliding_window_pattern": 3, **WINDOW}, ("layer_types",), vllm=SERVED),
    A("smollm3", {"no_rope_layer_interval": 3}, ("layer_types", "no_rope_layers"), vllm=SERVED),
    A("llama4_text", {"interleave_moe_layer_step": 2, "num_local_experts": 4, "intermediate_size_mlp": 48,
                      "attention_chunk_size": 8, "no_rope_layer_interval": 3},
      ("layer_types", "no_rope_layers", "moe_layers")),
    A("deepseek_v2", {"first_k_dense_replace": 2, **ROUTED, **LATENT}, refused=PREFIX[:1]),
    A("deepseek_v3", {"first_k_dense_replace": 2, **ROUTED, **LATENT}, refused=PREFIX[:1]),
    A("glm", {"partial_rotary_factor": 0.5}, vllm=SERVED),
    A("glm4", {"partial_rotary_factor": 0.5}, vllm=SERVED),
    A("glm4_moe", {"first_k_dense_replace": 2, "partial_rotary_factor": 0.5, **ROUTED}, refused=PREFIX[:1],
      vllm=SERVED),
    A("glm4_moe_lite", {**ROUTED, **LATENT}, ("mlp_layer_types",)),
    A("dots1", {"first_k_dense_replace": 2, "max_window_layers": 3, **ROUTED, **WINDOW}, ("layer_types",),
      refused=PREFIX[:1],
      vllm=SERVED),
    A("afmoe", {"num_dense_layers": 2, "global_attn_every_n_layers": 3, **EXPERTS, **WINDOW}, ("layer_types",),
      refused=PREFIX[:1]),
    A("ernie4_5", vllm=SERVED),
    A("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    A("hunyuan_v1_dense"),
    A("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    A("granite", vllm=SERVED),
    A("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    A("granitemoehybrid", {"layer_types": ["mamba", "attention", "mamba"] * 2, "num_local_experts": 4,
                           "num_experts_per_tok": 2, "shared_intermediate_size": 16, **STATES}),
    A("bamba", {"attn_layer_indices": [2, 4], **STATES}, cached=False),
    A("jamba", {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                "num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8},
      refused=("drop", "duplicate", "repeat")),
    A("falcon_h1", {**STATES, "mamba_d_ssm": 64, "mamba_rms_norm": True}, cached=False),
    A("nemotron"),
    A("nemotron_h", {"layers_block_type": ["mamba", "attention", "mlp", "moe", "attention", "mamba"],
                     "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
                     "moe_shared_expert_intermediate_size": 16, **ROUTED}, cached=False),
    A("mamba", {"state_size": 8, "time_step_rank": 4}, cached=False),
    A("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, cached=False),
    A("minimax", {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8}, ("layer_types",)),
    A("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4}),
    A("minicpm3", LATENT, vllm={**SERVED, **SERVED_LATENT}),
    A("lfm2", {"full_attn_idxs": [1, 4], "block_ff_dim": 48}, ("layer_types",)),
    A("recurrent_gemma", {"attention_window_size": 8, "lru_width": 32}, cached=False),
    A("olmo_hybrid", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}, ("layer_types",),
      refused=("skip", "last alone")),
    A("cwm", WINDOW, ("layer_types",)),
    A("vaultgemma", WINDOW, ("layer_types",)),
    A("phi", vllm=SERVED),
    A("phi3", {"original_max_position_embeddings": 64}, vllm=SERVED),
    A("phimoe", {"num_local_experts": 4}),
    A("stablelm", vllm=SERVED),
    A("starcoder2", {"sliding_window": None}, vllm=SERVED),
    A("seed_oss", vllm=SERVED),
    A("arcee", vllm=SERVED),
    A("apertus"),
    A("helium"),
    A("persimmon"),
    A("gpt2", GPT2, vllm={**SERVED, "n_embd": 128}),
    A("gpt_bigcode", GPT2),
    A("gpt_neo", {"num_layers": LAYERS, "attention_types": [[["global", "local"], 3]], "window_size": 8,
                  "num_heads": 4}),
    A("gpt_neox"),
    A("gptj", {**GPT2, "rotary_dim": 4}),
    A("codegen", {**GPT2, "rotary_dim": 4}),
    A("bloom", {"n_layer": LAYERS, "n_head": 4}),
    A("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "head_dim": None}, vllm={"hidden_size": 128}),
    A("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, vllm={**SERVED, "word_embed_proj_dim": 128}),
    A("xglm", {"num_layers": LAYERS, "d_model": 32, "ffn_dim": 48, "attention_heads": 4}),
    A("bert", cached=False),
    A("roberta", cached=False),
    A("distilbert", {"n_layers": LAYERS, "dim": 32, "hidden_dim": 48, "n_heads": 4}, cached=False),
    A("electra", {"embedding_size": 32}, cached=False),
    A("modernbert", {"global_attn_every_n_layers": 3, "local_attention": 8}, ("layer_types",), PREFIX, cached=False),
    A("modernbert-decoder", {"global_attn_every_n_layers": 3, "local_attention": 8}, ("layer_types",), PREFIX),
    A("gemma3", {"text_config": {"model_type": "gemma3_text", "sliding_window_pattern": 3, **WINDOW},
                 "vision_config": {**VISION, "model_type": "siglip_vision_model", "patch_size": 8, "image_size": 16},
                 "mm_tokens_per_image": 4}, why="nested"),
    A("qwen3_vl", {"text_config": {"model_type": "qwen3_vl_text", "rope_scaling": SECTIONS},
                   "vision_config": {**VISION, "depth": 3, "num_heads": 2, "out_hidden_size": 32,
                                     "deepstack_visual_indexes": [0]}}, why="nested"),
    A("mistral3", {"text_config": {"model_type": "mistral", **WINDOW},
                   "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8, "patch_size": 8,
                                     "image_size": 16}}, why="nested"),
    A("diffllama", refused=ALL),
    A("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}, refused=ALL, why="attention scaled by layer"),
)  # fmt: skip


def make(architecture: Architecture, directory: Path, **larger: Any) -> Path:
    """Write a random model of an architecture, in several shards, through transformers."""
    chosen = {**architecture.settings, **larger}
    if "text_config" in chosen:
        settings = {**chosen, "text_config": {**COMMON, **chosen["text_config"]}}
    else:
        settings = {key: it for key, it in {**COMMON, **chosen}.items() if it is not None or key in WINDOW}
    config = AutoConfig.for_model(architecture.model_type, **settings)
    torch.manual_seed(0)
    made = model_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            _fill(name, parameter, "gemma" in config.model_type)
    made.save_pretrained(directory, max_shard_size="60KB")
    return directory


def _fill(name: str, parameter: torch.Tensor, centred: bool) -> None:
    """Make a parameter random, around what its architecture takes for neutral."""
    if any(word in name for word in ("A_log", "dt_bias", "D", "recurrent_param")):
        parameter.add_(torch.randn_like(parameter) * 0.1)
    elif "norm" in name.lower() or "ln_" in name:
        parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.0 if centred or name.endswith("bias") else 1.0))
    else:
        parameter.copy_(torch.randn_like(parameter) * 0.2)


def model_class(config: Any) -> Any:
    """Return the class with a head for a config: for the next word, with images or without, or for masked ones."""
    if type(config) in _causal():
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForMaskedLM


@cache
def _causal() -> frozenset[type]:
    encoders = ("bert", "roberta", "distilbert", "electra", "modernbert", "albert")
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    return frozenset(it for it in mapping if it.model_type not in encoders)


def load(directory: Path) -> Any:
    """Load a model in float32; a tensor too few or too many is an error."""
    config = AutoConfig.from_pretrained(directory)
    model, info = model_class(config).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert not wrong, wrong
    return model.eval()


def layers_of(model: Any, count: int) -> list[Any]:
    """Return the decoder layers of a model."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] in LAYER_LISTS and len(module) == count
    ]
    return list(found[0])


def logits_of(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Return the logits of a whole input, without a cache."""
    kwargs = {"use_cache": False} if getattr(model.config.get_text_config(), "use_cache", None) is not None else {}
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def replay(
    model: Any, sequences: Sequence[Sequence[int]], tokens: torch.Tensor = TOKENS, count: int = LAYERS
) -> list[torch.Tensor]:
    """Return the logits that a model's own layers give in each of several orders.

    Each layer gets what it got in the original run but for the hidden states, and the last one hands what the chain
    made of them to the rest of the model. No config and no layer's number takes part, so that the oracle cannot share
    a mistake with what it judges.
    """
    layers = layers_of(model, count)
    given: list[Any] = [None] * len(layers)

    def note(place: int) -> Any:
        return lambda _, args, kwargs: given.__setitem__(place, (args, kwargs))

    hooks = [layer.register_forward_pre_hook(note(place), with_kwargs=True) for place, layer in enumerate(layers)]
    logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    results = []
    for sequence in sequences:
        args, kwargs = given[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad():
            for layer in sequence:
                args, kwargs = given[layer]
                if args:
                    output = layers[layer](hidden, *args[1:], **kwargs)
                else:
                    output = layers[layer](**{**kwargs, "hidden_states": hidden})
                hidden = output[0] if isinstance(output, tuple) else output

        def put(_: Any, __: Any, output: Any, made: torch.Tensor = hidden) -> Any:
            return (made, *output[1:]) if isinstance(output, tuple) else made

        hook = layers[-1].register_forward_hook(put)
        results.append(logits_of(model, tokens))
        hook.remove()
    return results


def decoded(model: Any, tokens: torch.Tensor = TOKENS, prompt: int = 24) -> torch.Tensor | None:
    """Return the logits behind a prompt, token by token with a cache; None where the model has none."""
    with torch.no_grad():
        output = (
            model(tokens[:, :prompt], use_cache=True)
            if getattr(model.config.get_text_config(), "use_cache", False)
            else None
        )
        past = getattr(output, "past_key_values", None)
        if past is None:
            return None
        steps = [output.logits[:, -1]]
        for place in range(prompt, tokens.shape[1] - 1):
            output = model(tokens[:, place : place + 1], past_key_values=past, use_cache=True)
            past = output.past_key_values
            steps.append(output.logits[:, -1])
    return torch.stack(steps, 1)
