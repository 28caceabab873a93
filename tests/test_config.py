"""What a layer sequence does to config.json: followed, left alone, or refused with the field's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import quantization_config, with_dtype, without_quantization
from tensorsurgeon.document import Document
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.fields import IMPLIED, POSITIONAL, RULES
from tensorsurgeon.format import Span
from tensorsurgeon.names import LayerStack
from tensorsurgeon.sequence import config_under_sequence, layer_shapes
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


def under(ckpt: Checkpoint, *seq: int) -> Any:
    return config_under_sequence(ckpt, ckpt.layers, seq)


def llama(count: int = 4, **changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": count, "vocab_size": 16, **changes}


def refused(config: Mapping[str, Any], *seq: int, **building: Any) -> tuple[str, ...]:
    with pytest.raises(RefusedError) as caught:
        under(checkpoint(config, **building), *seq)
    return caught.value.problems


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


# Each row: the field, a value, sequences that leave its meaning alone, sequences that do not.
# Worked by hand: entry k of the result must be what layer seq[k] had.
FIELDS: dict[str, list[tuple[Any, list[tuple[int, ...]], list[tuple[int, ...]]]]] = {
    "a list with one entry a layer": [
        ([1, 1, 1, 1], [REVERSE, (0, 0, 0, 0)], [DROP_LAST, REPEAT]),
        ([0, 1, 0, 1], [(2, 3, 0, 1), PAIRWISE], [REVERSE, DROP_LAST]),
        ("M*M*", [PAIRWISE], [REVERSE]),
        (5, [], [REVERSE, DROP_LAST]),
        ({"0": 1}, [], [REVERSE]),
    ],
    "a list of layers": [
        ([1], [DROP_LAST, (0, 1, 1 + 1, 3, 2)], [REVERSE, (1, 2, 3)]),
        ([0, 3], [REVERSE, (0, 2, 1, 3)], [(1, 2, 0, 3)]),
        ([3], [DROP_LAST], [(0, 1, 2, 3, 3), (3, 0)]),
        ([0, 1, 2, 3], [REVERSE, DROP_LAST], [REPEAT]),
        ("1,2", [], [REVERSE]),
    ],
    "a number of first layers": [
        (1, [DROP_LAST, (0, 3, 2, 1), (0, 1, 1, 1, 1)], [REVERSE, (1, 2, 3), (0, 0, 1)]),
        (4, [DROP_LAST, REVERSE], [REPEAT]),
        ("1", [], [REVERSE]),
    ],
    "a period": [
        (2, [DROP_LAST, PAIRWISE, (2, 3), REPEAT], [REVERSE, (1, 2, 3), (0, 2)]),
        (1, [REVERSE, (2, 2)], []),
        ([0, 1, 0, 1], [PAIRWISE], [REVERSE]),
        ("2", [], [REVERSE]),
    ],
    "a field that no sequence leaves alone": [(1, [], [REVERSE, DROP_LAST]), ([1], [], [REVERSE])],
}  # fmt: skip
KINDS = {
    "a list with one entry a layer": [
        "no_rope_layers",
        "hybrid_override_pattern",
        "mlp_layer_types",
        "compress_ratios",
    ],
    "a list of layers": ["mlp_only_layers", "moe_layers", "full_attn_idxs"],
    "a number of first layers": ["first_k_dense_replace", "num_dense_layers"],
    "a period": ["sliding_window_pattern", "decoder_sparse_step", "moe_layer_freq"],
    "a field that no sequence leaves alone": ["num_kv_shared_layers", "per_layer_config", "is_encoder_decoder"],
}
CASES = [(key, *case) for kind, keys in KINDS.items() for key in keys for case in FIELDS[kind]]


@pytest.mark.parametrize(("key", "value", "seq"), [(k, v, s) for k, v, kept, _ in CASES for s in kept])
def test_a_field_that_the_sequence_leaves_as_it_is_stays(key: str, value: Any, seq: tuple[int, ...]) -> None:
    assert under(checkpoint(llama(**{key: value})), *seq) == llama(len(seq), **{key: value})


@pytest.mark.parametrize(("key", "value", "seq"), [(k, v, s) for k, v, _, broken in CASES for s in broken])
def test_a_field_that_the_sequence_breaks_is_refused_by_name(key: str, value: Any, seq: tuple[int, ...]) -> None:
    (problem,) = refused(llama(**{key: value}), *seq)
    assert problem.startswith(f"config.json: {key!r} is {value!r}, a per-layer setting")


@pytest.mark.parametrize("key", RULES)
@pytest.mark.parametrize("value", [None, 0, False, [], "", {}])
def test_a_field_that_says_nothing_stays(key: str, value: Any) -> None:
    assert under(checkpoint(llama(**{key: value})), *DROP_LAST) == llama(3, **{key: value})


def test_max_window_layers_means_nothing_without_a_window() -> None:
    idle = {"max_window_layers": 2, "use_sliding_window": False, "sliding_window": None}
    assert under(checkpoint(llama(**idle)), *REVERSE) == llama(**idle)
    assert under(checkpoint(llama(max_window_layers=2)), *REVERSE) == llama(max_window_layers=2)
    (problem,) = refused(llama(max_window_layers=2, use_sliding_window=True), *REVERSE)
    assert "'max_window_layers' is 2" in problem


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


def test_layer_types_of_layers_behind_the_stack_stay_behind_it() -> None:
    config = llama(layer_types=["a", "b", "a", "b", "extra"], num_nextn_predict_layers=1)
    edited = under(checkpoint(config, count=5), 3, 0)
    assert edited["layer_types"] == ["b", "a", "extra"]
    assert (edited["num_hidden_layers"], edited["num_nextn_predict_layers"]) == (2, 1)


@pytest.mark.parametrize("types", [["a"], ["a"] * 3, ["a"] * 5, "aaaa", 4, {"0": "a"}], ids=repr)
def test_layer_types_of_another_length_are_refused(types: Any) -> None:
    (problem,) = refused(llama(layer_types=types), *DROP_LAST)
    assert problem == f"config.json: 'layer_types' is {types!r}, not one entry for each of 4 layers."


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


@pytest.mark.parametrize("kind", IMPLIED)
def test_a_pattern_that_only_the_class_knows_is_refused(kind: str) -> None:
    problems = refused(llama(model_type=kind), *REVERSE)
    assert len(problems) == 1
    assert problems[0].startswith(f"config.json: {IMPLIED[kind]!r} is missing, and {kind} then alternates")


def test_a_nested_config_without_a_type_is_of_the_outer_one_s_text_type() -> None:
    text = {"num_hidden_layers": 4}
    (problem,) = refused({"model_type": "gemma3", "text_config": text}, *REVERSE)
    assert "'layer_types' is missing, and gemma3_text then alternates" in problem
    assert under(checkpoint({"model_type": "llava", "text_config": text}), *REVERSE)["text_config"] == text


def test_a_pattern_that_is_written_out_is_enough() -> None:
    rope = {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 1]}
    assert under(checkpoint(llama(**rope)), *REVERSE) == llama(**rope)
    jamba = {"model_type": "jamba", "attn_layer_period": 2}
    assert under(checkpoint(llama(**jamba)), *PAIRWISE) == llama(**jamba)


@pytest.mark.parametrize("kind", POSITIONAL)
def test_a_model_in_which_places_matter_is_refused(kind: str) -> None:
    (problem,) = refused(llama(model_type=kind), *DROP_LAST)
    assert problem.startswith(f"model_type {kind!r}: {POSITIONAL[kind]}; ")
    assert "under the sequence 0-2" in problem


def test_an_unknown_list_as_long_as_the_stack_is_refused_by_name() -> None:
    (problem,) = refused(llama(head_widths=[8, 8, 8, 16], architectures=["A", "B", "C", "D"]), *REVERSE)
    assert "'head_widths' is [8, 8, 8, 16]" in problem
    same = llama(head_widths=[8, 8, 8, 8], three=[1, 2, 3], architectures=["A", "B", "C", "D"])
    assert under(checkpoint(same), *REVERSE) == same


@pytest.mark.parametrize("key", ["layer_pattern", "every_n", "first_k_special", "attn_layer_offset"])
def test_a_suspect_key_of_code_that_is_not_here_is_refused(key: str) -> None:
    remote = llama(auto_map={"AutoModel": "modeling.Model"}, attn_layer_period=2, **{key: 3})
    (problem,) = refused(remote, *PAIRWISE)
    assert f"{key!r} is 3" in problem
    here = llama(**{key: 3})
    assert under(checkpoint(here), *PAIRWISE) == here


def test_harmless_keys_of_code_that_is_not_here_stay() -> None:
    remote = llama(auto_map={}, layer_norm_eps=1e-5, layerdrop=0.1, n_shared_experts=1, layer_types=["a"] * 4)
    assert under(checkpoint(remote), *REVERSE) == remote


def test_everything_that_is_refused_is_named_at_once() -> None:
    config = {
        "model_type": "outer",
        "moe_layers": [1],
        "text_config": llama(model_type="rwkv", first_k_dense_replace=1, widths=[1, 2, 3, 4], layer_types=["a"]),
    }
    problems = refused(config, *REVERSE)
    for word in ("'moe_layers'", "'first_k_dense_replace'", "'widths'", "'rwkv'", "'layer_types'"):
        assert sum(word in problem for problem in problems) == 1
    assert len(problems) == 5


def test_a_long_value_is_shortened_in_the_message() -> None:
    (problem,) = refused(llama(widths=["x" * 100, "b", "c", "d"]), *REVERSE)
    assert "xxx..." in problem
    assert len(problem) < 200


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


def fp8(*skipped: str, key: str = "modules_to_not_convert", **changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", key: list(skipped), **changes}


def skip_list(ckpt: Checkpoint, *seq: int, key: str = "modules_to_not_convert") -> Any:
    return under(ckpt, *seq)["quantization_config"][key]


@pytest.mark.parametrize(
    "key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules"]
)
def test_names_in_a_skip_list_are_renumbered_copied_and_dropped(key: str) -> None:
    entries = ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj", "model.layers.3.mlp")
    config = llama(quantization_config=fp8(*entries, key=key, weight_block_size=[128, 128]))
    edited = under(checkpoint(config), 2, 0, 1, 2)
    assert edited["quantization_config"] == fp8(
        "lm_head",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.3.self_attn.q_proj",
        key=key,
        weight_block_size=[128, 128],
    )
    assert list(edited["quantization_config"]) == list(config["quantization_config"])


@pytest.mark.parametrize("entry", ["model.layers.1", "model.layers.1."])
def test_a_whole_layer_becomes_names_that_no_other_layer_can_match(entry: str) -> None:
    ckpt = checkpoint(llama(20, quantization_config=fp8(entry, "lm_head")), count=20)
    entries = skip_list(ckpt, *range(19))
    assert entries == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    # However an engine matches, as a prefix, a substring or a regular expression: layer 1 and no other.
    modules = [f"model.layers.{layer}.{module}" for layer in range(19) for module in MODULES]
    hit = {module for module in modules for it in entries if it in module or re.match(it, module)}
    assert hit == {f"model.layers.1.{module}" for module in MODULES}


def test_a_whole_layer_is_copied_with_its_layer() -> None:
    ckpt = checkpoint(llama(quantization_config=fp8("model.layers.3")))
    expected = [f"model.layers.{layer}.{module}" for layer in (0, 2) for module in MODULES]
    assert skip_list(ckpt, 3, 1, 3) == expected
    assert skip_list(ckpt, 0, 1) == []


def test_a_whole_layer_names_modules_of_fused_experts_too() -> None:
    fused = [f"model.layers.{layer}.mlp.experts.{it}" for layer in range(4) for it in ("gate_up_proj", "down_proj")]
    ckpt = checkpoint(llama(quantization_config=fp8("model.layers.3")), more=fused)
    assert skip_list(ckpt, 3) == [*(f"model.layers.0.{module}" for module in MODULES), "model.layers.0.mlp.experts"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("model.layers.4.eh_proj", ["model.layers.2.eh_proj"]),
        ("model.layers.4", [f"model.layers.2.{module}" for module in MODULES]),
    ],
)
def test_layers_behind_the_stack_stay_behind_it_in_a_skip_list(entry: str, expected: list[str]) -> None:
    config = llama(num_nextn_predict_layers=1, quantization_config=fp8(entry))
    assert skip_list(checkpoint(config, count=5), 3, 0) == expected


@pytest.mark.parametrize(
    "entry", ["visual.blocks.1.attn.qkv", "visual.blocks.1", "mtp.layers.0.mlp.gate", "visual.merger.linear_fc1"]
)
def test_modules_of_other_stacks_keep_their_names_in_a_skip_list(entry: str) -> None:
    others = ["visual.blocks.0.attn.qkv.weight", "visual.blocks.1.attn.qkv.weight", "mtp.layers.0.mlp.gate.weight"]
    ckpt = checkpoint(llama(quantization_config=fp8(entry)), more=others)
    assert skip_list(ckpt, 3, 2) == [entry]


@pytest.mark.parametrize(
    "entry", ["lm_head", "embed_tokens", "re:.*lm_head", "re:.*mlp.gate$", r"re:.*layers\.\d+\.mlp", "*gate*"]
)
def test_entries_that_name_no_layer_stay(entry: str) -> None:
    assert skip_list(checkpoint(llama(quantization_config=fp8(entry))), *REVERSE) == [entry]


@pytest.mark.parametrize(
    "entry",
    [
        r"re:model\.layers\.3\..*",
        r"re:.*layers\.(1|2)\.mlp",
        r"re:.*layers\.[12]\.mlp",
        "model.layers.3*",
        "model.layers.1.*",
        "re:model.layers.1.mlp.up_proj",
        "model.language_model.layers.1.mlp.up_proj",
        "layers.1.mlp",
    ],
)
def test_a_pattern_that_names_a_layer_is_refused(entry: str) -> None:
    (problem,) = refused(llama(quantization_config=fp8("lm_head", entry)), *DROP_LAST)
    assert repr(entry) in problem
    assert "dequantize first" in problem


@pytest.mark.parametrize(
    "settings",
    [
        {"config_groups": {"group_0": {"targets": [r"re:.*layers\.3\..*"]}}},
        {"dynamic": {r"-:model\.layers\.0\..*": {}}},
        {"extra_config": {"model.layers.2.mlp.up_proj": {"bits": 16}}},
        {"ignore": "model.layers.2.mlp.up_proj"},
        {"ignore": [["model.layers.2.mlp.up_proj"]]},
    ],
)
def test_quantisation_by_layer_elsewhere_is_refused(settings: dict[str, Any]) -> None:
    (problem,) = refused(llama(quantization_config={"quant_method": "x", **settings}), *DROP_LAST)
    assert problem.startswith("config.json: 'quantization_config': ")
    assert "dequantize first" in problem


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_a_skip_list_follows_wherever_it_lies(key: str) -> None:
    config = {"text_config": llama(**{key: fp8("model.layers.3.mlp.up_proj")}), key: fp8("model.layers.0.mlp.up_proj")}
    edited = under(checkpoint(config), 3, 0)
    assert edited[key]["modules_to_not_convert"] == ["model.layers.1.mlp.up_proj"]
    assert edited["text_config"][key]["modules_to_not_convert"] == ["model.layers.0.mlp.up_proj"]


def test_quantisation_without_a_skip_list_stays() -> None:
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"]}},
        "ignore": None,
    }
    assert under(checkpoint(llama(quantization_config=settings)), *REVERSE)["quantization_config"] == settings


FP8 = {"quant_method": "fp8"}


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
    assert quantization_config({key: FP8}) == FP8
    assert quantization_config({"text_config": {key: FP8}}) == FP8
    assert quantization_config({key: {"quant_method": "outer"}, "text_config": {key: FP8}}) == FP8
    assert quantization_config({key: FP8, "text_config": {key: {}}}) == FP8


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": "fp8"}, {"text_config": {}}]
)
def test_a_plain_config_has_no_quantisation_settings(config: dict[str, Any]) -> None:
    assert quantization_config(config) == {}


def test_the_source_s_config_is_never_changed() -> None:
    config = {"text_config": llama(layer_types=TYPES[:], quantization_config=fp8("model.layers.3")), "dtype": "x"}
    before = repr(config)
    under(checkpoint(config), *REVERSE)
    without_quantization(config, "float16")
    assert repr(config) == before
