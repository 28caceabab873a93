"""Checkpoints that transformers itself writes or reads: `fp8`, `mxfp4` and `fbgemm_fp8`.

fp8_block                     F32 scales, ragged blocks of 128x128 (hidden 132, intermediate 140): [140, 132] has a grid
                              of [2, 2] that 70x66 would fit too; a weight and its scale lie in different shards
fp8_block_bf16_scales         BF16 scales (Qwen3-32B-FP8), regular blocks but for k and v [64, 128]
fp8_block_f16_scales          F16 scales (Qwen3-4B-Instruct-2507-FP8)
fp8_block_64                  blocks of 64x64, in two layers and three shards
fp8_left_dense                what transformers 5.23 saves on quantising ragged shapes by itself: BF16 weights, as they
                              were, each with a `weight_scale_inv` that nobody has ever written to
fp8_per_tensor                `weight_block_size` null and static activations: scales [1, 1], activation scales []
fp8_per_tensor_scalar         the same with scales [] (Ministral-3)
fp8_autofp8                   the same under vLLM's names: `weight_scale` [1], `input_scale` [1], `ignored_layers`
fp8_experts_fused             `experts.gate_up_proj` [E, 2I, H] with `experts.gate_up_proj_scale_inv`, in Gemma 4, whose
                              other scales transformers 5.23 saves as `.scale`, and which has `router.scale` of its own
fp8_experts_split             transformers 5.23 splits experts on saving, but not their scales: weights such as
                              `experts.0.gate_proj.weight` beside `experts.gate_up_proj_scale_inv`, with blocks that
                              lie across gate and up
fp8_experts_split_per_tensor  the same without blocks: scales [E, 1, 1], activation scales [E]
fp8_deepseek_v3               scales for each expert, as DeepSeek, Qwen and GLM publish them; F32 router bias
fp8_ue8m0                     F8_E8M0 scales
fp8_ue8m0_bytes               the same as U8, blocks of 1x32
fp8_deepseek_v4               names and `.scale` of DeepSeek-V4: FP8 with F8_E8M0 scales, FP4 experts as I8
mxfp4                         gpt-oss: experts in blocks and scales, two shards
fbgemm_fp8                    scales for each row, attention left dense
fbgemm_fp8_llama4             experts of Llama 4: `down_proj_scale` [E, H, 1] for a `down_proj` of [E, I, H]
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from common import record
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    FbgemmFp8Config,
    FineGrainedFP8Config,
    Gemma4TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations import fbgemm_fp8
from transformers.integrations.finegrained_fp8 import (
    Fp8Dequantize,
    FP8Experts,
    FP8Linear,
    Fp8Quantize,
    _dequantize_fp8_weight,
)
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors
from transformers.quantizers.quantizer_fbgemm_fp8 import FbgemmFp8HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils import logging

DEST = Path(sys.argv[1])
Weights = dict[str, torch.Tensor]

BY_TRANSFORMERS = "quantised by transformers' Fp8Quantize, its check for a GPU switched off, saved by save_pretrained; "
PADDED = "weights were padded with zeros to whole blocks for it and cropped after it, which it does not do by itself; "
ANSWER = "expected: its _dequantize_fp8_weight in float32"


def build(config: Any, seed: int) -> Any:
    return tiny.model(config, AutoModelForCausalLM.from_config, seed)


def numbers(weights: Weights) -> dict[str, np.ndarray]:
    return {name: weight.detach().float().contiguous().numpy() for name, weight in weights.items()}


@contextmanager
def whole_blocks() -> Any:
    """Let Fp8Quantize see whole blocks only: it returns a ragged weight as it came, not quantised."""
    plain = Fp8Quantize._quantize_one

    def padded(self: Fp8Quantize, key: str, value: torch.Tensor) -> Weights:
        rows, cols = value.shape[-2:]
        tall, wide = self._resolve_block_size(value)
        made = plain(self, key, torch.nn.functional.pad(value, (0, -cols % wide, 0, -rows % tall)))
        made[key] = made[key][..., :rows, :cols].contiguous()
        return made

    Fp8Quantize._quantize_one = padded
    try:
        yield
    finally:
        Fp8Quantize._quantize_one = plain


def quantised(config: Any, seed: int, scheme: Any) -> Any:
    """A model that transformers has quantised while it loaded it."""
    with tempfile.TemporaryDirectory() as scratch:
        build(config, seed).save_pretrained(scratch)
        return AutoModelForCausalLM.from_pretrained(scratch, quantization_config=scheme, dtype=torch.bfloat16)


def answers(model: Any, split: bool = False) -> Weights:
    """What transformers decodes the modules of `model` to; experts are split where they are so on disk."""
    found: Weights = {}
    for name, module in model.named_modules():
        if isinstance(module, FP8Experts):
            experts = {
                each: _dequantize_fp8_weight(
                    getattr(module, each), getattr(module, f"{each}_scale_inv"), module.block_size, torch.float32
                )
                for each in ("gate_up_proj", "down_proj")
            }
            found |= by_expert(name, experts) if split else {f"{name}.{k}": v for k, v in experts.items()}
        elif isinstance(module, FP8Linear):
            found[f"{name}.weight"] = _dequantize_fp8_weight(
                module.weight, module.weight_scale_inv, module.block_size, torch.float32
            )
    return found


def by_expert(name: str, experts: Weights) -> Weights:
    found: Weights = {}
    for place, (gate_up, down) in enumerate(zip(experts["gate_up_proj"], experts["down_proj"], strict=True)):
        gate, up = gate_up.chunk(2)
        found |= {
            f"{name}.{place}.{each}.weight": w
            for each, w in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        }
    return found


def save(model: Any, name: str, shards: str = "5GB") -> Path:
    place = tiny.clear(DEST / name)
    model.save_pretrained(place, max_shard_size=shards)
    return place


def set_scales(model: Any, change: Any) -> None:
    """Put what `change` makes of each scale in its place."""
    for module in model.modules():
        if isinstance(module, FP8Linear):
            scale = change(module.weight_scale_inv.data)
            module.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)


def fp8_block() -> None:
    shape = {"hidden_size": 132, "intermediate_size": 140, "head_dim": 32, "tie_word_embeddings": True}
    with whole_blocks():
        model = quantised(Qwen3Config(**tiny.SMALL | shape), 1, FineGrainedFP8Config())
    place = save(model, "fp8_block", "40kB")
    record(place, numbers(answers(model)), "transformers", BY_TRANSFORMERS + PADDED + ANSWER, "torch")


def fp8_block_of_other_scales() -> None:
    for name, dtype, seed in (("bf16", torch.bfloat16, 2), ("f16", torch.float16, 3)):
        size = (
            {"intermediate_size": 128}
            if name == "bf16"
            else {"hidden_size": 72, "head_dim": 24, "intermediate_size": 136}
        )
        with whole_blocks():
            model = quantised(Qwen3Config(**tiny.SMALL | size), seed, FineGrainedFP8Config())
        set_scales(model, lambda scale, dtype=dtype: scale.to(dtype))
        place = save(model, f"fp8_block_{name}_scales")
        how = BY_TRANSFORMERS + PADDED + f"scales cast to {dtype} before saving; " + ANSWER
        record(place, numbers(answers(model)), "transformers", how, "torch")


def fp8_block_64() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = quantised(LlamaConfig(**tiny.SMALL | shape), 4, FineGrainedFP8Config(weight_block_size=(64, 64)))
    place = save(model, "fp8_block_64", "40kB")
    record(place, numbers(answers(model)), "transformers", BY_TRANSFORMERS + ANSWER, "torch")


def fp8_left_dense() -> None:
    shape = {"hidden_size": 72, "head_dim": 24, "intermediate_size": 128}
    model = quantised(Qwen3Config(**tiny.SMALL | shape), 5, FineGrainedFP8Config(weight_block_size=(64, 72)))
    # Scales left over are memory as it was allocated: numbers like those that were seen in it, but always the same.
    for module in model.modules():
        if isinstance(module, FP8Linear) and module.weight.dtype == torch.bfloat16:
            module.weight_scale_inv.data.fill_(9.2018e-33)
    place = save(model, "fp8_left_dense")
    dense = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, FP8Linear)}
    coded = {n: w for n, w in answers(model).items() if dense[n].dtype != torch.bfloat16}
    how = (
        BY_TRANSFORMERS + "it leaves weights dense whose shape is no multiple of the block and saves scales never "
        "written beside them (filled with 9.2018e-33 here, so that a rerun gives the same bytes); expected: those "
        "weights as they are, not multiplied, and _dequantize_fp8_weight in float32 for the others"
    )
    record(place, numbers(dense | coded), "transformers", how, "torch")


def fp8_per_tensor() -> None:
    shape = {"hidden_size": 72, "head_dim": 24, "intermediate_size": 136}
    scheme = FineGrainedFP8Config(weight_block_size=None, activation_scheme="static")
    model = quantised(LlamaConfig(**tiny.SMALL | shape), 6, scheme)
    for place, module in enumerate(m for m in model.modules() if isinstance(m, FP8Linear)):
        module.activation_scale.data.fill_(0.01 * (place + 1))
    place = save(model, "fp8_per_tensor")
    record(place, numbers(answers(model)), "transformers", BY_TRANSFORMERS + ANSWER, "torch")

    set_scales(model, lambda scale: scale.reshape(()))
    place = save(model, "fp8_per_tensor_scalar")
    how = BY_TRANSFORMERS + "scales [1, 1] reshaped to [], as its modules hold them on loading; " + ANSWER
    record(place, numbers(answers(model)), "transformers", how, "torch")

    place = tiny.clear(DEST / "fp8_autofp8")
    autofp8(DEST / "fp8_per_tensor_scalar", place)
    how = "tensors of fp8_per_tensor_scalar with the names, shapes and configuration of AutoFP8 and vLLM; " + ANSWER
    record(place, numbers(answers(model)), "transformers", how, "torch")


def autofp8(source: Path, place: Path) -> None:
    names = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stem, _, last = name.rpartition(".")
        weights[f"{stem}.{names[last]}" if last in names else name] = tensor.reshape(1) if last in names else tensor
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "static",
        "ignored_layers": ["lm_head"],
        "quant_method": "fp8",
    }
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fp8_experts() -> None:
    shape = tiny.SMALL | {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 48}
    routed = {"enable_moe_block": True, "num_experts": 3, "top_k_experts": 1, "hidden_size_per_layer_input": 0}
    config = Gemma4TextConfig(**shape | routed, layer_types=["full_attention"], global_head_dim=64)
    with whole_blocks():
        model = quantised(config, 7, FineGrainedFP8Config(weight_block_size=(32, 64)))
    place = save(model, "fp8_experts_fused", "30kB")
    record(place, numbers(answers(model)), "transformers", BY_TRANSFORMERS + PADDED + ANSWER, "torch")

    split = "it splits the experts as it saves them, but not their scales; "
    shape |= {"moe_intermediate_size": 96, "num_experts": 2, "num_experts_per_tok": 1}
    for name, static in (("fp8_experts_split", False), ("fp8_experts_split_per_tensor", True)):
        scheme = FineGrainedFP8Config(
            weight_block_size=None if static else (64, 32), activation_scheme="static" if static else "dynamic"
        )
        model = quantised(Qwen3MoeConfig(**shape), 8 + static, scheme)
        for parameter in (p for n, p in model.named_parameters() if n.endswith("activation_scale")):
            parameter.data.fill_(0.01)
        place = save(model, name)
        record(place, numbers(answers(model, split=True)), "transformers", BY_TRANSFORMERS + split + ANSWER, "torch")


class Asked:
    """As much of a quantiser as Fp8Quantize and Fp8Dequantize look at."""

    def __init__(self, scheme: FineGrainedFP8Config) -> None:
        self.quantization_config = scheme


def block(weight: torch.Tensor, scheme: FineGrainedFP8Config) -> tuple[torch.Tensor, torch.Tensor]:
    with whole_blocks():
        made = Fp8Quantize(Asked(scheme)).convert({"weight": weight})
    return made["weight"], made["weight_scale_inv"]


def plain(config: Any, seed: int, place: Path) -> Weights:
    """The tensors of a dense model under the names that it is saved under, its configuration in `place`."""
    build(config, seed).save_pretrained(tiny.clear(place))
    weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    return weights


def amend(place: Path, **said: Any) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | said, indent=2) + "\n")


def fp8_deepseek_v3() -> None:
    shape = tiny.SMALL | {"hidden_size": 136, "moe_intermediate_size": 32, "intermediate_size": 40}
    latent = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    routed = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    config = DeepseekV3Config(**shape | latent | routed | {"first_k_dense_replace": 1, "num_hidden_layers": 2})
    config.num_key_value_heads = 2
    place = DEST / "fp8_deepseek_v3"
    weights = plain(config, 10, place)
    scheme = FineGrainedFP8Config()
    expected: Weights = {}
    for name in [n for n in weights if n.endswith(("proj.weight", "_mqa.weight"))]:
        codes, scale = block(weights[name], scheme)
        weights[name], weights[f"{name}_scale_inv"] = codes, scale
        expected[name] = _dequantize_fp8_weight(codes, scale, [128, 128], torch.float32)
    save_file(dict(sorted(weights.items())), place / "model.safetensors", {"format": "pt"})
    said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    amend(place, quantization_config=said)
    how = "Fp8Quantize of transformers on each weight (padded with zeros, cropped), laid out as DeepSeek-V3; " + ANSWER
    record(place, numbers(expected), "transformers", how, "torch")


def fp8_ue8m0() -> None:
    shape = tiny.SMALL | {"hidden_size": 64}
    model = quantised(Qwen3Config(**shape), 11, FineGrainedFP8Config(weight_block_size=(64, 64), scale_fmt="ue8m0"))
    place = save(model, "fp8_ue8m0")
    record(place, numbers(answers(model)), "transformers", BY_TRANSFORMERS + ANSWER, "torch")

    model = quantised(Qwen3Config(**shape), 12, FineGrainedFP8Config(weight_block_size=(1, 32), scale_fmt="ue8m0"))
    expected = answers(model)
    set_scales(model, lambda scale: scale.view(torch.uint8))
    place = save(model, "fp8_ue8m0_bytes")
    how = BY_TRANSFORMERS + "scales viewed as bytes before saving; " + ANSWER + ", before that"
    record(place, numbers(expected), "transformers", how, "torch")


def fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of E2M1, two in a byte and the first of them low, and the byte 127 + e of every 32 of them."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-100))) - 2
    scaled = groups * torch.exp2(-exponent).unsqueeze(-1)
    magnitudes = torch.tensor(FP4_VALUES[:8])
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(scaled.abs().contiguous(), middles) | (torch.signbit(scaled).long() << 3)
    codes = codes.flatten(-2).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


def fp8_deepseek_v4() -> None:
    shape = {"hidden_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"head_dim": 32, "q_lora_rank": 64, "o_lora_rank": 32, "o_groups": 2, "vocab_size": 64, "hc_mult": 2}
    routed = {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "mlp_layer_types": ["moe"]}
    config = DeepseekV4Config(**shape | routed, layer_types=["sliding_attention"])
    place = DEST / "fp8_deepseek_v4"
    weights = plain(config, 13, place)
    scheme = FineGrainedFP8Config(scale_fmt="ue8m0")
    decode = Fp8Dequantize(Asked(scheme))
    expected: Weights = {}
    linear = (".wq_a.", ".wq_b.", ".wkv.", ".wo_a.", ".wo_b.", ".w1.", ".w2.", ".w3.")
    for name in [n for n in weights if any(part in n for part in linear)]:
        scale_name = name.removesuffix("weight") + "scale"
        if ".ffn.experts." in name:
            codes, scale = fp4(weights[name])
            weights[name], weights[scale_name] = codes.view(torch.int8), scale.view(torch.float8_e8m0fnu)
            expected[name] = decode._dequantize_one(weights[name], weights[scale_name], torch.float32)
        else:
            weights[name], weights[scale_name] = block(weights[name], scheme)
            expected[name] = _dequantize_fp8_weight(weights[name], weights[scale_name], [128, 128], torch.float32)
    save_file(dict(sorted(weights.items())), place / "model.safetensors", {"format": "pt"})
    said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"}
    amend(place, quantization_config=said | {"weight_block_size": [128, 128]}, expert_dtype="fp4")
    how = (
        "laid out by hand as DeepSeek-V4 under the names that transformers saves a dense one with: FP8 by its "
        "Fp8Quantize (padded with zeros, cropped), FP4 packed with torch; " + ANSWER + ", its Fp8Dequantize for FP4"
    )
    record(place, numbers(expected), "transformers", how, "torch")


def mxfp4() -> None:
    shape = tiny.SMALL | {"hidden_size": 96, "head_dim": 32, "intermediate_size": 64}
    config = GptOssConfig(**shape, num_local_experts=3, num_experts_per_tok=1, layer_types=["full_attention"])
    place = DEST / "mxfp4"
    weights = plain(config, 14, place)
    # One whole block of zeros, as there are in padded experts.
    weights["model.layers.0.mlp.experts.gate_up_proj"][1, :32, 5] = 0
    expected: Weights = {}
    for name in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        packed, scales = fp4(weights.pop(name).transpose(1, 2))
        blocks = packed.unflatten(-1, (-1, 16)).contiguous()
        # A scale byte of 0 is 2^-127, not 0: here beside codes of 0, where it is common, and once beside others.
        scales[(blocks == 0).all(-1)] = 0
        scales[0, 3, 1] = 0
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = blocks, scales
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    shards(place, weights)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    amend(place, quantization_config={"modules_to_not_convert": skipped, "quant_method": "mxfp4"})
    how = (
        "packed with torch as gpt-oss is (transformers packs on GPUs only), blocks and scales in two shards; "
        "expected: transformers' convert_moe_packed_tensors in float32"
    )
    record(place, numbers(expected), "transformers", how, "torch")


def shards(place: Path, weights: Weights) -> None:
    """Scales in a first shard, everything else in a second."""
    parts = [{n: w for n, w in weights.items() if n.endswith("_scales") == first} for first in (True, False)]
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, place / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def per_row(weight: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What fbgemm's op of this name does, which there is for GPUs only."""
    scale = weight.float().abs().amax(-1) / 448
    return (weight.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def fbgemm() -> None:
    how = (
        "quantised by transformers' FbgemmFp8Quantize with its check for a GPU switched off and torch code in place of "
        "fbgemm's op; there is no decoder for CPU: expected is codes times scales in float32"
    )
    attention = [f"model.layers.0.self_attn.{each}_proj" for each in "qkvo"]
    scheme = FbgemmFp8Config(modules_to_not_convert=[*attention, "lm_head"])
    shape = tiny.SMALL | {"hidden_size": 72, "head_dim": 24, "intermediate_size": 136}
    model = quantised(LlamaConfig(**shape), 15, scheme)
    found = {
        f"{name}.weight": module.weight.float() * module.weight_scale
        for name, module in model.named_modules()
        if isinstance(module, fbgemm_fp8.FbgemmFp8Linear)
    }
    record(save(model, "fbgemm_fp8"), numbers(found), "transformers", how, "torch")

    shape = tiny.SMALL | {"hidden_size": 96, "head_dim": 32, "intermediate_size": 64, "intermediate_size_mlp": 64}
    config = Llama4TextConfig(**shape, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"])
    model = quantised(
        config, 16, FbgemmFp8Config(modules_to_not_convert=[*attention, "lm_head", "feed_forward.router"])
    )
    place = save(model, "fbgemm_fp8_llama4")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, fbgemm_fp8.FbgemmFp8Llama4TextExperts):
            found[f"{name}.gate_up_proj"] = module.gate_up_proj.float() * module.gate_up_proj_scale
            found[f"{name}.down_proj"] = module.down_proj.float() * module.down_proj_scale.transpose(1, 2)
        elif isinstance(module, fbgemm_fp8.FbgemmFp8Linear):
            found[f"{name}.weight"] = module.weight.float() * module.weight_scale
    record(place, numbers(found), "transformers", how + ", scales turned as its forward does", "torch")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for quantizer in (FineGrainedFP8HfQuantizer, FbgemmFp8HfQuantizer):
        quantizer.validate_environment = lambda *args, **kwargs: None
    fbgemm_fp8.get_quantize_fp8_per_row = lambda: per_row
    fp8_block()
    fp8_block_of_other_scales()
    fp8_block_64()
    fp8_left_dense()
    fp8_per_tensor()
    fp8_experts()
    fp8_deepseek_v3()
    fp8_ue8m0()
    fp8_deepseek_v4()
    mxfp4()
    fbgemm()


if __name__ == "__main__":
    main()
