"""Checkpoints of compressed-tensors that are damaged, or contradict their config: each fault is said by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tensorsurgeon as ts
from tensorsurgeon.errors import RefusedError

TOP = Path(__file__).parent / "oracles/made"
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Damage = Callable[[Tensors, Config], Any]


def damaged(name: str, damage: Damage, place: Path) -> Path:
    """Copy a checkpoint of one shard with other tensors or another config."""
    shutil.copytree(TOP / name, place)
    file, settings = place / "model.safetensors", place / "config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, file, {"format": "pt"})
    settings.write_text(json.dumps(config))
    return place


def without(part: str) -> Damage:
    return lambda tensors, config: tensors.pop(UP + part)


def cut(part: str) -> Damage:
    """Leave the last column out."""
    return lambda tensors, config: tensors.update({UP + part: tensors[UP + part][:, :-1].contiguous()})


def as_dtype(part: str, dtype: torch.dtype) -> Damage:
    return lambda tensors, config: tensors.update({UP + part: tensors[UP + part].to(dtype)})


def weights(config: Config) -> dict[str, Any]:
    (group,) = config["config_groups"].values()
    return group["weights"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ct_fp8_tensor", without(".weight_scale"), f"{UP}.weight_scale: is missing"),
        ("ct_fp8_tensor", as_dtype(".weight_scale", torch.int32), f"{UP}.weight_scale in model.*: is I32, not F32"),
        ("ct_fp8_block", cut(".weight_scale"), rf"{UP}.weight_scale in .*: has shape \[2, 1\], but \[2, 2\] is needed"),
        ("ct_fp8_block", lambda t, c: weights(c).pop("block_structure"), "strategy 'block' .* is not known"),
        ("ct_int8_channel", cut(".weight_scale"), rf"{UP}.weight_scale in .*: has shape \[.*, 0\]"),
        ("ct_int8_channel_asym", as_dtype(".weight_zero_point", torch.int64), "weight_zero_point in .*: is I64"),
        ("ct_int8_group_asym", cut(".weight_zero_point"), rf"{UP}.weight_zero_point in .*: has shape"),
        ("ct_int8_packed", cut(".weight_packed"), r"weight_packed: has shape .* the file is truncated, or the config"),
        ("ct_int8_packed", lambda t, c: weights(c).update(num_bits=4), "weight_packed: has shape .* but 4 bits for"),
        ("ct_int8_packed", lambda t, c: weights(c).update(num_bits=9), "the config says 9 bits; 1 to 8"),
        ("ct_int8_packed", without(".weight_shape"), f"{UP}.weight_shape: is missing"),
        ("ct_int4_g128_asym", without(".weight_zero_point"), f"{UP}.weight_zero_point: is missing"),
        ("ct_int4_g128_asym", lambda t, c: weights(c).update(group_size=100), "do not cover"),
        ("ct_old_actorder", lambda t, c: t[f"{UP}.weight_g_idx"].fill_(99), "weight_g_idx: names groups 99 to 99"),
        ("ct_int8_channel", lambda t, c: t[f"{UP}.weight_scale"][3].fill_(torch.nan), "weight: a scale is NaN.*model"),
        ("ct_nvfp4", without(".weight_global_scale"), f"{UP}.weight_global_scale: is missing"),
        ("ct_mxfp4", cut(".weight_packed"), "bytes a row are neither 4 nor 6 bits"),
        ("ct_old_sparse24", without(".bitmask"), f"{UP}.bitmask: is missing"),
        ("ct_old_sparse24", lambda t, c: t[f"{UP}.bitmask"].zero_(), "bitmask: has 0 bits for"),
        ("ct_fp8_tensor", lambda t, c: c.update(config_groups={}), "none of the config_groups is for"),
        ("ct_fp8_tensor", lambda t, c: c.pop("config_groups"), "has no config_groups"),
        ("ct_fp8_tensor", lambda t, c: c.update(quant_method="gptq"), "in no format that is known here"),
        ("ct_nvfp4", lambda t, c: c.update(quant_method="fp8"), "the tensors are those of compressed-tensors, but"),
        ("ct_fp8_tensor", lambda t, c: c.update(transform_config={"config_groups": {"R": {"apply": [
            {"location": "input", "targets": ["Linear"]}]}}}), "transform_config rotates 'input'"),
        ("ct_fp8_tensor", lambda t, c: t.update({f"{UP}.weight_g_idx": torch.ones(3)}), "weight_g_idx: is no part of"),
    ],
)  # fmt: skip
def test_a_fault_is_said_by_name(name: str, damage: Damage, message: str, tmp_path: Path) -> None:
    source = damaged(name, damage, tmp_path / "source")
    with pytest.raises(RefusedError, match=message):
        ts.write(ts.ops.dequantize(ts.open(source)), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_faults_of_all_modules_are_said_at_once(tmp_path: Path) -> None:
    def damage(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            del tensors[name]

    with pytest.raises(RefusedError) as refused:
        ts.ops.dequantize(ts.open(damaged("ct_fp8_tensor", damage, tmp_path / "source")))
    assert len(refused.value.problems) == 7
