"""ModelOpt: faults, contradictions, layouts that no fixture has, and pairs of rows against their plain reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coded import (
    FILE,
    MODULE,
    assert_refused,
    assert_refused_while_decoding,
    checkpoint,
    decoded,
    random_bytes,
    random_scales,
)
from tensorsurgeon.kernels import unpacking

Edits = dict[str, Any]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def said(**settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "modelopt", **settings}}


def e4m3(*shape: int) -> torch.Tensor:
    return random_bytes(*shape, below=126).view(torch.float8_e4m3fn)


def fp8(**edits: Any) -> Edits:
    return {".weight": e4m3(6, 64), ".weight_scale": torch.tensor(0.01), ".input_scale": torch.tensor(1.0), **edits}


def nvfp4(**edits: Any) -> Edits:
    parts = {".weight": random_bytes(6, 32), ".weight_scale": e4m3(6, 4), ".weight_scale_2": torch.tensor(0.01)}
    return {**parts, **edits}


def awq(**edits: Any) -> Edits:
    parts = {
        ".weight": random_bytes(3, 64),
        ".weight_scale": random_scales(6, 2),
        ".pre_quant_scale": random_scales(64),
    }
    return {**parts, **edits}


def int8(**edits: Any) -> Edits:
    return {".weight": random_bytes(6, 64).view(torch.int8), ".weight_scale": random_scales(6), **edits}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (fp8(**{".weight": None}), rf"{MODULE}\.weight: is missing"),
        (fp8(**{".weight": torch.ones(6, 64)}), rf"\.weight in {FILE}: is F32, not F8_E4M3 or I8 or U8"),
        (fp8(**{".weight": e4m3(384)}), rf"\.weight in {FILE}: has shape \[384\]; not a matrix"),
        (fp8(**{".weight_scale": None}), rf"{MODULE}\.weight_scale: is missing"),
        (fp8(**{".weight_scale": random_scales(5)}), rf"weight_scale in {FILE}: has shape \[5\], which no FP8 has"),
        (fp8(**{".weight_scale": random_scales(2, 2)}), rf"weight_scale in {FILE}: has shape \[2, 2\], which no FP8"),
        (fp8(**{".weight_scale": e4m3(6, 4)}), rf"weight_scale in {FILE}: is F8_E4M3 beside codes in F8_E4M3; ModelO"),
        (fp8(**{".weight_scale": random_bytes(6, 3)}), rf"weight_scale in {FILE}: has shape \[6, 3\], which no MXFP8"),
        (fp8(**{".weight_scale": torch.ones(6).int()}), rf"weight_scale in {FILE}: is I32, not F32 or"),
        (nvfp4(**{".weight_scale_2": None}), rf"{MODULE}\.weight_scale_2: is missing"),
        (nvfp4(**{".weight_scale_2": random_scales(6)}), rf"weight_scale_2 in {FILE}: has shape \[6\], not \[\]"),
        (nvfp4(**{".weight_scale_2": e4m3()}), rf"weight_scale_2 in {FILE}: is F8_E4M3, not F32"),
        (nvfp4(**{".weight_scale": e4m3(6, 3)}), rf"weight_scale in {FILE}: has shape \[6, 3\], which no NVFP4 has"),
        (nvfp4(**{".weight": random_bytes(6, 24)}), r"which no NVFP4 has beside codes of \[6, 24\]"),
        (nvfp4(**{".weight_scale": e4m3(5, 4)}), rf"weight_scale in {FILE}: has shape \[5, 4\], which no NVFP4 has"),
        (nvfp4(**{".svdquant_lora_a": random_scales(2, 64)}), r"svdquant_lora_a: is NVFP4 with a low-rank correction"),
        (awq(**{".weight_scale": random_scales(3, 2)}), rf"weight_scale in {FILE}: has shape \[3, 2\], which no INT4"),
        (awq(**{".weight_scale": random_scales(6, 5)}), rf"weight_scale in {FILE}: has shape \[6, 5\], which no INT4"),
        (awq(**{".pre_quant_scale": random_scales(6)}), rf"pre_quant_scale in {FILE}: has shape \[6\], but \[64\]"),
        (awq(**{".pre_quant_scale": random_bytes(64)}), rf"pre_quant_scale in {FILE}: is U8, not F32 or"),
        (int8(**{".weight_scale": random_scales(64)}), rf"weight_scale in {FILE}: has shape \[64\], which no INT8"),
        (int8(**{".qweight": random_bytes(4, 4)}), r"\.qweight: is no part of a module in the format ModelOpt INT8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_module_part_and_file(parts: Edits, message: str, tmp_path: Path) -> None:
    assert_refused(checkpoint(tmp_path / "source", parts, said()), message)


@pytest.mark.parametrize(
    ("parts", "algo"),
    [(fp8(), "NVFP4"), (fp8(), "MXFP8"), (nvfp4(), "FP8"), (awq(), "NVFP4_AWQ"), (int8(), "FP8"), (nvfp4(), "mxfp4")],
)
def test_a_config_that_says_otherwise_is_refused(parts: Edits, algo: str, tmp_path: Path) -> None:
    message = rf"config\.json: 'quant_algo' of {MODULE} is {algo.upper()}, but its tensors in {FILE} are"
    assert_refused(checkpoint(tmp_path / "whole", parts, said(quant_algo=algo)), message)
    mixed = said(quant_algo="MIXED_PRECISION", quantized_layers={MODULE: {"quant_algo": algo}})
    assert_refused(checkpoint(tmp_path / "mixed", parts, mixed), message)


@pytest.mark.parametrize("parts", [nvfp4(), awq()])
def test_another_method_in_the_config_is_a_contradiction(parts: Edits, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", parts, {"quantization_config": {"quant_method": "awq"}})
    assert_refused(source, r"config\.json: the tensors are those of ModelOpt, but quant_method is 'awq'")


@pytest.mark.parametrize(
    "parts",
    [
        fp8(**{".weight_scale": torch.tensor(float("nan"))}),
        nvfp4(**{".weight_scale": torch.full((6, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)}),
        nvfp4(**{".weight_scale_2": torch.tensor(float("nan"))}),
        awq(**{".pre_quant_scale": torch.full((64,), float("nan"))}),
        fp8(**{".weight_scale": torch.full((6, 2), 255, dtype=torch.uint8)}),
    ],
)
def test_a_scale_that_is_nan_is_refused(parts: Edits, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", parts, said())
    assert_refused_while_decoding(source, tmp_path / "dest", rf"{MODULE}\.weight: a scale is NaN.*{FILE}")


@pytest.mark.parametrize("settings", [said(), {}])
def test_the_side_file_is_asked_where_the_config_says_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", fp8(), settings)
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    wanted = fp8()[".weight"].float() * 0.01
    assert torch.equal(decoded(source, tmp_path / "dest"), wanted)
    assert not (tmp_path / "dest/hf_quant_config.json").exists()


def test_the_scale_of_the_input_multiplies_last(tmp_path: Path) -> None:
    parts = nvfp4(**{".pre_quant_scale": random_scales(1, 64).bfloat16()})
    found = decoded(checkpoint(tmp_path / "source", parts, said()), tmp_path / "dest")
    codes = torch.stack([parts[".weight"] & 15, parts[".weight"] >> 4], dim=2).flatten(1)
    scales = (parts[".weight_scale"].float() * parts[".weight_scale_2"]).repeat_interleave(16, 1)
    assert torch.equal(found, E2M1[codes.long()] * scales * parts[".pre_quant_scale"].float())


@pytest.mark.parametrize(
    ("scale", "spread"),
    [
        (random_scales(3), lambda scale: scale[:, None, None]),
        (random_scales(3, 1, 1), lambda scale: scale),
        (random_scales(3, 6), lambda scale: scale[:, :, None]),
        (random_scales(3, 64), lambda scale: scale[:, None, :]),
    ],
)
def test_scales_of_stacked_experts_go_with_the_axis_of_their_length(
    scale: torch.Tensor, spread: Any, tmp_path: Path
) -> None:
    parts = {"": e4m3(3, 6, 64), "_weight_scale": scale}
    found = decoded(checkpoint(tmp_path / "source", parts, said()), tmp_path / "dest", name=MODULE)
    assert torch.equal(found, parts[""].float() * spread(scale))


def test_scales_of_square_experts_are_not_guessed(tmp_path: Path) -> None:
    parts = {"": e4m3(3, 64, 64), "_weight_scale": random_scales(3, 64)}
    message = rf"_weight_scale in {FILE}: has shape \[3, 64\], which no FP8"
    assert_refused(checkpoint(tmp_path / "source", parts, said()), message)


def test_each_expert_may_have_its_own_scale_of_scales(tmp_path: Path) -> None:
    parts = {
        "": random_bytes(3, 16, 6),
        "_weight_scale": e4m3(3, 2, 6),
        "_weight_scale_2": random_scales(3),
    }
    found = decoded(checkpoint(tmp_path / "source", parts, said()), tmp_path / "dest", name=MODULE)
    codes = torch.stack([parts[""] & 15, parts[""] >> 4], dim=2).flatten(1, 2)
    scales = parts["_weight_scale"].float() * parts["_weight_scale_2"][:, None, None]
    assert torch.equal(found, E2M1[codes.long()] * scales.repeat_interleave(16, 1))


def test_the_scale_of_the_input_of_stacked_experts_is_refused(tmp_path: Path) -> None:
    parts = {"": e4m3(3, 6, 64), "_weight_scale": random_scales(3), "_pre_quant_scale": random_scales(6)}
    message = rf"{MODULE}_pre_quant_scale: is no part of a module"
    assert_refused(checkpoint(tmp_path / "source", parts, said()), message)


def test_pairs_of_rows_are_unpacked_as_plainly() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(8, 32)
    assert np.array_equal(unpacking.unpack_row_pairs(packed), unpacking.unpack_row_pairs_plainly(packed))
