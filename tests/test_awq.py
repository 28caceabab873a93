"""AWQ in both layouts: what no library's checkpoint in `oracles` has, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import packed
import tensorsurgeon as ts
from packed import NAME, Codes
from tensorsurgeon.errors import RefusedError

SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GEMV = {**SETTINGS, "version": "gemv"}
I32 = torch.int32


def gemm(held: Codes, bits: int = 4) -> dict[str, torch.Tensor]:
    return {
        "qweight": packed.tensor(packed.interleaved(held.codes.T, bits)),
        "qzeros": packed.tensor(packed.interleaved(held.zeros.T, bits)),
        "scales": packed.tensor(held.scales.T.astype(np.float16)),
    }


def gemv(held: Codes, width: int) -> dict[str, torch.Tensor]:
    rows, groups = held.scales.shape
    zeros, scales = np.zeros((rows, 8 * width), int), np.zeros((rows, 8 * width), np.float16)
    zeros[:, :groups], scales[:, :groups] = held.zeros, held.scales
    return {
        "qweight": packed.tensor(packed.stream(held.codes, 4)),
        "qzeros": packed.tensor(packed.stream(zeros, 4)),
        "scales": packed.tensor(scales),
    }


def check(place: Path, held: Codes, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    tensor = ts.ops.dequantize(ts.open(packed.save(place, parts, settings)), "float32")[NAME]
    whole = bytes(tensor.read().data)
    np.testing.assert_array_equal(np.frombuffer(whole, np.float32).reshape(tensor.shape), held.numbers, strict=True)
    for start, stop in ((0, 1), (3, 4), (5, 8), (1, tensor.rows)):
        part = bytes(tensor.read(start, stop).data)
        assert part == whole[start * tensor.row_bytes : stop * tensor.row_bytes]


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(64, 96, 32), (8, 96, 32), (200, 35, -1), (136, 1, -1), (64, 80, 64)]
)
def test_gemm_of_any_shape(rows: int, columns: int, group: int, tmp_path: Path) -> None:
    held = packed.codes(4, (rows, columns), columns if group == -1 else group)
    check(tmp_path / "source", held, gemm(held), {**SETTINGS, "group_size": group})


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_gemm_of_autoround_in_more_bits(bits: int, tmp_path: Path) -> None:
    held = packed.codes(bits, (64, 96), 32)
    settings = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "packing_format": "auto_round:auto_awq"}
    check(tmp_path / "source", held, gemm(held, bits), settings)


@pytest.mark.parametrize(
    ("columns", "group", "width"),
    [(256, 128, 1), (1152, 128, 2), (128, 64, 2), (96, 32, 4), (1056, 32, 8), (256, -1, 1)],
)
def test_gemv_with_room_for_more_groups(columns: int, group: int, width: int, tmp_path: Path) -> None:
    held = packed.codes(4, (24, columns), columns if group == -1 else group)
    check(tmp_path / "source", held, gemv(held, width), {**GEMV, "group_size": group})


def test_where_shapes_fit_both_the_config_decides(tmp_path: Path) -> None:
    # 32 rows of 256 columns as GEMV have the shapes of GPTQ with 32 rows; the method says which.
    held = packed.codes(4, (24, 256), 32)
    parts = gemv(held, 4)
    assert parts["qweight"].shape == parts["scales"].shape
    check(tmp_path / "source", held, parts, GEMV)


def test_old_settings_beside_the_config_and_those_of_autoround(tmp_path: Path) -> None:
    held = packed.codes(4, (64, 96), 32)
    check(tmp_path / "old", held, gemm(held), {"quant_method": "awq", "w_bit": 4, "q_group_size": 32})
    source = packed.save(tmp_path / "file", gemm(held), None)
    (source / "quant_config.json").write_text('{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}')
    assert sorted(ts.ops.dequantize(ts.open(source))) == [NAME, "model.norm.weight"]
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"}
    check(tmp_path / "autoround", held, gemm(held), settings)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"scales": None}, r"up_proj\.scales: is missing"),
        ({"qzeros": None}, r"up_proj\.qzeros: is missing"),
        ({"qweight": None}, r"up_proj\.qweight: is missing"),
        ({"scales": torch.zeros(3, 64, dtype=I32)}, r"up_proj\.scales in model.safetensors: is I32, not F32 or"),
        ({"qweight": torch.zeros(96, 8, dtype=torch.int16)}, r"qweight in model.safetensors: is I16, not I32"),
        ({"qweight": torch.zeros((), dtype=I32)}, r"qweight in model.safetensors: has shape \[\], and is no matrix"),
        ({"qweight": torch.zeros(64, 8, dtype=I32)}, r"qzeros in model.safetensors: has shape \[3, 8\], but \[2, 8\]"),
        ({"qweight": torch.zeros(96, 7, dtype=I32)}, r"qzeros in model.safetensors: has shape \[3, 8\], but \[3, 7\]"),
        ({"qzeros": torch.zeros(3, 7, dtype=I32)}, r"qzeros in model.safetensors: has shape \[3, 7\], but \[3, 8\]"),
        ({"scales": torch.zeros(2, 64)}, r"scales in model.safetensors: has shape \[2, 64\], but \[3, 64\]"),
        ({"g_idx": torch.zeros(96, dtype=I32)}, r"up_proj\.g_idx: is no part of a module in the format AWQ"),
    ],
)
def test_broken_parts_are_refused_by_name_and_file(
    edits: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    parts = gemm(packed.codes(4, (64, 96), 32)) | edits
    source = packed.save(tmp_path / "source", {part: it for part, it in parts.items() if it is not None}, SETTINGS)
    with pytest.raises(RefusedError, match=message):
        ts.ops.dequantize(ts.open(source))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"config.json: the tensors are packed as AWQ, but quant_method is None"),
        ({**SETTINGS, "quant_method": "gptq"}, "the tensors are packed as AWQ, but quant_method is 'gptq'"),
        ({**SETTINGS, "bits": 8}, r"up_proj is AWQ of 8 bits, but the shapes in .*model\.safetensors are of 4"),
        ({**SETTINGS, "bits": 5}, r"up_proj is AWQ of 5 bits, but the shapes in .*model\.safetensors are of 4"),
        ({**SETTINGS, "version": "gemv_fast"}, "version 'gemv_fast' is packed for one kernel"),
        ({**SETTINGS, "version": "new"}, "version 'new' of AWQ is not decoded"),
        ({**SETTINGS, "group_size": 64}, r"qzeros in model.safetensors: has shape \[3, 8\], but \[2, 8\] is needed"),
        ({**SETTINGS, "group_size": "32"}, "the group size of model.layers.0.mlp.up_proj is '32'"),
        (
            {**SETTINGS, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
            "packing_format is 'auto_round:auto_gptq', but .* is packed as AWQ",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(settings: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    source = packed.save(tmp_path / "source", gemm(packed.codes(4, (64, 96), 32)), settings)
    with pytest.raises(RefusedError, match=message):
        ts.ops.dequantize(ts.open(source))


def test_gemv_with_another_width_of_zero_points_is_refused(tmp_path: Path) -> None:
    parts = gemv(packed.codes(4, (24, 96), 32), 4)
    with pytest.raises(
        RefusedError, match=r"qzeros in model.safetensors: has shape \[24, 4\], but \[24, 2\] is needed"
    ):
        ts.ops.dequantize(ts.open(packed.save(tmp_path / "source", parts, {**GEMV, "group_size": 64})))


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_a_scale_that_is_no_number_is_refused_when_it_is_read(version: str, tmp_path: Path) -> None:
    held = packed.codes(4, (64, 96), 32)
    parts = gemm(held) if version == "gemm" else gemv(held, 4)
    parts["scales"][2, 2] = float("nan")
    source = packed.save(tmp_path / "source", parts, {**SETTINGS, "version": version})
    with pytest.raises(RefusedError, match=rf"{NAME}: a scale is NaN.* \(in model\.safetensors\)"):
        ts.write(ts.ops.dequantize(ts.open(source)), tmp_path / "dest")
