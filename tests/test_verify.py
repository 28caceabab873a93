"""What `verify` finds: every defect by name, and nothing in what is sound."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from safetensors.torch import save_file

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.exams import verify
from tensorsurgeon.registry import Findings

INDEX = "model.safetensors.index.json"
RECEIPT = "tensorsurgeon.json"
UP = "model.layers.1.mlp.up_proj"

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Damage = Callable[[Tensors, Config], object]

SMALL: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}
EXPERTS: Config = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
COMPRESSED: Config = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
LINEAR: Config = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, Config]] = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "mixture": ("Qwen3Moe", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    "mixture with a dense layer": ("Qwen3Moe", {**EXPERTS, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]}),
    "mixture with dense first layers": (
        "DeepseekV3",
        {**EXPERTS, **COMPRESSED, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "mixed layer_types": ("Lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "linear attention": (
        "Qwen3Next",
        {**EXPERTS, **LINEAR, "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16},
    ),
    "mixed layers that no list names": (
        "Jamba",
        {"num_hidden_layers": 8, "num_experts": 4, "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 4},
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what tensorsurgeon wrote: shards, an index, a config, side files in two folders, and a receipt."""
    source = make.fp8(tmp_path_factory.mktemp("verify") / "fp8", layers=2)
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (source / "assets").mkdir()
    (source / "assets" / "template.jinja").write_text("{{ messages }}")
    ts.write(ts.ops.dequantize(ts.open(source)), source.parent / "written", max_shard_size="700kB")
    return source.parent / "written"


def results(findings: Findings) -> dict[str, str]:
    return {row["check"]: row["result"] for row in findings.tables["checks"]}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def examine(capsys: pytest.CaptureFixture[str], directory: Path, *options: str) -> Findings:
    """Return what the command line finds, having checked that its exit status and its streams agree with it."""
    capsys.readouterr()
    exit_status = main(["verify", str(directory), "--json", *options])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.err == ""
    assert exit_status == (3 if found["problems"] else 0)
    return Findings({"checks": found["checks"]}, tuple(found["problems"]))


@cache
def weights(quantized: bool) -> Tensors:
    """Return tensors that several tests copy and damage."""
    return make.quantized(make.tensors(4)) if quantized else make.tensors(4)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda at: make.plain(at, layers=2),
        lambda at: make.plain(at, layers=2, shards=3),
        lambda at: make.fp8(at, layers=2),
        lambda at: make.fp8(at, layers=2, shards=1, block=(64, 32), scale_dtype=torch.bfloat16),
        lambda at: make.fp8(at, layers=2, skipped=("model.layers.0.mlp.up_proj",)),
        lambda at: make.plain(at, layers=1),
    ],
)
def test_sound_checkpoints_pass(tmp_path: Path, build: Callable[[Path], Path], deep: bool) -> None:
    findings = verify(build(tmp_path / "sound"), deep)
    assert findings.problems == ()
    assert results(findings) == {
        **dict.fromkeys(("headers and index", "stray weights", "layers", "quantisation"), "ok"),
        "receipt": "skipped: there is no receipt",
        "model class": "ok",
        **({"values": "ok"} if deep else {}),
    }


@pytest.mark.parametrize("kind", PUBLISHED)
def test_what_transformers_itself_saves_passes(tmp_path: Path, kind: str) -> None:
    name, changes = PUBLISHED[kind]
    settings = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    getattr(transformers, f"{name}ForCausalLM")(settings).save_pretrained(tmp_path)
    findings = verify(tmp_path)
    assert findings.problems == ()
    assert results(findings)["layers"] == results(findings)["model class"] == "ok"


def test_what_tensorsurgeon_writes_passes(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine(capsys, written, "--deep")
    assert findings.problems == ()
    assert set(results(findings).values()) == {"ok"}


def test_layers_written_in_another_order_pass(tmp_path: Path) -> None:
    ckpt = ts.ops.select_layers(ts.open(make.fp8(tmp_path / "fp8", layers=3)), "2,0,0,1")
    ts.write(ckpt, tmp_path / "written", max_shard_size="500kB")
    assert verify(tmp_path / "written").problems == ()


def test_pickles_beside_a_sound_checkpoint_are_no_defect(tmp_path: Path) -> None:
    directory = make.plain(tmp_path / "plain", layers=2)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    assert verify(directory).problems == ()


@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_changed_byte_is_found_in_every_file(written: Path, tmp_path: Path, place: float) -> None:
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert {file.as_posix() for file in files} == {
        "assets/template.jinja", "config.json", "generation_config.json", "tokenizer.json", INDEX, RECEIPT,
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
    }  # fmt: skip
    copy = shutil.copytree(written, tmp_path / "copy")
    for file in files:
        size = (copy / file).stat().st_size
        flip(copy / file, int(place * size) if place > 0 else int(place))
        problems = verify(copy).problems
        assert any(file.name in problem for problem in problems), file
        shutil.copy(written / file, copy / file)
    assert verify(copy).problems == ()


def test_any_changed_byte_of_a_receipt_is_found(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.weight": torch.ones(2) for layer in range(2)}
    source = make.save(tmp_path / "source", tensors, {"num_hidden_layers": 2})
    ts.write(ts.ops.reverse_layers(ts.open(source)), tmp_path / "written")
    receipt = tmp_path / "written" / RECEIPT
    intact = receipt.read_bytes()
    assert verify(tmp_path / "written").problems == ()
    for place in range(0, len(intact), 3):
        flip(receipt, place)
        problems = verify(tmp_path / "written").problems
        assert any(problem.startswith(RECEIPT) for problem in problems), place
        receipt.write_bytes(intact)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: text.replace("  ", "\t", 1),
        lambda text: text.replace('"seal"', '"\\u0073eal"'),
        lambda text: json.dumps(json.loads(text)),
    ],
)
def test_a_receipt_that_only_reads_the_same_was_changed(
    written: Path, tmp_path: Path, change: Callable[[str], str]
) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    (copy / RECEIPT).write_text(change((copy / RECEIPT).read_text()))
    assert verify(copy).problems == (f"{RECEIPT}: was changed after it was written.",)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {"config.json": 5}, "seal": ""}'])
def test_a_damaged_receipt_is_a_defect(written: Path, tmp_path: Path, content: str) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    (copy / RECEIPT).write_text(content)
    assert verify(copy).problems == (f"{RECEIPT}: is damaged.",)


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (lambda at: (at / "tokenizer.json").unlink(), "tokenizer.json: is missing; the receipt lists it."),
        (
            lambda at: (at / "assets/template.jinja").unlink(),
            "assets/template.jinja: is missing; the receipt lists it.",
        ),
        (lambda at: (at / "extra.json").touch(), "extra.json: is not in the receipt; it was added later."),
        (lambda at: (at / "assets/extra").touch(), "assets/extra: is not in the receipt; it was added later."),
        (lambda at: (at / "notes").touch(), "notes: is not in the receipt; it was added later."),
        (
            lambda at: (at / "tokenizer.json").write_text("{}"),
            "tokenizer.json: was changed after it was written; its SHA-256 is not the receipt's.",
        ),
    ],
)
def test_missing_added_and_changed_files_are_found(
    written: Path, tmp_path: Path, act: Callable[[Path], object], problem: str
) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    act(copy)
    assert verify(copy).problems == (problem,)


def test_the_receipt_may_go_and_the_rest_is_still_checked(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    (copy / RECEIPT).unlink()
    assert results(verify(copy))["receipt"] == "skipped: there is no receipt"


@pytest.mark.parametrize("shards", [1, 2])
def test_stray_weights_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: int) -> None:
    directory = make.plain(tmp_path / "plain", layers=2, shards=shards)
    file = next(directory.glob("*.safetensors"))
    shutil.copy(file, directory / "model-00007-of-00009.safetensors")
    assert examine(capsys, directory).problems == (
        "model-00007-of-00009.safetensors: is not part of the model; some engines load it all the same. Remove it.",
    )


def test_a_single_file_beside_an_index_is_found(tmp_path: Path) -> None:
    directory = make.plain(tmp_path / "plain", layers=2, shards=2)
    save_file(make.tensors(2), directory / "model.safetensors")
    assert verify(directory).problems == (
        f"model.safetensors: lies beside {INDEX}; which of the two is the model depends on the reader.",
    )


def test_an_index_that_names_a_single_file_is_sound(tmp_path: Path) -> None:
    directory = make.plain(tmp_path / "plain", layers=2)
    names = dict.fromkeys(make.tensors(2), "model.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert verify(directory).problems == ()


def test_a_tensor_that_the_index_does_not_list_is_found(tmp_path: Path) -> None:
    directory = make.plain(tmp_path / "plain", layers=2, shards=2)
    index = json.loads((directory / INDEX).read_text())
    home = index["weight_map"].pop("lm_head.weight")
    (directory / INDEX).write_text(json.dumps(index))
    assert f"{INDEX}: does not list 'lm_head.weight', which {home} holds" in verify(directory).problems[0]


def truncate(directory: Path) -> None:
    path = directory / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def relist(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("act", "parts"),
    [
        (truncate, ["model-00001-of-00002.safetensors: tensor ", "the download is incomplete"]),
        (
            lambda at: (at / "model-00002-of-00002.safetensors").unlink(),
            [f"{INDEX}: names the shard model-00002-of-00002.safetensors", "fetch it"],
        ),
        (
            lambda at: shutil.copy(at / "model-00001-of-00002.safetensors", at / "model-00002-of-00002.safetensors"),
            ["is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"],
        ),
        (
            lambda at: relist(at, lambda listed: listed.update(ghost="model-00001-of-00002.safetensors")),
            [f"{INDEX}: puts 'ghost' in model-00001-of-00002.safetensors, which does not hold it."],
        ),
        (
            lambda at: relist(at, lambda listed: listed.update(ghost="../other.safetensors")),
            [f"{INDEX}: '../other.safetensors' is not a plain file name"],
        ),
        (lambda at: (at / INDEX).unlink(), ["but neither model.safetensors nor"]),
        (lambda at: (at / "config.json").unlink(), ["there is no config.json"]),
        (lambda at: (at / "config.json").write_text("{"), ["config.json: ", "it is damaged"]),
    ],
)
def test_what_cannot_be_opened_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], act: Callable[[Path], object], parts: list[str]
) -> None:
    directory = make.plain(tmp_path / "plain", layers=2, shards=2)
    act(directory)
    findings = examine(capsys, directory)
    assert all(part in findings.problems[0] for part in parts)
    assert list(results(findings)) == ["headers and index"]


def without(*names: str) -> Damage:
    return lambda tensors, config: [tensors.pop(name) for name in names]


def without_layer(layer: int) -> Damage:
    return lambda tensors, config: [tensors.pop(name) for name in list(tensors) if f"layers.{layer}." in name]


def with_tensor(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Damage:
    return lambda tensors, config: tensors.update({name: torch.zeros(shape, dtype=dtype)})


def with_config(**changes: Any) -> Damage:
    return lambda tensors, config: config.update(changes)


def test_layers_that_share_keys_and_values_need_none_of_their_own(tmp_path: Path) -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    model = architectures.make(
        architectures.ARCHITECTURES["gemma3n_text"], tmp_path / "model", num_hidden_layers=9, layer_types=types,
        num_kv_shared_layers=3, activation_sparsity_pattern=[0.0] * 9,
    )  # fmt: skip
    assert sum("k_proj" in name for name in ts.open(model)) == 6
    assert not verify(str(model)).problems
    ckpt = ts.open(model)
    lost = "model.layers.1.self_attn.k_proj.weight"
    ts.write(ckpt.replace(tensors={name: it for name, it in ckpt.tensors.items() if name != lost}), tmp_path / "lost")
    assert any("layer 1: lacks self_attn.k_proj.weight" in it for it in verify(str(tmp_path / "lost")).problems)


@pytest.mark.parametrize(
    ("damage", "check", "problem"),
    [
        (without_layer(1), "layers", "layers 1 have no tensors under model.layers.N; the checkpoint is incomplete."),
        (without_layer(3), "layers", "config.json says 4 layers, but there are tensors of 3 under model.layers.N"),
        (with_config(num_hidden_layers=5), "layers", "config.json says 5 layers, but there are tensors of 4"),
        (without(UP + ".weight"), "layers", "layer 1: lacks mlp.up_proj.weight, which 3 other layers have."),
        (without(UP + ".weight"), "model class", f"Qwen3ForCausalLM misses {UP}.weight."),
        (with_tensor(UP + ".bias", 320), "layers", "layer 1: has mlp.up_proj.bias, which 3 other layers do not have."),
        (with_tensor(UP + ".bias", 320), "model class", f"Qwen3ForCausalLM does not know {UP}.bias."),
        (
            with_tensor(UP + ".weight", 192, 320),
            "layers",
            "layer 1: mlp.up_proj.weight is [192, 320], and [320, 192] in 3 other layers.",
        ),
        (
            with_tensor(UP + ".weight", 192, 320),
            "model class",
            f"Qwen3ForCausalLM has another shape for {UP}.weight [192, 320], not [320, 192].",
        ),
        (
            with_config(layer_types=["full_attention"] * 3),
            "layers",
            "config.json: layer_types has 3 entries for 4 layers.",
        ),
        (with_config(layer_types=5), "layers", "config.json: layer_types is 5, not a list."),
        (with_config(n_layer=7), "layers", "config.json: n_layer is 7, but there are tensors of 4 layers."),
        (without("lm_head.weight"), "model class", "Qwen3ForCausalLM misses lm_head.weight."),
        (without("model.norm.weight"), "model class", "Qwen3ForCausalLM misses model.norm.weight."),
        (with_tensor("model.surplus.weight", 3), "model class", "Qwen3ForCausalLM does not know model.surplus.weight."),
        (
            with_config(vocab_size=305),
            "model class",
            "Qwen3ForCausalLM has another shape for lm_head.weight [304, 192], not [305, 192], "
            "model.embed_tokens.weight [304, 192], not [305, 192].",
        ),
        (
            with_config(quantization_config=make.fp8_settings()),
            "quantisation",
            "config.json: has a quantization_config, but no tensor is quantised.",
        ),
    ],
)
def test_a_defect_of_a_plain_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage, check: str, problem: str
) -> None:
    tensors, config = dict(weights(False)), make.config(4)
    damage(tensors, config)
    findings = examine(capsys, make.save(tmp_path / "damaged", tensors, config, shards=2))
    assert any(found.startswith(problem) for found in findings.problems)
    assert results(findings)[check].endswith(("problem", "problems"))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            without(UP + ".weight_scale_inv"),
            f"{UP}.weight: is F8_E4M3 without a weight_scale_inv; its codes are not numbers, fetch its scale.",
        ),
        (without(UP + ".weight"), f"{UP}.weight_scale_inv: has no weight to scale: {UP}.weight is missing."),
        (
            with_tensor(UP + ".weight", 320, 192),
            f"{UP}.weight_scale_inv: has no weight to scale: {UP}.weight is BF16, not F8_E4M3.",
        ),
        (
            with_tensor(UP + ".weight_scale_inv", 2, 3, dtype=torch.float32),
            f"{UP}.weight_scale_inv: has shape [2, 3], but [320, 192] in blocks of [128, 128] needs [3, 2];",
        ),
        (
            with_tensor(UP + ".weight_scale_inv", 3, 2, dtype=torch.float64),
            f"{UP}.weight_scale_inv in model-00001-of-00002.safetensors: is F64, not F32 or BF16",
        ),
        (
            lambda tensors, config: config.pop("quantization_config"),
            "config.json: has no quantization_config, but 56 tensors are quantised: 'model.layers.0.",
        ),
        (
            with_config(quantization_config={"quant_method": "fp8"}),
            "model.layers.0.self_attn.q_proj.weight_scale_inv: has shape [2, 2], but [256, 192] with one scale",
        ),
        (
            with_config(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}),
            "model.layers.0.self_attn.q_proj.weight_scale_inv: has shape [2, 2], but [256, 192] in blocks of [64, 64]",
        ),
        (
            lambda tensors, config: [
                tensors.pop(UP + ".weight_scale_inv"),
                config.update(quantization_config={"quant_method": "compressed-tensors"}),
            ],
            "config.json: quantization_config has no config_groups; the schemes are not known.",
        ),
    ],
)
def test_a_defect_of_a_quantised_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage, problem: str
) -> None:
    tensors, config = dict(weights(True)), make.config(4, quantization_config=make.fp8_settings())
    damage(tensors, config)
    findings = examine(capsys, make.save(tmp_path / "damaged", tensors, config, shards=2))
    assert any(found.startswith(problem) for found in findings.problems)
    assert results(findings)["quantisation"].endswith(("problem", "problems"))


def test_one_scale_for_a_whole_weight_is_sound(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for name, tensor in make.quantized(make.tensors(2)).items():
        if name.endswith("_scale_inv"):
            tensors[name.removesuffix("_inv")] = torch.ones((), dtype=torch.float32)
        else:
            tensors[name] = tensor
    settings = {"activation_scheme": "dynamic", "quant_method": "fp8"}
    directory = make.save(tmp_path / "whole", tensors, make.config(2, quantization_config=settings))
    assert verify(directory).problems == ()


@pytest.mark.parametrize(
    ("name", "dtype", "codes", "counts"),
    [
        ("model.norm.weight", torch.bfloat16, [0x7FC0], "1 NaN and 0 infinite of 192"),
        ("model.norm.weight", torch.bfloat16, [0x7F80, -0x80], "0 NaN and 2 infinite of 192"),
        ("model.norm.weight", torch.bfloat16, [0x7FC0, 0x7F80], "1 NaN and 1 infinite of 192"),
        (UP + ".weight", torch.float8_e4m3fn, [0x7F], "1 NaN and 0 infinite of 61440"),
        (UP + ".weight", torch.float8_e4m3fn, [-1, 0x7F], "2 NaN and 0 infinite of 61440"),
        (UP + ".weight_scale_inv", torch.float32, [0x7F800000], "0 NaN and 1 infinite of 6"),
        (UP + ".weight_scale_inv", torch.float32, [0x7FC00000], "1 NaN and 0 infinite of 6"),
    ],
)
def test_what_is_not_a_number_is_found_where_it_is_looked_for(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    dtype: torch.dtype,
    codes: list[int],
    counts: str,
) -> None:
    tensors = {
        key: value for key, value in weights(True).items() if ".layers.2." not in key and ".layers.3." not in key
    }
    integers = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8, torch.float32: torch.int32}
    assert tensors[name].dtype == dtype
    tensors[name] = tensors[name].clone()
    tensors[name].view(integers[dtype]).view(-1)[-len(codes) :] = torch.tensor(codes, dtype=integers[dtype])
    settings = make.config(2, quantization_config=make.fp8_settings())
    directory = make.save(tmp_path / "damaged", tensors, settings, shards=2)
    assert examine(capsys, directory).problems == ()
    assert examine(capsys, directory, "--deep").problems == (f"{name}: holds {counts} elements.",)


def test_every_problem_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = dict(weights(True))
    without(UP + ".weight_scale_inv", "lm_head.weight", "model.layers.3.self_attn.k_norm.weight")(tensors, {})
    directory = make.save(
        tmp_path / "damaged", tensors, make.config(4, quantization_config=make.fp8_settings(), n_layer=2)
    )
    (directory / "stray.safetensors").touch()
    assert main(["verify", str(directory)]) == 3
    out = capsys.readouterr().out
    assert out.count("problem: ") == 5
    for part in ("stray.safetensors", "n_layer is 2", "layer 3: lacks self_attn.k_norm", UP, "lm_head.weight"):
        assert part in out


def test_an_unknown_architecture_is_skipped_and_said(tmp_path: Path) -> None:
    directory = make.plain(tmp_path / "plain", layers=2, architectures=["OfMyOwnForCausalLM"])
    findings = verify(directory)
    assert findings.problems == ()
    assert results(findings)["model class"] == "skipped: transformers does not have it"


@pytest.mark.parametrize("architecture", ["pipeline", "utils", "AutoModelForCausalLM", "Qwen3Config", "__name__"])
def test_an_architecture_that_is_no_model_class_does_not_pass(tmp_path: Path, architecture: str) -> None:
    directory = make.plain(tmp_path / "plain", layers=2, architectures=[architecture])
    (problem,) = verify(directory).problems
    assert problem.startswith(f"{architecture}: does not load in transformers: ")


def test_without_transformers_the_model_class_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make.plain(tmp_path / "plain", layers=2)
    monkeypatch.setattr(sys.modules["tensorsurgeon.exams.integrity"], "find_spec", lambda name: None)
    findings = verify(directory)
    assert findings.problems == ()
    assert results(findings)["model class"] == "skipped: transformers and accelerate not installed"


def test_loading_the_model_class_says_nothing_and_leaves_the_settings_of_transformers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging = transformers.utils.logging
    tensors = make.tensors(2)
    without("lm_head.weight")(tensors, {})
    directory = make.save(tmp_path / "damaged", tensors, make.config(2))
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    assert verify(directory).problems == ("Qwen3ForCausalLM misses lm_head.weight.",)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
