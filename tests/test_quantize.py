"""Block FP8 encoded, against transformers' Fp8Quantize, plain torch and float64."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import MANNEQUIN
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear, Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import RefusedError, UsageError
from tensorsurgeon.kernels.fp8_encoding import Recipe, encode_blocks, encode_plainly, find_scales
from tensorsurgeon.kernels.fp8_errors import combined, measure_errors
from tensorsurgeon.ops import quantizing
from tensorsurgeon.running import Running, run_under
from tensorsurgeon.tensor import Block

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ROUNDING = 1 + 2.0**-16
"""What the five roundings of float32 may add to half of a step."""


def block_of(tensor: torch.Tensor) -> Block:
    name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
    return Block(name, tuple(tensor.shape), bytes(make.bits(tensor).numpy()))


def tensor_of(block: Block) -> torch.Tensor:
    dtype = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn}[block.dtype]
    return torch.frombuffer(bytearray(block.data), dtype=dtype).reshape(block.shape)


def by_transformers(weight: torch.Tensor, block: tuple[int, int], ue8m0: bool = False) -> tuple[Any, Any]:
    """Return transformers' codes and scales of a weight of whole blocks."""
    config = FineGrainedFP8Config(weight_block_size=block, **({"scale_fmt": "ue8m0"} if ue8m0 else {}))
    made = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"m.weight": weight})
    return made["m.weight"], made["m.weight_scale_inv"].float()


def decoded(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * spread[: codes.shape[0], : codes.shape[1]]


def weights(shape: tuple[int, int], seed: int = 0, std: float = 0.05) -> torch.Tensor:
    """Return numbers of many sizes: rows differ by powers of ten, a few are zero of either sign, a block is zero."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator) * std
    made *= 10.0 ** torch.randint(-3, 2, (shape[0], 1), generator=generator)
    made[torch.rand(shape, generator=generator) < 0.05] = 0
    made[:8, :8] = -0.0
    return made


CASES = {
    "usual": weights((256, 384)),
    "ragged": weights((200, 330)),
    "one row": weights((1, 300)),
    "one column": weights((300, 1)),
    "zeros": torch.zeros(130, 140),
    "signed zeros": -torch.zeros(16, 16),
    "subnormal": torch.linspace(-1, 1, 128 * 256).reshape(128, 256) * 1e-40,
    "tiny": weights((128, 128)) * 1e-36,
    "huge": weights((128, 128)).clamp(-1, 1) * 1e38,
    "wide apart": torch.logspace(-30, 30, 128 * 128, base=2).reshape(128, 128).flip(1),
    "every half step": torch.cat([torch.arange(-2048, 2049) / 512, torch.arange(-448, 449, 0.5)])[None].repeat(3, 1),
}  # fmt: skip
RECIPES = [
    Recipe(128, 128), Recipe(64, 32), Recipe(1, 32), Recipe(96, 500), Recipe(128, 128, powers=True),
    Recipe(128, 128, "BF16"), Recipe(64, 64, "F16"), Recipe(128, 128, "BF16", True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_loop_is_the_plain_formula(case: str, recipe: Recipe, dtype: str) -> None:
    rows = block_of(CASES[case].to(DTYPES[dtype]).contiguous())
    largest = tensor_of(rows).double().abs().max()
    if not largest.isfinite() or (recipe.scale_dtype == "F16" and largest > 448 * 65519):
        with pytest.raises(RefusedError, match="too large for F16" if largest.isfinite() else "holds NaN"):
            encode_blocks(rows, recipe)
        return
    fast, plain = encode_blocks(rows, recipe), encode_plainly(rows, recipe)
    assert [bytes(it.data) for it in fast] == [bytes(it.data) for it in plain]
    assert bytes(find_scales(rows, recipe).data) == bytes(plain[1].data)
    assert [it[:2] for it in fast] == [it[:2] for it in plain]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 32), (16, 256)])
@pytest.mark.parametrize("std", [1e-4, 0.02, 30.0])
def test_codes_and_scales_are_transformers_own(dtype: str, ue8m0: bool, block: tuple[int, int], std: float) -> None:
    for seed in range(4):
        weight = weights((384, 512), seed, std).to(DTYPES[dtype])
        codes, scales = by_transformers(weight, block, ue8m0)
        ours = encode_blocks(block_of(weight), Recipe(*block, powers=ue8m0))
        assert torch.equal(tensor_of(ours[0]).view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(tensor_of(ours[1]), scales)
        if not ue8m0 and dtype == "F32":
            assert torch.equal(make.quantize(weight, block)[0].view(torch.uint8), codes.view(torch.uint8))


def test_the_mannequin_is_quantised_as_its_maker_did(tmp_path: Path) -> None:
    """What made `mannequin/fp8` is code of its own."""
    ts.write(ts.ops.quantize(ts.open(MANNEQUIN / "bf16"), "fp8-block"), tmp_path / "dest")
    assert make.same(make.read(tmp_path / "dest"), make.read(MANNEQUIN / "fp8"))
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "dest", MANNEQUIN / "fp8"))
    listed = ours["quantization_config"].pop("modules_to_not_convert")
    assert set(listed) > set(theirs["quantization_config"].pop("modules_to_not_convert"))
    assert ours == theirs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**127])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_no_scale_can_hold_is_refused_by_name(bad: float, dtype: str, tmp_path: Path) -> None:
    made = make.tensors(2, DTYPES[dtype])
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"]
    for name in names:
        made[name][77, 33] = bad
    source = make.save(tmp_path / "source", made, make.config(2))
    with pytest.raises(RefusedError) as refused:
        ts.ops.quantize(ts.open(source), "fp8-block")
    assert [text.split(": ")[0] for text in refused.value.problems] == names
    assert all("holds NaN, infinity or numbers from 2^127" in text for text in refused.value.problems)
    with run_under(Running(planned=True)):
        planned = ts.ops.quantize(ts.open(source), "fp8-block")
    with pytest.raises(RefusedError, match=r"up_proj\.weight: holds NaN"):
        ts.write(planned, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_scales_too_large_for_f16_are_refused() -> None:
    with pytest.raises(RefusedError, match="scales are too large for F16"):
        encode_blocks(block_of(torch.full((4, 4), 448 * 65536.0)), Recipe(128, 128, "F16"))


@pytest.mark.parametrize("largest", [448.0, 448.0 * (1 + 2.0**-23), 449.0, 896.0, 1e-44, 7.0, 2.0**-130])
def test_powers_of_two_are_the_least_that_hold_the_block(largest: float) -> None:
    weight = torch.tensor([[largest, -largest / 3]])
    (scale,) = tensor_of(find_scales(block_of(weight), Recipe(1, 2, powers=True))).flatten().double()
    fraction, exponent = np.frexp(float(scale))
    assert fraction == 0.5
    assert 448 * scale >= weight[0, 0].double()
    assert 224 * scale < weight[0, 0].double() or exponent - 1 == -126


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("case", ["usual", "ragged", "tiny", "subnormal", "wide apart", "every half step", "one row"])
def test_no_weight_moves_by_more_than_half_of_the_last_step(case: str, recipe: Recipe) -> None:
    weight = CASES[case] * (2.0**-16 if recipe.scale_dtype == "F16" else 1)
    codes, scales = (tensor_of(it) for it in encode_blocks(block_of(weight), recipe))
    wide = decoded(torch.ones(codes.shape), scales, (recipe.rows, recipe.columns)).double()
    error = (decoded(codes, scales, (recipe.rows, recipe.columns)).double() - weight.double()).abs()
    assert (error <= 16 * wide * ROUNDING).all()
    if recipe.scale_dtype == "F32" and not recipe.powers and case not in ("tiny", "subnormal"):
        blocks = [
            it.abs().max() for strip in weight.double().split(recipe.rows) for it in strip.split(recipe.columns, 1)
        ]
        largest = torch.stack(blocks).reshape(scales.shape)
        spread = largest.repeat_interleave(recipe.rows, 0).repeat_interleave(recipe.columns, 1)
        assert (error <= spread[: error.shape[0], : error.shape[1]] / 28 * ROUNDING).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "recipe", [Recipe(128, 128), Recipe(1, 32), Recipe(96, 500), Recipe(64, 64, powers=True)], ids=str
)
@pytest.mark.parametrize("case", ["usual", "ragged", "zeros", "tiny", "every half step"])
def test_figures_are_float64s(case: str, recipe: Recipe, dtype: str) -> None:
    weight = CASES[case].to(DTYPES[dtype]).contiguous()
    codes, scales = (tensor_of(it) for it in encode_blocks(block_of(weight), recipe))
    back = decoded(codes, scales, (recipe.rows, recipe.columns)).double().numpy()
    exact = weight.double().numpy()
    bound = 16 * decoded(torch.ones(codes.shape), scales, (recipe.rows, recipe.columns)).double().numpy() * ROUNDING
    found = combined([measure_errors(block_of(weight), recipe)])
    wanted = {
        "squares of errors": ((back - exact) ** 2).sum(),
        "squares": (exact**2).sum(),
        "zeros": float((codes.float() == 0).sum()),
        "largest error": np.abs(back - exact).max(),
        "absmax": np.abs(exact).max(),
        "bound": bound.max(),
        "of the bound": (np.abs(back - exact) / bound).max(),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


def test_the_tables_are_what_was_written(tmp_path: Path) -> None:
    source = make.plain(tmp_path / "source", layers=2)
    receipt = ts.write(ts.ops.quantize(ts.open(source), "fp8-block", block="64x64"), tmp_path / "dest")
    before, after = make.read(source), make.read(tmp_path / "dest")
    rows = {row["tensor"]: row for row in receipt["report"]["quantised"]}
    assert rows.keys() == {name for name, it in after.items() if it.dtype == torch.float8_e4m3fn}
    sums = np.zeros(3)
    for name, row in rows.items():
        exact = before[name].double()
        error = decoded(after[name], after[f"{name}_scale_inv"], (64, 64)).double() - exact
        assert row["elements"] == exact.numel()
        assert row["absmax"] == pytest.approx(float(exact.abs().max()), rel=1e-5)
        assert row["largest error"] == pytest.approx(float(error.abs().max()), rel=1e-5)
        assert row["rms error"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5)
        assert row["relative error"] == pytest.approx(float(error.norm() / exact.norm()), rel=1e-5)
        assert row["zeros"] == pytest.approx(float((after[name].float() == 0).double().mean()), rel=1e-5)
        assert row["bound"] == pytest.approx(float(after[f"{name}_scale_inv"].max()) * 16 * ROUNDING, rel=1e-5)
        assert row["of the bound"] <= 1
        if name.endswith("up_proj.weight"):
            sums += [error.square().sum(), exact.square().sum(), exact.numel()]
    (role,) = [row for row in receipt["report"]["quantised roles"] if row["role"] == "mlp up"]
    assert role["tensors"] == 2
    assert role["relative error"] == pytest.approx((sums[0] / sums[1]) ** 0.5, rel=1e-5)
    assert role["rms error"] == pytest.approx((sums[0] / sums[2]) ** 0.5, rel=1e-5)
    left = {row["role"]: row["tensors"] for row in receipt["report"]["left plain"]}
    assert left["embedding token"] == left["head lm_head"] == 1
    assert sum(left.values()) + len(rows) == len(before)


@pytest.mark.parametrize(("memory", "threads"), [("16MiB", 1), ("1GiB", 3)])
def test_neither_memory_nor_threads_change_a_byte(memory: str, threads: int, tmp_path: Path, monkeypatch: Any) -> None:
    source = make.plain(tmp_path / "source", layers=2)
    usual = ts.write(ts.ops.quantize(ts.open(source), "fp8-block", block="32x48"), tmp_path / "usual")
    monkeypatch.setattr(quantizing, "BLOCK_MEMORY", 10**5)
    with run_under(Running(2**24, threads)):
        again = ts.ops.quantize(ts.open(source), "fp8-block", block=(32, 48))
    assert ts.write(again, tmp_path / "again", memory=memory, threads=threads) == usual


# There and back


def trip(source: Path, place: Path, ue8m0: bool, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """Decode block FP8, and quantise what comes of it, in one pass."""
    plain = ts.ops.dequantize(ts.open(source), dtype)
    ts.write(ts.ops.quantize(plain, "fp8-block", ue8m0=ue8m0), place)
    return make.read(place)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_to_plain_to_fp8_changes_no_code(scale_dtype: torch.dtype, dtype: str, tmp_path: Path) -> None:
    """Scales of 32-bit weights: 16-bit ones cannot say them, but every block has a code of 448."""
    made = make.quantized(make.tensors(2, torch.float32), scale_dtype=scale_dtype)
    source = make.save(tmp_path / "source", made, make.config(2, quantization_config=make.fp8_settings()))
    again = trip(source, tmp_path / "dest", False, dtype)
    for name, tensor in made.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(make.bits(again[name]), make.bits(tensor)), name
        elif name.endswith("_scale_inv"):
            assert torch.allclose(again[name], tensor.float(), rtol=2**-8 if dtype == "bfloat16" else 2**-22)


def test_codes_and_scales_of_bf16_weights_come_back_exactly(tmp_path: Path) -> None:
    assert make.same(trip(MANNEQUIN / "fp8", tmp_path / "dest", False), make.read(MANNEQUIN / "fp8"))


def test_powers_of_two_come_back_exactly(tmp_path: Path) -> None:
    ts.write(ts.ops.quantize(ts.open(MANNEQUIN / "bf16"), "fp8-block", ue8m0=True), tmp_path / "once")
    assert json.loads((tmp_path / "once/config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    once, again = make.read(tmp_path / "once"), trip(tmp_path / "once", tmp_path / "again", True)
    halved = 0
    for name, codes in once.items():
        if codes.dtype != torch.float8_e4m3fn:
            continue
        before, after = once[f"{name}_scale_inv"], again[f"{name}_scale_inv"]
        assert (before.frexp().mantissa == 0.5).all()
        assert torch.equal(decoded(codes, before, (128, 128)), decoded(again[name], after, (128, 128)))
        tops = torch.stack([it.abs().max() for strip in codes.float().split(128) for it in strip.split(128, 1)])
        assert torch.equal(after, torch.where(tops.reshape(before.shape) > 224, before, before / 2))
        halved += int((after != before).sum())
        if torch.equal(after, before):
            assert torch.equal(make.bits(codes), make.bits(again[name]))
    assert halved


def test_weights_that_change_get_scales_of_their_models_kind(tmp_path: Path) -> None:
    """Powers of two stay such: transformers casts the scales of a `ue8m0` model to exponents."""
    ts.write(ts.ops.quantize(ts.open(MANNEQUIN / "bf16"), "fp8-block", ue8m0=True), tmp_path / "source")
    options: dict[str, Any] = {"level": 0.3, "requantize": True}
    ts.write(ts.ops.perturb(ts.open(tmp_path / "source"), "mult-gauss", "mlp-up", **options), tmp_path / "dest")
    before, after = make.read(tmp_path / "source"), make.read(tmp_path / "dest")
    name = "model.layers.2.mlp.up_proj.weight"
    assert not torch.equal(make.bits(before[name]), make.bits(after[name]))
    assert (after[f"{name}_scale_inv"].frexp().mantissa == 0.5).all()
    settings = make.fp8_settings() | {"weight_scale_semantics": "inverse"}
    inverse = make.save(
        tmp_path / "inverse", make.quantized(make.tensors(1)), make.config(1, quantization_config=settings)
    )
    with pytest.raises(RefusedError, match="is not block FP8 with plain scales; only that can be quantised again"):
        ts.ops.perturb(ts.open(inverse), "mult-gauss", "mlp-up", **options)


# What is quantised, and what engines are told

ZOO = (
    "llama", "qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text",
    "granitemoe", "phi3", "gpt_neox", "gpt_bigcode", "gemma3 (nested)", "qwen3_vl (nested)", "mistral3 (nested)",
    "minimax_m2", "bamba", "olmo2", "starcoder2", "phimoe", "ernie4_5_moe", "bert", "modernbert", "persimmon", "jamba",
)  # fmt: skip


def converted(directory: Path) -> tuple[set[str], set[str]]:
    """Return the modules that transformers takes for block FP8, and those that have scales, by its names.

    The experts of a layer are one module.
    """
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = architectures.model_class(config).from_config(config)
    renamings = get_model_conversion_mapping(model)
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(**config.quantization_config), pre_quantized=True)
    quantizer._process_model_before_weight_loading(model)
    taken = {name for name, module in model.named_modules() if isinstance(module, FP8Linear | FP8Experts)}
    scaled = set()
    for name in make.read(directory):
        if name.endswith("_scale_inv"):
            name = name.removesuffix("_scale_inv")
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            scaled.add(re.sub(r"\.experts\..*", ".experts", name.removesuffix(".weight")))
    return taken, scaled


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", ZOO)
def test_transformers_takes_just_those_for_quantised_that_are(name: str, tmp_path: Path) -> None:
    source = architectures.make(ARCHITECTURES[name], tmp_path / "source")
    ts.write(ts.ops.quantize(ts.open(source), "fp8-block", block="8x8"), tmp_path / "dest")
    taken, scaled = converted(tmp_path / "dest")
    assert taken == scaled
    assert len(scaled) >= architectures.LAYERS
    before, after = make.read(source), make.read(tmp_path / "dest")
    plain = {name for name in before if after[name].dtype != torch.float8_e4m3fn}
    assert make.same({name: before[name] for name in plain}, {name: after[name] for name in plain})
    assert after.keys() == before.keys() | {f"{name}_scale_inv" for name in before.keys() - plain}


EXPECTED = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "deepseek_v3": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj",
    "qwen2_moe": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "phi3": "qkv_proj o_proj gate_up_proj down_proj",
    "gpt_oss": "q_proj k_proj v_proj o_proj",
    "qwen3_next": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "gpt_neox": "dense dense_h_to_4h dense_4h_to_h",
    "qwen3_vl (nested)": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_linear_layers_of_the_decoder_are_quantised_and_nothing_else(name: str, tmp_path: Path) -> None:
    ckpt = ts.open(architectures.make(ARCHITECTURES[name], tmp_path / "source"))
    with run_under(Running(planned=True)):
        quantised = ts.ops.quantize(ckpt, "fp8-block", block="8x8")
    found = {it.removesuffix(".weight") for it in quantised if quantised[it].dtype == "F8_E4M3"}
    assert {it.rpartition(".")[2] for it in found} == set(EXPECTED[name].split())
    assert not [it for it in found if "visual" in it or ".layers." not in it]
    listed = quantised.config.value["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in listed or "embed_out" in listed
    assert not found & set(listed)


def test_what_is_skipped_stays_plain_and_is_listed(tmp_path: Path) -> None:
    source = make.plain(tmp_path / "source")
    skip = "model.layers.0.*, *.2.mlp.*, *.o_proj"
    ts.write(ts.ops.quantize(ts.open(source), "fp8-block", "64x64", skip), tmp_path / "dest")
    after = make.read(tmp_path / "dest")
    quantised = {name.removesuffix(".weight") for name, it in after.items() if it.dtype == torch.float8_e4m3fn}
    every = {name.removesuffix(".weight") for name in after if name.endswith("_proj.weight")}
    skipped = {it for it in every if ".layers.0." in it or ".2.mlp." in it or it.endswith("o_proj")}
    assert quantised == every - skipped
    settings = json.loads((tmp_path / "dest/config.json").read_text())["quantization_config"]
    assert set(settings["modules_to_not_convert"]) == skipped | {"lm_head", "model.embed_tokens"}
    assert settings["weight_block_size"] == [64, 64]
    assert settings["quant_method"] == "fp8"
    assert settings["activation_scheme"] == "dynamic"
    assert "scale_fmt" not in settings
    assert converted(tmp_path / "dest") == (quantised, quantised)


def test_layers_move_with_the_list_of_what_is_plain(tmp_path: Path) -> None:
    quantised = ts.ops.quantize(ts.open(make.plain(tmp_path / "source")), "fp8-block", "64x64", "*.3.mlp.*")
    ts.write(ts.ops.reverse_layers(quantised), tmp_path / "dest")
    taken, scaled = converted(tmp_path / "dest")
    assert taken == scaled
    assert "model.layers.0.mlp.up_proj" not in taken
    assert "model.layers.3.mlp.up_proj" in taken


def test_transformers_loads_what_dequantize_gives_back(tmp_path: Path) -> None:
    """It decodes by itself where it has no GPU, and only whole blocks rightly: those of the mannequin are."""
    ts.write(ts.ops.quantize(ts.open(MANNEQUIN / "bf16"), "fp8-block", block="64x128", ue8m0=True), tmp_path / "dest")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dest", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ts.write(ts.ops.dequantize(ts.open(tmp_path / "dest")), tmp_path / "back")
    assert make.same(make.read(tmp_path / "back"), dict(model.state_dict()))
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def test_verify_is_content_and_inspect_tells_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, dest = make.plain(tmp_path / "source"), str(tmp_path / "dest")
    assert main(["quantize", str(source), dest, "--format", "fp8-block", "--block", "64x32", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["verify", dest, "--deep"]) == 0
    assert main(["inspect", dest]) == 0
    assert "FP8, blocks of 64x32" in capsys.readouterr().out
    receipt = json.loads((tmp_path / "dest/tensorsurgeon.json").read_text())
    assert receipt["steps"] == [{"quantize": {"format": "fp8-block", "block": "64x32"}}]


def test_a_plan_reads_no_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make.plain(tmp_path / "source")
    command = ["quantize", str(source), str(tmp_path / "dest"), "--format", "fp8-block", "--dry-run", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["quantised roles"][0].keys() == {"role", "tensors", "elements"}
    assert "quantised" not in report


# Warnings and refusals


def warnings_of(ckpt: ts.Checkpoint, **options: Any) -> list[str]:
    with run_under(Running(planned=True)):
        return [it.removeprefix("quantize: ") for it in ts.ops.quantize(ckpt, "fp8-block", **options).warnings]


def shaped(place: Path, **shapes: tuple[int, int]) -> ts.Checkpoint:
    """Return a model of one layer in which some modules of attention and MLP have other shapes."""
    made = make.tensors(1)
    for name, shape in shapes.items():
        (found,) = [it for it in made if it.endswith(f".{name}.weight")] or [f"model.layers.0.self_attn.{name}.weight"]
        made[found] = torch.zeros(shape, dtype=torch.bfloat16)
    return ts.open(make.save(place, made, make.config(1)))


def test_fused_partitions_that_are_no_whole_blocks_are_told(tmp_path: Path) -> None:
    whole = shaped(tmp_path / "a", o_proj=(256, 256), gate_proj=(384, 128), up_proj=(384, 128), down_proj=(128, 384),
                   q_proj=(256, 128), k_proj=(128, 128), v_proj=(128, 128))  # fmt: skip
    assert warnings_of(whole) == []
    even = {"gate_proj": (256, 192), "up_proj": (256, 192)}
    first, ragged = warnings_of(shaped(tmp_path / "b", k_proj=(192, 128), v_proj=(192, 128), **even))
    assert first.startswith("model.layers.0.self_attn.k_proj.weight: vLLM fuses this with its neighbours")
    assert "rows are no multiple of 128" in first
    assert ragged.startswith("model.layers.0.mlp.down_proj.weight and 6 more: [192, 320] is no whole number of 128x128")
    assert ragged.endswith("A block of 64x64 would fit all.")
    last, _ = warnings_of(shaped(tmp_path / "c", v_proj=(200, 192), **even))
    assert last.startswith("model.layers.0.self_attn.v_proj.weight: rows are no multiple of 128, so vLLM cannot split")
    latent = {"q_a_proj": (128, 256), "kv_a_proj_with_mqa": (192, 256)}
    (only,) = warnings_of(
        shaped(tmp_path / "d", **latent, gate_proj=(256, 256), up_proj=(256, 256), o_proj=(256, 256),
               q_proj=(256, 256), k_proj=(256, 256), v_proj=(256, 256), down_proj=(256, 256))
    )  # fmt: skip
    assert only.startswith("model.layers.0.self_attn.kv_a_proj_with_mqa.weight: [192, 256] is no whole number")
    latent["q_a_proj"] = (192, 256)
    (fused, _) = warnings_of(shaped(tmp_path / "e", **latent, **even))
    assert fused.startswith("model.layers.0.self_attn.q_a_proj.weight: vLLM fuses")


def test_parts_that_are_fused_on_disk_are_told(tmp_path: Path) -> None:
    phi3 = ts.open(architectures.make(ARCHITECTURES["phi3"], tmp_path / "phi3"))
    assert warnings_of(phi3, block="8x8") == []
    fused = warnings_of(phi3, block="32x8")
    assert fused[0].startswith("model.layers.0.mlp.gate_up_proj.weight and 11 more: vLLM fuses")


def test_what_is_plain_beside_quantised_parts_is_told(tmp_path: Path) -> None:
    ckpt = ts.open(make.plain(tmp_path / "source"))
    (mixed,) = warnings_of(ckpt, block="64x64", skip="*.0.self_attn.k_proj,*.2.mlp.up_proj")
    assert mixed == (
        "model.layers.0.self_attn.k_proj.weight and 1 more: stays plain, but not all that vLLM fuses it with: it does "
        "not load that."
    )
    assert warnings_of(ckpt, block="64x64", skip="*.self_attn.?_proj") == []


def test_stacked_experts_stay_plain_and_that_is_told(tmp_path: Path) -> None:
    ckpt = ts.open(architectures.make(ARCHITECTURES["gpt_oss"], tmp_path / "source"))
    share = sum(np.prod(ckpt[it].shape) for it in ckpt if "experts" in it and "bias" not in it)
    share /= sum(np.prod(it.shape) for it in ckpt.tensors.values())
    (told,) = warnings_of(ckpt, block="8x8")
    assert "mlp.experts.gate_up_proj and 11 more: experts that are stacked in one tensor stay plain, " in told
    assert f"{share:.0%} of all weights" in told


def refused(ckpt: ts.Checkpoint, match: str, **options: Any) -> None:
    with pytest.raises(RefusedError, match=match):
        ts.ops.quantize(ckpt, "fp8-block", **options)


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    moe = ts.open(architectures.make(ARCHITECTURES["qwen3_moe"], tmp_path / "moe"))
    refused(moe, r"layers\.0\.mlp\.experts stays plain, and engines then take .*experts\.0\..* for plain as well",
            block="8x8", skip="*.0.mlp.experts.3.*")  # fmt: skip
    both = shaped(tmp_path / "both", q_proj=(256, 192), q=(256, 192))
    refused(both, r"self_attn\.q stays plain, and engines then take .*self_attn\.q_proj for plain as well", skip="*.q")


def test_what_is_not_to_be_quantised_is_refused(fp8: Path, plain: Path, tmp_path: Path) -> None:
    refused(ts.open(fp8), r"is quantised already \(FP8, blocks of 128x128\); dequantize it first")
    says = make.plain(tmp_path / "says", quantization_config=make.fp8_settings())
    refused(ts.open(says), "config.json says that this is quantised, and no tensor is")
    refused(ts.open(architectures.make(ARCHITECTURES["gpt2"], tmp_path / "gpt2")), "there is no linear layer")
    refused(ts.open(architectures.make(ARCHITECTURES["falcon"], tmp_path / "falcon")), "linear layers of its own")
    refused(ts.open(plain), "there is no linear layer", skip="*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4"}, "format: Input should be 'fp8-block'"),
        ({"format": "fp8-block", "block": "128"}, "block: '128' is not ROWSxCOLUMNS"),
        ({"format": "fp8-block", "block": "0x128"}, "is not ROWSxCOLUMNS"),
        ({"format": "fp8-block", "block": [128, -1]}, "is not ROWSxCOLUMNS"),
        ({"format": "fp8-block", "skip": "*.w1"}, "skip: '\\*.w1' matches no module"),
    ],
)
def test_bad_parameters_are_not_understood(options: dict[str, Any], message: str, plain: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ts.ops.quantize(ts.open(plain), **options)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    make.save(tmp_path / "tuned", {it: t + 0.01 for it, t in make.tensors(1).items()}, make.config(1))
    base = make.plain(tmp_path / "base", layers=1)
    ts.write(ts.ops.extract_lora(ts.open(tmp_path / "tuned"), str(base), rank=2), tmp_path / "lora")
    refused(ts.open(tmp_path / "lora"), "this is an adapter; merge it into its model first")
