"""What `inspect` tells, held against safetensors, torch and the files' sizes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main

CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by safetensors, in file order."""
    made = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            made |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return made


def model(directory: Path) -> dict[str, Any]:
    (row,) = ts.exams.inspect(ts.open(directory)).tables["model"]
    return row


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plain_checkpoint(tmp_path: Path, shards: int) -> None:
    directory = make.plain(tmp_path / "plain", layers=3, shards=shards)
    tensors = read(directory)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert model(directory) == {
        "name": "plain",
        "architecture": "Qwen3ForCausalLM",
        "model type": "qwen3",
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtype": "bfloat16",
        "quantisation": "none",
        "layers": "3 (model.layers.N)",
        "tensors": len(tensors),
        "shards": shards,
        "bytes": size,
        "size": "2.23 MB",
        "warnings": "none",
    }
    assert size == 2_227_584


def test_a_block_fp8_checkpoint_counts_no_scale_as_a_parameter(tmp_path: Path) -> None:
    told = model(make.fp8(tmp_path / "fp8", layers=3))
    plain = model(make.plain(tmp_path / "plain", layers=3))
    assert told["parameters"] == plain["parameters"]
    assert told["tensors"] == plain["tensors"] + 3 * 7
    assert told["quantisation"] == "fp8: FP8, blocks of 128x128"
    assert told["layers"] == "3 (model.layers.N)"


@pytest.mark.parametrize("shards", [1, 2])
def test_dtypes_and_shards_are_summed(tmp_path: Path, shards: int) -> None:
    directory = make.fp8(tmp_path / "fp8", layers=2, shards=shards)
    tensors = read(directory)
    total = sum(tensor.nbytes for tensor in tensors.values())
    found = ts.exams.inspect(ts.open(directory)).tables
    sums: dict[str, Counter[str]] = {}
    for tensor in tensors.values():
        sums.setdefault(CODES[tensor.dtype], Counter()).update(tensors=1, elements=tensor.numel(), bytes=tensor.nbytes)
    assert found["dtypes"] == [
        {"dtype": dtype, **sums[dtype], "share": f"{100 * sums[dtype]['bytes'] / total:.1f}%"}
        for dtype in sorted(sums, key=lambda dtype: -sums[dtype]["bytes"])
    ]
    assert {row["dtype"] for row in found["dtypes"]} == {"BF16", "F32", "F8_E4M3"}
    for row, path in zip(found["shards"], sorted(directory.glob("*.safetensors")), strict=True):
        with safe_open(path, "pt") as file:
            assert row == {"file": path.name, "tensors": len(file.keys()), "bytes": path.stat().st_size}


def role_of(name: str) -> str:
    """Return the role of a tensor of Qwen3, by its name."""
    module = name.removesuffix("_scale_inv").removesuffix(".weight").rpartition(".")[2]
    if module.endswith("_proj"):
        return f"{'mlp' if '.mlp.' in name else 'attention'} {module.removesuffix('_proj')}"
    ends = {"lm_head": "head lm_head", "embed_tokens": "embedding token", "norm": "norm final"}
    short = {"q_norm": "norm q", "k_norm": "norm k"}
    return {**ends, **short}.get(module, f"norm {module}")


@pytest.mark.parametrize("pattern", ["*norm*", "lm_head.weight", "model.layers.1.*", "*.q_proj.weight,*k_norm*", "*"])
def test_tensors_are_listed_by_a_glob(tmp_path: Path, pattern: str) -> None:
    directory = make.fp8(tmp_path / "fp8", layers=2)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    expected = {
        name: {
            "name": name,
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "role": role_of(name),
            "kind": "companion" if name.endswith("_scale_inv") else "weight",
            "layout": "out,in" if name.endswith(("proj.weight", "lm_head.weight")) else "-",
            "shard": weight_map[name],
        }
        for name, tensor in read(directory).items()
        if any(fnmatchcase(name, part) for part in pattern.split(","))
    }
    found = ts.exams.inspect(ts.open(directory), pattern)
    assert list(found.tables) == ["tensors"]
    assert {row["name"]: row for row in found.tables["tensors"]} == expected
    assert len(found.tables["tensors"]) == len(expected)


def test_computed_tensors_are_listed_with_what_computes_them(tmp_path: Path) -> None:
    ckpt = ts.ops.dequantize(ts.open(make.fp8(tmp_path / "fp8", layers=2)))
    (row,) = ts.exams.inspect(ckpt, "model.layers.0.mlp.up_proj.weight").tables["tensors"]
    assert (row["dtype"], row["bytes"]) == ("BF16", 2 * 320 * 192)
    assert row["shard"] == "decode FP8, blocks of 128x128 to BF16"


@pytest.mark.parametrize(
    ("changes", "column", "shown"),
    [
        ({"architectures": ["A", "B"]}, "architecture", "A, B"),
        ({"architectures": []}, "architecture", "-"),
        ({"architectures": None}, "architecture", "-"),
        ({"model_type": None}, "model type", "-"),
        ({"torch_dtype": None}, "dtype", "-"),
        ({"torch_dtype": None, "dtype": "float16"}, "dtype", "float16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantisation", "gptq"),
        ({"num_hidden_layers": 5}, "layers", "unclear: config.json says 5 layers, but there are tensors of 2"),
        ({"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, "layers",
         "1 (model.layers.N), and 1 for multi-token prediction"),
    ],
)  # fmt: skip
def test_what_the_config_says_or_does_not(tmp_path: Path, changes: dict[str, Any], column: str, shown: str) -> None:
    assert str(model(make.plain(tmp_path / "plain", layers=2, **changes))[column]).startswith(shown)


def test_the_config_of_a_language_model_inside_another_is_looked_at(tmp_path: Path) -> None:
    inner = make.config(2, torch_dtype="float16")
    settings = {"architectures": ["Outer"], "model_type": "outer", "text_config": inner}
    told = model(make.save(tmp_path / "nested", make.tensors(2), settings))
    assert (told["architecture"], told["model type"], told["dtype"]) == ("Outer", "outer", "float16")
    assert told["layers"] == "2 (model.layers.N)"


def test_warnings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make.plain(tmp_path / "plain", layers=2)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "original").mkdir()
    (directory / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    left = "left behind, as they hold or describe other weights: pytorch_model.bin, original/consolidated.00.pth."
    assert model(directory)["warnings"] == left
    assert main(["inspect", str(directory)]) == 0
    assert left in capsys.readouterr().out


def test_a_name_that_says_nothing_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make.plain(tmp_path / "plain", layers=2)
    monkeypatch.chdir(directory)
    assert model(Path("."))["name"] == "plain"


def test_the_table_shows_the_numbers_as_people_read_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make.plain(tmp_path / "plain", layers=3)
    assert main(["inspect", str(directory)]) == 0
    out = capsys.readouterr().out
    facts = dict(line.split(None, 1) for line in out.split("\n\n")[0].splitlines())
    assert facts["parameters"] == "1,113,792"
    assert facts["bytes"] == "2,227,584"
    row = next(line for line in out.splitlines() if line.startswith("BF16"))
    assert row.split() == ["BF16", "36", "1,113,792", "2,227,584", "100.0%"]
    assert main(["inspect", str(directory), "--tensors", "lm_head*"]) == 0
    assert (
        "lm_head.weight  BF16     304x192  116,736  head lm_head  weight  out,in    model.safetensors"
        in capsys.readouterr().out
    )


def test_long_lists_of_shards_are_cut_in_the_table_and_whole_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make.plain(tmp_path / "plain", layers=3, shards=14)
    assert main(["inspect", str(directory)]) == 0
    out = capsys.readouterr().out
    assert out.count("-of-00014.safetensors") == 12
    assert out.endswith("and 2 more\n")
    assert main(["inspect", str(directory), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["shards"]) == 14


def test_looking_changes_nothing(tmp_path: Path) -> None:
    directory = make.fp8(tmp_path / "fp8", layers=2)
    copy = shutil.copytree(directory, tmp_path / "copy")
    ts.exams.inspect(ts.open(directory))
    files = sorted(path.name for path in directory.iterdir())
    assert files == sorted(path.name for path in copy.iterdir())
    assert all((directory / name).read_bytes() == (copy / name).read_bytes() for name in files)
