"""The rules by which model classes fill in a config, compared with the classes themselves."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from architectures import COMMON, EXPERTS, LATENT, ROUTED, STATES, WINDOW
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import checkpoint, under
from test_fields import follows, sequences
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.families import FAMILIES, REFUSED

KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers", "indexer_types", "activation_sparsity_pattern",
        "layer_rope_theta", "layers_block_type", "attention_layers")  # fmt: skip

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "sliding_window_pattern": [{"sliding_window_pattern": 3}, {"sliding_window_pattern": 1}],
    "full_attention_interval": [{"full_attention_interval": 3}],
    "layer_group_size": [{"layer_group_size": 3}],
    "global_attn_every_n_layers": [{"global_attn_every_n_layers": 2}],
    "no_rope_layer_interval": [
        {"no_rope_layer_interval": 3},
        {"no_rope_layers": [1, 0, 1, 1, 0]},
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
    ],
    "first_k_dense_replace": [{"first_k_dense_replace": 2}, {"first_k_dense_replace": 0}],
    "moe_layer_freq": [{"moe_layer_freq": 2}],
    "num_dense_layers": [{"num_dense_layers": 3}],
    "max_window_layers": [
        {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
        {"use_sliding_window": False, "max_window_layers": 3, "sliding_window": 8},
        {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8},
    ],
    "full_attn_idxs": [{"full_attn_idxs": [1, 4]}],
    "local_layer_ids": [{"local_layer_ids": [1, 4]}],
    "hybrid_override_pattern": [{"hybrid_override_pattern": "M-M*E"}],
    "linear_attn_config.kda_layers": [{"linear_attn_config": {"kda_layers": [1, 2, 4], "full_attn_layers": [3, 5]}}],
    "index_topk_pattern": [{"index_topk_pattern": "FSSFS"}, {"index_topk_freq": 3, "index_skip_topk_offset": 1}],
    "num_hash_layers": [{"num_hash_layers": 1}],
    "compress_ratios": [{"compress_ratios": [0, 4, 128, 4, 0]}],
    "dense_mlp_idx": [{"dense_mlp_idx": 2}],
    "prefix_dense_sliding_window_pattern": [{"first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": 2}],
    "moe_layers": [
        {"no_rope_layers": []},
        {"moe_layers": [1, 4]},
        {"moe_layers": []},
        {"interleave_moe_layer_step": 2},
    ],
    "attn_layer_period": [{"attn_layer_period": 3, "attn_layer_offset": 1}],
    "expert_layer_period": [{"expert_layer_period": 3, "expert_layer_offset": 2}],
    "attention_types": [{"attention_types": [[["global", "local"], 2], [["local"], 1]]}],
    "scale_depth": [{"scale_depth": 2.0}, {"scale_depth": None}],
}
FIXED_LENGTH = ("hybrid_override_pattern", "linear_attn_config", "index_topk_pattern", "compress_ratios",
                "attention_types")  # fmt: skip


ALONE_SAYS_NOTHING = ("gpt_neo", "lfm2_moe", "nemotron_h")
"""Model types whose config always gives the list."""

KNOWN = [kind for kind in FAMILIES if kind in CONFIG_MAPPING]


def settings_of(kind: str) -> Iterator[dict[str, Any]]:
    if kind not in ALONE_SAYS_NOTHING:
        yield {}
    for field in FAMILIES[kind]:
        for key in field.keys:
            yield from SETTINGS.get(key, [])


def counts_of(settings: dict[str, Any]) -> list[int]:
    fixed = any(key in settings for key in FIXED_LENGTH) or any(
        isinstance(value, list) and len(value) == 5 for value in settings.values()
    )
    return [5] if fixed else [5, 6, 9, 12, 13, 24]


CASES = [(kind, settings) for kind in KNOWN for settings in settings_of(kind)]


def made(kind: str, count: int, settings: Mapping[str, Any]) -> Any:
    """Return what a model class makes of a config, or None where it takes none of the kind."""
    counted = {} if kind == "nemotron_h" else {("num_layers" if kind == "gpt_neo" else "num_hidden_layers"): count}
    try:
        return CONFIG_MAPPING[kind](**json.loads(json.dumps({**counted, **settings}))).get_text_config()
    except (ValueError, AttributeError, TypeError, ZeroDivisionError):
        return None


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_a_rule_makes_of_a_config_what_the_class_makes_of_it(kind: str, settings: dict[str, Any]) -> None:
    compared = 0
    for count in counts_of(settings):
        config = made(kind, count, settings)
        if config is None:
            continue
        for field in FAMILIES[kind]:
            key = field.keys[0]
            wanted = getattr(config, key, None) if key in KEYS else None
            if wanted is not None and not field.points:
                assert field.read(settings, count) == list(wanted), (count, key)
                compared += 1
    assert compared or kind in ALONE_SAYS_NOTHING or not any(field.keys[0] in KEYS for field in FAMILIES[kind])


def field_of(kind: str, key: str, points: bool = False) -> Any:
    (found,) = [field for field in FAMILIES[kind] if key in field.keys and field.points == points]
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
def test_what_llama4_and_jamba_make_of_their_steps(count: int) -> None:
    for found in ({}, {"interleave_moe_layer_step": 2}, {"interleave_moe_layer_step": 3}, {"moe_layers": [0]},
                  {"moe_layers": []}):  # fmt: skip
        layers = made("llama4_text", count, found).moe_layers
        wanted = [layer in layers for layer in range(count)]
        assert field_of("llama4_text", "moe_layers").read(found, count) == wanted
    for found in ({}, {"attn_layer_period": 3, "attn_layer_offset": 2, "expert_layer_period": 4,
                       "expert_layer_offset": 1}):  # fmt: skip
        config = made("jamba", count, found)
        attention = [kind == "attention" for kind in config.layers_block_type]
        assert field_of("jamba", "attn_layer_period").read(found, count) == attention
        experts = [number > 1 for number in config.layers_num_experts]
        assert field_of("jamba", "expert_layer_period").read(found, count) == experts


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("found", [{}, {"scale_depth": 2.0}, {"scale_depth": None}], ids=str)
def test_what_minicpm3_adds_to_the_residual(found: dict[str, Any], count: int) -> None:
    config = made("minicpm3", count, found)
    scale = config.scale_depth / count**0.5
    assert field_of("minicpm3", "scale_depth").read(found, count) == pytest.approx([scale] * count)


TINY: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 16, **EXPERTS},
    "qwen3_moe": EXPERTS,
    "qwen3_vl_moe_text": EXPERTS,
    "qwen3_next": {"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, **EXPERTS},
    "deepseek_v2": {**ROUTED, **LATENT},
    "deepseek_v3": {**ROUTED, **LATENT},
    "glm4_moe": {"partial_rotary_factor": 0.5, **ROUTED},
    "dots1": {**ROUTED, **WINDOW},
    "afmoe": {**EXPERTS, **WINDOW},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3, **EXPERTS},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "jamba": {"num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "gemma3n_text": {"hidden_size_per_layer_input": 8, "laurel_rank": 8, "vocab_size_per_layer_input": 96, **WINDOW},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "global_head_dim": 8, "vocab_size_per_layer_input": 96,
                    "use_double_wide_mlp": True, **WINDOW},
    "minicpm3": LATENT,
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16, **STATES},
    "smollm3": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "cohere2": WINDOW,
    "olmo3": WINDOW,
    "qwen2": WINDOW,
    "exaone4": WINDOW,
}  # fmt: skip

STEPS = [
    {},
    {"decoder_sparse_step": 2},
    {"mlp_only_layers": [1, 4]},
    {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
]
DENSE_FIRST = [{}, {"first_k_dense_replace": 2}, {"first_k_dense_replace": 0}, {"first_k_dense_replace": 9}]
ALTERNATE = ["sliding_attention", "full_attention"] * 3
BUILT: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_next"), STEPS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"), DENSE_FIRST),
    "afmoe": [{}, {"num_dense_layers": 3, "global_attn_every_n_layers": 2}],
    "lfm2_moe": [{}, {"num_dense_layers": 3}],
    "ernie4_5_moe": [
        {}, {"moe_layer_start_index": 2}, {"moe_layer_start_index": 0, "moe_layer_end_index": 3},
        {"moe_layer_start_index": 1, "moe_layer_interval": 2},
    ],
    "llama4_text": [{}, {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 3}, {"moe_layers": [0, 5]}],
    "jamba": [
        {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 3, "expert_layer_offset": 0},
    ],
    "gemma3n_text": [
        {"layer_types": ALTERNATE, "num_kv_shared_layers": shared, "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4}
        for shared in (0, 2, 4)
    ] + [{"num_kv_shared_layers": 1}],
    "gemma4_text": [{"layer_types": ALTERNATE, "num_kv_shared_layers": shared} for shared in (0, 2, 4)]
    + [{"num_kv_shared_layers": 0}],
    "minicpm3": [{}, {"scale_depth": 2.0}, {"scale_depth": None}],
    "smollm3": [{}, {"no_rope_layer_interval": 3}, {"no_rope_layers": [1, 1, 0, 1, 0, 1]}],
    "gemma2": [{}],
    "gemma3_text": [{}, {"sliding_window_pattern": 3}],
    "cohere2": [{}, {"sliding_window_pattern": 3}],
    "olmo3": [{}],
    "qwen2": [{"use_sliding_window": True, "max_window_layers": 3}],
    "exaone4": [{}, {"sliding_window": None, "layer_types": ["full_attention"] * 6}],
}  # fmt: skip
SAID = ("is_sliding", "sliding_window", "use_rope", "layer_type", "attention_type", "residual_scale",
        "activation_sparsity", "attn_chunk_size", "layer_types")  # fmt: skip
SIX = 6


@cache
def built(kind: str, text: str) -> tuple[list[Any], list[int | None]]:
    """Return what the modeling code builds for each layer, and the layer whose keys and values it uses."""
    config = CONFIG_MAPPING[kind](**json.loads(text))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    layers = model.get_decoder().layers if hasattr(model, "get_decoder") else model.layers
    found: list[Any] = []
    producers: list[int | None] = []
    stored: dict[str, int] = {}
    for place, layer in enumerate(layers):
        parts = tuple(
            (name, type(module).__name__, tuple((key, said(module, key)) for key in SAID if hasattr(module, key)))
            for name, module in layer.named_modules()
        )
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
        found.append((parts, shapes))
        attention = getattr(layer, "self_attn", None)
        if getattr(attention, "is_kv_shared_layer", False):
            by_number = getattr(attention, "kv_shared_layer_index", None)
            producers.append(stored[config.layer_types[place]] if by_number is None else by_number)
        else:
            producers.append(place)
        if getattr(attention, "store_full_length_kv", False):
            stored[config.layer_types[place]] = place
    return found, producers


def said(module: Any, key: str) -> Any:
    """Return what a module says of itself, to twelve digits where it is a fraction."""
    value = getattr(module, key)
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return value if isinstance(value, str | int | None | bool) else repr(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "says"), [(kind, it) for kind, all_ in BUILT.items() for it in all_], ids=str)
def test_the_modeling_code_builds_of_a_rewritten_config_the_layers_of_the_original(
    kind: str, says: dict[str, Any]
) -> None:
    config = {**COMMON, **TINY[kind], **says, "num_hidden_layers": SIX, "model_type": kind}
    before, producers = built(kind, json.dumps(config))
    assert len(before) == SIX
    chance = random.Random(f"{kind} {says}")
    followed = 0
    chosen = [(0, 1, 2, 3, 4), (5, 4, 3, 2, 1, 0), (0, 1, 0, 1, 2, 3, 4, 5), (0, 1, 2, 2, 3, 4, 5), (0, 1, 0, 1)]
    for seq in [*chosen, *(tuple(chance.choices(range(SIX), k=chance.randint(1, 9))) for _ in range(4))]:
        try:
            edited = under(checkpoint(config, SIX), *seq)
        except RefusedError:
            continue
        followed += 1
        after, takes = built(kind, json.dumps(edited))
        assert len(after) == len(seq)
        assert [it == before[layer] for it, layer in zip(after, seq, strict=True)] == [True] * len(seq), (seq, edited)
        for place, target in enumerate(takes):
            assert follows(producers[seq[place]], target, place, seq), (seq, place, edited)
    assert followed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "key", "sparse"), [
    ("qwen2_moe", "decoder_sparse_step", "experts"),
    ("qwen3_moe", "decoder_sparse_step", "experts"),
    ("qwen3_next", "decoder_sparse_step", "experts"),
    ("deepseek_v2", "first_k_dense_replace", "experts"),
    ("deepseek_v3", "first_k_dense_replace", "experts"),
    ("glm4_moe", "first_k_dense_replace", "experts"),
    ("dots1", "first_k_dense_replace", "experts"),
    ("afmoe", "num_dense_layers", "experts"),
    ("lfm2_moe", "num_dense_layers", "experts"),
    ("ernie4_5_moe", "moe_layer_start_index", "experts"),
])  # fmt: skip
def test_a_rule_of_dense_layers_is_what_the_modeling_code_builds(kind: str, key: str, sparse: str) -> None:
    for says in BUILT[kind]:
        layers, _ = built(kind, json.dumps({**COMMON, **TINY[kind], **says, "model_type": kind}))
        holds = [any(sparse in name for name, *_ in parts) for parts, _ in layers]
        meaning = field_of(kind, key).read(says, SIX)
        assert [it in (True, "sparse") for it in meaning] == holds, says


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("shared", range(6))
def test_who_makes_keys_and_values_is_who_the_modeling_code_takes_them_from(kind: str, shared: int) -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    says = {"layer_types": [*types, "full_attention"], "num_kv_shared_layers": shared}
    try:
        _, producers = built(kind, json.dumps({**COMMON, **TINY[kind], **says, "model_type": kind}))
    except (ValueError, KeyError):
        return  # A type of which no layer makes any.
    assert field_of(kind, "num_kv_shared_layers", points=True).read(says, SIX) == producers


FACTS: dict[str, Callable[[Any, int], Sequence[Any]]] = {
    "moe_layers": lambda config, count: [layer in config.moe_layers for layer in range(count)],
    "layers_num_experts": lambda config, count: config.layers_num_experts,
    "scale_depth": lambda config, count: [float(f"{config.scale_depth / count**0.5:.9g}")] * count,
    "first_k_dense_replace": lambda config, count: [layer < config.first_k_dense_replace for layer in range(count)],
    "num_dense_layers": lambda config, count: [layer < config.num_dense_layers for layer in range(count)],
}
BY_CLASS = {
    "moe_layers": ("llama4_text",),
    "layers_num_experts": ("jamba",),
    "scale_depth": ("minicpm3",),
    "first_k_dense_replace": ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4v_moe_text", "dots1", "axk1", "mistral4"),
    "num_dense_layers": ("afmoe", "lfm2_moe"),
}
"""What else some classes say of each layer, and which."""


def facts(kind: str, config: Any, count: int) -> dict[str, list[Any]]:
    """Return what a class says of each layer."""
    found = {key: list(getattr(config, key)) for key in KEYS if getattr(config, key, None)}
    # Newer classes say by a list what older ones say by a number.
    more = {key for key, kinds in BY_CLASS.items() if kind in kinds and hasattr(config, key)}
    return found | {key: list(FACTS[key](config, count)) for key in sorted(more)}


def indexed_by(types: Sequence[str]) -> list[int | None]:
    """Return the layer whose choice of keys each layer uses: itself, or the last before it that has an indexer."""
    return [max((at for at in range(layer + 1) if types[at] == "full"), default=None) for layer in range(len(types))]


@pytest.mark.parametrize("kind", [kind for kind in KNOWN if kind not in REFUSED])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_class_makes_of_a_rewritten_config_what_it_made_of_each_layer(kind: str, data: st.DataObject) -> None:
    says = data.draw(st.sampled_from(list(settings_of(kind)) or [{}]), "says")
    count = data.draw(st.sampled_from(counts_of(says)), "count")
    config = made(kind, count, says)
    if config is None:
        return
    key = "num_layers" if kind == "gpt_neo" else "num_hidden_layers"
    before = facts(kind, config, count)
    seq = data.draw(sequences(count), "sequence")
    try:
        edited = under(checkpoint({"model_type": kind, key: count, **says}, count, more=["slope_rate"]), *seq)
    except RefusedError:
        return
    edited = {name: value for name, value in edited.items() if name not in ("model_type", key)}
    loaded = made(kind, len(seq), edited)
    assert loaded is not None, edited
    after = facts(kind, loaded, len(seq))
    # What the class does not read, vLLM does.
    assert {name: after.get(name) for name in before} == {
        name: [values[layer] for layer in seq] for name, values in before.items()
    }, edited
    if "indexer_types" in before:
        sources = indexed_by(before["indexer_types"])
        for place, target in enumerate(indexed_by(after["indexer_types"])):
            assert follows(sources[seq[place]], target, place, seq), edited
