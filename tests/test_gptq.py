"""GPTQ and AutoRound: what no library's checkpoint in `oracles` has, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import packed
import tensorsurgeon as ts
from packed import MODULE, NAME, Codes
from tensorsurgeon.errors import RefusedError

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AUTOROUND = {**SETTINGS, "quant_method": "auto-round", "packing_format": "auto_round"}


def decoded(source: Path) -> np.ndarray[Any, Any]:
    tensor = ts.ops.dequantize(ts.open(source), "float32")[NAME]
    whole = bytes(tensor.read().data)
    for start, stop in ((0, 1), (3, 4), (5, tensor.rows)):
        part = bytes(tensor.read(start, stop).data)
        assert part == whole[start * tensor.row_bytes : stop * tensor.row_bytes]
    return np.frombuffer(whole, np.float32).reshape(tensor.shape)


def check(place: Path, held: Codes, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    np.testing.assert_array_equal(decoded(packed.save(place, parts, settings)), held.numbers, strict=True)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_both_versions_with_any_zero_point(bits: int, less_one: bool, index: bool, tmp_path: Path) -> None:
    held = packed.codes(bits, (64, 96), 32)
    settings = {**SETTINGS, "bits": bits, "checkpoint_format": "gptq" if less_one else "gptq_v2"}
    check(tmp_path / "source", held, packed.gptq(held, bits, less_one=less_one, index=index), settings)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planes_of_bits(bits: int, tmp_path: Path) -> None:
    held = packed.codes(bits, (64, 96), 32)
    settings = {**SETTINGS, "bits": bits, "checkpoint_format": "gptq_p"}
    check(tmp_path / "source", held, packed.gptq(held, bits, less_one=False, planar=True), settings)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("packing", "less_one"),
    [
        ("auto_round", False), ("auto_round:exllamav2", False), ("auto_round:gptqmodel", False),
        ("auto_round:auto_gptq", True), ("auto_round:gptq:exllamav2", True),
    ],
)  # fmt: skip
def test_autoround_has_streams_of_any_width(bits: int, packing: str, less_one: bool, tmp_path: Path) -> None:
    held = packed.codes(bits, (64, 96), 32)
    settings = {**AUTOROUND, "bits": bits, "packing_format": packing}
    check(tmp_path / "source", held, packed.gptq(held, bits, less_one=less_one, index=False), settings)


@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_points_tell_the_version_themselves(
    bits: int, less_one: bool, said: str, tmp_path: Path
) -> None:
    held = packed.codes(bits, (64, 96), 32, zeros=[2 ** (bits - 1)])
    settings = {**SETTINGS, "bits": bits, "sym": True, "checkpoint_format": said}
    check(tmp_path / "source", held, packed.gptq(held, bits, less_one=less_one), settings)


def test_the_label_counts_where_zero_points_differ(tmp_path: Path) -> None:
    held = packed.codes(4, (64, 96), 32, zeros=[7, 8])
    for number, less_one in enumerate((True, False)):
        settings = {**SETTINGS, "sym": True, "format": "gptq" if less_one else "gptq_v2"}
        check(tmp_path / str(number), held, packed.gptq(held, 4, less_one=less_one), settings)


def test_columns_in_the_order_of_activations(tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(256)
    for bits in (2, 4, 8):
        held = packed.codes(bits, (40, 256), 32)
        held = held._replace(index=held.index[order])
        parts = packed.gptq(held, bits)
        check(tmp_path / str(bits), held, parts, {**SETTINGS, "bits": bits, "desc_act": True})
        long = {**parts, "g_idx": parts["g_idx"].long()}
        check(tmp_path / f"long-{bits}", held, long, {**SETTINGS, "bits": bits, "desc_act": True})


@pytest.mark.parametrize("group", [64, -1])
@pytest.mark.parametrize("index", [True, False])
def test_a_last_group_that_is_smaller_and_one_group(group: int, index: bool, tmp_path: Path) -> None:
    held = packed.codes(4, (64, 96), 96 if group == -1 else group)
    check(tmp_path / "source", held, packed.gptq(held, 4, index=index), {**SETTINGS, "group_size": group})


@pytest.mark.parametrize(("rows", "columns"), [(70, 35), (5, 33), (1, 1), (9, 130)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_last_words_that_are_not_full(bits: int, rows: int, columns: int, tmp_path: Path) -> None:
    held = packed.codes(bits, (rows, columns), 32)
    source = packed.save(tmp_path / "source", packed.gptq(held, bits), {**SETTINGS, "bits": bits})
    tensor = ts.ops.dequantize(ts.open(source), "float32")[NAME]
    np.testing.assert_array_equal(np.frombuffer(tensor.read().data, np.float32).reshape(tensor.shape), held.numbers)


def test_few_rows_have_the_bits_that_the_config_says(tmp_path: Path) -> None:
    # One word holds the zero points of four rows at 5 bits as at 8; only the rows of codes differ.
    held = packed.codes(4, (6, 32), 32)
    parts = packed.gptq(held, 4, less_one=False, index=False)
    check(tmp_path / "source", held, parts, {**AUTOROUND, "packing_format": "auto_round"})
    source = packed.save(tmp_path / "other", parts, {**AUTOROUND, "bits": 9})
    with pytest.raises(RefusedError, match=r"that is GPTQ of \[.*4.*\] bits, and the config says 9"):
        ts.ops.dequantize(ts.open(source))


@pytest.mark.parametrize(
    "changes",
    [
        {"dynamic": {r"-:.*lm_head": {}, r"+:.*\.up_proj": {"group_size": 48}}},
        {"dynamic": {r"model\.layers\.0\.mlp\.up_proj": {"group_size": 48}, r".*": {"group_size": 96}}},
        {"extra_config": {MODULE: {"group_size": 48}, r"up_proj": {"group_size": 96}}},
        {"extra_config": {r"layers\.0\..*up": {"group_size": 48}}},
    ],
)
def test_what_the_config_says_of_one_module_counts(changes: dict[str, Any], tmp_path: Path) -> None:
    # Two groups of 96 columns are 48 each, or 64 and 32.
    held = packed.codes(4, (64, 96), 48)
    settings = {**SETTINGS, "group_size": 64, **changes}
    check(tmp_path / "source", held, packed.gptq(held, 4, index=False), settings)


def test_scales_in_any_float_and_a_bias_that_stays(tmp_path: Path) -> None:
    held = packed.codes(4, (64, 96), 32)
    held = held._replace(scales=torch.from_numpy(held.scales).bfloat16().float().numpy())
    for dtype in (torch.bfloat16, torch.float32):
        parts = {**packed.gptq(held, 4), "scales": packed.tensor(held.scales.T).to(dtype), "bias": torch.ones(64)}
        source = packed.save(tmp_path / str(dtype), parts, SETTINGS)
        np.testing.assert_array_equal(decoded(source), held.numbers)
        plain = ts.ops.dequantize(ts.open(source))
        assert sorted(plain) == ["model.layers.0.mlp.up_proj.bias", NAME, "model.norm.weight"]
        assert plain[f"{MODULE}.bias"].span


I32 = torch.int32


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"scales": None}, r"up_proj\.scales: is missing"),
        ({"qzeros": None}, r"up_proj\.qzeros: is missing"),
        ({"qweight": None}, r"up_proj\.qweight: is missing"),
        ({"qweight": None, "scales": None}, r"up_proj\.scales: is missing"),
        ({"scales": torch.zeros(3, 64, dtype=I32)}, r"up_proj\.scales in model.safetensors: is I32, not F32 or"),
        ({"qweight": torch.zeros(12, 64)}, r"up_proj\.qweight in model.safetensors: is F32, not I32"),
        ({"qzeros": torch.zeros(3, 8, dtype=torch.int64)}, r"up_proj\.qzeros in model.safetensors: is I64, not I32"),
        ({"qweight": torch.zeros((), dtype=I32)}, r"up_proj\.qweight in model.safetensors: has shape \[\], and is no"),
        ({"qweight": torch.zeros(11, 64, dtype=I32)}, r"qweight in .*: has shape \[11, 64\], but \[12, 64\]"),
        ({"qweight": torch.zeros(12, 60, dtype=I32)}, r"qweight in model.safetensors: has shape \[12, 60\]"),
        ({"qzeros": torch.zeros(3, 7, dtype=I32)}, r"qzeros in model.safetensors: has shape \[3, 7\], but \[3, 8\]"),
        ({"qzeros": torch.zeros(2, 8, dtype=I32)}, r"qzeros in model.safetensors: has shape \[2, 8\], but \[3, 8\]"),
        ({"scales": torch.zeros(3, 32)}, r"qweight in model.safetensors: has shape"),
        ({"g_idx": torch.zeros(95)}, r"up_proj\.g_idx in model.safetensors: is F32, not I32"),
        ({"g_idx": torch.zeros(80, dtype=I32)}, r"qweight in model.safetensors: has shape \[12, 64\], but \[10, 64\]"),
        ({"g_idx": torch.zeros(96, 1, dtype=I32)}, r"g_idx in model.safetensors: has shape \[96, 1\], but \[96\]"),
        ({"weight": torch.zeros(64, 96)}, r"up_proj\.weight: is no part of a module in the format GPTQ"),
    ],
)  # fmt: skip
def test_broken_parts_are_refused_by_name_and_file(
    edits: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    parts = packed.gptq(packed.codes(4, (64, 96), 32), 4) | edits
    source = packed.save(tmp_path / "source", {part: it for part, it in parts.items() if it is not None}, SETTINGS)
    with pytest.raises(RefusedError, match=message):
        ts.ops.dequantize(ts.open(source))


def test_a_truncated_module_without_an_index_does_not_fit_its_groups(tmp_path: Path) -> None:
    parts = packed.gptq(packed.codes(4, (64, 96), 32), 4, index=False)
    source = packed.save(tmp_path / "source", {**parts, "qweight": parts["qweight"][:8].clone()}, SETTINGS)
    with pytest.raises(
        RefusedError, match=r"scales in model.safetensors: has shape \[3, 64\], but \[2, 64\] is needed"
    ):
        ts.ops.dequantize(ts.open(source))


@pytest.mark.parametrize(
    ("part", "place", "value", "message"),
    [
        ("g_idx", 5, -1, r"up_proj\.g_idx: names groups -1 to 2, but there are 0 to 2"),
        ("g_idx", 95, 3, r"up_proj\.g_idx: names groups 0 to 3, but there are 0 to 2"),
        ("g_idx", slice(None), -1, r"up_proj\.g_idx: names group -1 throughout"),
        ("scales", (1, 7), float("nan"), "a scale is NaN"),
    ],
)
def test_broken_numbers_are_refused_when_they_are_read(
    part: str, place: Any, value: float, message: str, tmp_path: Path
) -> None:
    parts = packed.gptq(packed.codes(4, (64, 96), 32), 4)
    parts[part][place] = value
    source = packed.save(tmp_path / "source", parts, SETTINGS)
    with pytest.raises(RefusedError, match=rf"{NAME}: .*{message}.* \(in model\.safetensors\)"):
        ts.write(ts.ops.dequantize(ts.open(source)), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"config.json: the tensors are packed as GPTQ, but quant_method is None"),
        ({**SETTINGS, "quant_method": "fp8"}, "quant_method is 'fp8'"),
        ({**SETTINGS, "checkpoint_format": "gptq_v9"}, "checkpoint_format 'gptq_v9' is not decoded"),
        ({**SETTINGS, "checkpoint_format": "marlin"}, "'marlin' is packed for one kernel"),
        ({**SETTINGS, "is_marlin_format": True}, "nor what is_marlin_format"),
        ({**SETTINGS, "group_size": None}, "the group size of model.layers.0.mlp.up_proj is None"),
        ({**SETTINGS, "group_size": 0}, "the group size of model.layers.0.mlp.up_proj is 0"),
        ({**SETTINGS, "group_size": 64}, r"scales in model.safetensors: has shape \[3, 64\], but \[2, 64\] is needed"),
        ({**SETTINGS, "group_size": -1}, r"scales in model.safetensors: has shape \[3, 64\], but \[1, 64\] is needed"),
        ({**SETTINGS, "dynamic": {"+:[": {}}}, r"'\+?:?\[' is no regular expression"),
        ({**AUTOROUND, "packing_format": None}, "packing_format is None"),
        ({**AUTOROUND, "packing_format": "auto_round:auto_awq"}, "packing_format is 'auto_round:auto_awq', but the"),
        ({**AUTOROUND, "act_bits": 8}, "act_bits is 8"),
        ({**AUTOROUND, "rotation_config": {"kind": "hadamard"}}, "has a rotation_config"),
        ({**SETTINGS, "quant_method": "awq"}, "the tensors are packed as GPTQ, but quant_method is 'awq'"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused(settings: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    parts = packed.gptq(packed.codes(4, (64, 96), 32), 4, index=False)
    with pytest.raises(RefusedError, match=message):
        ts.ops.dequantize(ts.open(packed.save(tmp_path / "source", parts, settings)))


def test_planes_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    parts = packed.gptq(packed.codes(3, (64, 40), 40), 3, less_one=False)
    source = packed.save(tmp_path / "source", parts, {**SETTINGS, "bits": 3, "checkpoint_format": "gptq_p"})
    with pytest.raises(RefusedError, match=r"qweight in model.safetensors: \[64, 40\] in planes of 32"):
        ts.ops.dequantize(ts.open(source))


def test_all_faults_of_a_module_are_said_at_once(tmp_path: Path) -> None:
    parts = {"qweight": torch.zeros(12, 64), "g_idx": torch.zeros(96, dtype=I32)}
    with pytest.raises(RefusedError) as refused:
        ts.ops.dequantize(ts.open(packed.save(tmp_path / "source", parts, SETTINGS)))
    assert [problem.split(":")[0] for problem in refused.value.problems] == [
        f"{MODULE}.qweight in model.safetensors", f"{MODULE}.qzeros", f"{MODULE}.scales",
    ]  # fmt: skip
