"""Roles of tensors, compared with the modules of transformers that own them."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.names import LayerStack, companions, find_stack, layer_name
from tensorsurgeon.roles import Role, find_role, find_roles

CAUSAL = (
    "afmoe", "apertus", "arcee", "aria_text", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2",
    "cpmant", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffllama", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "jamba", "jetmoe", "kimi_linear", "laguna", "lfm2",
    "lfm2_moe", "llama", "llama4_text", "longcat_flash", "mamba", "mamba2", "mimo_v2_flash", "minimax",
    "minimax_m2", "ministral", "mistral", "mixtral", "modernbert-decoder", "moshi", "mpt", "nanochat", "nemotron",
    "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next",
    "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm",
    "xlstm",
)  # fmt: skip
MASKED = (
    "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "gte", "jina_embeddings_v3",
    "megatron-bert", "modernbert", "mpnet", "nomic_bert", "roberta", "roformer", "xlm-roberta",
)  # fmt: skip
SEEING = (
    "cohere2_vision", "gemma3", "gemma4", "glm4v", "glm4v_moe", "internvl", "llava", "lfm2_vl", "mistral3",
    "mllama", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe",
)  # fmt: skip
KINDS = (*CAUSAL, *MASKED, *SEEING)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # By transformers, at import.

CHANGES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 128, "num_key_value_heads": 8},
    "nemotron": {"num_attention_heads": 48, "num_key_value_heads": 8},
}
"""Settings for defaults that do not fit each other."""

UNNAMED = re.compile(
    r"per_layer_input_gate|per_layer_projection|altup\.|laurel\.|hc_|\.ape$"
    r"|compressor\.w(gate|kv)"  # deepseek_v4
)
"""Matrices of a layer that have a role of their own."""


TOWERS = ("vision", "audio", "projector", "tower")
"""Parts of what is not the language model."""


class Owned(NamedTuple):
    """A tensor on disk, the tensor in memory that it becomes, and the module of that one."""

    shape: tuple[int, ...]
    memory: str
    module: nn.Module
    is_head: bool


class Model(NamedTuple):
    """A model of transformers: its config, its tensors on disk, and their roles."""

    config: dict[str, Any]
    hidden: int
    tensors: dict[str, Owned]
    roles: dict[str, Role]


def small(kind: str) -> transformers.PretrainedConfig:
    """Return the default config of a model type, with few layers and experts."""
    known = CONFIG_MAPPING[kind]().to_dict()
    layers = {key: 4 for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in known}
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    few = {key: 4 for key in experts if known.get(key)}
    chosen = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k")
    few |= {key: 2 for key in chosen if known.get(key)} | {key: 1 for key in ("n_group", "topk_group") if key in known}
    return CONFIG_MAPPING[kind](**layers, **few, **CHANGES.get(kind, {}))


@cache
def built(kind: str) -> Model:
    """Build a model without memory for its tensors, and take each back to the names it has on disk."""
    auto = AutoModelForCausalLM
    auto = AutoModelForMaskedLM if kind in MASKED else AutoModelForImageTextToText if kind in SEEING else auto
    config = small(kind)
    with torch.device("meta"):
        model = auto.from_config(config)
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [step for step in mapping if not isinstance(step, PrefixChange)]
    modules = dict(model.named_modules())
    state = model.state_dict()
    head = model.get_output_embeddings()

    def disk(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(model, tensors) if model._weight_conversions else tensors

    whole = disk(dict(state))
    tensors = {}
    for memory, tensor in state.items():
        module = modules[memory.rpartition(".")[0]]
        for name in disk({memory: tensor}):
            tensors[name] = Owned(tuple(whole[name].shape), memory, module, module is head)
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", None) or text.d_model
    shapes = {name: owned.shape for name, owned in tensors.items()}
    settings = config.to_dict()
    count = getattr(text, "num_hidden_layers", None)
    try:
        stack = find_stack(shapes, count)
    except CheckpointError:
        stack = None
    return Model(settings, hidden, tensors, find_roles(shapes, settings, stack))


models = pytest.mark.parametrize("kind", KINDS)


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not isinstance(module, nn.Embedding)


@models
def test_every_matrix_of_a_layer_has_a_role(kind: str) -> None:
    model = built(kind)
    unknown = [
        name
        for name, owned in model.tensors.items()
        if layer_name(name)
        and isinstance(owned.module, nn.Linear | Conv1D)
        and model.roles[name].group == "other"
        and model.roles[name].part not in TOWERS
        and not UNNAMED.search(name)
    ]
    assert unknown == []


@models
def test_the_layout_is_that_of_the_module(kind: str) -> None:
    model = built(kind)
    for name, owned in model.tensors.items():
        role = model.roles[name]
        if role.group == "other" or role.kind != "weight":
            continue
        if isinstance(owned.module, nn.Linear) and len(owned.shape) == 2:
            assert role.layout == "out,in", name
        elif isinstance(owned.module, Conv1D):
            assert role.layout == "in,out", name
        elif is_norm(owned.module) or isinstance(owned.module, nn.Embedding) or len(owned.shape) == 1:
            assert role.layout == "", name


@models
def test_the_side_of_the_residual_stream_has_the_hidden_size(kind: str) -> None:
    model = built(kind)
    for name, owned in model.tensors.items():
        role = model.roles[name]
        sides = role.layout.removeprefix("expert,").split(",")
        if not role.layout or role.mark or role.group not in ("attention", "mlp", "expert", "router"):
            continue
        size = dict(zip(sides, owned.shape[-2:], strict=True))
        if role.part in ("o", "down"):
            assert size["out"] == model.hidden, name
        if role.part in ("q", "k", "v", "qkv", "q_a", "kv_a", "gate", "up", "gate_up", "up_gate", "router"):
            assert size["in"] == model.hidden, name


@models
def test_norms_and_embeddings_and_heads_are_those_of_the_model(kind: str) -> None:
    model = built(kind)
    for name, owned in model.tensors.items():
        role = model.roles[name]
        if role.group == "other" and role.part:
            continue
        assert (role.group == "norm") == is_norm(owned.module), name
        assert (role.group == "embedding") == isinstance(owned.module, nn.Embedding), name
        if name.endswith("weight"):
            assert (role.part == "lm_head") == owned.is_head, name


@models
def test_a_layer_has_one_of_each(kind: str) -> None:
    model = built(kind)
    counts = Counter(
        (found.prefix, found.index, role.group, role.part, role.mark)
        for name, role in model.roles.items()
        if (found := layer_name(name)) and role.layout and role.group in ("attention", "mlp")
    )
    twice = {key: count for key, count in counts.items() if count > 1}
    # longcat_flash has two of everything in a layer.
    assert kind == "longcat_flash" or twice == {}


@models
def test_names_on_disk_and_in_memory_have_one_role(kind: str) -> None:
    model = built(kind)
    shapes = {owned.memory: owned.shape for owned in model.tensors.values()}
    memory = find_roles(shapes, model.config)
    for name, owned in model.tensors.items():
        one, other = model.roles[name], memory[owned.memory]
        if "other" in (one.group, other.group) or owned.memory == name:
            continue
        # Fused on one side, and one of its parts on the other.
        assert one.group == other.group, name
        assert one.part in other.part or other.part in one.part or one.group == "norm", name


@models
def test_what_is_fused_in_memory_has_its_parts_in_order(kind: str) -> None:
    model = built(kind)
    halves: dict[str, list[str]] = {}
    for name, owned in model.tensors.items():
        if owned.memory.endswith("experts.gate_up_proj") and model.roles[name].part not in ("gate_up", *TOWERS):
            halves.setdefault(owned.memory, []).append(model.roles[name].part)
    for memory, parts in halves.items():
        assert parts == ["gate"] * (len(parts) // 2) + ["up"] * (len(parts) // 2), memory


@pytest.mark.parametrize("kind", SEEING)
def test_towers_and_projectors_are_other(kind: str) -> None:
    model = built(kind)
    for name, owned in model.tensors.items():
        outside = not re.search(r"language_model|lm_head", owned.memory)
        assert (model.roles[name].part in TOWERS) == outside, name
        assert model.roles[name].group == "other" or not outside, name


TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 24, "n_head": 3},
    "gpt_bigcode": {"n_embd": 24, "n_head": 3},
    "gpt_bigcode with heads": {"n_embd": 24, "n_head": 3, "multi_query": False},
    "gpt_neox": {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40},
    "bloom": {"hidden_size": 24, "n_head": 3},
    "falcon": {"hidden_size": 24, "num_attention_heads": 3},
    "falcon with heads": {"hidden_size": 24, "num_attention_heads": 3, "multi_query": False},
    "falcon with groups": {
        "hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True,
    },
    "persimmon": {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "qk_layernorm": False},
    "mpt": {"d_model": 24, "n_heads": 3},
    "phi3": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40},
    "glm": {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40,
    },
    "modernbert": {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40},
}  # fmt: skip
"""Models with fused matrices, small enough to run."""


def rows_of(role: Role, last: int, heads: int, groups: int, size: int) -> torch.Tensor:
    """Tell which of the outputs of a fused matrix a role claims to be its last part: v, or up."""
    outputs = torch.arange(last)
    if role.part == "gate_up":
        return outputs >= last // 2 if role.fused == "blocks" else outputs % 2 == 1
    if role.fused == "blocks":
        return outputs >= last - groups * size
    within = 3 if role.fused == "per head" else heads // groups + 2
    return outputs // size % within == within - 1


@pytest.mark.parametrize("case", TINY)
def test_what_is_linear_in_the_last_fused_part_doubles_with_it(case: str) -> None:
    kind, settings = case.split()[0], TINY[case]
    layers = {"n_layers": 1} if kind == "mpt" else {"num_hidden_layers": 1}
    config = CONFIG_MAPPING[kind](**layers, **settings, vocab_size=40, pad_token_id=0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = (AutoModelForMaskedLM if kind == "modernbert" else AutoModelForCausalLM).from_config(config).eval()
    state = model.state_dict()
    roles = find_roles({name: tuple(tensor.shape) for name, tensor in state.items()}, config.to_dict())
    heads = getattr(config, "num_attention_heads", None) or config.n_heads
    groups = 1 if case in ("gpt_bigcode", "falcon") else settings.get("num_key_value_heads", heads)
    groups = settings.get("num_kv_heads", groups)
    fused = {name: role for name, role in roles.items() if role.part in ("qkv", "gate_up") and role.kind == "weight"}
    assert fused
    for name, role in fused.items():
        end = "o" if role.part == "qkv" else "down"
        (writer,) = (at for at, one in roles.items() if one[:3] == (role.group, end, "weight"))
        seen: list[torch.Tensor] = []
        hook = model.get_submodule(writer.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].clone())
        )
        ids = torch.arange(1, 13)[None]
        outputs = state[name].shape[1 if role.layout == "in,out" else 0]
        rows = rows_of(role, outputs, heads, groups, 8)
        scale = 1 + rows.float()
        with torch.no_grad():
            model(ids)
            model.get_parameter(name).mul_(scale if role.layout == "in,out" else scale[:, None])
            bias = name.removesuffix("weight") + "bias"
            if bias in state:
                model.get_parameter(bias).mul_(scale)
            model(ids)
        hook.remove()
        before, after = seen
        assert before.abs().max() > 0
        assert torch.allclose(after, 2 * before, rtol=1e-5, atol=0), name


COMPANIONS = (
    "weight_scale_inv", "weight_scale", "weight_scale_2", "weight_packed", "weight_shape", "weight_zero_point",
    "weight_global_scale", "weight_g_idx", "qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format",
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4",
    "weight_absmax", "weight_quant_map", "weight_quant_state", "_weight_qdata", "_weight_scale", "compressed",
    "bitmask", "pre_quant_scale", "input_scale", "input_scale_ub", "activation_scale", "input_global_scale",
    "input_zero_point", "output_scale", "k_scale", "v_scale", "q_scale", "trellis", "weight_scale_inverse",
    "weight_scb", "svdquant_lora_a", "svdquant_lora_b",
)  # fmt: skip


@pytest.mark.parametrize("suffix", COMPANIONS)
def test_a_companion_has_the_role_of_its_module(suffix: str) -> None:
    name = f"model.layers.3.mlp.experts.7.up_proj.{suffix}"
    assert companions([name]) == {name: "model.layers.3.mlp.experts.7.up_proj"}
    assert find_role(name, (8, 8), "qwen3_moe", 8) == Role("expert", "up", "companion", suffix=f".{suffix}")


@pytest.mark.parametrize("suffix", ["_blocks", "_scales", "_scale_inv"])
def test_a_companion_of_stacked_experts_has_their_role(suffix: str) -> None:
    name = f"model.layers.3.mlp.experts.gate_up_proj{suffix}"
    assert companions([name]) == {name: "model.layers.3.mlp.experts.gate_up_proj"}
    assert find_role(name, (4, 8, 2, 16), "gpt_oss", 64) == Role(
        "expert", "gate_up", "companion", fused="interleaved", suffix=suffix
    )


L = "model.layers.3."
ROLES: list[tuple[str, tuple[int, ...], str, Role]] = [
    (L + "self_attn.q_proj.weight", (8, 8), "", Role("attention", "q", layout="out,in", suffix=".weight")),
    (L + "self_attn.q_proj.bias", (8,), "", Role("attention", "q", "bias", suffix=".bias")),
    (L + "self_attn.q_proj.weight", (32, 1), "", Role("attention", "q", suffix=".weight")),
    (L + "self_attn.k_scale", (1,), "", Role("attention", "cache", "companion", suffix=".k_scale")),
    ("h.0.attn.c_attn.weight", (8, 24), "", Role("attention", "qkv", "weight", "in,out", "blocks", "", ".weight")),
    ("h.0.attn.c_attn.weight", (24, 8), "", Role("attention", "qkv", "weight", "out,in", "blocks", "", ".weight")),
    ("h.0.attn.c_proj.weight", (8, 8), "", Role("attention", "o", suffix=".weight")),
    ("h.0.attn.c_proj.weight", (8, 8), "gpt2", Role("attention", "o", layout="in,out", suffix=".weight")),
    ("h.0.attn.c_proj.weight", (8, 8), "gpt_bigcode", Role("attention", "o", layout="out,in", suffix=".weight")),
    ("h.0.mlp.c_proj.weight", (32, 8), "", Role("mlp", "down", layout="in,out", suffix=".weight")),
    ("h.0.mlp.c_proj.weight", (8, 32), "", Role("mlp", "down", layout="out,in", suffix=".weight")),
    ("h.0.attn.bias", (1, 1, 16, 16), "gpt2", Role("other", "", "bias", suffix="")),
    (L + "mlp.experts.gate_up_proj", (4, 8, 12), "", Role("expert", "gate_up", "weight", "expert,in,out", "blocks")),
    (L + "mlp.experts.gate_up_proj", (4, 12, 8), "", Role("expert", "gate_up", "weight", "expert,out,in", "blocks")),
    (L + "mlp.experts.gate_up_proj", (4, 8, 8), "", Role("expert", "gate_up", "weight", "", "blocks")),
    (L + "mlp.experts.down_proj", (4, 8, 8), "gpt_oss", Role("expert", "down", "weight", "expert,in,out")),
    (L + "mlp.experts.down_proj", (4, 8, 6), "gpt_oss", Role("expert", "down", "weight", "expert,out,in")),
    (L + "mlp.experts.down_proj_bias", (4, 8), "gpt_oss", Role("expert", "down", "bias", suffix="_bias")),
    (L + "mlp.experts.down_proj", (4, 8, 8), "llama4_text", Role("expert", "down", "weight", "expert,in,out")),
    (L + "mlp.experts.down_proj", (4, 8, 8), "granitemoe", Role("expert", "down", "weight", "expert,out,in")),
    (L + "self_attn.sinks", (4,), "gpt_oss", Role("attention", "sinks")),
    (L + "mlp.gate.e_score_correction_bias", (4,), "", Role("router", "correction", "bias", suffix="_bias")),
    (L + "mlp.shared_expert_gate.weight", (1, 8), "", Role("router", "shared", layout="out,in", suffix=".weight")),
    (L + "mlp.gate.wg.weight", (4, 8), "", Role("router", "router", layout="out,in", suffix=".weight")),
    (L + "cross_attn.k_proj.weight", (4, 8), "", Role("attention", "k", "weight", "out,in", "", "cross", ".weight")),
    ("transformer.blocks.0.ffn.experts.mlp.w2", (48, 8), "dbrx", Role("expert", "down", "weight", "expert*in,out")),
    ("transformer.blocks.0.norm_attn_norm.norm_1.weight", (8,), "dbrx", Role("norm", "norm_1", suffix=".weight")),
    ("encoder.block.1.layer.0.SelfAttention.o.weight", (8, 8), "t5",
     Role("attention", "o", layout="out,in", suffix=".weight")),
    ("decoder.block.1.layer.1.EncDecAttention.q.weight", (8, 8), "t5",
     Role("attention", "q", "weight", "out,in", "", "cross", ".weight")),
    ("decoder.block.1.layer.2.DenseReluDense.wo.weight", (8, 9), "t5",
     Role("mlp", "down", layout="out,in", suffix=".weight")),
    ("model.layers.3.attention.wqkv.weight", (16, 8), "internlm2",
     Role("attention", "qkv", "weight", "out,in", "per group", "", ".weight")),
    ("layers.0.feed_forward.w2.weight", (8, 16), "", Role("mlp", "down", layout="out,in", suffix=".weight")),
    ("model.decoder.layers.0.final_layer_norm.weight", (8,), "opt", Role("norm", "final_layer_norm", suffix=".weight")),
    ("model.decoder.final_layer_norm.weight", (8,), "opt", Role("norm", "final", suffix=".weight")),
    ("bert.encoder.layer.0.output.LayerNorm.gamma", (8,), "bert", Role("norm", "LayerNorm", suffix=".gamma")),
    ("bert.encoder.layer.0.output.LayerNorm.beta", (8,), "bert", Role("norm", "LayerNorm", "bias", suffix=".beta")),
    ("score.weight", (2, 8), "qwen3", Role("head", "score", layout="out,in", suffix=".weight")),
    ("lm_head.qweight", (2, 8), "qwen3", Role("head", "lm_head", "companion", suffix=".qweight")),
    ("mtp.layers.0.self_attn.q_proj.weight", (8, 8), "qwen3_next", Role("other", "mtp", suffix=".weight")),
    ("model.visual.blocks.0.attn.qkv.weight", (24, 8), "qwen3_vl", Role("other", "vision", suffix=".weight")),
    ("model.audio_tower.layers.0.fc1.weight", (24, 8), "qwen3_omni", Role("other", "audio", suffix=".weight")),
    ("multi_modal_projector.norm.weight", (24,), "mistral3", Role("other", "projector", suffix=".weight")),
    (L + "self_attn.rotary_emb.inv_freq", (8,), "llama", Role("other")),
    (L + "self_attn.q_proj.lora_A.weight", (8, 8), "llama", Role("other", suffix=".weight")),
    (L + "input_layernorm.weight", (8, 8), "llama", Role("other", suffix=".weight")),
    (L + "something.new.weight", (8, 8), "llama", Role("other", suffix=".weight")),
    ("something.new", (8, 8), "llama", Role("other")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "kind", "role"), ROLES, ids=[f"{one[0]}-{one[1]}-{one[2]}" for one in ROLES])
def test_the_role_of_a_name(name: str, shape: tuple[int, ...], kind: str, role: Role) -> None:
    found = find_role(name, shape, kind, 8)
    if role.group == "other":
        found = found._replace(kind=role.kind, suffix=role.suffix)
    assert found == role


def test_linear_attention_that_calls_itself_self_attention_is_a_mixer() -> None:
    shapes = {
        "model.layers.0.self_attn.A_log": (4,),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.q_proj.weight_scale_inv": (1, 1),
        "model.layers.1.self_attn.q_proj.weight": (8, 8),
    }
    found = find_roles(shapes, {"model_type": "kimi_linear", "hidden_size": 8})
    assert [role.group for role in found.values()] == ["mixer", "mixer", "mixer", "attention"]


def test_a_layer_of_multi_token_prediction_is_other() -> None:
    tails = ("self_attn.o_proj.weight", "input_layernorm.weight")
    shapes = {f"model.layers.{layer}.{tail}": (8, 8)[: 1 + ("proj" in tail)] for layer in (3, 4) for tail in tails}
    shapes["model.layers.4.eh_proj.weight"] = (8, 16)
    found = find_roles(shapes, {"model_type": "deepseek_v3", "hidden_size": 8})
    assert [role.group for role in found.values()] == ["attention", "norm", "other", "other", "other"]
    assert {role.part for role in found.values() if role.group == "other"} == {"mtp"}


def test_layers_of_another_stack_are_other() -> None:
    shapes = {"blocks.0.attn.qkv.weight": (24, 8), "layers.0.self_attn.q_proj.weight": (8, 8)}
    assert [role.group for role in find_roles(shapes, {}, LayerStack("layers.", 1)).values()] == ["other", "attention"]


def test_the_model_type_and_hidden_size_are_those_of_the_language_model() -> None:
    config = {"model_type": "seeing", "text_config": {"model_type": "gpt_oss", "hidden_size": 8}, "hidden_size": 12}
    (role,) = find_roles({"model.layers.0.mlp.experts.gate_up_proj": (4, 8, 12)}, config).values()
    assert role == Role("expert", "gate_up", "weight", "expert,in,out", "interleaved")


@given(st.text(st.sampled_from("model.layers.3.self_attn\nmlpqkvo_projweightbias0 \x85"), max_size=40), st.booleans())
def test_any_name_has_a_role(name: str, inside: bool) -> None:
    assert isinstance(find_role(f"model.layers.0.{name}" if inside else name, (2, 2)), Role)
