"""torchao: faults, metadata in shards and under a sequence of layers, swizzled scales against their plain reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import make
import tensorsurgeon as ts
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

SETTINGS = {"quantization_config": {"quant_method": "torchao"}}
QDATA, SCALE, ZERO = "._weight_qdata", "._weight_scale", "._weight_zero_point"


def described(kind: str, **data: Any) -> dict[str, str]:
    entry = {"_type": kind, "_data": data, "_tensor_data_names": ["qdata", "scale"]}
    names = [f"{MODULE}.weight"]
    return {"format": "pt", "tensor_names": json.dumps(names), names[0]: json.dumps(entry)}


INT8 = described("Int8Tensor", block_size=[1, 64])
NVFP4 = described("NVFP4Tensor", block_size=16)
SWIZZLED = described("NVFP4Tensor", block_size=16, is_swizzled_scales=True)
MX = described("MXTensor", block_size=32, elem_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"})
FP8 = described("Float8Tensor", block_size=[1, 64])


def e4m3(*shape: int) -> torch.Tensor:
    return random_bytes(*shape, below=126).view(torch.float8_e4m3fn)


def int8(**edits: Any) -> dict[str, Any]:
    return {QDATA: random_bytes(6, 64).view(torch.int8), SCALE: random_scales(6, 1), **edits}


def nvfp4(**edits: Any) -> dict[str, Any]:
    return {QDATA: random_bytes(6, 32), SCALE: e4m3(6, 4), **edits}


@pytest.mark.parametrize(
    ("parts", "metadata", "message"),
    [
        (int8(**{QDATA: None}), INT8, rf"{MODULE}\._weight_qdata: is missing; the metadata lists it"),
        (int8(**{SCALE: None}), INT8, rf"{MODULE}\._weight_scale: is missing; the metadata lists it"),
        (int8(**{QDATA: random_bytes(6, 64)}), INT8, rf"_weight_qdata in {FILE}: is U8, not I8"),
        (int8(**{QDATA: random_bytes(384).view(torch.int8)}), INT8, rf"qdata in {FILE}: has shape \[384\]; not"),
        (int8(**{SCALE: random_scales(5, 1)}), INT8, rf"_scale in {FILE}: has shape \[5, 1\], but 6 numbers"),
        (int8(**{SCALE: e4m3(6, 1)}), INT8, rf"_scale in {FILE}: is F8_E4M3, not F32 or"),
        (int8(**{ZERO: torch.zeros(5, 1, dtype=torch.int8)}), INT8, rf"_zero_point in {FILE}: has shape \[5, 1\]"),
        (int8(**{ZERO: e4m3(6, 1)}), INT8, rf"_zero_point in {FILE}: is F8_E4M3, not I8 or"),
        (int8(**{"._weight_act_pre_scale": random_scales(6)}), INT8, rf"act_pre_scale in {FILE}: has shape \[6\]"),
        (int8(**{"._weight_new": random_scales(6)}), INT8, r"_weight_new: is no part of a module in the format tor"),
        (int8(), None, rf"{MODULE}\.weight: no __metadata__ of a shard describes it"),
        (int8(), INT8 | {f"{MODULE}.weight": "{"}, rf"{MODULE}\.weight: __metadata__ is no JSON"),
        (int8(), INT8 | {f"{MODULE}.weight": "[]"}, rf"{MODULE}\.weight: the metadata says None; that is not known"),
        (int8(), described("Int4Tensor"), r"\.weight: the metadata says Int4Tensor; it is packed for one kernel"),
        (int8(), described("New"), r"\.weight: the metadata says New; that is not known here, and it is not decoded"),
        (int8(), FP8, rf"_weight_qdata in {FILE}: is I8, not F8_E4M3 or F8_E5M2"),
        (int8(), described("Int8Tensor", block_size=[64]), r"\.weight: 'block_size' \(64,\) does not fit"),
        (int8(), described("Int8Tensor", block_size="x"), r"\.weight: the metadata gives 'block_size' 'x'"),
        (nvfp4(), described("NVFP4Tensor"), r"\.weight: the metadata gives 'block_size' None"),
        (nvfp4(**{SCALE: e4m3(6, 3)}), NVFP4, rf"_scale in {FILE}: has shape \[6, 3\], but 24 numbers are needed"),
        (nvfp4(**{SCALE: random_bytes(6, 4)}), NVFP4, rf"_scale in {FILE}: is U8, not F8_E4M3"),
        (nvfp4(), SWIZZLED, rf"_scale in {FILE}: has shape \[6, 4\], but 512 numbers are needed"),
        (nvfp4(**{QDATA: random_bytes(6, 31)}), NVFP4, rf"_weight_qdata in {FILE}: is \[6, 62\], no whole 16s"),
        (nvfp4(**{"._weight_per_tensor_scale": random_scales(6)}), NVFP4, rf"_per_tensor_scale in {FILE}: has shape"),
        (nvfp4(), MX, rf"_weight_qdata in {FILE}: is U8, not F8_E4M3"),
        (nvfp4(), described("MXTensor", block_size=32, elem_dtype={"_data": "fp6"}), r"\.weight: is MXTensor of 'fp6'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_module_part_and_file(
    parts: dict[str, Any], metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    assert_refused(checkpoint(tmp_path / "source", parts, SETTINGS, metadata), message)


@pytest.mark.parametrize(
    ("parts", "metadata"),
    [
        (int8(**{SCALE: torch.full((6, 1), float("nan"))}), INT8),
        (nvfp4(**{"._weight_per_tensor_scale": torch.tensor(float("nan"))}), NVFP4),
        (nvfp4(**{SCALE: torch.full((6, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)}), NVFP4),
    ],
)
def test_a_scale_that_is_nan_is_refused(parts: dict[str, Any], metadata: dict[str, str], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", parts, SETTINGS, metadata)
    assert_refused_while_decoding(source, tmp_path / "dest", rf"{MODULE}\.weight: a scale is NaN.*{FILE}")


def test_stacked_matrices_are_one_tall_one_and_their_scales_too(tmp_path: Path) -> None:
    # 3 matrices of 50 rows: the tiles of 128 rows cross them.
    straight = random_bytes(150, 4, below=126)
    padded = torch.zeros(256, 4, dtype=torch.uint8)
    padded[:150] = straight
    tiles = padded.view(2, 4, 32, 4).transpose(1, 2).reshape(-1, 16)
    parts = {QDATA: random_bytes(3, 50, 32), SCALE: tiles.contiguous().view(torch.float8_e4m3fn)}
    found = decoded(checkpoint(tmp_path / "source", parts, SETTINGS, SWIZZLED), tmp_path / "dest")
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([parts[QDATA] & 15, parts[QDATA] >> 4], dim=3).flatten(2).long()
    numbers = table[codes & 7] * torch.where(codes > 7, -1, 1)
    scales = straight.view(torch.float8_e4m3fn).float().view(3, 50, 4)
    assert torch.equal(found, numbers * scales.repeat_interleave(16, 2))


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (300, 12)])
def test_swizzled_scales_are_put_straight_as_plainly(shape: tuple[int, int]) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (-(-shape[0] // 128), -(-shape[1] // 4), 512), dtype=np.uint8)
    fast = unpacking.unswizzle(tiles, *shape)
    assert np.array_equal(fast, unpacking.unswizzle_plainly(tiles, *shape))


def sharded(directory: Path) -> Path:
    """Write two layers in a shard each, whose metadata describes only what it holds; the kinds of the layers differ."""
    directory.mkdir()
    weight_map: dict[str, str] = {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        prefix = name.removesuffix("weight") + "_weight_"
        codes = random_bytes(6, 64)
        qdata = codes.view(torch.int8) if layer else codes[:, :32].contiguous()
        tensors = {prefix + "qdata": qdata, prefix + "scale": random_scales(6, 1) if layer else e4m3(6, 4)}
        kind, block = ("Int8Tensor", [1, 64]) if layer else ("NVFP4Tensor", 16)
        entry = {"_type": kind, "_data": {"block_size": block}, "_tensor_data_names": ["qdata", "scale"]}
        metadata = {"format": "pt", "tensor_names": json.dumps([name]), name: json.dumps(entry)}
        shard = f"model-0000{layer + 1}-of-00002.safetensors"
        save_file(tensors, directory / shard, metadata)
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(make.config(2, **SETTINGS)))
    return directory


def test_shards_that_describe_their_own_tensors_do_not_contradict_each_other(tmp_path: Path) -> None:
    ckpt = ts.open(sharded(tmp_path / "source"))
    assert ckpt.warnings == ()
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    assert json.loads(ckpt.metadata["tensor_names"]) == names
    assert list(ts.ops.dequantize(ckpt)) == names


@pytest.mark.parametrize("layers", ["1,0", "1", "0*2", "1,1,0"])
def test_what_the_metadata_says_moves_with_the_layers(layers: str, tmp_path: Path) -> None:
    source = sharded(tmp_path / "source")
    ts.write(ts.ops.select_layers(ts.open(source), layers), tmp_path / "moved")
    ts.write(ts.ops.dequantize(ts.open(tmp_path / "moved")), tmp_path / "first")
    ts.write(ts.ops.select_layers(ts.ops.dequantize(ts.open(source)), layers), tmp_path / "second")
    assert make.same(make.read(tmp_path / "first"), make.read(tmp_path / "second"))
    with safe_open(tmp_path / "moved/model.safetensors", "pt") as file:
        metadata = file.metadata()
    names = json.loads(metadata.pop("tensor_names"))
    assert sorted(names) == sorted(metadata.keys() - {"format"}) == sorted(make.read(tmp_path / "first"))
