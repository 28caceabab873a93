"""Quantised checkpoints that foreign libraries made, decoded bit for bit as those libraries decode them.

What made each is in `oracles/made/*/made.json`; `oracles/build` makes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import make
import tensorsurgeon as ts
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import QUANTIZATION_KEYS, SETTINGS_FILES
from tensorsurgeon.names import companions
from tensorsurgeon.quantized import find_modules, residue

MADE = sorted(path.parent for path in Path(__file__).parent.glob("oracles/made/*/made.json"))
NUMPY = {"F32": np.float32, "F16": np.float16}
SLACK = {"bfloat16": torch.bfloat16, "float16": torch.float16}

PLAIN = {"fp8_left_dense": "*down_proj*,*self_attn*"}
"""What has to be said of a checkpoint: transformers leaves meaningless scales beside weights that it left plain."""

every = pytest.mark.parametrize("place", MADE, ids=lambda place: place.name)


def answers(place: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(place / "expected.npz") as held:
        return {name: held[name] for name in held.files}


def opened(place: Path) -> Checkpoint:
    """Open a checkpoint without the scales that mean nothing."""
    ckpt = ts.open(place)
    said = ckpt.names(PLAIN[place.name]) if place.name in PLAIN else []
    dropped = companions(said)
    return ckpt.replace(tensors={name: it for name, it in ckpt.tensors.items() if name not in dropped})


def numbers(ckpt: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    tensor = ckpt[name]
    return np.frombuffer(tensor.read().data, np.float32).reshape(tensor.shape)


def is_quantised(place: Path, name: str) -> bool:
    # bitsandbytes may keep its codes in tensors of floats, of another shape.
    ckpt = ts.open(place)
    plain = name in ckpt and ckpt[name].dtype in ("F32", "F16", "BF16")
    return not plain or ckpt[name].shape != answers(place)[name].shape


@every
def test_every_weight_is_what_its_own_library_makes_of_it(place: Path) -> None:
    plain = ts.ops.dequantize(ts.open(place), "float32", PLAIN.get(place.name))
    expected = answers(place)
    modules = set(find_modules(opened(place)).modules)
    assert {name for name in expected if is_quantised(place, name)} == modules
    for name in modules:
        wanted = expected[name]
        np.testing.assert_array_equal(numbers(plain, name), wanted, err_msg=name, strict=True)


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_dtypes_are_float32_rounded_once(place: Path, dtype: str, tmp_path: Path) -> None:
    ts.write(ts.ops.dequantize(opened(place), dtype), tmp_path / "dest")
    written = make.read(tmp_path / "dest")
    for name, wanted in answers(place).items():
        if not is_quantised(place, name):
            continue
        assert torch.equal(make.bits(written[name]), make.bits(torch.from_numpy(wanted).to(SLACK[dtype]))), name


@every
def test_nothing_quantised_remains_and_all_else_keeps_its_bits(place: Path, tmp_path: Path) -> None:
    ckpt = opened(place)
    found = find_modules(ckpt)
    ts.write(ts.ops.dequantize(ckpt), tmp_path / "dest", max_shard_size="200KB")
    written = ts.open(tmp_path / "dest")
    assert not list(residue(written.tensors))
    passed = {name for name in ckpt if name not in found.tensors and name not in found.idle}
    assert set(written) == passed | set(found.modules)
    for name in passed:
        assert bytes(written[name].read().data) == bytes(ckpt[name].read().data), name
    assert not any(key in json.dumps(written.config.value) for key in QUANTIZATION_KEYS)
    assert not set(SETTINGS_FILES) & {path.name for path in (tmp_path / "dest").iterdir()}
    for shard in (tmp_path / "dest").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@every
def test_any_block_of_rows_is_that_part_of_the_whole(place: Path) -> None:
    plain = ts.ops.dequantize(opened(place), "bfloat16")
    for name in answers(place):
        tensor = plain[name].flat
        whole = bytes(tensor.read().data)
        for start, stop in ((0, 1), (1, tensor.rows), (tensor.rows // 3, tensor.rows // 2 + 1)):
            part = bytes(tensor.read(start, stop).data)
            assert part == whole[start * tensor.row_bytes : stop * tensor.row_bytes], (name, start, stop)


@every
def test_inspect_names_the_format_of_every_module(place: Path) -> None:
    tables = ts.exams.inspect(opened(place)).tables
    quantised = {name: it for name, it in answers(place).items() if is_quantised(place, name)}
    assert sum(row["modules"] for row in tables["formats"]) == len(quantised)
    assert sum(row["elements"] for row in tables["formats"]) == sum(it.size for it in quantised.values())
