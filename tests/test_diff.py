"""Diff: what changed is named, layers are recognised wherever they went, and the numbers are those of float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MANNEQUIN
from safetensors.torch import load_file

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import UsageError
from tensorsurgeon.exams.alignment import align
from tensorsurgeon.notation import format_layers, parse_layers
from tensorsurgeon.registry import Findings
from tensorsurgeon.running import Running, run_under

UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


def compared(one: Path, other: Path, **chosen: Any) -> Findings:
    return ts.exams.diff(ts.open(one), str(other), **chosen)


def summary(findings: Findings) -> dict[str, Any]:
    return findings.tables["model"][0]


def row_of(findings: Findings, name: str) -> dict[str, Any]:
    return next(row for row in findings.tables["tensors by change"] if row["name"] == name)


def changed(directory: Path, change: Callable[[Weights], object], shards: int = 1, **settings: Any) -> Path:
    made = make.tensors()
    change(made)
    return make.save(directory, made, make.config(**settings), shards)


@pytest.fixture
def fine_tuned(tmp_path: Path) -> Path:
    """The plain model with noise on every weight of three roles, much in one layer."""

    def tune(made: Weights) -> None:
        generator = torch.Generator().manual_seed(9)
        for name, tensor in made.items():
            if "proj" in name:
                size = 0.01 if ".layers.2." in name else 0.001
                tensor += size * torch.randn(tensor.shape, generator=generator)

    return changed(tmp_path / "tuned", tune)


def test_a_checkpoint_is_equal_to_itself_and_to_its_copy(plain: Path, tmp_path: Path) -> None:
    copy = make.plain(tmp_path / "copy")
    for other in (plain, copy):
        findings = compared(plain, other)
        assert summary(findings)["equal"] == "every byte of every tensor"
        assert summary(findings)["layers"] == "the same 4"
        assert set(findings.tables) == {"model"}
    assert main(["diff", str(plain), str(copy)]) == 0


def test_sharding_is_no_change_of_bytes(plain: Path, tmp_path: Path) -> None:
    findings = compared(plain, make.plain(tmp_path / "other", shards=3))
    assert summary(findings)["equal"] == "every byte of every tensor"
    assert summary(findings)["in another shard"] == summary(findings)["tensors compared"] == 47
    assert row_of(findings, UP)["change"] == "shard"


def test_one_changed_bit_is_found(plain: Path, tmp_path: Path) -> None:
    findings = compared(plain, changed(tmp_path / "other", lambda made: made[UP].view(torch.int16)[3, 5:6].add_(1)))
    assert summary(findings)["equal"] == "no"
    assert summary(findings)["changed"] == 1
    first = findings.tables["tensors by change"][0]
    assert (first["name"], first["change"]) == (UP, "values")
    assert first["unequal share"] == 1 / (320 * 192)
    assert findings.tables["roles"][0]["tensors of"] == "mlp up"
    assert findings.tables["layers"][0]["layer of the second"] == 1


def expected(one: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    x, y = (it.double().numpy().ravel() for it in (one, other))
    d = y - x
    singular = np.linalg.svd(d.reshape(one.shape), compute_uv=False) if one.dim() == 2 else None
    return {
        "unequal share": (d != 0).mean(),
        "largest difference": np.abs(d).max(),
        "mean difference": np.abs(d).mean(),
        "relative error": np.linalg.norm(d) / np.linalg.norm(x),
        "cosine": x @ y / np.linalg.norm(x) / np.linalg.norm(y),
        "SNR": 10 * math.log10((x**2).sum() / (d**2).sum()) if d.any() else None,
        "delta stable rank": (singular**2).sum() / singular[0] ** 2 if singular is not None and d.any() else None,
    }


def assert_numbers(row: dict[str, Any], wanted: dict[str, float]) -> None:
    for key, value in wanted.items():
        # The delta's largest singular value is found to a few thousandths, everything else is exact.
        precision = 2e-3 if key == "delta stable rank" else 1e-9
        assert row[key] == (None if value is None else pytest.approx(value, rel=precision)), key


def test_the_numbers_are_those_of_numpy(plain: Path, fine_tuned: Path) -> None:
    findings = compared(plain, fine_tuned)
    one, other = load_file(plain / "model.safetensors"), load_file(fine_tuned / "model.safetensors")
    for name in one:
        if "proj" in name:
            assert_numbers(row_of(findings, name), expected(one[name], other[name]))
        else:
            assert row_of(findings, name)["change"] == "equal"
    errors = [row["relative error"] for row in findings.tables["tensors by change"]]
    assert errors == sorted(errors, reverse=True)
    assert findings.tables["layers"][0]["layer of the second"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_dtypes_are_compared_by_their_numbers(plain: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    one = load_file(plain / "model.safetensors")
    widened = make.save(tmp_path / "wide", {name: it.to(dtype) for name, it in one.items()}, make.config())
    findings = compared(plain, widened)
    assert summary(findings)["of another dtype"] == 47
    if dtype == torch.float16:
        # What is below float16's least number is rounded.
        assert summary(findings)["of the same numbers"] < 47
        for name in ("model.embed_tokens.weight", UP):
            assert_numbers(row_of(findings, name), expected(one[name], one[name].half()))
    else:
        assert summary(findings)["equal"] == "every number of every tensor"
        assert row_of(findings, UP)["change"].endswith("same numbers")


def test_quantised_weights_are_compared_with_plain_ones(plain: Path, fp8: Path) -> None:
    findings = compared(plain, fp8)
    assert summary(findings)["layout"] == "plain to FP8, blocks of 128x128"
    assert "absent" not in findings.tables
    one = load_file(plain / "model.safetensors")[UP]
    codes, scale = make.quantize(one)
    decoded = codes.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:320, :192]
    assert_numbers(row_of(findings, UP), expected(one, decoded))
    assert "quantization_config" in {row["key"] for row in findings.tables["config"]}
    # A quantised model is equal to itself without being decoded; one changed scale is a change.
    assert summary(compared(fp8, fp8))["equal"] == "every byte of every tensor"


def test_a_changed_scale_is_a_changed_weight(fp8: Path, tmp_path: Path) -> None:
    made = make.read(fp8)
    made["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] *= 2
    other = make.save(tmp_path / "other", made, make.config(quantization_config=make.fp8_settings()), 3)
    findings = compared(fp8, other)
    assert summary(findings)["changed"] == 1
    assert findings.tables["tensors by change"][0]["name"] == UP


SURGERY: dict[str, tuple[str, str]] = {
    "deleted": ("0,3", "; 1-2 are gone"),
    "repeated": ("0,1,1,2,3", ""),
    "reversed": ("3-0", ""),
    "reordered": ("0,2,1,3", ""),
}


@pytest.mark.parametrize("tuned", [False, True], ids=["as it was", "fine-tuned too"])
@pytest.mark.parametrize("surgery", SURGERY)
def test_layer_surgery_is_shown_as_what_it_is(
    plain: Path, fine_tuned: Path, tmp_path: Path, surgery: str, tuned: bool
) -> None:
    sequence, gone = SURGERY[surgery]
    origins = parse_layers(sequence)
    made = ts.ops.select_layers(ts.open(fine_tuned if tuned else plain), sequence)
    ts.write(made, tmp_path / "made", quiet=True)
    findings = compared(plain, tmp_path / "made")
    found = summary(findings)
    assert found["layers"] == f"{format_layers(origins)} of 4{gone}"
    assert align(ts.open(plain), ts.open(tmp_path / "made")).layers == origins
    assert (found["added"], found["removed"]) == (0, 22 if gone else 0)
    if not tuned:
        assert found["equal"] == ("no" if gone else "every byte of every tensor, under other names")
        assert found["changed"] == 0
    moved = next(place for place, origin in enumerate(origins) if place != origin)
    row = row_of(findings, UP.replace(".1.", f".{moved}."))
    assert row["change"].startswith(f"from layer {origins[moved]}")
    assert (row["relative error"] > 0) == tuned


def test_a_renamed_tensor_is_known_by_its_bytes(plain: Path, tmp_path: Path) -> None:
    def rename(made: Weights) -> None:
        made["a.new.name"] = made.pop("model.norm.weight")
        made["lm_head.weight"] = made["lm_head.weight"][:300].clone()
        made["b.added"] = torch.ones(3)

    findings = compared(plain, changed(tmp_path / "other", rename))
    row = row_of(findings, "a.new.name")
    assert (row["from"], row["change"]) == ("model.norm.weight", "renamed")
    assert row_of(findings, "lm_head.weight")["change"] == "304x192 to 300x192, bytes"
    assert findings.tables["absent"] == [
        {"tensor": "b.added", "change": "added", "dtype": "F32", "shape": [3], "elements": 3}
    ]


def test_a_tensor_that_is_alike_in_part_only_is_not_renamed(tmp_path: Path) -> None:
    """Tables that begin alike, or agree in the middle, are told apart by the rest."""
    table = torch.randn(5000, 16)
    one = make.save(tmp_path / "one", {"a.table": table}, make.config(1))
    table = table.clone()
    table[0] += 1
    findings = compared(one, make.save(tmp_path / "other", {"b.table": table}, make.config(1)))
    assert {row["tensor"]: row["change"] for row in findings.tables["absent"]} == {
        "a.table": "removed",
        "b.table": "added",
    }


def test_models_that_have_nothing_in_common_are_compared_by_name(plain: Path, tmp_path: Path) -> None:
    other = make.save(tmp_path / "other", make.tensors(5, seed=7), make.config(5))
    findings = compared(plain, other)
    assert summary(findings)["tensors compared"] == 47
    assert summary(findings)["layers"] == "0-3 of 4; 1 are new"
    assert abs(row_of(findings, UP)["cosine"]) < 0.05


def test_what_is_not_a_number_in_one_model_only_is_a_problem(plain: Path, tmp_path: Path) -> None:
    def spoil(made: Weights) -> None:
        made[UP][0, :2] = math.nan

    spoilt = changed(tmp_path / "spoilt", spoil)
    findings = compared(plain, spoilt)
    assert findings.problems == (f"{UP}: 2 elements are NaN or infinite in one of the two models only.",)
    assert row_of(findings, UP)["delta stable rank"] is None
    assert main(["diff", str(plain), str(spoilt)]) == 3
    # The same NaN in both is no difference.
    findings = compared(spoilt, changed(tmp_path / "again", lambda made: (spoil(made), made[UP][3].mul_(2))))
    assert findings.problems == ()
    assert row_of(findings, UP)["unequal share"] == 192 / made_size(UP)


def made_size(name: str) -> int:
    return make.tensors()[name].numel()


def test_config_and_files_are_compared_key_by_key(plain: Path, tmp_path: Path) -> None:
    other = changed(tmp_path / "other", lambda made: None, rope_theta=5.0, rope_scaling={"type": "yarn"})
    (other / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.95}')
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (plain / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    (other / "merges.txt").write_text("a b")
    findings = compared(plain, other)
    assert findings.tables["config"] == [
        {"key": "rope_theta", "first": "1000000.0", "second": "5.0"},
        {"key": "rope_scaling", "first": "-", "second": '{"type": "yarn"}'},
    ]
    assert {row["file"]: (row["change"], row["where"]) for row in findings.tables["files"]} == {
        "generation_config.json": ("changed", "temperature"),
        "tokenizer.json": ("changed", "model.vocab.b"),
        "merges.txt": ("added", "-"),
    }


def test_only_what_is_chosen_is_compared(plain: Path, fine_tuned: Path) -> None:
    findings = compared(plain, fine_tuned, roles="mlp", layers="1")
    assert {row["name"].split(".")[4] for row in findings.tables["tensors by change"]} == {
        "up_proj", "gate_proj", "down_proj",
    }  # fmt: skip
    assert summary(compared(plain, fine_tuned, roles="norm"))["equal"] == "every byte of what was chosen"
    with pytest.raises(UsageError, match="nothing is selected"):
        compared(plain, fine_tuned, names="*norm*", roles="mlp")


@pytest.mark.parametrize("fault", [math.nan, 0.0])
def test_a_layer_that_is_like_no_other_is_compared_in_its_place(plain: Path, tmp_path: Path, fault: float) -> None:
    def spoil(made: Weights) -> None:
        for name, tensor in made.items():
            if ".layers.2." in name:
                tensor.fill_(fault)

    findings = compared(plain, changed(tmp_path / "other", spoil))
    assert summary(findings)["layers"] == "the same 4"
    assert (summary(findings)["changed"], summary(findings)["added"], summary(findings)["removed"]) == (11, 0, 0)
    assert len(findings.problems) == (11 if math.isnan(fault) else 0)
    # What is wrong is told in the order of the tensors, however many threads there are.
    names = [text.split(":")[0] for text in findings.problems]
    assert names == [name for name in ts.open(plain) if name in names]


def test_findings_do_not_depend_on_threads_and_memory(plain: Path, fine_tuned: Path) -> None:
    found = []
    for settings in (Running(threads=1), Running(threads=3), Running(memory=2**20)):
        with run_under(settings):
            found.append(compared(plain, fine_tuned))
    assert found[0] == found[1] == found[2]


def test_the_mannequin_was_tuned_in_its_last_layers_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(MANNEQUIN / "bf16"), str(MANNEQUIN / "tuned"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"][0]["changed"] == 69
    assert found["tensors by change"][0]["name"] == "lm_head.weight"
