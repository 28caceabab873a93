"""Casts, against torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import RefusedError, UsageError

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """Return numbers that a careless cast gets wrong: ties, subnormals, signed zeros, infinities, NaN."""
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-8)], dtype=torch.float64)
    small = torch.tensor([2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-126, 2.0**-133, 0.0, -0.0], dtype=torch.float64)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 65504.0, -65504.0], dtype=torch.float64)
    random = torch.randn(300_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat([ties, small, odd, random]).to(dtype)


@pytest.mark.parametrize("target", TORCH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_cast_rounds_as_torch_rounds(dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    # A bfloat16 next to 65504 is 65536, which float16 does not hold.
    numbers = awkward(dtype)
    numbers = numbers[(numbers.abs() != 65536)] if target == "float16" else numbers
    source = make.save(tmp_path / "source", {"a.weight": numbers, "b.weight": numbers.clone()[:, None]}, make.config())
    ts.write(ts.ops.cast(ts.open(source), target), tmp_path / "dest", memory="300kB")
    wanted = numbers.to(TORCH[target])
    written = make.read(tmp_path / "dest")
    assert torch.equal(torch.isnan(written["a.weight"]), torch.isnan(wanted))
    known = ~torch.isnan(wanted)
    assert torch.equal(make.bits(written["a.weight"][known]), make.bits(wanted[known]))
    assert written["b.weight"].shape == (len(numbers), 1)


@pytest.mark.parametrize("number", [65520.0, -1e5, 3.4e38])
def test_a_number_that_does_not_fit_is_refused_by_name(number: float, tmp_path: Path) -> None:
    made = make.tensors(1, torch.float32)
    made["model.layers.0.mlp.up_proj.weight"][5, 7] = number
    source = make.save(tmp_path / "source", made, make.config(1))
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: holds .* does not fit F16"):
        ts.write(ts.ops.cast(ts.open(source), "float16"), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_only_the_named_tensors_are_cast_and_the_config_keeps_its_dtype(plain: Path, tmp_path: Path) -> None:
    ts.write(ts.ops.cast(ts.open(plain), "float32", "*q_proj*, lm_head.weight"), tmp_path / "dest")
    written = make.read(tmp_path / "dest")
    for name, tensor in make.tensors().items():
        chosen = "q_proj" in name or name == "lm_head.weight"
        assert torch.equal(make.bits(written[name]), make.bits(tensor.float() if chosen else tensor))
    assert (tmp_path / "dest/config.json").read_bytes() == (plain / "config.json").read_bytes()


def test_a_cast_of_everything_is_said_in_the_config(plain: Path, tmp_path: Path) -> None:
    ts.write(ts.ops.cast(ts.open(plain), "float32"), tmp_path / "dest")
    assert json.loads((tmp_path / "dest/config.json").read_text())["torch_dtype"] == "float32"
    assert {tensor.dtype for tensor in make.read(tmp_path / "dest").values()} == {torch.float32}


def test_a_cast_to_what_it_is_copies(plain: Path) -> None:
    ckpt = ts.ops.cast(ts.open(plain), "bfloat16")
    assert all(tensor.span for tensor in ckpt.tensors.values())


def test_integers_keep_their_bits(tmp_path: Path) -> None:
    made = {"a.weight": torch.ones(3), "position_ids": torch.arange(5), "mask": torch.tensor([True, False])}
    source = make.save(tmp_path / "source", made, make.config())
    ts.write(ts.ops.cast(ts.open(source), "float16"), tmp_path / "dest")
    assert make.same(make.read(tmp_path / "dest"), {**made, "a.weight": made["a.weight"].half()})


def test_a_pattern_that_matches_nothing_is_not_understood(plain: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing matches 'model\.layer\.\*'"):
        ts.ops.cast(ts.open(plain), "float32", "model.layer.*")
