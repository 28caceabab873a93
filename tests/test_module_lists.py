"""Quantisation settings that name modules: what an engine reads in them follows the layers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import DROP_LAST, MODULES, REPEAT, REVERSE, checkpoint, llama, refused, tensor, under

from tensorsurgeon.arrangement import Arrangement, Origin
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.module_lists import renamed_files
from tensorsurgeon.renaming import make_renaming, names_a_layer

COUNT = 12
RESTS = (*MODULES, "mlp.gate", "mlp.gate_proj", "mlp.experts.1.up_proj", "mlp.experts.10.up_proj")
OTHERS = ("lm_head", "visual.blocks.1.attn.qkv", "visual.blocks.10.attn.qkv", "visual.merger.linear_fc1")
Effect = Callable[[Any, str], Any]


def model(value: Mapping[str, Any], count: int = COUNT, extra: int = 0, key: str = "quantization_config") -> Checkpoint:
    """Return a model with a router, experts, a vision tower and some quantisation settings."""
    stack = [f"model.layers.{layer}.{rest}" for layer in range(count + extra) for rest in RESTS]
    more = [f"{module}.weight" for module in (*stack, *OTHERS)]
    return checkpoint(llama(count, num_nextn_predict_layers=extra, **{key: value}), count + extra, more=more)


def moved(seq: Sequence[int], count: int = COUNT, extra: int = 0) -> dict[str, str]:
    """Return the source module of every module of the output."""
    layers = dict(enumerate([*seq, *range(count, count + extra)]))
    stack = {
        f"model.layers.{at}.{rest}": f"model.layers.{layer}.{rest}" for at, layer in layers.items() for rest in RESTS
    }
    return {**stack, **{module: module for module in OTHERS}}


def substring(found: Any, module: str) -> bool:
    """Skip as vLLM's AWQ does."""
    return any(entry in module for entry in found["modules_to_not_convert"])


def boundary(found: Any, module: str) -> bool:
    """Skip as transformers does: from the start as a regular expression, or at the end."""
    return any(
        re.match(f"{entry}\\.", module) or re.match(entry, module) or module.endswith(entry)
        for entry in found["modules_to_not_convert"]
    )


def exact(found: Any, module: str) -> bool:
    """Skip as vLLM's fp8 does."""
    return module in found["ignored_layers"]


def suffix(found: Any, module: str) -> bool:
    """Skip as vLLM does where names may be short."""
    return any(module == entry or module.endswith(f".{entry}") for entry in found["ignored_layers"])


def wildcard(found: Any, module: str) -> bool:
    """Skip as modelopt does."""
    return any(fnmatchcase(module, entry) for entry in found["exclude_modules"])


def compressed(found: Any, module: str) -> bool:
    """Skip as compressed-tensors does."""
    return any(
        re.match(entry[3:], module) is not None if entry.startswith("re:") else entry == module
        for entry in found["ignore"]
    )


def dynamic(found: Any, module: str) -> Any:
    """Return what GPTQModel takes for a module: the first pattern decides."""
    for pattern, overrides in found["dynamic"].items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
            return False if pattern.startswith("-:") else overrides
    return None


def rounded(found: Any, module: str) -> Any:
    """Return what AutoRound takes for a module: an exact name, else a regular expression anywhere, else an end."""
    if module in found["extra_config"]:
        return found["extra_config"][module]
    for pattern, overrides in found["extra_config"].items():
        if set(pattern) & set("*+?^$()[]{}|\\") and re.search(pattern, module):
            return overrides
    return next((it for name, it in found["extra_config"].items() if module.endswith(f".{name}")), None)


def torchao(found: Any, module: str) -> Any:
    """Return what torchao takes for a module: an exact name, else a regular expression of all of it."""
    named = found["quant_type"]["default"]["_data"]["module_fqn_to_config"]
    if module in named:
        return named[module]
    return next((it for key, it in named.items() if key[:3] == "re:" and re.fullmatch(key[3:], module)), None)


def keyed(found: Any, module: str) -> Any:
    """Return what MLX and modelopt's mixed formats take for a module."""
    return found["quantized_layers"].get(module)


NAMES = [
    "lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
    "model.layers.10.mlp.gate", "model.layers.11.mlp.gate_proj", "visual.blocks.1.attn.qkv",
    "visual.merger.linear_fc1", "model.layers.3.mlp.experts.1.up_proj", "model.layers.3.mlp.experts.10.up_proj",
]  # fmt: skip
REGEXES = [
    r".*lm_head", r".*mlp.gate$", r".*layers\.\d+\.mlp\..*", r"model\.layers\.3\..*", r".*layers\.(1|2)\.mlp.*",
    r".*layers\.[12]\.mlp.*", r"model.layers.1.mlp.up_proj$", r".*\.layers\.(0|1|10|11)\..*q_proj",
    r"model\.layers\.1[01]\.self_attn.*", r".*visual.*", r"model\.layers\.([0-9]|1[0])\.mlp\.up_proj",
]  # fmt: skip
OVERRIDES = {"bits": 8}


def skips(key: str) -> Callable[[list[str]], dict[str, Any]]:
    return lambda entries: {"quant_method": "x", key: entries}


def overrides(key: str) -> Callable[[list[str]], dict[str, Any]]:
    return lambda entries: {"quant_method": "x", key: {entry: {"bits": at} for at, entry in enumerate(entries)}}


def nested(entries: list[str]) -> dict[str, Any]:
    named = {entry: {"bits": at} for at, entry in enumerate(entries)}
    return {"quant_method": "torchao", "quant_type": {"default": {"_data": {"module_fqn_to_config": named}}}}


ENGINES: dict[str, tuple[Effect, Callable[[list[str]], dict[str, Any]], list[str]]] = {
    "AWQ": (substring, skips("modules_to_not_convert"),
            [*NAMES, "mlp.gate", "model.layers.1.", "model.layers.2.mlp", "layers.3.mlp", "up_proj"]),
    "transformers": (boundary, skips("modules_to_not_convert"),
                     [*NAMES, *REGEXES, "gate", "model.layers.2.mlp", "model.layers.11", r"model.layers.1\..*"]),
    "fp8": (exact, skips("ignored_layers"), NAMES),
    "fp8 by end": (suffix, skips("ignored_layers"), [*NAMES, "up_proj", "layers.3.mlp.up_proj", "mlp.gate"]),
    "modelopt": (wildcard, skips("exclude_modules"),
                 [*NAMES, "*lm_head*", "*.mlp.gate", "model.layers.3.*", "model.layers.1.mlp*", "*layers.2.mlp*",
                  "visual*", "model.layers.10.*"]),
    "compressed-tensors": (compressed, skips("ignore"), [*NAMES, *(f"re:{it}" for it in REGEXES)]),
    "GPTQModel": (dynamic, overrides("dynamic"),
                  [f"{sign}{it}" for sign in ("+:", "-:") for it in (*REGEXES, "model.layers.1.mlp.up_proj")]),
    "AutoRound": (rounded, overrides("extra_config"), [*NAMES, *REGEXES, r"layers\.3\.mlp\.up_proj"]),
    "torchao": (torchao, nested, [*NAMES, *(f"re:{it}" for it in REGEXES)]),
    "by key": (keyed, overrides("quantized_layers"), NAMES),
}  # fmt: skip

SEQUENCES = st.one_of(
    st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=16),
    st.permutations(range(COUNT)),
    st.sets(st.integers(0, COUNT - 1), min_size=1).map(sorted),
).map(tuple)


def check(engine: str, entries: list[str], seq: Sequence[int], extra: int = 0) -> None:
    """Compare what an engine does with each module of the output with what it did with the module's source."""
    effect, build, _ = ENGINES[engine]
    before = build(entries)
    after = under(model(before, extra=extra), *seq)["quantization_config"]
    for module, source in moved(seq, extra=extra).items():
        assert effect(after, module) == effect(before, source), (module, source, after)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_an_engine_does_with_a_module_is_what_it_did_with_its_source(engine: str, data: st.DataObject) -> None:
    entries = data.draw(st.lists(st.sampled_from(ENGINES[engine][2]), unique=True, max_size=5), "entries")
    check(engine, entries, data.draw(SEQUENCES, "sequence"), data.draw(st.sampled_from((0, 1)), "extra"))


EACH = [(engine, entry) for engine, (_, _, entries) in ENGINES.items() for entry in entries]


@pytest.mark.parametrize(("engine", "entry"), EACH)
def test_every_entry_follows_by_itself(engine: str, entry: str) -> None:
    check(engine, [entry], (11, 3, 1, 1, 0, 10, 2))


@pytest.mark.parametrize(
    "pattern",
    [r"model\.layers\.(?:3|4)\..*", r".*\.(3|4)\..*", r"model[.]layers[.]3[.].*", r".*\.3\.mlp\..*",
     r"model\.(layers)\.3\.mlp.*", r"model\.layers\.(?!3\.).*up_proj", r"model\.layers\.\d\.mlp.*",
     r"model\.layers\.1?\d\.mlp.*", r"model\.layers\.(?P<n>3)\.mlp.*"],
)  # fmt: skip
@pytest.mark.parametrize("engine", ["compressed-tensors", "GPTQModel"])
def test_a_regular_expression_that_tells_layers_apart_in_another_way_follows_or_is_refused(
    engine: str, pattern: str
) -> None:
    with suppress(RefusedError):
        check(engine, [{"compressed-tensors": "re:", "GPTQModel": "-:"}[engine] + pattern], (11, 3, 1, 1, 0, 10, 2))


@pytest.mark.parametrize(
    ("engine", "entries"),
    [
        ("AutoRound", ["model.layers.1.mlp.up_proj", r".*layers\.[12]\.mlp.*"]),
        ("torchao", ["model.layers.1.mlp.up_proj", r"re:.*layers\.[12]\.mlp.*"]),
        ("torchao", [r"re:.*layers\.[12]\.mlp.*", "model.layers.1.mlp.up_proj"]),
        ("GPTQModel", [r"+:model\.layers\.1\..*", r"+:.*layers\.[12]\..*"]),
        ("GPTQModel", [r"-:model\.layers\.1\..*", r"+:.*layers\.[12]\..*"]),
    ],
)
def test_the_entry_that_decides_where_two_hit_a_module_still_decides(engine: str, entries: list[str]) -> None:
    check(engine, entries, (2, 1, 0))


@pytest.mark.parametrize("entry", ["model.layers.1*", "model.layers.11*", "*layers.1*", "model.layers.1[01].mlp*"])
def test_a_wildcard_of_modelopt_hits_every_number_that_begins_so(entry: str) -> None:
    seq = (11, 3, 1, 1, 0, 10, 2)
    before = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": [entry]}
    after = under(model(before), *seq)["quantization_config"]
    for module, source in moved(seq).items():
        assert wildcard(after, module) == wildcard(before, source), (module, source)


def skip_list(ckpt: Checkpoint, *seq: int, key: str = "modules_to_not_convert") -> Any:
    return under(ckpt, *seq)["quantization_config"][key]


def fp8(*skipped: str, key: str = "modules_to_not_convert", **changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", key: list(skipped), **changes}


@pytest.mark.parametrize(
    "key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules", "exclude"]
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
    (*entries, last) = skip_list(ckpt, 1, 0, *range(2, 10), *range(10, 20))
    assert last == "lm_head"
    # However an engine matches, as a prefix, a substring or a regular expression: a layer and no other.
    modules = [f"model.layers.{layer}.{module}" for layer in range(20) for module in MODULES]
    for it in entries:
        assert [module for module in modules if it in module or re.match(it, module)] == [it]
    assert {f"model.layers.0.{module}" for module in MODULES} <= set(entries)
    assert not any(f"model.layers.1.{module}" in entries for module in MODULES)


@pytest.mark.parametrize("entry", ["model.layers.1", "layers.1"])
def test_a_whole_layer_means_every_number_that_begins_so_where_the_tensors_are_so(entry: str) -> None:
    # AWQ's own tool skips by substring, so that layers 10 to 19 are not quantised either.
    plain = {1, *range(10, 20)}
    ckpt = checkpoint(llama(20, quantization_config={"quant_method": "awq", "modules_to_not_convert": [entry]}), 20)
    tensors = {}
    for name, it in ckpt.tensors.items():
        if "norm" in name or int(name.split(".")[2]) in plain:
            tensors[name] = it
        else:
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": tensor(8, 1) for part in ("qweight", "qzeros", "scales")}
    seq = (0, *range(2, 20))
    entries = skip_list(ckpt.replace(tensors=tensors), *seq)
    hit = {place for place in range(19) for it in entries if it in f"model.layers.{place}.mlp.up_proj"}
    assert hit == {place for place, layer in enumerate(seq) if layer in plain}


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
        ("model.layers.4.*", [f"model.layers.2.{module}" for module in MODULES]),
        (r"re:model\.layers\.4\..*", [f"model.layers.2.{module}" for module in MODULES]),
    ],
)
def test_layers_behind_the_stack_stay_behind_it_in_a_skip_list(entry: str, expected: list[str]) -> None:
    config = llama(num_nextn_predict_layers=1, quantization_config=fp8(entry))
    assert skip_list(checkpoint(config, count=5), 3, 0) == expected


@pytest.mark.parametrize(
    "entry",
    ["visual.blocks.1.attn.qkv", "visual.blocks.1", "visual.blocks.1*", "mtp.layers.0.mlp.gate", "visual.merger.fc"],
)
def test_modules_of_other_stacks_keep_their_names_in_a_skip_list(entry: str) -> None:
    others = ["visual.blocks.0.attn.qkv.weight", "visual.blocks.1.attn.qkv.weight", "mtp.layers.0.mlp.gate.weight"]
    ckpt = checkpoint(llama(quantization_config=fp8(entry, key="exclude_modules")), more=others)
    entries = skip_list(ckpt, 3, 2, key="exclude_modules")
    assert [module for module in ("visual.blocks.0.attn.qkv", "visual.blocks.1.attn.qkv", "mtp.layers.0.mlp.gate")
            for it in entries if fnmatchcase(module, it)] == [
        module for module in ("visual.blocks.0.attn.qkv", "visual.blocks.1.attn.qkv", "mtp.layers.0.mlp.gate")
        if fnmatchcase(module, entry)]  # fmt: skip
    assert "*" in entry or entries == [entry]


def test_a_pattern_that_hits_a_tower_as_well_still_hits_it() -> None:
    others = ["visual.blocks.1.mlp.up_proj.weight", "visual.blocks.2.mlp.up_proj.weight"]
    pattern = r"re:.*(blocks|layers)\.1\.mlp.*"
    ckpt = checkpoint(llama(quantization_config=fp8(pattern, key="ignore")), more=others)
    assert sorted(skip_list(ckpt, 3, 2, 1, key="ignore")) == [
        "model.layers.2.mlp.up_proj", "visual.blocks.1.mlp.up_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "entry", ["lm_head", "embed_tokens", "re:.*lm_head", "re:.*mlp.gate$", r"re:.*layers\.\d+\.mlp", "*gate*", "Linear"]
)
def test_entries_that_name_no_layer_stay(entry: str) -> None:
    assert not names_a_layer(entry)
    assert skip_list(checkpoint(llama(quantization_config=fp8(entry))), *REVERSE) == [entry]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (r"re:model\.layers\.3\..*", ["0.self_attn.q_proj", "0.mlp.up_proj"]),
        (r"re:.*layers\.(0|2)\.mlp", ["3.mlp.up_proj", "1.mlp.up_proj"]),
        (r"re:.*layers\.[02]\.mlp", ["3.mlp.up_proj", "1.mlp.up_proj"]),
        ("model.layers.1.*", ["2.self_attn.q_proj", "2.mlp.up_proj"]),
        ("re:model.layers.1.mlp.up_proj", ["2.mlp.up_proj"]),
    ],
)
def test_a_pattern_that_names_a_layer_is_written_out(entry: str, expected: list[str]) -> None:
    found = skip_list(checkpoint(llama(quantization_config=fp8("lm_head", entry))), *REVERSE)
    assert found == ["lm_head", *(f"model.layers.{name}" for name in expected)]


@pytest.mark.parametrize("prefix", ["model.language_model.layers.", "language_model.model.layers.", "layers."])
def test_names_by_which_an_engine_calls_the_layers_follow_as_they_are(prefix: str) -> None:
    for entry in (f"{prefix}1.mlp.up_proj", f"re:{re.escape(prefix)}1\\.mlp.*"):
        assert skip_list(checkpoint(llama(quantization_config=fp8(entry))), *REVERSE) == [f"{prefix}2.mlp.up_proj"]


@pytest.mark.parametrize("value", ["model.layers.2.mlp.up_proj", {"of": "model.layers.2.mlp.up_proj"}])
def test_a_name_where_no_list_is_is_refused(value: Any) -> None:
    (problem,) = refused(llama(quantization_config={"quant_method": "x", "ignore": value}), *DROP_LAST)
    assert problem.startswith("config.json: ")
    assert "'model.layers.2.mlp.up_proj' names a layer by number in a way that cannot be renumbered" in problem
    assert "dequantize first" in problem


@pytest.mark.parametrize("entry", ["re:.*layers\\.9\\..*", r"re:.*layers\.(1|2)\.mlp"])
def test_a_pattern_stays_where_it_hits_of_the_output_what_it_hit_of_the_source(entry: str) -> None:
    assert skip_list(checkpoint(llama(quantization_config=fp8(entry))), *REVERSE) == [entry]


def test_a_pattern_that_would_hit_what_it_did_not_is_dropped() -> None:
    config = llama(quantization_config=fp8("re:.*layers\\.[45]\\..*", "lm_head"))
    assert skip_list(checkpoint(config), *REPEAT) == ["lm_head"]


def test_a_pattern_that_cannot_be_read_is_refused() -> None:
    (problem,) = refused(llama(quantization_config=fp8("re:layers.3.(")), *REVERSE)
    assert "'re:layers.3.(' names a layer by number in a way that cannot be renumbered" in problem


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        (
            {"config_groups": {"group_0": {"targets": [r"re:.*layers\.3\..*up_proj"], "weights": {"num_bits": 8}}}},
            {"config_groups": {"group_0": {"targets": ["model.layers.0.mlp.up_proj"], "weights": {"num_bits": 8}}}},
        ),
        (
            {"sparsity_config": {"ignore": ["model.layers.0.mlp.up_proj"], "targets": ["Linear"]}},
            {"sparsity_config": {"ignore": ["model.layers.3.mlp.up_proj"], "targets": ["Linear"]}},
        ),
        (
            {"extra_config": {"model.layers.2.mlp.up_proj": {"bits": 16}, "lm_head": {"bits": 16}}},
            {"extra_config": {"model.layers.1.mlp.up_proj": {"bits": 16}, "lm_head": {"bits": 16}}},
        ),
        (
            {"quantized_layers": {"model.layers.1.mlp.up_proj": {"quant_algo": "FP8"}}},
            {"quantized_layers": {"model.layers.2.mlp.up_proj": {"quant_algo": "FP8"}}},
        ),
        ({"modules_in_block_to_quantize": [["mlp.up_proj"]]}, {"modules_in_block_to_quantize": [["mlp.up_proj"]]}),
        ({"block_name_to_quantize": "model.layers"}, {"block_name_to_quantize": "model.layers"}),
        ({"ignore": None}, {"ignore": None}),
        ({"ignore": [["model.layers.0.mlp.up_proj"]]}, {"ignore": [["model.layers.3.mlp.up_proj"]]}),
    ],
)
def test_quantisation_by_layer_follows_wherever_it_lies(settings_: Any, expected: Any) -> None:
    edited = under(checkpoint(llama(quantization_config={"quant_method": "x", **settings_})), *REVERSE)
    assert edited["quantization_config"] == {"quant_method": "x", **expected}


def test_a_dict_that_names_a_layer_twice_over_names_its_copies() -> None:
    config = llama(quantization_config={"extra_config": {"model.layers.3.mlp.up_proj": OVERRIDES, "other": 1}})
    edited = under(checkpoint(config), 3, 0, 3)
    assert edited["quantization_config"]["extra_config"] == {
        "model.layers.0.mlp.up_proj": OVERRIDES, "model.layers.2.mlp.up_proj": OVERRIDES, "other": 1,
    }  # fmt: skip
    assert under(checkpoint(config), 0, 1)["quantization_config"]["extra_config"] == {"other": 1}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_a_skip_list_follows_wherever_it_lies(key: str) -> None:
    config = {"text_config": llama(**{key: fp8("model.layers.3.mlp.up_proj")}), key: fp8("model.layers.0.mlp.up_proj")}
    edited = under(checkpoint(config), 3, 0)
    assert edited[key]["modules_to_not_convert"] == ["model.layers.1.mlp.up_proj"]
    assert edited["text_config"][key]["modules_to_not_convert"] == ["model.layers.0.mlp.up_proj"]


def test_quantisation_that_names_no_layer_stays() -> None:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "actorder": None}}}
    same = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": None, "kv_cache_scheme": {}}
    assert under(checkpoint(llama(quantization_config=same)), *REVERSE)["quantization_config"] == same


def files_under(ckpt: Checkpoint, *seq: int) -> dict[str, Any]:
    arrangement = Arrangement((ckpt,), tuple(Origin(0, layer) for layer in seq))
    found = renamed_files(ckpt, make_renaming(ckpt, ckpt.layers, arrangement.places(0)))
    return {name: json.loads(content) for name, content in found.items()}


def test_modelopt_s_own_file_follows() -> None:
    held = {
        "producer": {"name": "modelopt", "version": "0.39"},
        "quantization": {
            "quant_algo": "FP8",
            "exclude_modules": ["lm_head", "model.layers.3.mlp*", "model.layers.0.*", "model.layers.4.*"],
            "quantized_layers": {"model.layers.1.mlp.up_proj": {"quant_algo": "NVFP4"}},
        },
    }
    ckpt = checkpoint(llama(num_nextn_predict_layers=1), count=5)
    ckpt = ckpt.replace(files={"hf_quant_config.json": json.dumps(held).encode(), "tokenizer.json": b"model.layers.1."})
    found = files_under(ckpt, 3, 0, 1)
    assert list(found) == ["hf_quant_config.json"]
    quantization = found["hf_quant_config.json"]["quantization"]
    assert found["hf_quant_config.json"]["producer"] == held["producer"]
    assert quantization["quantized_layers"] == {"model.layers.2.mlp.up_proj": {"quant_algo": "NVFP4"}}
    modules = [f"model.layers.{layer}.{module}" for layer in range(4) for module in MODULES]
    hit = [module for module in modules for it in quantization["exclude_modules"] if fnmatchcase(module, it)]
    assert sorted(hit) == sorted(
        ["model.layers.0.mlp.up_proj", *(f"model.layers.{layer}.{module}" for layer in (1, 3) for module in MODULES)]
    )


def test_a_wildcard_without_a_dot_in_modelopt_s_own_file_follows() -> None:
    held = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["model.layers.1*"]}}
    ckpt = checkpoint(llama(12), count=12).replace(files={"hf_quant_config.json": json.dumps(held).encode()})
    (entries,) = (it["quantization"]["exclude_modules"] for it in files_under(ckpt, 0, 11, 2, 1).values())
    modules = [f"model.layers.{layer}.mlp.up_proj" for layer in range(4)]
    hit = {module for module in modules for it in entries if fnmatchcase(module, it)}
    assert hit == {"model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj"}


def test_a_settings_file_that_names_no_layer_stays() -> None:
    files = {"hf_quant_config.json": b'{"exclude_modules": ["lm_head"]}', "quantize_config.json": b"{}"}
    assert files_under(checkpoint(llama()).replace(files=files), *REVERSE) == {}


@pytest.mark.parametrize("file", ["recipe.yaml", "quant_log.csv", "quantize_config.json"])
def test_a_settings_file_that_is_no_json_and_names_a_layer_is_refused(file: str) -> None:
    ckpt = checkpoint(llama()).replace(files={file: b"ignore: ['model.layers.3.mlp.up_proj']\n- x\n"})
    with pytest.raises(RefusedError, match=f"{file}: names layers by number"):
        files_under(ckpt, *REVERSE)
