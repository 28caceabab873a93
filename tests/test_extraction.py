"""Adapters extracted from two models: PEFT applies them, and what is told of them is true."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, SERVED, TOKENS, load, logits_of
from peft import PeftModel

import make
import tensorsurgeon as ts
from serving import Job, Request, adapter_answers
from tensorsurgeon.errors import RefusedError, UsageError
from tensorsurgeon.running import Running, run_under

Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def planted(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add a delta of rank 3 to every matrix of a layer."""
    if tensor.dim() != 2 or ".layers." not in name:
        return tensor
    rows, columns = tensor.shape
    delta = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    return tensor + 0.02 * delta


def noisy(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add noise to everything."""
    return tensor + 0.02 * torch.randn(tensor.shape, generator=generator)


def tuned(base: Path, place: Path, change: Change) -> Path:
    """Write a copy of a model in which every tensor is changed."""
    generator = torch.Generator().manual_seed(5)
    tensors = {name: change(name, it, generator).contiguous() for name, it in sorted(make.read(base).items())}
    return make.save(place, tensors, json.loads((base / "config.json").read_text()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make(ARCHITECTURES["llama"], tmp_path_factory.mktemp("base") / "base", **SIZES)


@pytest.fixture(scope="module")
def low(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(base, tmp_path_factory.mktemp("low") / "low", planted)


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(base, tmp_path_factory.mktemp("full") / "full", noisy)


def extract(model: Path, base: Path, dest: Path, **options: Any) -> dict[str, Any]:
    """Write an adapter and return its receipt."""
    return ts.write(ts.ops.extract_lora(ts.open(model), base=str(base), **options), dest)


def applied(base: Path, adapter: Path) -> torch.Tensor:
    """Return the logits of PEFT with the adapter."""
    return logits_of(PeftModel.from_pretrained(load(base), adapter).eval())


def deltas(base: Path, model: Path) -> dict[str, torch.Tensor]:
    before, after = make.read(base), make.read(model)
    return {name: after[name].double() - it.double() for name, it in before.items()}


def product(adapter: Path, module: str) -> torch.Tensor:
    tensors = make.read(adapter)
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return b @ a


def test_a_planted_delta_makes_peft_compute_what_the_tuned_model_does(base: Path, low: Path, tmp_path: Path) -> None:
    receipt = extract(low, base, tmp_path / "adapter", rank=3)
    assert (applied(base, tmp_path / "adapter") - logits_of(load(low))).abs().max() < 2e-4
    assert (logits_of(load(base)) - logits_of(load(low))).abs().max() > 0.1
    rows = receipt["report"]["captured"]
    assert len(rows) == 6 * 7
    assert all(row["rank"] == 3 and row["error"] < 1e-5 for row in rows)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 3, str(base))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_report_is_true_and_the_error_the_least_possible(
    base: Path, full: Path, tmp_path: Path, rank: int, dtype: str
) -> None:
    narrow = {"*.k_proj": min(rank, 16), "*.v_proj": min(rank, 16)}
    receipt = extract(full, base, tmp_path / "adapter", rank=rank, ranks=narrow, dtype=dtype)
    whole = deltas(base, full)
    squares = 0.0
    for row in receipt["report"]["captured"]:
        delta = whole[f"{row['module']}.weight"]
        error = (delta - product(tmp_path / "adapter", row["module"])).norm()
        values, size = torch.linalg.svdvals(delta), row["rank"]
        assert row["error"] == pytest.approx(float(error / delta.norm()), rel=1e-4, abs=2e-7)
        assert row["least error"] == pytest.approx(float(values[size:].norm() / delta.norm()), rel=1e-4, abs=2e-7)
        assert row["energy"] == pytest.approx(float((values[:size] ** 2).sum() / (values**2).sum()), rel=1e-4)
        assert (
            error
            <= values[size:].norm() * (1.001 if dtype == "float32" else 1.01)
            + 5e-3 * delta.norm() * (dtype != "float32")
            + 1e-6
        )
        squares += float((values[:size] ** 2).sum())
    everything = sum(float(it.square().sum()) for it in whole.values())
    (total,) = receipt["report"]["total"]
    assert total["share of the whole delta"] == pytest.approx(squares / everything, rel=1e-4)


def test_what_is_left_out_is_counted(base: Path, full: Path, tmp_path: Path) -> None:
    left = {row["tensors"]: row for row in extract(full, base, tmp_path / "adapter", rank=2)["report"]["left out"]}
    whole = deltas(base, full)
    everything = sum(float(it.square().sum()) for it in whole.values())
    assert {name: row["number"] for name, row in left.items()} == {"embedding": 1, "head": 1, "norm": 13}
    norms = sum(float(it.square().sum()) for name, it in whole.items() if "norm" in name)
    assert left["norm"]["share of the delta"] == pytest.approx(norms / everything, rel=1e-4)
    assert left["norm"]["changed"] == 13
    assert left["head"]["share of the delta"] > 0


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_head_and_norms_come_along_when_asked_for(tied: bool, tmp_path: Path) -> None:
    base = architectures.make(ARCHITECTURES["llama"], tmp_path / "base", **SIZES, tie_word_embeddings=tied)
    model = tuned(base, tmp_path / "tuned", noisy)
    receipt = extract(model, base, tmp_path / "adapter", rank=48, ranks={"attention": 16, "*.down_proj": 64, "mlp": 64},
                      include="embedding,head,norm")  # fmt: skip
    extract(model, base, tmp_path / "whole", error=1e-5, include=["embedding", "head", "norm"])
    wanted = logits_of(load(model))
    assert (applied(base, tmp_path / "whole") - wanted).abs().max() < 2e-3
    assert (applied(base, tmp_path / "adapter") - wanted).abs().max() > 0.05
    assert {row["tensors"] for row in receipt["report"]["left out"]} == set()


def test_ranks_by_role_and_pattern_and_padded(base: Path, full: Path, tmp_path: Path) -> None:
    extract(full, base, tmp_path / "adapter", rank=5, ranks={"*.layers.1.mlp.*": 7, "attention.q": 2}, pad_rank=True)
    shapes = {name: tuple(it.shape) for name, it in make.read(tmp_path / "adapter").items()}
    prefix = "base_model.model.model.layers."
    assert shapes[f"{prefix}0.mlp.up_proj.lora_A.weight"] == (8, 64)
    assert shapes[f"{prefix}0.self_attn.q_proj.lora_B.weight"] == (32, 8)
    extract(full, base, tmp_path / "plain", rank=5, ranks={"*.layers.1.mlp.*": 7, "attention.q": 2})
    shapes = {name: tuple(it.shape) for name, it in make.read(tmp_path / "plain").items()}
    assert shapes[f"{prefix}1.mlp.up_proj.lora_A.weight"] == (7, 64)
    assert shapes[f"{prefix}1.self_attn.q_proj.lora_B.weight"] == (32, 2)
    assert shapes[f"{prefix}2.mlp.up_proj.lora_A.weight"] == (5, 64)
    assert (applied(base, tmp_path / "adapter") - applied(base, tmp_path / "plain")).abs().max() < 1e-4


@pytest.mark.parametrize(("option", "value"), [("energy", 0.5), ("energy", 1.0), ("error", 0.4)])
def test_a_share_is_reached_with_the_least_rank(
    base: Path, full: Path, tmp_path: Path, option: str, value: float
) -> None:
    rows = extract(full, base, tmp_path / "adapter", **{option: value})["report"]["captured"]
    for row in rows:
        values = torch.linalg.svdvals(deltas(base, full)[f"{row['module']}.weight"]) ** 2
        share = values.cumsum(0) / values.sum()
        wanted = value if option == "energy" else 1 - value**2
        assert row["rank"] == int((share < wanted - 1e-9).sum()) + 1
        assert row["error"] <= value + 1e-6 if option == "error" else row["energy"] >= value - 1e-6


def test_a_zero_delta_has_no_pair_and_is_no_target(base: Path, tmp_path: Path) -> None:
    def most(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return tensor if "layers.2.mlp.up_proj" in name else planted(name, tensor, generator)

    model = tuned(base, tmp_path / "tuned", most)
    receipt = extract(model, base, tmp_path / "adapter", rank=3)
    assert any("model.layers.2.mlp.up_proj" in text for text in receipt["warnings"])
    assert (applied(base, tmp_path / "adapter") - logits_of(load(model))).abs().max() < 2e-4
    wrapped = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    adapted = {name for name, module in wrapped.named_modules() if hasattr(module, "lora_A") and module.lora_A}
    assert len(adapted) == 6 * 7 - 1
    assert not any("layers.2.mlp.up_proj" in name for name in adapted)


def test_a_quantised_base_is_decoded_as_it_is_read(tmp_path: Path) -> None:
    fp8 = make.fp8(tmp_path / "fp8", layers=2)
    model = tuned(make.plain(tmp_path / "plain", layers=2), tmp_path / "tuned", noisy)
    extract(model, fp8, tmp_path / "direct", rank=4)
    ts.write(ts.ops.dequantize(ts.open(fp8), dtype="float32"), tmp_path / "bridge")
    extract(model, tmp_path / "bridge", tmp_path / "bridged", rank=4)
    assert make.same(make.read(tmp_path / "direct"), make.read(tmp_path / "bridged"))


def test_conv1d_weights_lie_the_other_way_round(tmp_path: Path) -> None:
    base = architectures.make(ARCHITECTURES["gpt2"], tmp_path / "base")

    def change(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return planted(name.replace(".h.", ".layers."), tensor, generator)

    model = tuned(base, tmp_path / "tuned", change)
    extract(model, base, tmp_path / "adapter", rank=3)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert (applied(base, tmp_path / "adapter") - logits_of(load(model))).abs().max() < 2e-4


@pytest.mark.parametrize("architecture", ["phi3", "qwen3", "gemma2", "bert"])
def test_fused_and_other_modules_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    base = architectures.make(ARCHITECTURES[architecture], tmp_path / "base")

    def change(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return planted(name.replace(".layer.", ".layers."), tensor, generator)

    model = tuned(base, tmp_path / "tuned", change)
    extract(model, base, tmp_path / "adapter", rank=3)
    assert (applied(base, tmp_path / "adapter") - logits_of(load(model))).abs().max() < 2e-4


@pytest.mark.parametrize("settings", [Running(memory=2**20), Running(threads=1), Running(threads=4, memory=2**34)])
def test_neither_memory_nor_threads_change_a_byte(base: Path, full: Path, tmp_path: Path, settings: Running) -> None:
    extract(full, base, tmp_path / "usual", rank=4)
    with run_under(settings):
        extract(full, base, tmp_path / "other", rank=4)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tensorsurgeon.json"):
        assert (tmp_path / "usual" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("settings", [Running(memory=2**22), Running(threads=1), Running(threads=4, memory=2**34)])
def test_neither_changes_a_byte_where_a_krylov_space_is_grown(tmp_path: Path, settings: Running) -> None:
    generator = torch.Generator().manual_seed(1)
    config = {"model_type": "llama", "num_hidden_layers": 3, "architectures": ["LlamaForCausalLM"]}
    for name in ("base", "tuned"):
        weights = {
            f"model.layers.{n}.mlp.up_proj.weight": torch.randn(1100, 900, generator=generator) for n in range(3)
        }
        make.save(tmp_path / name, weights, config)
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "usual", rank=8)
    with run_under(settings):
        extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "other", rank=8)
    assert make.contents(tmp_path / "usual") == make.contents(tmp_path / "other")


def test_a_plan_reads_no_weights(base: Path, full: Path, tmp_path: Path) -> None:
    with run_under(Running(planned=True)):
        planned = ts.ops.extract_lora(ts.open(full), base=str(base), rank=4, include=["embedding"])
    made = ts.ops.extract_lora(ts.open(full), base=str(base), rank=4, include=["embedding"])
    assert {name: (it.dtype, it.shape) for name, it in planned.tensors.items()} == {
        name: (it.dtype, it.shape) for name, it in made.tensors.items()
    }
    assert planned.config.value == made.config.value
    with pytest.raises(AssertionError, match="only planned"):
        ts.write(planned, tmp_path / "dest")


def refusal(model: Path, base: Path, **options: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        ts.ops.extract_lora(ts.open(model), base=str(base), **options)
    return str(caught.value)


def test_models_that_are_the_same_are_refused(base: Path) -> None:
    assert "the models are the same in every matrix" in refusal(base, base, rank=4)


@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_either_model_is_refused_by_name(base: Path, low: Path, tmp_path: Path, side: str, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def broken(key: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return tensor.index_fill(0, torch.tensor([3]), value) if key == name else tensor

    wrong = tuned(low if side == "tuned" else base, tmp_path / "wrong", broken)
    pair = (wrong, base) if side == "tuned" else (low, wrong)
    assert refusal(*pair, rank=4) == f"{name}: holds NaN or infinity in the {side} model."


def test_models_of_other_kinds_depths_and_widths_are_refused(base: Path, low: Path, tmp_path: Path) -> None:
    other = architectures.make(ARCHITECTURES["qwen2"], tmp_path / "qwen2")
    assert "'model_type' is 'llama' in the tuned model, 'qwen2' in the base" in refusal(low, other, rank=2)
    ts.write(ts.ops.drop_layers(ts.open(base), "3"), tmp_path / "shorter")
    assert "the tuned model has 6 layers, the base 5" in refusal(low, tmp_path / "shorter", rank=2)
    wider = architectures.make(ARCHITECTURES["llama"], tmp_path / "wider")
    assert "model.layers.0.mlp.up_proj.weight: has shape [96, 64]" in refusal(low, wider, rank=2)
    extract(low, base, tmp_path / "adapter", rank=3)
    assert "an adapter is no model" in refusal(low, tmp_path / "adapter", rank=2)


def test_a_rank_above_a_side_is_refused_for_each_kind_of_matrix(base: Path, low: Path) -> None:
    text = refusal(low, base, rank=33)
    assert text.count("rank 33 is above") == 4
    assert "layers.0.self_attn.k_proj.weight: rank 33 is above 16, the shorter side of [16, 64], here and in 5" in text
    assert "--ranks '*.k_proj=16'" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "just one of rank, energy and error"),
        ({"rank": 2, "energy": 0.5}, "just one of rank, energy and error"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"energy": 1.5}, "less than or equal to 1"),
        ({"error": 0}, "greater than 0"),
        ({"rank": 2, "include": "head,bias"}, "include: 'bias' is none of embedding, head, norm"),
        ({"rank": 2, "ranks": {"*.up_proj": 0}}, "is not PATTERN=RANK"),
    ],
)
def test_what_is_not_understood_is_said(base: Path, low: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text.replace("*", r"\*")):
        ts.ops.extract_lora(ts.open(low), base=str(base), **options)


def test_a_pattern_that_fits_nothing_is_refused(base: Path, low: Path) -> None:
    assert "ranks: '*.nothing' is no module, group or role here" in refusal(low, base, rank=2, ranks={"*.nothing": 4})


def test_stacked_experts_are_refused_by_name_or_left_out(tmp_path: Path) -> None:
    base = architectures.make(ARCHITECTURES["gpt_oss"], tmp_path / "base")
    model = tuned(base, tmp_path / "tuned", noisy)
    text = refusal(model, base, rank=2)
    assert "model.layers.0.mlp.experts.gate_up_proj: has shape [4, 32, 96], and so have 11 others of experts" in text
    assert "--exclude '*.experts.*'" in text
    receipt = extract(model, base, tmp_path / "adapter", rank=2, exclude="*.experts.*")
    assert {row["tensors"] for row in receipt["report"]["left out"]} >= {"expert", "router", "bias"}
    assert applied(base, tmp_path / "adapter").shape[:2] == TOKENS.shape


def test_experts_of_their_own_get_pairs_only_when_asked_for(tmp_path: Path) -> None:
    base = architectures.make(ARCHITECTURES["qwen3_moe"], tmp_path / "base")
    model = tuned(base, tmp_path / "tuned", planted)
    text = refusal(model, base, rank=3)
    assert "experts.0.down_proj.weight: has shape [32, 16], and so have 47 others of experts" in text
    assert "--experts each makes them for vLLM" in text
    extract(model, base, tmp_path / "adapter", rank=3, experts="each")
    merged = ts.ops.merge_lora(ts.open(base), adapter=str(tmp_path / "adapter"))
    ts.write(merged, tmp_path / "merged")
    wanted = {name: it for name, it in make.read(model).items() if ".gate.weight" not in name}
    found = make.read(tmp_path / "merged")
    assert all(torch.allclose(found[name], it, atol=1e-5) for name, it in wanted.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said(base: Path, low: Path) -> None:
    with pytest.raises(UsageError, match="torch finds no GPU here"):
        ts.ops.extract_lora(ts.open(low), base=str(base), rank=2, device="cuda")


@pytest.mark.parametrize("rows", [104, 90])
def test_another_vocabulary_is_refused_or_cut(base: Path, full: Path, tmp_path: Path, rows: int) -> None:
    def resized(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            return tensor
        return torch.cat([tensor, tensor[:8]])[:rows]

    other = tuned(full, tmp_path / "other", resized)
    receipt = extract(other, base, tmp_path / "linear", rank=2)
    left = {row["tensors"]: row for row in receipt["report"]["left out"]}
    assert left["embedding"]["not compared"] == 1
    text = refusal(other, base, rank=2, include="embedding,head")
    assert f"lm_head.weight: has {rows} rows in the tuned model and 96 in the base" in text
    extract(other, base, tmp_path / "cut", rank=64, ranks={"attention": 2, "mlp": 2}, include="embedding,head",
            vocabulary="cut")  # fmt: skip
    tensors = make.read(tmp_path / "cut")
    assert tuple(tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape) == (64, 96)
    delta = deltas(base, full)["lm_head.weight"]
    delta[rows:] = 0
    assert (product(tmp_path / "cut", "lm_head") - delta).norm() < 1e-5 * delta.norm()
    assert applied(base, tmp_path / "cut").shape[-1] == 96


MEASURE = """
import resource, sys
import tensorsurgeon as ts, tensorsurgeon.kernels.deltas, torch
from tensorsurgeon.running import Running, run_under
torch.linalg.eigh(torch.eye(600, dtype=torch.float64)); torch.randn(600, 600) @ torch.randn(600, 600)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with run_under(Running(memory=2**26, threads=2)):
    adapter = ts.ops.extract_lora(ts.open(sys.argv[1]), base=sys.argv[2], rank=8)
ts.write(adapter, sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_stays_bounded_whatever_the_largest_matrix(tmp_path: Path) -> None:
    """Two matrices of 512 MiB in float32, in 64 MiB: what does not fit is read again for each product."""
    settings = {"model_type": "llama", "num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"]}
    for name, scale in (("base", 1.0), ("tuned", 1.01)):
        rows = torch.linspace(-1, 1, 32768).bfloat16()[:, None] * scale
        large = rows * torch.linspace(-1, 1, 4096).bfloat16()
        make.save(
            tmp_path / name, {f"model.layers.{layer}.mlp.up_proj.weight": large + layer for layer in (0, 1)}, settings
        )
    arguments = [str(tmp_path / name) for name in ("tuned", "base", "dest")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 256
    assert len(make.read(tmp_path / "dest")) == 4


@pytest.mark.serving
def test_vllm_serves_pairs_of_fused_modules(tmp_path: Path) -> None:
    base = architectures.make(ARCHITECTURES["phi3"], tmp_path / "base", **SERVED)
    model = tuned(base, tmp_path / "tuned", planted)
    extract(model, base, tmp_path / "adapter", rank=3)
    requests = [Request(row) for row in TOKENS.tolist()]
    (answers,) = adapter_answers(Job(base, requests, adapters=[tmp_path / "adapter"], max_lora_rank=8))
    assert not isinstance(answers, str), answers
    wanted = logits_of(load(model))[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None])[..., 0]
    assert (torch.tensor([answer.prompt_logprobs for answer in answers]) - wanted).abs().max() < 1e-3
