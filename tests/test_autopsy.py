"""Autopsy: what is healthy comes out healthy, and each planted disease is found by its name."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MANNEQUIN

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import DestinationError, RefusedError, UsageError
from tensorsurgeon.exams.verdict import DUPLICATED, RULES
from tensorsurgeon.kernels.lattice import find_lattice
from tensorsurgeon.registry import Findings
from tensorsurgeon.running import Running, run_under

LAYERS = 8
UP = "model.layers.3.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Weights = dict[str, torch.Tensor]


def healthy() -> Weights:
    """Weights of a Qwen3 whose layers differ in size as those of trained models do, with an embedding like theirs."""
    made = make.tensors(LAYERS, torch.float32)
    made[EMBEDDING] *= 0.05
    for name, tensor in made.items():
        if name.endswith("_proj.weight"):
            tensor *= 0.6 + 0.05 * int(name.split(".")[2])
    return made


def matrix(rows: int = 640, columns: int = 512) -> torch.Tensor:
    """A weight whose rows and columns differ in size."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
    sizes = sizes * torch.exp(0.3 * torch.randn(1, columns, generator=generator))
    return 0.03 * sizes * torch.randn(rows, columns, generator=generator)


def decoded(spread: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
    """A weight in block FP8 that was decoded, its scales laid over its codes by `spread`."""
    codes, scale = make.quantize(matrix())
    return codes.float() * spread(scale, codes.shape)


def by_blocks(size: int) -> Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]:
    def spread(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        whole = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)
        return whole.repeat(128 // size or 1, 128 // size or 1)[: shape[0], : shape[1]]

    return spread


def saved(directory: Path, made: Weights, dtype: torch.dtype = torch.bfloat16) -> Path:
    return make.save(directory, {name: it.to(dtype) for name, it in made.items()}, make.config(LAYERS))


def examined(directory: Path, **parameters: Any) -> Findings:
    return ts.exams.autopsy(ts.open(directory), **parameters)


def rules_of(problems: tuple[str, ...]) -> set[tuple[str, str]]:
    """Which rule is broken, and by what."""
    return {(text.split(": ")[1], text.split(": ")[0]) for text in problems}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_healthy_weights_are_healthy(tmp_path: Path, dtype: torch.dtype) -> None:
    findings = examined(saved(tmp_path / "model", healthy(), dtype))
    assert findings.problems == ()
    assert findings.tables["model"][0]["verdict"] == "healthy"


@pytest.mark.parametrize("model", ["bf16", "fp8", "tuned"])
def test_the_mannequin_is_healthy(model: str) -> None:
    findings = examined(MANNEQUIN / model)
    assert findings.problems == ()
    assert "unusual" not in findings.tables


def test_real_trained_weights_are_healthy(minilm: Path) -> None:
    findings = examined(minilm, spectrum=True)
    assert findings.problems == ()
    assert len(findings.tables["statistics"]) == 103
    exponents = [row["alpha"] for row in findings.tables["statistics"] if row["role"].startswith("mlp")]
    assert all(1.5 < alpha < 8 for alpha in exponents if alpha)


def test_block_fp8_that_was_decoded_rightly_is_healthy(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        findings = examined(saved(tmp_path / str(dtype), healthy() | {UP: decoded(by_blocks(128))}, dtype))
        assert findings.problems == ()


def per_tensor(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def powers_of_two(weight: torch.Tensor) -> torch.Tensor:
    scale = 2 ** make.quantize(weight)[1].log2().ceil()
    whole = by_blocks(128)(scale, weight.shape)
    return (weight / whole).to(torch.float8_e4m3fn).float() * whole


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.reshape(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 7
    return ((groups / scale).round() * scale).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(640, 512), (128, 512), (512, 64)])
@pytest.mark.parametrize("quantized", [per_tensor, powers_of_two, four_bits])
def test_other_ways_to_quantise_are_healthy(
    tmp_path: Path, quantized: Callable[..., torch.Tensor], shape: tuple[int, int]
) -> None:
    assert examined(saved(tmp_path / "model", healthy() | {UP: quantized(matrix(*shape))})).problems == ()


def planted(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Weights], object]:
    return lambda made: change(made[name])


def replaced(weight: torch.Tensor) -> Callable[[Weights], object]:
    return lambda made: made.update({UP: weight})


def rolled(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return by_blocks(128)(scale.roll((1, 1), (0, 1)), shape)


def copied(made: Weights) -> None:
    for name in list(made):
        if ".layers.2." in name:
            made[name.replace(".2.", ".6.")] = made[name].clone()


DISEASES: dict[str, tuple[str, str, Callable[[Weights], object]]] = {
    "a NaN": ("nan", UP, planted(UP, lambda it: it[7].__setitem__(3, math.nan))),
    "an infinity": ("infinity", UP, planted(UP, lambda it: it[7].__setitem__(3, math.inf))),
    "a NaN in a norm": ("nan", "model.norm.weight", planted("model.norm.weight", lambda it: it[:1].fill_(math.nan))),
    "all zero": ("all-zero", UP, planted(UP, lambda it: it.zero_())),
    "a norm that is zero": ("all-zero", "model.norm.weight", planted("model.norm.weight", lambda it: it.zero_())),
    "raw FP8 codes": ("raw-fp8-codes", UP, replaced(decoded(lambda scale, shape: torch.ones(())))),
    "one scale for all blocks": ("fp8-per-tensor-scale", UP, replaced(decoded(lambda scale, shape: scale.mean()))),
    "divided by one scale": ("fp8-per-tensor-scale", UP, replaced(decoded(lambda scale, shape: 1 / scale.mean()))),
    "a mean beyond 448": (
        "fp8-per-tensor-scale", UP, replaced(decoded(lambda scale, shape: 1 / scale.mean()).abs())
    ),
    "blocks of 64 for 128": ("fp8-wrong-block", UP, replaced(decoded(by_blocks(64)))),
    "blocks of 256 for 128": ("fp8-wrong-block", UP, replaced(decoded(by_blocks(256)))),
    "scales of other blocks": ("fp8-wrong-scale", UP, replaced(decoded(rolled))),
    "scales that bias": ("fp8-wrong-scale", UP, replaced(decoded(by_blocks(128)).abs())),
    "exploded": ("exploded", UP, planted(UP, lambda it: it.mul_(2000))),
    "a mean that exploded": ("exploded", UP, planted(UP, lambda it: it.add_(3))),
    "a flipped bit of an exponent": ("giant", UP, planted(UP, lambda it: it[0].__setitem__(0, 0.02 * 2**16))),
    "a layer of another size": ("departing-std", UP, planted(UP, lambda it: it.mul_(3))),
    "rows that were not written": ("dead-channels", UP, planted(UP, lambda it: it[-32:].zero_())),
    "columns that were not written": ("dead-channels", UP, planted(UP, lambda it: it[:, :32].zero_())),
    "a layer twice": ("duplicated-layers", "layers 2,6", copied),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize("disease", DISEASES)
def test_a_planted_disease_is_found_by_its_name(tmp_path: Path, disease: str, dtype: torch.dtype) -> None:
    rule, where, plant = DISEASES[disease]
    made = healthy()
    plant(made)
    findings = examined(saved(tmp_path / "model", made, dtype))
    assert rules_of(findings.problems) == {(rule, where)}
    reasons = {row["rule"]: row["reason"] for row in findings.tables["rules"]}
    assert reasons[rule]


@pytest.mark.parametrize(
    ("rule", "where", "plant"),
    [
        ("untrained-rows", EMBEDDING, planted(EMBEDDING, lambda it: it[300:].zero_())),
        ("untrained-rows", EMBEDDING, planted(EMBEDDING, lambda it: it[300:].mul_(1e-4))),
        ("untrained-rows", EMBEDDING, planted(EMBEDDING, lambda it: it[300:].copy_(it.mean(0)))),
        ("biased", UP, planted(UP, lambda it: it.add_(0.02))),
        ("unusual-size", "lm_head.weight", planted("lm_head.weight", lambda it: None)),
    ],
)
def test_what_is_only_unusual_is_listed(
    tmp_path: Path, rule: str, where: str, plant: Callable[[Weights], object]
) -> None:
    made = healthy()
    plant(made)
    findings = examined(saved(tmp_path / "model", made))
    assert findings.problems == ()
    assert (rule, where) in {(row["rule"], row["name"]) for row in findings.tables["unusual"]}


def test_a_shard_of_zeros_is_found(tmp_path: Path) -> None:
    """Half an output that looks whole: every tensor of one layer is zero."""
    made = healthy()
    lost = [name for name in made if ".layers.5." in name]
    for name in lost:
        made[name].zero_()
    assert rules_of(examined(saved(tmp_path / "model", made)).problems) == {("all-zero", name) for name in lost}


def clipped(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().flatten().kthvalue(int(0.999 * weight.numel())).values / 448
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("quantized", [powers_of_two, per_tensor, clipped, as_it_is])
def test_real_weights_that_were_decoded_from_fp8_rightly_are_healthy(
    minilm: Path, tmp_path: Path, quantized: Callable[..., torch.Tensor]
) -> None:
    made = make.read(minilm)
    for name, tensor in made.items():
        if tensor.dim() == 2 and ".layer." in name:
            made[name] = quantized(tensor)
    directory = make.save(tmp_path / "model", made, json.loads((minilm / "config.json").read_text()))
    assert examined(directory, roles="attention,mlp").problems == ()


def altered(rows: torch.Tensor, name: str = UP) -> Weights:
    return healthy() | {name: rows}


def many_experts(sizes: Callable[[int, int], float]) -> Weights:
    made = healthy()
    for layer in range(LAYERS):
        for expert in range(6):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            made[name] = 0.03 * sizes(layer, expert) * torch.randn(40, 48)
    return made


ODD_BUT_HEALTHY: dict[str, Callable[[], Weights]] = {
    "a state space's A_log": lambda: healthy() | {
        f"model.layers.{layer}.mixer.A_log": torch.arange(1, 17.0).log().repeat(32, 1) for layer in range(LAYERS)
    },
    "norms with a row for each head": lambda: healthy() | {
        f"model.layers.{layer}.self_attn.q_norm.weight": 1.3 + 0.1 * torch.randn(8, 32) for layer in range(LAYERS)
    },
    "an embedding of large numbers": lambda: altered(12 * torch.randn(304, 192), EMBEDDING),
    "one dead row of stacked experts": lambda: altered(
        matrix(512, 64).index_fill(0, torch.tensor(7), 0).reshape(8, 64, 64), "model.layers.3.mlp.experts.gate_up_proj"
    ),
    "experts that differ": lambda: many_experts(lambda layer, expert: 4.0 if expert == layer % 6 else 1.0),
    "a small matrix of powers of two": lambda: altered(powers_of_two(matrix(384, 384))),
    "per tensor, clipped": lambda: altered(
        (matrix().clamp(-0.08, 0.08) / (0.08 / 448)).to(torch.float8_e4m3fn).float() * (0.08 / 448)
    ),
    "a quantiser that reaches 240": lambda: altered(shy(240)),
    "a quantiser with a margin": lambda: altered(shy(416)),
}  # fmt: skip


def shy(top: int) -> torch.Tensor:
    """Block FP8 whose largest code is another than 448, decoded rightly."""
    weight = matrix()
    scale = by_blocks(128)(make.quantize(weight)[1] * 448 / top, weight.shape)
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("weights", ODD_BUT_HEALTHY)
def test_what_is_odd_is_not_ill(tmp_path: Path, weights: str) -> None:
    assert examined(saved(tmp_path / "model", ODD_BUT_HEALTHY[weights]())).problems == ()


def test_vectors_can_be_ill_too(tmp_path: Path) -> None:
    made = healthy()
    made["model.norm.weight"][5] = 3e38
    made["model.layers.2.self_attn.q_proj.bias"] = torch.full((256,), 1e36)
    assert rules_of(examined(saved(tmp_path / "model", made)).problems) == {
        ("giant", "model.norm.weight"),
        ("giant", "model.layers.2.self_attn.q_proj.bias"),
    }


def test_a_layer_whose_experts_are_of_another_size_is_found(tmp_path: Path) -> None:
    findings = examined(saved(tmp_path / "model", many_experts(lambda layer, expert: 4.0 if layer == 3 else 1.0)))
    ((rule, name),) = rules_of(findings.problems)
    assert rule == "departing-std"
    assert ".layers.3.mlp.experts." in name


def test_an_expert_that_was_lost_is_found(tmp_path: Path) -> None:
    stacked = matrix(512, 64).reshape(8, 64, 64)
    stacked[5] = 0
    name = "model.layers.3.mlp.experts.gate_up_proj"
    assert rules_of(examined(saved(tmp_path / "model", altered(stacked, name))).problems) == {("dead-channels", name)}


def test_layers_are_not_called_the_same_where_only_a_part_was_read(tmp_path: Path) -> None:
    made = healthy()
    for layer in range(LAYERS):
        made[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.zeros(256)
    directory = saved(tmp_path / "model", made)
    assert examined(directory).problems == examined(directory, names="*bias").problems == ()


@pytest.mark.parametrize("size", [1e80, 1e120, 1e300])
def test_numbers_that_only_float64_holds_are_looked_at(tmp_path: Path, size: float) -> None:
    made = {name: it.double() for name, it in healthy().items()}
    made[UP] *= size
    directory = make.save(tmp_path / "model", made, make.config(LAYERS))
    assert {where for _, where in rules_of(examined(directory).problems)} == {UP}


def test_scales_of_a_cache_make_no_quantised_model(tmp_path: Path) -> None:
    made = healthy() | {"model.layers.0.self_attn.k_scale": torch.ones(())}
    assert examined(saved(tmp_path / "model", made)).problems == ()


def test_singular_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", healthy())
    with run_under(Running(memory=2**19)), pytest.raises(RefusedError, match=r"lm_head.weight: .* give --memory that"):
        examined(directory, spectrum=True)


def test_every_rule_has_a_disease() -> None:
    found = {rule for rule, _, _ in DISEASES.values()}
    assert found == {rule.name for rule in (*RULES, DUPLICATED) if rule.wrong}


def test_scales_do_not_jump_at_heads(tmp_path: Path) -> None:
    """Rows of attention differ from head to head, and a head may be as high as a block."""
    weight = matrix()
    for head in range(5):
        weight[128 * head : 128 * (head + 1)] *= 0.3 + 0.4 * head
    codes, scale = make.quantize(weight)
    rightly = codes.float() * by_blocks(128)(scale, codes.shape)
    assert examined(saved(tmp_path / "model", healthy() | {UP: rightly})).problems == ()


def test_probes_need_room_and_finite_numbers() -> None:
    weight = decoded(by_blocks(128)).double().numpy()
    assert find_lattice(weight[:31]) is None
    assert find_lattice(weight + math.inf) is None
    found = find_lattice(weight)
    assert found is not None
    assert (found.block, found.top, found.tiles) == (128, 20, 20)


def test_statistics_of_fp8_are_those_of_what_dequantize_writes(tmp_path: Path, fp8: Path) -> None:
    ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "plain", quiet=True)
    ours, plain = examined(fp8), examined(tmp_path / "plain")
    rows = [{key: it for key, it in row.items() if key != "dtype"} for row in ours.tables["statistics"]]
    expected = [{key: it for key, it in row.items() if key != "dtype"} for row in plain.tables["statistics"]]
    by_name = sorted(rows, key=lambda row: row["name"])
    assert by_name == sorted(expected, key=lambda row: row["name"])
    assert {row["dtype"] for row in ours.tables["statistics"]} == {"F8_E4M3", "BF16"}


def test_fp8_without_its_scales_is_refused(tmp_path: Path) -> None:
    made = {name: it for name, it in make.quantized(make.tensors(2)).items() if not name.endswith("_inv")}
    with pytest.raises(RefusedError):
        examined(make.save(tmp_path / "model", made, make.config(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_findings_do_not_depend_on_threads_and_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = saved(tmp_path / "model", healthy() | {UP: matrix(1500, 1300)}, dtype)
    found = []
    for settings in (Running(threads=1), Running(threads=3), Running(memory=2**26, threads=2)):
        with run_under(settings):
            found.append(examined(directory, spectrum=True))
    assert found[0] == found[1] == found[2]


def test_a_stacked_tensor_is_read_by_its_matrices(tmp_path: Path) -> None:
    stacked = torch.stack([matrix(64, 48), matrix(64, 48) * 2])
    made = {"model.layers.0.mlp.experts.gate_up_proj": stacked.bfloat16()}
    (row,) = examined(make.save(tmp_path / "model", made, make.config(1))).tables["statistics"]
    assert row["shape"] == [2, 64, 48]
    assert row["std"] == pytest.approx(stacked.bfloat16().double().std(correction=0).item(), rel=1e-12)
    flat = stacked.bfloat16().abs().reshape(-1, 48)
    assert row["largest row"] == int(flat.amax(1).argmax())


def test_integers_and_empty_tensors_are_left_out(tmp_path: Path) -> None:
    made = {"model.embed_tokens.weight": matrix(40, 40), "a.position_ids": torch.arange(4), "b": torch.zeros(0, 4)}
    findings = examined(make.save(tmp_path / "model", made, make.config(1)))
    assert [row["name"] for row in findings.tables["statistics"]] == ["model.embed_tokens.weight"]
    assert findings.tables["model"][0]["not looked at"].startswith("2 tensors")


def test_scalars_and_vectors_have_statistics(tmp_path: Path) -> None:
    made = {"a.scalar": torch.tensor(2.0), "a.vector": torch.tensor([0.0, 1.0, -3.0])}
    scalar, vector = examined(make.save(tmp_path / "model", made, make.config(1))).tables["statistics"]
    assert (scalar["mean"], scalar["std"], scalar["skewness"]) == (2.0, 0.0, None)
    assert (vector["dead rows"], vector["largest row"], vector["dead columns"]) == (1, 2, None)


def test_tensors_are_selected_by_name_role_and_layer(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", healthy())

    def names(**chosen: Any) -> list[str]:
        return [row["name"] for row in examined(directory, **chosen).tables["statistics"]]

    assert names(names="*.norm.weight") == ["model.norm.weight"]
    assert names(roles="mlp.up", layers="2-3") == ["model.layers.2.mlp.up_proj.weight", UP]
    assert len(names(roles="attention,norm", layers="0")) == 8
    with pytest.raises(UsageError, match=r"there is no 'mpl' here. Did you mean 'mlp'"):
        names(roles="mpl")
    with pytest.raises(UsageError, match="there is no layer 8"):
        names(layers="8")
    with pytest.raises(UsageError, match="nothing is selected"):
        names(names="lm_head*", layers="0")


def test_a_sample_is_said_to_be_one(tmp_path: Path) -> None:
    big = torch.randn(8192, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    directory = saved(tmp_path / "model", healthy() | {UP: big})
    findings = examined(directory, sample=0.25, names=UP)
    (row,) = findings.tables["statistics"]
    assert "a quick look, no proof" in findings.tables["model"][0]["sample"]
    histogram = findings.details[0]["histogram"]
    assert sum(histogram["positive"]) + sum(histogram["negative"]) + histogram["zero"] == 8192 * 512 // 4
    assert row["std"] == pytest.approx(0.02, rel=0.01)
    assert row["equal rows"] is None
    for wrong in (0, 1.5):
        with pytest.raises(UsageError, match="sample"):
            examined(directory, sample=wrong)


def test_two_models_stand_side_by_side(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one", healthy()), healthy()
    other[UP].zero_()
    findings = examined(one, beside=str(saved(tmp_path / "other", other)))
    assert findings.problems == (f"other: {UP}: all-zero: everything that was read is zero.",)
    assert {row["model"] for row in findings.tables["statistics"]} == {"one", "other"}
    assert len(findings.details) == len(findings.tables["statistics"])
    same = examined(one, beside=str(one))
    assert {row["model"] for row in same.tables["statistics"]} == {"one (1)", "one (2)"}


def test_limits_are_overridden(tmp_path: Path) -> None:
    made = healthy()
    made[UP] *= 3
    made["model.norm.weight"].zero_()
    directory = saved(tmp_path / "model", made)
    limits = tmp_path / "limits.yaml"
    limits.write_text("departing-std: {factor: 4}\nall-zero: off\n")
    assert examined(directory, thresholds=str(limits)).problems == ()
    assert rules_of(examined(directory, thresholds={"all-zero": False}).problems) == {("departing-std", UP)}
    assert main(["autopsy", str(directory), "--thresholds", str(limits)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("explodet: {std: 3}", "there is no rule 'explodet'. Did you mean 'exploded'"),
        ("exploded: {sdt: 3}", "exploded has no limit 'sdt'; it has mean, std"),
        ("exploded: {std: big}", "std is 'big', not a number from 0"),
        ("exploded: {std: .nan}", "std is nan, not a number from 0"),
        ("departing-std: {neighbours: 0}", "neighbours is 0; it is at least 1"),
        ("departing-std: {factor: 0.5}", "factor is 0.5; it is at least 1"),
        ("exploded: 3", "exploded is 3, neither limits nor 'off'"),
        ("- exploded", "no mapping of rules"),
        ("a: [", "is not YAML"),
    ],
)
def test_wrong_limits_are_refused_before_the_work(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "limits.yaml").write_text(text)
    directory = saved(tmp_path / "model", {"model.norm.weight": torch.ones(4)})
    with pytest.raises(UsageError, match=message):
        examined(directory, thresholds=str(tmp_path / "limits.yaml"))


def test_all_that_is_wrong_with_limits_is_said_at_once(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", {"model.norm.weight": torch.ones(4)})
    with pytest.raises(UsageError) as caught:
        examined(directory, thresholds={"what": {}, "giant": {"ratio": None, "size": 1}})
    assert len(caught.value.problems) == 3


def test_an_interrupted_autopsy_goes_on_from_its_lines(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", healthy() | {UP: decoded(by_blocks(64))})
    lines = tmp_path / "lines.jsonl"
    whole = examined(directory, spectrum=True)
    assert examined(directory, spectrum=True, lines=str(lines)) == whole
    written = lines.read_text().splitlines(keepends=True)
    # Cut in the middle of a line, as a kill leaves it; a value changed in another shows that it is not read again.
    kept = json.loads(written[1])
    kept["row"]["mean"] = 0.00123
    lines.write_text(written[0] + json.dumps(kept) + "\n" + "".join(written[2:20]) + written[20][:50])
    resumed = examined(directory, spectrum=True, lines=str(lines))
    rows = {row["name"]: row for row in resumed.tables["statistics"]}
    assert rows[kept["name"]]["mean"] == 0.00123
    rows[kept["name"]]["mean"] = next(row["mean"] for row in whole.tables["statistics"] if row["name"] == kept["name"])
    assert resumed.tables["statistics"] == whole.tables["statistics"]
    assert resumed.problems == whole.problems
    assert len(lines.read_text().splitlines()) == len(written)


def test_lines_of_something_else_are_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", healthy())
    lines = tmp_path / "lines.jsonl"
    examined(directory, lines=str(lines), roles="norm")
    with pytest.raises(DestinationError, match="another model, version or settings"):
        examined(directory, lines=str(lines), sample=0.5)
    os.utime(directory / "model.safetensors", (1, 1))
    with pytest.raises(DestinationError, match="another model, version or settings"):
        examined(directory, lines=str(lines))
    lines.write_text('{"a": 1}\n')
    with pytest.raises(DestinationError, match="something else than lines of an autopsy"):
        examined(directory, lines=str(lines))
    with pytest.raises(DestinationError, match="cannot be written"):
        examined(directory, lines=str(tmp_path / "nowhere" / "lines.jsonl"))


def test_the_command_line_exits_with_3_where_something_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = healthy()
    assert main(["autopsy", str(saved(tmp_path / "healthy", made))]) == 0
    assert "healthy" in capsys.readouterr().out
    made[UP][0, 0] = math.nan
    directory = saved(tmp_path / "ill", made)
    assert main(["autopsy", str(directory), "--csv", str(tmp_path / "csv")]) == 3
    assert f"problem: {UP}: nan: holds 1 NaN of 61,440 elements." in capsys.readouterr().out
    assert main(["autopsy", str(directory), "--json", "--roles", "mlp.up"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert result["problems"] == [f"{UP}: nan: holds 1 NaN of 61,440 elements."]
    assert {it["name"] for it in result["details"]} == {row["name"] for row in result["statistics"]}
    with open(tmp_path / "csv" / "statistics.csv", newline="") as file:
        assert {row["name"] for row in csv.DictReader(file)} == set(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "nowhere/page.html"], "there is no directory nowhere"),
        (["--html", "."], "is a directory; name a file"),
        (["--csv", "model/config.json"], "is a file; name a directory"),
    ],
)
def test_a_report_that_could_not_be_written_is_refused_before_the_work(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "model", {"model.norm.weight": torch.ones(4)})
    assert main(["autopsy", "model", *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_memory_stays_small_on_a_tensor_of_four_gib(tmp_path: Path) -> None:
    """A sparse file: nothing of it takes room on the disk."""
    shape = [2**19, 4096]
    directory = make.sparse(tmp_path / "model", {"model.embed_tokens.weight": ("BF16", shape)}, make.config(1))
    script = """
import resource, sys
import tensorsurgeon.cli, tensorsurgeon.exams.vitals
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert tensorsurgeon.cli.main(["autopsy", sys.argv[1], "-q"]) == 3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) * 1024 < 600e6
