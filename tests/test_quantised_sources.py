"""Exams and operations take a quantised checkpoint as it is: they see and make what they do of its decoded twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_oracles import MADE

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import RefusedError

NAMES = (
    "fp8_block", "fp8_experts_fused", "fp8_experts_split", "ct_int4_g32", "ct_old_sparse24", "gptq_v1_asym",
    "autoawq_gemv_g32", "autoround_awq", "mxfp4", "bnb_nf4_double", "bnb_nf4_bf16_storage", "bnb_int8",
    "modelopt_nvfp4_awq", "torchao_nvfp4", "fbgemm_fp8_llama4", "mlx_4bit",
)  # fmt: skip
PLACES = [place for place in MADE if place.name in NAMES]

every = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)


@pytest.fixture
def decoded(place: Path, tmp_path: Path) -> Path:
    ts.write(ts.ops.dequantize(ts.open(place)), tmp_path / "decoded")
    return tmp_path / "decoded"


def statistics(place: Path) -> dict[str, Any]:
    rows = ts.exams.autopsy(ts.open(place)).tables["statistics"]
    return {row["name"]: {key: value for key, value in row.items() if key != "dtype"} for row in rows}


def test_all_that_are_named_are_there() -> None:
    assert {place.name for place in PLACES} == set(NAMES)


@every
def test_autopsy_sees_the_decoded_weights(place: Path, decoded: Path) -> None:
    assert statistics(place) == statistics(decoded)


@every
def test_diff_finds_the_rounding_to_bf16_and_nothing_else(place: Path, decoded: Path) -> None:
    tables = ts.exams.diff(ts.open(place), str(decoded)).tables
    assert "absent" not in tables
    for row in tables["tensors by change"]:
        assert row["relative error"] <= 2.0**-8, row
    assert ts.exams.diff(ts.open(place), str(place)).tables["model"][0]["equal"].startswith("every byte")


@every
def test_noise_takes_it_as_the_quantised_form(place: Path, decoded: Path) -> None:
    findings = ts.exams.noise(ts.open(decoded), str(place))
    assert findings.problems == ()


@every
def test_verify_and_inspect_find_nothing_wrong(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["verify", str(place)])
    assert status == 0, capsys.readouterr().out
    capsys.readouterr()
    assert main(["inspect", str(place), "--json"]) == 0
    assert "problem" not in json.loads(capsys.readouterr().out)["model"][0]["layers"]


@every
def test_perturb_refuses_it_or_decodes_it(place: Path, decoded: Path, tmp_path: Path) -> None:
    wanted = {"method": "ablate", "level": 0.5, "group": "*proj*"}
    quantised = not all(name in ts.open(place) for name in ts.open(decoded))
    if quantised:
        with pytest.raises(RefusedError, match="of the chosen tensors are quantised"):
            ts.ops.perturb(ts.open(place), **wanted)
    ts.write(ts.ops.perturb(ts.open(place), **wanted, dequantize=True), tmp_path / "one")
    ts.write(ts.ops.perturb(ts.open(decoded), **wanted), tmp_path / "two")
    # Ablation keeps or clears each weight, so that when it is rounded makes no difference.
    assert make.same(make.read(tmp_path / "one"), make.read(tmp_path / "two"))


@every
def test_project_decodes_it(place: Path, decoded: Path, tmp_path: Path) -> None:
    width = ts.open(decoded).text_config["hidden_size"]
    save_file({"directions": np.eye(width, dtype=np.float32)[:2]}, tmp_path / "directions.safetensors")
    given = {"directions": str(tmp_path / "directions.safetensors"), "weights": "attention.o"}
    ts.write(ts.ops.project(ts.open(place), **given, dequantize=True), tmp_path / "one")
    ts.write(ts.ops.project(ts.open(decoded), **given), tmp_path / "two")
    one, two = make.read(tmp_path / "one"), make.read(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name].float() - two[name].float()).abs().max() <= 2.0**-7 * two[name].float().abs().max(), name


@every
def test_layers_move_with_all_their_parts(place: Path, tmp_path: Path) -> None:
    if place.name == "autoround_awq":
        # Of a model with one layer AutoRound's config names that layer, and no pattern.
        with pytest.raises(RefusedError, match="names a layer by number"):
            ts.ops.select_layers(ts.open(place), "0,0")
        return
    ts.write(ts.ops.select_layers(ts.open(place), "0,0"), tmp_path / "doubled")
    doubled = ts.ops.dequantize(ts.open(tmp_path / "doubled"), "float32")
    single = ts.ops.dequantize(ts.open(place), "float32")
    for name in single:
        if ".layers.1." not in name:
            twin = name.replace(".layers.0.", ".layers.1.")
            assert bytes(doubled[twin].read().data) == bytes(single[name].read().data), name
