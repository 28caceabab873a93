"""MLX: faults, settings for single modules, and bit streams of every width against their plain reference."""

from __future__ import annotations

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

AFFINE = {"group_size": 64, "bits": 4}


def words(*shape: int) -> torch.Tensor:
    return random_bytes(*shape[:-1], 4 * shape[-1]).view(torch.uint32)


def affine(**edits: Any) -> dict[str, torch.Tensor | None]:
    return {".weight": words(6, 16), ".scales": random_scales(6, 2), ".biases": random_scales(6, 2), **edits}


def floats(groups: int = 4, **edits: Any) -> dict[str, torch.Tensor | None]:
    return {".weight": words(6, 16), ".scales": random_bytes(6, groups, below=126), **edits}


def settings(values: dict[str, Any]) -> dict[str, Any]:
    return {"quantization": values, "quantization_config": values}


@pytest.mark.parametrize(
    ("parts", "values", "message"),
    [
        (affine(**{".weight": None}), AFFINE, rf"{MODULE}\.weight: is missing"),
        (affine(**{".weight": words(6, 16).view(torch.int32)}), AFFINE, rf"\.weight in {FILE}: is I32, not U32"),
        (affine(**{".weight": words(96)}), AFFINE, r"has shape \[96\]"),
        (affine(**{".weight": words(6, 15)}), AFFINE, rf"scales in {FILE}: has shape \[6, 2\] beside a weight of \[6"),
        (affine(**{".scales": None}), AFFINE, rf"{MODULE}\.scales: is missing"),
        (affine(**{".scales": random_scales(5, 2)}), AFFINE, rf"scales in {FILE}: has shape \[5, 2\], but \[6, 2\]"),
        (affine(**{".scales": random_scales(6, 3)}), AFFINE, r"4 bits in groups of 64, as config\.json says"),
        (affine(**{".scales": torch.ones(6, 2, dtype=torch.int8)}), AFFINE, rf"scales in {FILE}: is I8, not F32 or"),
        (affine(**{".biases": None}), AFFINE, rf"{MODULE}\.biases: is missing"),
        (affine(**{".biases": random_scales(6, 1)}), AFFINE, rf"biases in {FILE}: has shape \[6, 1\]"),
        (affine(), AFFINE | {"bits": 7}, r"config\.json: .* in mode affine, 7 bits, groups of 64: no"),
        (affine(), AFFINE | {"group_size": 48}, "4 bits, groups of 48: no"),
        (affine(), AFFINE | {"mode": "new"}, r"config\.json: 'mode' of .*up_proj is 'new'; known are affine, nvfp4"),
        (affine(), AFFINE | {MODULE: {"group_size": 32, "bits": 4}}, "4 bits in groups of 32, .* do not fit"),
        (affine(), {"group_size": 32, "bits": 4, "mode": "mxfp4"}, r"32, as config\.json says, do not fit"),
        (affine(), {"group_size": 64, "bits": 4, "mode": "mxfp4"}, "in mode mxfp4, 4 bits, groups of 64: no"),
        (floats(**{".biases": random_scales(6, 4)}), AFFINE, r"\.biases: is no part of a module in .* MLX mxfp4"),
        (floats(), AFFINE | {MODULE: {"mode": "nvfp4"}}, "4 bits in groups of 16, .* do not fit"),
        (floats(8, **{".global_scale": random_scales(2)}), AFFINE, rf"global_scale in {FILE}: has shape \[2\], but"),
        (floats(4, **{".global_scale": random_scales()}), AFFINE, r"\.global_scale: is no part of a module in .* mxf"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_module_part_and_file(
    parts: dict[str, torch.Tensor | None], values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert_refused(checkpoint(tmp_path / "source", parts, settings(values)), message)


def test_tensors_of_mlx_under_another_method_are_a_contradiction(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", affine(), {"quantization_config": {"quant_method": "gptq"}})
    assert_refused(source, r"config\.json: the tensors are those of MLX, but quant_method is 'gptq'")


def test_without_settings_bits_and_groups_are_not_guessed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", affine(), {})
    assert_refused(source, "quant_method is None; what is not in the tensors cannot be known")


@pytest.mark.parametrize(
    ("parts", "values"),
    [
        (affine(**{".scales": torch.full((6, 2), float("nan"))}), AFFINE),
        (affine(**{".biases": torch.full((6, 2), float("nan"))}), AFFINE),
        (floats(**{".scales": torch.full((6, 4), 255, dtype=torch.uint8)}), AFFINE),
        (floats(8, **{".scales": torch.full((6, 8), 0x7F, dtype=torch.uint8)}), AFFINE),
    ],
)
def test_a_scale_that_is_nan_is_refused(parts: dict[str, Any], values: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", parts, settings(values))
    assert_refused_while_decoding(source, tmp_path / "dest", rf"{MODULE}\.weight: a scale is NaN.*{FILE}")


@pytest.mark.parametrize("own", [{"group_size": 32, "bits": 8}, {"group_size": 32, "bits": 8, "mode": "affine"}])
def test_settings_of_a_module_count_and_are_affine_unless_they_say_so(own: dict[str, Any], tmp_path: Path) -> None:
    parts: dict[str, Any] = affine(**{".weight": words(6, 16)})
    values = {"group_size": 16, "bits": 4, "mode": "nvfp4", MODULE: own}
    found = decoded(checkpoint(tmp_path / "source", parts, settings(values)), tmp_path / "dest")
    codes = parts[".weight"].view(torch.uint8).float()
    spread = [parts[part].repeat_interleave(32, 1) for part in (".scales", ".biases")]
    assert torch.equal(found, codes * spread[0] + spread[1])


def test_scales_of_exponents_tell_their_mode_by_the_shapes(tmp_path: Path) -> None:
    parts: dict[str, Any] = floats(2)
    found = decoded(checkpoint(tmp_path / "source", parts, settings(AFFINE)), tmp_path / "dest")
    scales = torch.ldexp(torch.ones(6, 2), parts[".scales"].int() - 127).repeat_interleave(32, 1)
    wanted = parts[".weight"].view(torch.float8_e4m3fn).float() * scales
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 64, 99])
def test_streams_of_every_width_are_unpacked_as_plainly(bits: int, columns: int) -> None:
    stream = np.random.default_rng(bits).integers(0, 256, (5, -(-columns * bits // 8) + 3), dtype=np.uint8)
    fast = unpacking.unpack_rows(stream, bits, columns)
    assert np.array_equal(fast, unpacking.unpack_rows_plainly(stream, bits, columns))
