"""What a layer sequence does to config.json: followed, left alone, or refused with the field's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.arrangement import Arrangement, Origin, layer_shapes
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import with_dtype, without_quantization
from tensorsurgeon.document import Document
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.families import REFUSED
from tensorsurgeon.format import Span
from tensorsurgeon.known_fields import FIELDS as KNOWN
from tensorsurgeon.names import LayerStack
from tensorsurgeon.quantized.settings import find_settings
from tensorsurgeon.sequence import config_under_sequence
from tensorsurgeon.tensor import LazyTensor

MODULES = ("self_attn.q_proj", "mlp.up_proj")
DROP_LAST, REVERSE, REPEAT, PAIRWISE = (0, 1, 2), (3, 2, 1, 0), (0, 1, 2, 3, 2, 3), (0, 1, 0, 1)


def tensor(*shape: int) -> LazyTensor:
    return LazyTensor("BF16", shape, Span(Path("model.safetensors"), 0, 0))


def checkpoint(
    config: Mapping[str, Any], count: int = 4, prefix: str = "model.layers.", more: Sequence[str] = ()
) -> Checkpoint:
    """Return a checkpoint of `count` layers under `prefix`, with a norm and two matrices each."""
    tensors = {}
    for layer in range(count):
        tensors[f"{prefix}{layer}.input_layernorm.weight"] = tensor(8)
        tensors |= {f"{prefix}{layer}.{module}.weight": tensor(8, 8) for module in MODULES}
    tensors |= {name: tensor(8, 8) for name in more}
    return Checkpoint(tensors, Document(config, "{}"), {}, {}, ())


def under(ckpt: Checkpoint, *seq: int, assume_uniform: bool = False) -> Any:
    return config_under_sequence(Arrangement((ckpt,), tuple(Origin(0, layer) for layer in seq), assume_uniform))


def llama(count: int = 4, **changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": count, "vocab_size": 16, **changes}


def refused(config: Mapping[str, Any], *seq: int, **building: Any) -> tuple[str, ...]:
    """Return why a sequence is refused, but for the one that is offered in its place."""
    with pytest.raises(RefusedError) as caught:
        under(checkpoint(config, **building), *seq)
    problems = caught.value.problems
    assert not any("nearest sequence" in problem for problem in problems[:-1])
    return problems if len(problems) == 1 else tuple(it for it in problems if not it.startswith("layers: "))


@pytest.mark.parametrize("seq", [DROP_LAST, REVERSE, REPEAT, (2,), (3,) * 7])
def test_only_the_count_of_a_uniform_model_follows(seq: tuple[int, ...]) -> None:
    config = llama()
    edited = under(checkpoint(config), *seq)
    assert edited == llama(len(seq))
    assert list(edited) == list(config)


@pytest.mark.parametrize("config", [llama(first_k_dense_replace=1, unknown=[1, 2, 3, 4]), llama(model_type="rwkv")])
def test_all_layers_in_their_order_leave_any_config_alone(config: dict[str, Any]) -> None:
    assert under(checkpoint(config), 0, 1, 2, 3) == config


def test_no_layers_at_all_are_refused() -> None:
    assert refused(llama()) == ("layers: the sequence is empty; a model keeps at least one layer.",)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_the_count_follows_under_its_own_key(key: str) -> None:
    assert under(checkpoint({key: 4}), *DROP_LAST) == {key: 3}


def test_counts_of_another_number_stay() -> None:
    config = {"num_hidden_layers": 4, "num_layers": 7, "encoder_layers": 4}
    assert under(checkpoint(config), *DROP_LAST) == {"num_hidden_layers": 3, "num_layers": 7, "encoder_layers": 4}


# Each row: a value, a sequence, and the value that says of output layer k what the old one said of layer seq[k].
FOLLOWED: dict[str, list[tuple[Any, tuple[int, ...], Any]]] = {
    "a list with one entry a layer": [
        ([5, 6, 7, 8], DROP_LAST, [5, 6, 7]),
        ([5, 6, 7, 8], REVERSE, [8, 7, 6, 5]),
        ([5, 6, 7, 8], REPEAT, [5, 6, 7, 8, 7, 8]),
        ([1, 1, 1, 1], DROP_LAST, [1, 1, 1]),
        ([1, 1, 1, 1], REVERSE, [1, 1, 1, 1]),
        ([0, 1, 0, 1], PAIRWISE, [0, 1, 0, 1]),
        ([0, 1, 0, 1], (3,), [1]),
    ],
    "a text with one letter a layer": [
        ("M*ME", REVERSE, "EM*M"),
        ("M*ME", DROP_LAST, "M*M"),
        ("M*ME", REPEAT, "M*MEME"),
    ],
    "a list of layers": [
        ([1], DROP_LAST, [1]),
        ([1], (0, 1, 2, 3, 2), [1]),
        ([1], REVERSE, [2]),
        ([1], (1, 2, 3), [0]),
        ([0, 3], (1, 2, 0, 3), [2, 3]),
        ([2, 0], REVERSE, [1, 3]),
        ([3], (0, 1, 2, 3, 3), [3, 4]),
        ([0, 1, 2, 3], REPEAT, [0, 1, 2, 3, 4, 5]),
    ],
    "a list of layers of which none is left": [([3], DROP_LAST, []), ([1], (0, 2, 3), []), ([1, 2], (0, 3), [])],
    "a list of layers of which some are left": [([1, 3], DROP_LAST, [1]), ([0, 1, 2, 3], DROP_LAST, [0, 1, 2])],
    "a text of layers": [("1,2", REVERSE, "1,2"), ("1,2", (1, 2, 3), "0,1"), ("0,3", (0, 1, 3, 3), "0,2,3")],
    "a list of layers counted from one": [
        ([1, 4], (3, 0, 1), [1, 2]),
        ([4], REVERSE, [1]),
        ([2, 3], (0, 1, 2, 1, 3), [2, 3, 4]),
    ],
    "a number of first layers": [
        (1, DROP_LAST, 1),
        (1, (0, 3, 2, 1), 1),
        (1, (0, 0, 1), 2),
        (1, (1, 2, 3), 0),
        (2, (1, 0, 2), 2),
        (2, (1, 3), 1),
        (4, REPEAT, 6),
    ],
    "a period": [(2, PAIRWISE, 2), (2, (2, 3), 2), (2, REPEAT, 2), (1, REVERSE, 1), (1, (2, 2), 1)],
    "a list that is repeated": [
        (["r", "r", "a"], REVERSE, ["r", "a", "r", "r"]),
        (["r", "r", "a"], (2, 3), ["a", "r"]),
        ([8, 9, 8, 9], (3, 3, 0), [9, 9, 8]),
    ],
    "settings under the numbers of layers": [
        ({"00": {"a": 1}, "03": {"b": 2}}, REVERSE, {"00": {"b": 2}, "03": {"a": 1}}),
        ({"00": {"a": 1}, "03": {"b": 2}}, (3, 0, 0), {"00": {"b": 2}, "01": {"a": 1}, "02": {"a": 1}}),
        ({"2": {"skip": True}}, (2, 1, 2), {"0": {"skip": True}, "2": {"skip": True}}),
        ({"2": {"skip": True}}, (0, 1, 3), {}),
    ],
    "runs of types": [
        ([[["g", "l"], 2]], REVERSE, [[["l", "g", "l", "g"], 1]]),
        ([[["g"], 1], [["l"], 3]], (3, 0), [[["l", "g"], 1]]),
    ],
}
REFUSED_VALUES: dict[str, list[tuple[Any, tuple[int, ...]]]] = {
    "a list with one entry a layer": [(5, REVERSE), ({"0": 1}, REVERSE), ([1, 2, 3], DROP_LAST), ([1] * 5, REVERSE)],
    "a list of layers": [("x", REVERSE), ("1,,2", REVERSE), ([1.5], DROP_LAST), ([[1]], REVERSE), (2, REVERSE)],
    "a number of first layers": [
        (1, REVERSE),
        (1, (1, 0, 2)),
        (2, (0, 2, 1)),
        (1, (0, 1, 0)),
        ("1", REVERSE),
        ([1], DROP_LAST),
    ],
    "a period": [(2, REVERSE), (2, (1, 2, 3)), (2, (0, 2)), (3, (0, 1, 3)), ("2", REVERSE), (2.5, DROP_LAST)],
    "settings under the numbers of layers": [({"x": 1}, DROP_LAST), ({"04": 1}, DROP_LAST), ([1], REVERSE)],
    "runs of types": [([[["g", "l"], 1]], REVERSE), (5, DROP_LAST), ([["g", "l"]], DROP_LAST)],
    "a setting that ties layers to their places": [(1, REVERSE), (1, (1, 2, 3)), (1, REPEAT), ([1], REVERSE)],
}
PERIODS = [
    "sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval", "layer_group_size",
    "no_rope_layer_interval", "decoder_sparse_step", "interleave_moe_layer_step", "attn_layer_period",
    "expert_layer_period", "index_topk_freq", "moe_layer_freq", "moe_layer_interval", "cross_layer_interval",
    "cross_attention_frequency",
]  # fmt: skip
INDICES = [
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs",
    "rope_scaling_layers", "local_layer_ids",
]  # fmt: skip
KINDS: dict[str, list[str]] = {
    "a list with one entry a layer": [
        "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "layer_rope_theta",
        "num_attention_heads_per_layer", "activation_sparsity_pattern", "indexer_types", "hybrid_layer_pattern",
        "attention_layers", "attn_layers", "swiglu_limits", "swiglu_limits_shared",
        "partial_rotary_factors", "use_rope_layers", "compress_ratios", "attn_type_list", "block_configs",
        "expert_swiglu_limit_list", "sparse_attention_config.sparse_attention_freq", "moe_layer_freq",
    ],
    "a text with one letter a layer": ["hybrid_override_pattern", "index_topk_pattern"],
    "a list of layers": INDICES,
    "a list of layers of which none is left": INDICES,
    "a list of layers of which some are left": INDICES,
    "a text of layers": ["moe_layers_enum"],
    "a list of layers counted from one": [
        "linear_attn_config.full_attn_layers", "linear_attn_config.kda_layers", "ple_layer_ids",
    ],
    "a number of first layers": ["first_k_dense_replace", "num_dense_layers", "num_hash_layers", "dense_mlp_idx"],
    "a period": PERIODS,
    "a list that is repeated": ["block_types", "sliding_window", "interleaved_sliding_window"],
    "settings under the numbers of layers": ["per_layer_config"],
    "runs of types": ["attention_types"],
    "a setting that ties layers to their places": [
        "num_kv_shared_layers", "rescale_every", "scale_attn_by_inverse_layer_idx", "num_layers_per_stack",
        "aligner_num_add_layers", "use_cla", "is_encoder_decoder",
    ],
}  # fmt: skip
LISTS_TOO = {"moe_layer_freq"}
"""Keys that are no lists in some models, so that other values say something as well."""


def placed(key: str, value: Any) -> dict[str, Any]:
    """Return a value under a key such as `a` or `a.b`, with a neighbour."""
    first, _, rest = key.partition(".")
    return {first: {"neighbour": 1, rest: value}} if rest else {first: value}


FOLLOWED_CASES = [(key, *row) for kind, rows in FOLLOWED.items() for key in KINDS[kind] for row in rows]
REFUSED_CASES = [
    (key, *row)
    for kind, rows in REFUSED_VALUES.items()
    for key in KINDS[kind]
    for row in rows
    if not (kind == "a list with one entry a layer" and key in LISTS_TOO)
]


@pytest.mark.parametrize(("key", "value", "seq", "expected"), FOLLOWED_CASES)
def test_a_per_layer_field_follows(key: str, value: Any, seq: tuple[int, ...], expected: Any) -> None:
    edited = under(checkpoint(llama(**placed(key, value))), *seq)
    assert edited == llama(len(seq), **placed(key, expected))


@pytest.mark.parametrize(("key", "value", "seq"), REFUSED_CASES)
def test_a_field_that_cannot_follow_is_refused_by_name(key: str, value: Any, seq: tuple[int, ...]) -> None:
    (problem,) = refused(llama(**placed(key, value)), *seq)
    assert problem.startswith(f"config.json: {key!r} is {value!r}, a per-layer setting that cannot follow ")


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "aligner_num_add_layers", "num_layers_per_stack"])
def test_a_field_that_counts_from_the_last_layer_does_not_follow_the_first_ones(key: str) -> None:
    (problem,) = refused(llama(**{key: 1}), *DROP_LAST)
    assert problem.startswith(f"config.json: {key!r} is 1, a per-layer setting that cannot follow 0-2")


@pytest.mark.parametrize(
    "key",
    ["intermediate_size", "moe_intermediate_size", "num_experts", "num_shared_expert", "moe_topk", "rope_theta",
     "num_attention_heads", "num_key_value_heads", "num_query_heads", "ffn_multipliers"],
)  # fmt: skip
def test_a_setting_that_may_be_a_list_follows_where_it_is_as_long_as_the_stack(key: str) -> None:
    assert under(checkpoint(llama(**{key: [1, 2, 3, 4]})), 3, 3, 0) == llama(3, **{key: [4, 4, 1]})
    for value in (7, [1, 2], [1, 2, 3, 4, 5]):
        assert under(checkpoint(llama(**{key: value})), 3, 3, 0) == llama(3, **{key: value})


@pytest.mark.parametrize("key", [key for key in KNOWN if "." not in key])
@pytest.mark.parametrize("value", [None, 0, False, [], "", {}])
def test_a_field_that_says_nothing_stays(key: str, value: Any) -> None:
    assert under(checkpoint(llama(**{key: value})), *DROP_LAST) == llama(3, **{key: value})


def test_max_window_layers_means_nothing_without_a_window() -> None:
    idle = {"max_window_layers": 2, "use_sliding_window": False, "sliding_window": None}
    assert under(checkpoint(llama(**idle)), *REVERSE) == llama(**idle)
    assert under(checkpoint(llama(max_window_layers=2)), *REVERSE) == llama(max_window_layers=2)


def test_max_window_layers_follows_while_the_layers_that_slide_are_the_last() -> None:
    slides = {"use_sliding_window": True, "sliding_window": 8}
    edited = under(checkpoint(llama(max_window_layers=2, **slides)), 1, 2, 3, 3)
    assert edited == llama(max_window_layers=1, **slides)
    (problem,) = refused(llama(max_window_layers=2, **slides), *REVERSE)
    assert "'max_window_layers' is 2" in problem


@pytest.mark.parametrize(
    ("field", "seq", "expected"),
    [
        ({"layer_types": [*"abab", "tail"]}, (3, 0), {"layer_types": ["b", "a", "tail"]}),
        ({"layer_types": [*"abab"]}, (3, 0), {"layer_types": ["b", "a"]}),
        ({"layer_types": [*"aaaa"]}, DROP_LAST, {"layer_types": [*"aaa"]}),
        ({"layer_types": [*"aaaaa"]}, (0, 1, 2, 3, 3), {"layer_types": [*"aaaaaa"]}),
        ({"layer_types": [*"aaaat"]}, DROP_LAST, {"layer_types": [*"aaat"]}),
        ({"hybrid_override_pattern": "M*MEt"}, REVERSE, {"hybrid_override_pattern": "EM*Mt"}),
        ({"swiglu_limits": [0, 0, 7, 7, 9]}, (2, 3, 3, 0, 0), {"swiglu_limits": [7, 7, 7, 0, 0, 9]}),
        ({"moe_layers": [1, 4]}, (1, 0), {"moe_layers": [0, 2]}),
        ({"moe_layers": [1, 4]}, (0, 1, 2, 3, 1), {"moe_layers": [1, 4, 5]}),
        ({"moe_layers_enum": "1,2,4"}, (1, 2, 3, 3, 3), {"moe_layers_enum": "0,1,5"}),
        ({"ple_layer_ids": [2, 5]}, (1, 0), {"ple_layer_ids": [1, 3]}),
    ],
)
def test_entries_for_layers_behind_the_stack_stay_behind_it(
    field: dict[str, Any], seq: tuple[int, ...], expected: dict[str, Any]
) -> None:
    edited = under(checkpoint(llama(num_nextn_predict_layers=1, **field), count=5), *seq)
    assert edited == llama(len(seq), num_nextn_predict_layers=1, **expected)


FULL, SLIDING, LINEAR, CHUNKED = "full_attention", "sliding_attention", "linear_attention", "chunked_attention"
SLIDES = {"use_sliding_window": True, "sliding_window": 8}
KIMI = {"linear_attn_config": {"head_dim": 8, "full_attn_layers": [4], "kda_layers": [1, 2, 3]}}
GONE = object()

# Each row: a model type, what its config says, a sequence, and what the config must say after it. The rules are those
# of the classes: gemma2 slides in layers 0, 2, ...; qwen2 from max_window_layers on; and so on.
RULES: list[tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any]]] = [
    ("gemma2", {}, REVERSE, {"layer_types": [FULL, SLIDING, FULL, SLIDING]}),
    ("gemma2", {}, PAIRWISE, {}),
    ("gemma2", {"layer_types": [SLIDING, FULL] * 2}, (1, 0, 3), {"layer_types": [FULL, SLIDING, FULL]}),
    ("gpt_oss", {}, (0, 2, 3), {"layer_types": [SLIDING, SLIDING, FULL]}),
    ("gemma3_text", {"sliding_window_pattern": 2}, (1, 2, 3),
     {"layer_types": [FULL, SLIDING, FULL], "sliding_window_pattern": GONE}),
    ("gemma3_text", {"sliding_window_pattern": 4}, (0, 1, 3, 0, 2, 3), {"sliding_window_pattern": 3}),
    ("gemma3_text", {}, DROP_LAST, {}),
    ("cohere2", {}, REVERSE, {"layer_types": [FULL, SLIDING, SLIDING, SLIDING]}),
    ("olmo3", {}, (3, 0), {"layer_types": [FULL, SLIDING]}),
    ("cwm", {}, REVERSE, {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]}),
    ("exaone4", {"sliding_window": None}, REVERSE, {}),
    ("gemma4_text", {}, (0, 2, 3), {}),
    ("gemma4_text", {"layer_types": [SLIDING, FULL] * 2}, (1, 3),
     {"layer_types": [FULL, FULL]}),
    ("qwen3_next", {}, (0, 3, 1), {"layer_types": [LINEAR, FULL, LINEAR]}),
    ("muse_spark_text", {}, (3, 0), {"layer_types": [FULL, SLIDING], "layer_rope_theta": [0, 500000.0]}),
    ("smollm3", {}, REVERSE, {"no_rope_layers": [0, 1, 1, 1]}),
    ("smollm3", {"no_rope_layer_interval": 2}, (0, 1, 3),
     {"no_rope_layers": [1, 0, 0], "no_rope_layer_interval": GONE}),
    ("smollm3", SLIDES, REVERSE, {"no_rope_layers": [0, 1, 1, 1]}),
    ("llama4_text", {}, REVERSE, {"no_rope_layers": [0, 1, 1, 1]}),
    ("llama4_text", {"moe_layers": [1, 3], "interleave_moe_layer_step": 2}, (0, 2, 1),
     {"moe_layers": [2], "interleave_moe_layer_step": 3}),
    ("llama4_text", {"moe_layers": [1, 3], "interleave_moe_layer_step": 2}, (1, 0), {"moe_layers": [0]}),
    ("qwen2", {"max_window_layers": 2, **SLIDES}, REVERSE,
     {"max_window_layers": 0, "layer_types": [SLIDING, SLIDING, FULL, FULL]}),
    ("qwen2", {"max_window_layers": 2, **SLIDES}, (0, 2, 3), {"max_window_layers": 1}),
    ("qwen2", {"max_window_layers": 2, **SLIDES}, (1, 0), {}),
    ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 1}, (0, 2, 1), {"mlp_only_layers": [2]}),
    ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 1}, (0, 2, 3), {"mlp_only_layers": []}),
    ("qwen2_moe", {"decoder_sparse_step": 2}, (1, 2, 3), {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
    ("qwen2_moe", {"decoder_sparse_step": 2}, (0, 1, 0, 3), {}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 3),
     {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
    ("deepseek_v3", {"first_k_dense_replace": 1}, (0, 0, 1), {"first_k_dense_replace": 2}),
    ("deepseek_v3", {"first_k_dense_replace": 1}, (2, 3), {"first_k_dense_replace": 0}),
    ("deepseek_v3", {}, (0, 3), {"first_k_dense_replace": 1}),
    ("glm4_moe", {}, (0, 0, 1), {"first_k_dense_replace": 2}),
    ("hy_v3", {"first_k_dense_replace": 1}, (1, 0),
     {"mlp_layer_types": ["sparse", "dense"], "first_k_dense_replace": GONE}),
    ("exaone_moe", {"first_k_dense_replace": 1}, (0, 0, 1),
     {"first_k_dense_replace": 2, "layer_types": GONE}),
    ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 1}, REVERSE,
     {"moe_layer_start_index": 0, "moe_layer_end_index": 2, "moe_layer_interval": 1}),
    ("jamba", {"attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
     (1, 0, 2, 3), {"attn_layer_period": 4, "attn_layer_offset": 0}),
    ("lfm2", {"layer_types": ["conv", FULL, "conv", FULL]}, (1, 0), {"layer_types": [FULL, "conv"]}),
    ("kimi_linear", KIMI, (3, 0, 3),
     {"linear_attn_config": {"head_dim": 8, "full_attn_layers": [1, 3], "kda_layers": [2]}}),
    ("nemotron_h", {"hybrid_override_pattern": "M-M*"}, REVERSE, {"hybrid_override_pattern": "*M-M"}),
    ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "moe", "attention"], "hybrid_override_pattern": "M-E*"},
     (3, 1), {"layers_block_type": ["attention", "mlp"], "hybrid_override_pattern": "*-"}),
    ("nemotron_h", {"hybrid_override_pattern": "-M-*", "intermediate_size": [16, 32]}, (2, 2, 1),
     {"hybrid_override_pattern": "--M", "intermediate_size": [32, 32]}),
    ("gpt_neo", {"attention_types": [[["global", "local"], 2]]}, (1, 0),
     {"attention_types": [[["local", "global"], 1]]}),
    ("recurrent_gemma", {"block_types": ["recurrent", "recurrent", "attention"]}, (2, 3),
     {"block_types": ["attention", "recurrent"]}),
    ("minimax", {}, (0, 1, 0), {}),
    ("glm_moe_dsa", {"indexer_types": ["full", "shared"] * 2}, (2, 3), {"indexer_types": ["full", "shared"]}),
    ("deepseek_v32", {"indexer_types": ["full", "shared"] * 2, "index_topk_pattern": "FSFS"}, (0, 1, 1),
     {"indexer_types": ["full", "shared", "shared"], "index_topk_pattern": "FSS"}),
    ("gemma3n_text", {"layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}, (0, 1, 3),
     {"layer_types": [SLIDING, FULL, FULL], "num_kv_shared_layers": 1}),
    ("gemma3n_text", {"layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}, (0, 1, 0, 1),
     {"num_kv_shared_layers": 0}),
    ("gemma4_text", {"layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}, (0, 1, 0, 1),
     {"num_kv_shared_layers": 0}),
    ("minicpm3", {"scale_depth": 1.0}, (0,), {"scale_depth": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "says", "seq", "expected"), RULES)
def test_a_rule_of_a_class_follows(
    kind: str, says: dict[str, Any], seq: tuple[int, ...], expected: dict[str, Any]
) -> None:
    more = ["slope_rate"] if kind == "minimax" else []
    edited = under(checkpoint(llama(model_type=kind, **says), more=more), *seq)
    assert edited["num_hidden_layers"] == len(seq)
    for key, value in expected.items():
        assert edited.get(key, GONE) == value, key
    assert {key: value for key, value in edited.items() if key in says and key not in expected} == {
        key: value for key, value in says.items() if key not in expected
    }


@pytest.mark.parametrize(
    ("kind", "says", "seq", "key"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 1}, REVERSE, "first_k_dense_replace"),
        ("deepseek_v3", {"first_k_dense_replace": 1}, (0, 1, 0), "first_k_dense_replace"),
        ("glm4_moe", {}, (1, 0), "first_k_dense_replace"),
        ("dots1", {"first_k_dense_replace": 2}, (0, 2, 1), "first_k_dense_replace"),
        ("afmoe", {"num_dense_layers": 1}, (1, 0), "num_dense_layers"),
        ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1}, (1, 0, 0, 1),
         "moe_layer_start_index"),
        ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
         (0, 0, 1, 1), "attn_layer_period"),
        ("gemma4_text", {"layer_types": [SLIDING, FULL] * 2}, (3, 0), "layer_types"),
        ("gemma3n_text", {"layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}, REVERSE,
         "num_kv_shared_layers"),
        ("gemma3n_text", {"layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}, (1, 3, 2),
         "num_kv_shared_layers"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full", "shared"]}, (1, 2, 3), "indexer_types"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full", "shared"]}, (0, 3), "indexer_types"),
    ],
)  # fmt: skip
def test_a_rule_of_a_class_that_cannot_say_it_is_refused(
    kind: str, says: dict[str, Any], seq: tuple[int, ...], key: str
) -> None:
    (problem,) = refused(llama(model_type=kind, **says), *seq)
    assert problem.startswith(f"config.json: {key!r} is ")


@pytest.mark.parametrize("kind", ["modernbert", "modernbert-decoder", "zaya"])
@pytest.mark.parametrize(("seq", "wrong"), [((1, 2), "0"), (REVERSE, "0,3"), ((0, 1, 0), "2"), ((2, 0), "0-1")])
def test_a_first_layer_that_is_built_otherwise_stays_first(kind: str, seq: tuple[int, ...], wrong: str) -> None:
    (problem,) = refused(llama(model_type=kind, layer_types=[FULL] * 4), *seq)
    assert "layer 0 stays first and occurs once" in problem
    assert f"output layers {wrong} of the sequence" in problem
    assert under(checkpoint(llama(model_type=kind, layer_types=[FULL] * 4)), 0, 3, 3)["num_hidden_layers"] == 3


def test_minimax_needs_the_tensors_that_it_would_compute_by_number() -> None:
    (problem,) = refused(llama(model_type="minimax"), 0, 1)
    assert "attention decay depends on a layer's number" in problem


@pytest.mark.parametrize(("kept", "missing"), [((0, 1, 2), "full_attention"), ((3,), "linear_attention")])
def test_olmo_hybrid_keeps_a_layer_of_each_kind(kept: tuple[int, ...], missing: str) -> None:
    config = llama(model_type="olmo_hybrid", layer_types=[LINEAR] * 3 + [FULL])
    (problem,) = refused(config, *kept)
    assert problem == f"model_type 'olmo_hybrid': its class wants at least one {missing} layer."
    assert under(checkpoint(config), 3, 0)["layer_types"] == [FULL, LINEAR]


def test_a_refusal_ends_with_the_nearest_sequence_that_is_possible() -> None:
    with pytest.raises(RefusedError) as caught:
        under(checkpoint(llama(first_k_dense_replace=1)), 1, 0, 2, 3)
    # Of the changes of a single layer, those that put layer 0 first or leave it out are possible.
    possible = ("1-3", "0,0,2-3", "1,1-3", "0-1,0,2-3", "0,2-3")
    last = caught.value.problems[-1]
    assert len(caught.value.problems) == 2
    assert last.startswith("layers: the nearest sequence that is possible is ")
    assert last.removeprefix("layers: the nearest sequence that is possible is ").rstrip(".") in possible


def test_no_sequence_is_offered_for_a_model_that_cannot_be_re_ordered_at_all() -> None:
    with pytest.raises(RefusedError) as caught:
        under(checkpoint(llama(model_type="rwkv")), *DROP_LAST)
    assert not any(problem.startswith("layers: ") for problem in caught.value.problems)


TYPES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("seq", "types"),
    [
        (DROP_LAST, ["sliding_attention"] * 3),
        ((3, 0), ["full_attention", "sliding_attention"]),
        ((3, 3, 2), ["full_attention", "full_attention", "sliding_attention"]),
    ],
)
def test_layer_types_follow(seq: tuple[int, ...], types: list[str]) -> None:
    config = llama(model_type="gemma3_text", layer_types=TYPES)
    assert under(checkpoint(config), *seq) == llama(len(seq), model_type="gemma3_text", layer_types=types)


@pytest.mark.parametrize("types", [["a"], ["a"] * 3, ["a"] * 5, 4, {"0": "a"}], ids=repr)
def test_layer_types_of_another_length_are_refused(types: Any) -> None:
    (problem,) = refused(llama(layer_types=types), *DROP_LAST)
    why = (
        f"it has {len(types)} entries, not one for each of 4 layers" if isinstance(types, list) else "it is not a list"
    )
    assert problem.startswith(f"config.json: 'layer_types' is {types!r}, ")
    assert why in problem


def test_layer_types_of_an_outer_config_are_checked_and_follow_as_well() -> None:
    config = {"layer_types": TYPES, "text_config": llama(layer_types=TYPES)}
    edited = under(checkpoint(config), 3, 2)
    assert edited["layer_types"] == edited["text_config"]["layer_types"] == ["full_attention", "sliding_attention"]
    (problem,) = refused({"layer_types": ["a"], "text_config": llama(layer_types=TYPES)}, 3, 2)
    assert "'layer_types' is ['a']" in problem


NESTINGS = {
    "text_config": lambda part: {"text_config": part},
    "llm_config": lambda part: {"llm_config": part},
    "language_config": lambda part: {"language_config": part},
    "thinker_config": lambda part: {"thinker_config": {"model_type": "x", "text_config": part}},
}


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_a_nested_config_follows_and_its_neighbours_stay(nest: Callable[[Any], dict[str, Any]]) -> None:
    vision = {"num_hidden_layers": 4, "layer_types": ["a"], "fullatt_block_indexes": [1, 2, 3, 0]}
    config = {"architectures": ["X"], "vision_config": vision, **nest(llama(layer_types=TYPES))}
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    expected = {"architectures": ["X"], "vision_config": vision, **nest(llama(3, layer_types=types))}
    assert under(checkpoint(config), 3, 2, 1) == expected


def test_a_count_that_is_missing_is_written_into_the_language_model_s_config() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    edited = under(checkpoint(config, prefix="language_model.model.layers."), *DROP_LAST)
    assert edited == {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 3}}
    assert under(checkpoint({"model_type": "llama"}), *DROP_LAST) == {"model_type": "llama", "num_hidden_layers": 3}


def test_a_count_that_is_mirrored_follows_at_both_levels() -> None:
    config = {"num_hidden_layers": 4, "text_config": llama()}
    assert under(checkpoint(config), *DROP_LAST) == {"num_hidden_layers": 3, "text_config": llama(3)}


def test_a_count_beside_a_nested_config_without_one_follows_and_is_written_into_it() -> None:
    config = {"num_hidden_layers": 4, "text_config": {"model_type": "llama"}}
    expected = {"num_hidden_layers": 3, "text_config": {"model_type": "llama", "num_hidden_layers": 3}}
    assert under(checkpoint(config), *DROP_LAST) == expected


def test_a_nested_config_without_a_type_is_of_the_outer_one_s_text_type() -> None:
    text = {"num_hidden_layers": 4, "sliding_window_pattern": 2}
    edited = under(checkpoint({"model_type": "gemma3", "text_config": text}), *REVERSE)
    types = [FULL, SLIDING, FULL, SLIDING]
    assert edited == {"model_type": "gemma3", "text_config": {"num_hidden_layers": 4, "layer_types": types}}
    plain = {"num_hidden_layers": 4}
    assert under(checkpoint({"model_type": "llava", "text_config": plain}), *REVERSE)["text_config"] == plain


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_in_which_places_matter_is_refused(kind: str) -> None:
    (problem,) = refused(llama(model_type=kind), *DROP_LAST)
    assert problem.startswith(f"model_type {kind!r}: {REFUSED[kind]}; ")
    assert "under the sequence 0-2" in problem


def test_an_unknown_list_as_long_as_the_stack_is_refused_by_name() -> None:
    (problem,) = refused(llama(head_widths=[8, 8, 8, 16], architectures=["A", "B", "C", "D"]), *REVERSE)
    assert "'head_widths' is [8, 8, 8, 16]" in problem
    same = llama(head_widths=[8, 8, 8, 8], three=[1, 2, 3], architectures=["A", "B", "C", "D"])
    assert under(checkpoint(same), *REVERSE) == same


@pytest.mark.parametrize("key", ["layer_pattern", "every_n", "first_k_special", "attn_layer_interval", "shared_from"])
@pytest.mark.parametrize("code", [{}, {"auto_map": {"AutoModel": "modeling.Model"}}], ids=["here", "remote"])
def test_a_suspect_key_that_is_not_known_is_refused_unless_layers_are_said_to_be_alike(
    key: str, code: dict[str, Any]
) -> None:
    config = llama(**{key: 3}, **code)
    (problem,) = refused(config, *PAIRWISE)
    assert problem.startswith(f"config.json: {key!r} is 3, which may be a setting of single layers")
    assert "--assume-uniform" in problem
    assert under(checkpoint(config), *PAIRWISE, assume_uniform=True) == config


def test_harmless_keys_of_code_that_is_not_here_stay() -> None:
    remote = llama(auto_map={}, layer_norm_eps=1e-5, layerdrop=0.1, n_shared_experts=1, layer_types=["a"] * 4)
    assert under(checkpoint(remote), *REVERSE) == remote


def test_everything_that_is_refused_is_named_at_once() -> None:
    config = {
        "model_type": "outer",
        "moe_layers": [1, "x"],
        "text_config": llama(model_type="rwkv", first_k_dense_replace=1, widths=[1, 2, 3, 4], layer_types=["a"]),
    }
    problems = refused(config, *REVERSE)
    for word in ("'moe_layers'", "'first_k_dense_replace'", "'widths'", "'rwkv'", "'layer_types'"):
        assert sum(word in problem for problem in problems) == 1
    assert len(problems) == 5


def test_a_long_value_is_shortened_in_the_message() -> None:
    (problem,) = refused(llama(widths=["x" * 1000, "b", "c", "d"]), *REVERSE)
    assert "xxx..." in problem
    assert len(problem) < 400


def mixed(types: list[str] | None = None) -> Checkpoint:
    """Return a model whose first layer is dense and whose others hold experts."""
    ckpt = checkpoint(llama(**({"layer_types": types} if types else {})))
    experts = {f"model.layers.{layer}.mlp.experts.0.weight": tensor(8, 8) for layer in (1, 2, 3)}
    return ckpt.replace(tensors={**ckpt.tensors, **experts})


@pytest.mark.parametrize("seq", [DROP_LAST, (0, 3, 2, 1), (0, 1, 1, 2, 3)])
def test_layers_that_differ_in_their_tensors_may_move_among_their_like(seq: tuple[int, ...]) -> None:
    assert under(mixed(), *seq) == llama(len(seq))


@pytest.mark.parametrize(
    ("seq", "moved"), [((1, 2, 3), "0"), (REVERSE, "0,3"), ((0, 0, 1), "1"), ((0, 1, 2, 3, 0), "4")]
)
def test_layers_that_differ_in_their_tensors_keep_their_place(seq: tuple[int, ...], moved: str) -> None:
    with pytest.raises(RefusedError, match=f"^tensors: layers {moved} would hold other tensors"):
        under(mixed(), *seq)


def test_layers_that_differ_as_their_types_do_may_move() -> None:
    ckpt = mixed(["dense", "experts", "experts", "experts"])
    assert under(ckpt, *REVERSE)["layer_types"] == ["experts", "experts", "experts", "dense"]
    with pytest.raises(RefusedError, match="^tensors: layers 0,3 would hold"):
        under(mixed(["any"] * 4), *REVERSE)


def test_scales_do_not_make_layers_differ() -> None:
    ckpt = checkpoint(llama(), more=["model.layers.2.mlp.up_proj.weight_scale_inv"])
    assert under(ckpt, *REVERSE) == llama()
    assert len(set(layer_shapes(ckpt, ckpt.layers))) == 1
    assert ("mlp.up_proj.weight", (8, 8)) in layer_shapes(ckpt, LayerStack("model.layers.", 4))[2]


FP8 = {"quant_method": "fp8"}
SKIPS = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.3"]}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization", "expert_dtype"])
@pytest.mark.parametrize(
    "nest",
    [
        lambda part: part,
        lambda part: {"text_config": part},
        lambda part: {"thinker_config": {"text_config": part}},
        lambda part: {"torch_dtype": "x", "text_config": {}, "vision_config": part},
    ],
    ids=["outside", "nested", "nested twice", "in another part"],
)
def test_quantisation_is_removed_at_every_level(key: str, nest: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    edited = without_quantization(nest({"hidden_size": 8, key: FP8, "vocab_size": 16}), "bfloat16")
    assert key not in repr(edited)
    assert "'hidden_size': 8, 'vocab_size': 16" in repr(edited)


def test_plain_weights_state_their_dtype() -> None:
    config = {"a": 1, "torch_dtype": "float8_e4m3fn", "quantization_config": FP8, "z": 2}
    assert list(without_quantization(config, "float16").items()) == [("a", 1), ("torch_dtype", "float16"), ("z", 2)]
    nested = {"dtype": "x", "text_config": {"quantization_config": FP8}}
    assert without_quantization(nested, "float16") == {"dtype": "float16", "text_config": {}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "x"}, {"dtype": "float16"}),
        ({"torch_dtype": "x"}, {"torch_dtype": "float16"}),
        ({"dtype": "x", "torch_dtype": "y"}, {"dtype": "float16", "torch_dtype": "float16"}),
        ({"a": 1}, {"a": 1, "torch_dtype": "float16"}),
        ({"torch_dtype": None}, {"torch_dtype": "float16"}),
        (
            {"torch_dtype": "x", "text_config": {"dtype": "y"}, "vision_config": {"dtype": "z"}},
            {"torch_dtype": "float16", "text_config": {"dtype": "float16"}, "vision_config": {"dtype": "z"}},
        ),
        ({"text_config": {"dtype": "y"}}, {"text_config": {"dtype": "float16"}}),
        ({"text_config": {}}, {"text_config": {}, "torch_dtype": "float16"}),
        (
            {"thinker_config": {"text_config": {"torch_dtype": "y"}}},
            {"thinker_config": {"text_config": {"torch_dtype": "float16"}}},
        ),
    ],
)
def test_a_dtype_is_stated_where_the_config_states_one(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert with_dtype(config, "float16") == expected


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_quantisation_settings_are_found_at_any_level(key: str) -> None:
    def said(config: dict[str, Any]) -> Mapping[str, Any]:
        return find_settings(checkpoint(config)).values

    assert said({key: FP8}) == FP8
    assert said({"text_config": {key: FP8}}) == FP8
    assert said({key: FP8, "text_config": {key: {}}}) == FP8
    assert said({key: FP8, "text_config": {key: {"quant_method": "inner"}}}) == FP8
    assert said({key: {}, "text_config": {key: FP8}}) == FP8


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": "fp8"}, {"text_config": {}}]
)
def test_a_plain_config_has_no_quantisation_settings(config: dict[str, Any]) -> None:
    assert find_settings(checkpoint(config)).values == {}


def test_the_source_s_config_is_never_changed() -> None:
    config = {"text_config": llama(layer_types=TYPES[:], quantization_config=SKIPS), "dtype": "x"}
    before = repr(config)
    under(checkpoint(config), *REVERSE)
    without_quantization(config, "float16")
    assert repr(config) == before
