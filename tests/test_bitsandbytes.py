"""bitsandbytes: faults, kernels against their plain references, and what no fixture has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coded import (
    FILE,
    MODULE,
    as_bytes,
    assert_refused,
    assert_refused_while_decoding,
    checkpoint,
    decoded,
    random_bytes,
    random_scales,
)
from tensorsurgeon.kernels import unpacking
from tensorsurgeon.kernels.blockwise import decode_run, nested_scales
from tensorsurgeon.kernels.codes import UNSIGNED

SETTINGS = {"quantization_config": {"quant_method": "bitsandbytes"}}
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 48]}
STATE_PART = ".weight.quant_state.bitsandbytes__nf4"
DOUBLE = STATE | {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
TABLE = torch.linspace(-1, 1, 16)


def four_bits(**edits: Any) -> dict[str, torch.Tensor | None]:
    return {
        ".weight": random_bytes(144, 1),
        ".weight.absmax": random_scales(5),
        ".weight.quant_map": TABLE,
        STATE_PART: as_bytes(STATE),
        **edits,
    }


def double(**edits: Any) -> dict[str, torch.Tensor | None]:
    parts: dict[str, torch.Tensor | None] = {
        ".weight.absmax": random_bytes(5),
        ".weight.nested_absmax": random_scales(1),
        ".weight.nested_quant_map": torch.linspace(-1, 1, 256),
        STATE_PART: as_bytes(DOUBLE),
    }
    return four_bits(**(parts | edits))


def eight_bits(**edits: Any) -> dict[str, torch.Tensor | None]:
    return {
        ".weight": random_bytes(6, 48).view(torch.int8),
        ".SCB": random_scales(6),
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
        **edits,
    }


def by_hand(parts: dict[str, Any], shape: tuple[int, ...], block: int) -> torch.Tensor:
    """Take each code by itself, in plain Python."""
    stored = parts[".weight"].view(torch.uint8).flatten().tolist()
    numbers = []
    for place in range(int(np.prod(shape))):
        code = stored[place // 2] >> 4 if place % 2 == 0 else stored[place // 2] & 15
        numbers.append(parts[".weight.quant_map"][code] * parts[".weight.absmax"][place // block])
    return torch.stack(numbers).view(shape)


@pytest.mark.parametrize("shape", [(6, 48), (7, 9), (3, 5, 7), (1, 1), (2, 640)])
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_blocks_run_over_the_flattened_weight(shape: tuple[int, ...], block: int, tmp_path: Path) -> None:
    count = int(np.prod(shape))
    parts = four_bits(
        **{
            ".weight": random_bytes(-(-count // 2), 1),
            ".weight.absmax": random_scales(-(-count // block)),
            STATE_PART: as_bytes(STATE | {"shape": list(shape), "blocksize": block}),
        }
    )
    found = decoded(checkpoint(tmp_path / "source", parts, SETTINGS), tmp_path / "dest")
    assert torch.equal(found, by_hand(parts, shape, block))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (four_bits(**{".weight": None}), rf"{MODULE}\.weight: is missing"),
        (four_bits(**{".weight": random_bytes(143, 1)}), rf"\.weight in {FILE}: holds 143 bytes, but .* are 144"),
        (four_bits(**{".weight": torch.zeros(144, 1, dtype=torch.int8)}), rf"\.weight in {FILE}: is I8, not U8 or"),
        (four_bits(**{".weight.absmax": None}), rf"{MODULE}\.weight\.absmax: is missing"),
        (four_bits(**{".weight.absmax": random_scales(4)}), rf"absmax in {FILE}: has shape \[4\], but \[5\] is needed"),
        (four_bits(**{".weight.absmax": random_scales(5).half()}), rf"absmax in {FILE}: is F16, not F32 or U8"),
        (four_bits(**{".weight.quant_map": None}), rf"{MODULE}\.weight\.quant_map: is missing"),
        (four_bits(**{".weight.quant_map": TABLE[:8]}), rf"quant_map in {FILE}: has shape \[8\]"),
        (four_bits(**{STATE_PART: None}), rf"{MODULE}{STATE_PART}: is missing"),
        (four_bits(**{STATE_PART: random_bytes(40)}), rf"bitsandbytes__nf4 in {FILE}: .*; what the codes mean"),
        (four_bits(**{STATE_PART: as_bytes(STATE | {"shape": [6]})}), rf"__nf4 in {FILE}: says .* that is no state"),
        (four_bits(**{STATE_PART: as_bytes(STATE | {"blocksize": 0})}), "that is no state of nf4 or fp4"),
        (four_bits(**{STATE_PART: as_bytes(STATE | {"blocksize": 2**40})}), "that is no state of nf4 or fp4"),
        (four_bits(**{STATE_PART: as_bytes(STATE | {"quant_type": "fp4"})}), "that is no state of nf4 or fp4"),
        (four_bits(**{STATE_PART: as_bytes(DOUBLE | {"nested_offset": float("nan")})}), "that is no state of nf4"),
        (four_bits(**{STATE_PART: as_bytes(STATE | {"shape": [6, 49]})}), r"\[6, 49\] in 4 bits are 147"),
        (four_bits(**{".SCB": random_scales(6)}), rf"{MODULE}\.weight in {FILE}: is U8, not I8"),
        (double(**{".weight.nested_absmax": None}), rf"{MODULE}\.weight\.nested_absmax: is missing"),
        (double(**{".weight.nested_absmax": random_scales(2)}), rf"nested_absmax in {FILE}: has shape \[2\]"),
        (double(**{".weight.nested_quant_map": None}), rf"{MODULE}\.weight\.nested_quant_map: is missing"),
        (double(**{STATE_PART: as_bytes(STATE)}), rf"absmax in {FILE}: is U8, but no nested_blocksize is given"),
        (eight_bits(**{".weight": None}), rf"{MODULE}\.weight: is missing"),
        (eight_bits(**{".weight": random_bytes(6, 48)}), rf"\.weight in {FILE}: is U8, not I8"),
        (eight_bits(**{".weight": random_bytes(288).view(torch.int8)}), r"has shape \[288\], not two"),
        (eight_bits(**{".SCB": None}), rf"{MODULE}\.SCB: is missing"),
        (eight_bits(**{".SCB": random_scales(5)}), rf"SCB in {FILE}: has shape \[5\], but \[6\]"),
        (eight_bits(**{".SCB": random_scales(6).bfloat16()}), rf"SCB in {FILE}: is BF16, not F32"),
        (eight_bits(**{".weight_format": torch.tensor(2, dtype=torch.uint8)}), rf"_format in {FILE}: is not 0, rows"),
        (eight_bits(**{".qweight": random_bytes(4, 4)}), r"\.qweight: is no part of a module in the format bitsand"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_module_part_and_file(
    parts: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    assert_refused(checkpoint(tmp_path / "source", parts, SETTINGS), message)


@pytest.mark.parametrize("parts", [four_bits(), double(), eight_bits()])
def test_another_method_in_the_config_is_a_contradiction(parts: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", parts, {"quantization_config": {"quant_method": "awq"}})
    assert_refused(source, r"config\.json: the tensors are those of bitsandbytes, but quant_method is 'awq'")


@pytest.mark.parametrize(
    "parts",
    [
        four_bits(**{".weight.absmax": torch.tensor([1.0, 1, float("nan"), 1, 1])}),
        double(**{".weight.nested_absmax": torch.tensor([float("nan")])}),
        eight_bits(**{".SCB": torch.tensor([1.0, 1, 1, float("nan"), 1, 1])}),
    ],
)
def test_a_scale_that_is_nan_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", parts, SETTINGS)
    message = rf"{MODULE}\.weight: a scale is NaN.*{FILE}"
    assert_refused_while_decoding(source, tmp_path / "dest", message)


def test_a_conv1d_is_turned_back_and_only_of_models_that_have_it(tmp_path: Path) -> None:
    parts, module = eight_bits(), "transformer.h.0.mlp.c_fc"
    name = f"{module}.weight"
    found = [
        decoded(
            checkpoint(tmp_path / model, parts, SETTINGS | {"model_type": model}, module=module),
            tmp_path / f"{model}-dest",
            "bfloat16",
            name,
        )
        for model in ("gpt2", "gpt_bigcode")
    ]
    assert found[0].shape == (48, 6)
    assert torch.equal(found[0], found[1].T)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 511, 512, 600])
def test_codes_with_the_first_in_the_high_half_are_unpacked_as_plainly(count: int) -> None:
    stream = np.random.default_rng(0).permutation(256).astype(np.uint8)
    fast = unpacking.unpack_high_first(stream, count)
    assert np.array_equal(fast, unpacking.unpack_high_first_plainly(stream, count))


@pytest.mark.parametrize("size", [1, 24, 64, 4096, 5000])
def test_a_run_is_cut_where_its_scales_are(size: int) -> None:
    chance = np.random.default_rng(0)
    stream, count = chance.integers(0, 256, 5001, dtype=np.uint8), 10001
    scales = chance.random(-(-count // size)).astype(np.float32)
    run = decode_run(stream, count, UNSIGNED, scales, size, "F32")
    codes = unpacking.unpack_high_first_plainly(stream, count).astype(np.float32)
    assert np.array_equal(np.frombuffer(run.data, np.float32), codes * scales.repeat(size)[:count])


def test_nested_scales_of_a_part_are_that_part_of_all() -> None:
    chance = np.random.default_rng(0)
    codes, table = chance.integers(0, 256, 700, dtype=np.uint8), chance.random(256).astype(np.float32)
    outer = chance.random(3).astype(np.float32)
    spread = torch.from_numpy(outer).repeat_interleave(256)[:700]
    wanted = torch.from_numpy(table)[torch.from_numpy(codes).long()] * spread + 0.125
    for start in (0, 1, 255, 300):
        part = nested_scales(codes[start:], table, outer, start, 256, 0.125)
        assert torch.equal(torch.from_numpy(part), wanted[start:])
