"""Block FP8 decoded, against transformers, plain torch and float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import CheckpointError, RefusedError, UsageError
from tensorsurgeon.kernels.codes import E4M3
from tensorsurgeon.kernels.scaling import Scaling, decode, decode_plainly
from tensorsurgeon.kernels.tables import look_up

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def formula(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Widen, spread the scale over its blocks, multiply in float32, round once."""
    spread = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (codes.float() * spread[: codes.shape[0], : codes.shape[1]]).to(dtype)


def expected(source: Path, block: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    read = make.read(source)
    return {
        name: formula(tensor, read[name + "_scale_inv"], block, dtype)
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in read.items()
        if not name.endswith("_scale_inv")
    }


def test_the_table_of_e4m3_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, codes)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (32, 256), (1, 32), (500, 500)])
def test_every_weight_is_code_times_scale_rounded_once(
    dtype: str, scale_dtype: torch.dtype, block: tuple[int, int], tmp_path: Path
) -> None:
    source = make.fp8(tmp_path / "source", layers=1, block=block, scale_dtype=scale_dtype)
    ts.write(ts.ops.dequantize(ts.open(source), dtype), tmp_path / "dest")
    assert make.same(make.read(tmp_path / "dest"), expected(source, block, TORCH[dtype]))


def test_the_result_is_what_transformers_dequantizes(tmp_path: Path) -> None:
    # transformers spreads scales evenly over ragged blocks, which is wrong: its shapes must be whole blocks.
    changes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384}
    model = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_config.__globals__["AutoConfig"].for_model(**make.config(2, **changes))
    )
    torch.manual_seed(0)
    plain = {name: torch.randn_like(tensor).to(torch.bfloat16) * 0.05 for name, tensor in model.state_dict().items()}
    settings = make.config(2, quantization_config=make.fp8_settings(), **changes)
    source = make.save(tmp_path / "source", make.quantized(plain), settings, shards=2)
    oracle = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    ts.write(ts.ops.dequantize(ts.open(source)), tmp_path / "dest")
    assert make.same(make.read(tmp_path / "dest"), dict(oracle.state_dict()))


def test_the_error_of_a_whole_trip_is_what_fp8_allows(fp8: Path, tmp_path: Path) -> None:
    ts.write(ts.ops.dequantize(ts.open(fp8), "float32"), tmp_path / "dest")
    written, original = make.read(tmp_path / "dest"), make.tensors()
    for name, tensor in original.items():
        error = (written[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error < (0.04 if name.endswith("_proj.weight") else 1e-12)


def test_codes_for_nan_stay_nan_and_signed_zero_its_sign(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    made = make.tensors(1)
    made["model.layers.0.mlp.up_proj.weight"] = codes
    made["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.tensor([[0.5]])
    source = make.save(tmp_path / "source", made, make.config(1, quantization_config=make.fp8_settings()))
    ts.write(ts.ops.dequantize(ts.open(source), "float32"), tmp_path / "dest")
    written = load_file(tmp_path / "dest/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(torch.isnan(written), torch.isnan(codes.float()))
    assert torch.equal(torch.signbit(written), torch.signbit(codes.float()))
    finite = ~torch.isnan(written)
    assert torch.equal(written[finite], codes.float()[finite] * 0.5)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 257), (200, 130)])
def test_the_compiled_loop_is_the_plain_formula(dtype: str, shape: tuple[int, int]) -> None:
    chance = np.random.default_rng(0)
    codes = chance.integers(0, 0x7F, shape, dtype=np.uint8) | chance.choice([0, 128], shape).astype(np.uint8)
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    scale = np.exp(chance.normal(-6, 3, grid)).astype(np.float32)
    plain = decode_plainly(codes, E4M3, Scaling(scale, 128, 128), dtype)
    for fast in (decode, look_up):
        assert bytes(fast(codes, E4M3, Scaling(scale, 128, 128), dtype).data) == bytes(plain.data)


@pytest.mark.parametrize("scale", [2.0**-126, 1e-42, 3e38, 1e30])
def test_extreme_scales_round_as_torch_rounds(scale: float, tmp_path: Path) -> None:
    codes = torch.tensor([[0x01, 0x08, 0x38, 0x7E, 0x81, 0xFE, 0x00, 0x80]], dtype=torch.uint8).view(
        torch.float8_e4m3fn
    )
    factor = torch.tensor([[scale]])
    expected = bytes(formula(codes, factor, (128, 128), torch.bfloat16).view(torch.uint8).numpy())
    for fast in (decode, look_up):
        decoded = fast(codes.view(torch.uint8).numpy(), E4M3, Scaling(factor.numpy(), 128, 128), "BF16")
        assert bytes(decoded.data) == expected


def test_a_weight_too_large_for_float16_is_refused_by_name(fp8: Path, tmp_path: Path) -> None:
    shard = next(
        path for path in fp8.glob("*.safetensors") if "model.layers.2.mlp.up_proj.weight_scale_inv" in load_file(path)
    )
    read = load_file(shard)
    read["model.layers.2.mlp.up_proj.weight_scale_inv"] *= 1e9
    save_file(read, shard, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: .* does not fit float16"):
        ts.write(ts.ops.dequantize(ts.open(fp8), "float16"), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_modules_that_are_not_quantized_pass(tmp_path: Path) -> None:
    skipped = ("model.layers.0.mlp.down_proj", "model.layers.3.self_attn.o_proj")
    source = make.fp8(tmp_path / "source", skipped=skipped)
    ts.write(ts.ops.dequantize(ts.open(source)), tmp_path / "dest")
    written, original = make.read(tmp_path / "dest"), make.tensors()
    names = {module + ".weight" for module in skipped}
    assert make.same({name: written[name] for name in names}, {name: original[name] for name in names})


def test_the_config_no_longer_says_quantized(tmp_path: Path) -> None:
    source = make.fp8(tmp_path / "source", rope_scaling=None, note=1e-5)
    (source / "hf_quant_config.json").write_text("{}")
    ts.write(ts.ops.dequantize(ts.open(source), "float16"), tmp_path / "dest")
    before, after = ((source / "config.json").read_text(), (tmp_path / "dest" / "config.json").read_text())
    wanted = {key: value for key, value in json.loads(before).items() if key != "quantization_config"}
    assert json.loads(after) == wanted | {"torch_dtype": "float16"}
    assert list(json.loads(after)) == list(wanted)
    assert '"rms_norm_eps": 1e-06' in after
    assert not (tmp_path / "dest/hf_quant_config.json").exists()


def broken(source: Path, **edits: torch.Tensor | None) -> Path:
    """Replace or, with None, remove tensors of layer 1's up_proj in the single shard of `source`."""
    read = load_file(source / "model.safetensors")
    for suffix, tensor in edits.items():
        name = f"model.layers.1.mlp.up_proj.{suffix}"
        read.pop(name, None)
        if tensor is not None:
            read[name] = tensor
    save_file(read, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"weight_scale_inv": None}, "up_proj.weight: is F8_E4M3 without a weight_scale_inv"),
        ({"weight": None}, "up_proj.weight_scale_inv: has no weight to scale: .* is missing"),
        ({"weight": torch.ones(320, 192, dtype=torch.bfloat16)}, "has no weight to scale: .* is BF16, not F8_E4M3"),
        ({"weight_scale_inv": torch.ones(2, 2)}, r"\[2, 2\], but \[320, 192\] in blocks of .* needs \[3, 2\]"),
        ({"weight_scale_inv": torch.ones(6)}, r"weight_scale_inv: has shape \[6\]"),
        ({"weight_scale_inv": torch.ones(())}, r"weight_scale_inv: has shape \[\]"),
        ({"weight_scale_inv": torch.ones(3, 2, dtype=torch.int8)}, "weight_scale_inv in .*: is I8, not F32 or"),
        ({"weight": torch.zeros(320, 192).to(torch.float8_e5m2)}, "is F8_E5M2"),
        ({"qweight": torch.ones(4, 4, dtype=torch.int32)}, "qweight: is no part of a module in the format FP8"),
    ],
)  # fmt: skip
def test_broken_fp8_is_refused_by_name_and_exam(
    edits: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    source = broken(make.fp8(tmp_path / "source", shards=1), **edits)
    with pytest.raises(RefusedError, match=message):
        ts.ops.dequantize(ts.open(source))


def test_all_faults_are_said_at_once(tmp_path: Path) -> None:
    source = broken(make.fp8(tmp_path / "source", shards=1), weight_scale_inv=None)
    read = load_file(source / "model.safetensors")
    read["model.layers.0.mlp.gate_proj.weight_scale_inv"] = torch.ones(9, 9)
    save_file(read, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(RefusedError) as refused:
        ts.ops.dequantize(ts.open(source))
    assert len(refused.value.problems) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_block_size": None}, "with one scale needs"),
        ({"weight_block_size": [128]}, r"'weight_block_size' is \[128\]"),
        ({"weight_block_size": [0, 128]}, "'weight_block_size' is"),
        ({"weight_block_size": [96, 96]}, "in blocks of"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"weight_scale_semantics": "reversed"}, "'weight_scale_semantics' is 'reversed'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    quantization = make.fp8_settings() | settings
    source = make.save(
        tmp_path / "s", make.quantized(make.tensors(1)), make.config(1, quantization_config=quantization)
    )
    with pytest.raises(RefusedError, match=message):
        ts.ops.dequantize(ts.open(source))


def test_without_any_quantization_config_the_block_is_not_guessed(tmp_path: Path) -> None:
    source = make.save(tmp_path / "source", make.quantized(make.tensors(1)), make.config(1))
    with pytest.raises(RefusedError, match="what is not in the tensors cannot be known"):
        ts.ops.dequantize(ts.open(source))


def test_a_plain_checkpoint_is_not_dequantized(plain: Path) -> None:
    with pytest.raises(RefusedError, match="nothing is quantised here"):
        ts.ops.dequantize(ts.open(plain))


@pytest.mark.parametrize(
    ("settings", "suffixes", "message"),
    [
        ({"quant_method": "exl3"}, ("trellis", "suh", "svh"), "up_proj.trellis: is EXL3"),
        ({"quant_method": "hqq"}, ("qweight", "scales"), "quant_method 'hqq' is HQQ; it is not decoded"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, ("qweight", "scales"), "'marlin' is packed for one"),
        ({"quant_method": "new"}, ("SCB",), "One of bitsandbytes would fit"),
    ],
)
def test_a_format_that_is_not_decoded_is_refused_by_its_name(
    settings: dict[str, Any], suffixes: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    made = make.tensors(1)
    del made["model.layers.0.mlp.up_proj.weight"]
    made |= {f"model.layers.0.mlp.up_proj.{suffix}": torch.ones(8, 8, dtype=torch.int32) for suffix in suffixes}
    source = make.save(tmp_path / "source", made, make.config(1, quantization_config=settings))
    with pytest.raises(RefusedError, match=message):
        ts.ops.dequantize(ts.open(source))
    with pytest.raises(RefusedError, match="their codes are not numbers"):
        ts.ops.cast(ts.open(source), "float32", "*up_proj*")


def test_an_unknown_dtype_is_not_understood(fp8: Path) -> None:
    with pytest.raises(UsageError, match="dequantize: dtype: Input should be 'bfloat16', 'float16' or 'float32'"):
        ts.ops.dequantize(ts.open(fp8), "bf16")


@pytest.mark.parametrize(
    "operation", [lambda ckpt: ts.ops.cast(ckpt, "float32"), lambda ckpt: ts.ops.cast(ckpt, "float16", "*up_proj*")]
)
def test_no_operation_on_numbers_reads_fp8_as_numbers(operation: Any, fp8: Path) -> None:
    with pytest.raises(RefusedError, match="their codes are not numbers to compute with"):
        operation(ts.open(fp8))


def test_plain_tensors_of_a_quantized_checkpoint_can_be_cast(fp8: Path, tmp_path: Path) -> None:
    ts.write(ts.ops.cast(ts.open(fp8), "float32", "*norm.weight"), tmp_path / "dest")
    before, after = make.read(fp8), make.read(tmp_path / "dest")
    for name, tensor in before.items():
        wanted = tensor.float() if name.endswith("norm.weight") else tensor
        assert torch.equal(make.bits(after[name]), make.bits(wanted))


def test_layers_of_a_quantized_checkpoint_move_with_their_scales(tmp_path: Path) -> None:
    skipped = ("model.layers.0.mlp.down_proj", "model.layers.3.self_attn.o_proj")
    source = make.fp8(tmp_path / "source", skipped=skipped)
    first = ts.ops.select_layers(ts.ops.dequantize(ts.open(source)), "3,0,1")
    ts.write(first, tmp_path / "first")
    ts.write(ts.ops.select_layers(ts.open(source), "3,0,1"), tmp_path / "moved")
    ts.write(ts.ops.dequantize(ts.open(tmp_path / "moved")), tmp_path / "second")
    assert make.same(make.read(tmp_path / "first"), make.read(tmp_path / "second"))
    settings = json.loads((tmp_path / "moved/config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn.o_proj",
    ]


def test_a_missing_shard_is_not_a_dequantization(fp8: Path) -> None:
    next(fp8.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="names the shard model-00002-of-00003.safetensors"):
        ts.open(fp8)
