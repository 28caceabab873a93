"""Checkpoints that llmcompressor quantises (rounding to nearest) and compressed-tensors 0.20 packs.

ct_fp8_tensor          float-quantized, one scale [1] for each weight, static activations (`input_scale`), and
                       scales of a kv cache (`self_attn.k_scale`, `self_attn.v_scale`)
ct_fp8_channel         float-quantized, scales [o, 1], in shards so small that scales are not beside their weights
ct_fp8_block           float-quantized, blocks of 128x128, ragged: weights [140, 132] have scales [2, 2]
ct_int8_channel        int-quantized, scales [o, 1]
ct_int8_channel_asym   int-quantized with I8 zero points [o, 1] that are not packed
ct_int8_group_asym     int-quantized in groups of 32 with I8 zero points [o, G]
ct_int4_g32            pack-quantized, two shards
ct_int4_g128_asym      pack-quantized with packed zero points
ct_int8_packed         pack-quantized in 8 bits, scales [o, 1] in F16, as everything else there
ct_embeddings          pack-quantized embeddings and head (75 tokens), asymmetric; everything else dense
ct_int1                pack-quantized in 1 bit, symmetric: -1 and 0
ct_bits                pack-quantized, a group of its own for each of 2, 3, 4, 5, 6, 7 and 8 bits; asymmetric, packed
                       densely, rows and columns that do not fill the last word
ct_mixed               mixed-precision: FP8 attention, 4 bits elsewhere, 3 bits for one module by its name
ct_nvfp4               nvfp4-pack-quantized, activations too (`input_global_scale`)
ct_mxfp4               mxfp4-pack-quantized
ct_mxfp6               mxfp6-pack-quantized
ct_mxfp8               mxfp8-quantized
ct_moe                 pack-quantized experts of a DeepSeek-V3, everything else dense (Kimi-K2-Thinking)
ct_nested              pack-quantized language model of a Mistral 3, its configuration in `text_config` (Kimi-K2.5)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from common import record
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    LlamaConfig,
    Mistral3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

DEST = Path(sys.argv[1])
Tensors = dict[str, torch.Tensor]

MADE = "quantised by llmcompressor's oneshot (QuantizationModifier), saved by its save_pretrained; expected: "
RAGGED = {"hidden_size": 132, "intermediate_size": 140, "head_dim": 32}


def samples() -> Dataset:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (4, 16), generator=random).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 16] * 4})


def processor() -> PreTrainedTokenizerFast:
    """A tokenizer that oneshot asks for and has no use for."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), pad_token="a")


def decoded(scheme: QuantizationScheme, tensors: Tensors) -> np.ndarray:
    """What compressed-tensors decodes the tensors of one module to, in float32."""
    kind = scheme.format
    if kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized"):
        packed = tensors["weight_packed"]
        rows, width = packed.shape
        six = kind == "mxfp6-pack-quantized"
        unpack = unpack_fp6_from_uint8 if six else unpack_fp4_from_uint8
        codes = unpack(packed, rows, width * 4 // 3 if six else width * 2, torch.float32)
        scale = tensors["weight_scale"]
        scale = scale.float() if kind == "nvfp4-pack-quantized" else decompress_mx_scale(scale).float()
        weight = dequantize(
            codes, scale, args=scheme.weights, dtype=torch.float32, global_scale=tensors.get("weight_global_scale")
        )
        return weight.numpy()
    if kind == "mxfp8-quantized":
        kind, scale = "naive-quantized", decompress_mx_scale(tensors["weight_scale"])
        tensors = tensors | {"weight_scale": scale}
    if "weight_shape" in tensors:
        tensors = tensors | {"weight_shape": torch.Size(tensors["weight_shape"].tolist())}
    tensors = tensors | {"weight_scale": tensors["weight_scale"].float()}
    return BaseCompressor.get_value_from_registry(kind).decompress(tensors, scheme)["weight"].numpy()


def answers(place: Path, schemes: dict[str, QuantizationScheme]) -> dict[str, np.ndarray]:
    found: Tensors = {}
    for path in place.glob("*.safetensors"):
        found |= load_file(path)
    expected = {}
    for module, scheme in schemes.items():
        own = {n.removeprefix(f"{module}."): t for n, t in found.items() if n.rpartition(".")[0] == module}
        expected[f"{module}.weight"] = decoded(scheme, own)
    return expected


def make(
    name: str,
    model: Any,
    modifier: dict[str, Any],
    shards: str = "5GB",
    calibrated: bool = False,
    how: str = "BaseCompressor.decompress of compressed-tensors, scales cast to float32 before it",
) -> None:
    """Quantise `model` as `modifier` says, and record what compressed-tensors itself makes of it."""
    said = {"ignore": ["lm_head"]} | modifier
    data: dict[str, Any] = {}
    if calibrated:
        data = {"dataset": samples(), "processor": processor(), "num_calibration_samples": 4}
        data["shuffle_calibration_samples"] = False
    place = tiny.clear(DEST / name)
    # A model that was never on disk is none that oneshot takes.
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        model = AutoModelForCausalLM.from_pretrained(scratch, dtype=model.dtype)
        oneshot(model=model, recipe=QuantizationModifier(**said), **data)
        model.save_pretrained(place, save_compressed=True, max_shard_size=shards)
    (place / "recipe.yaml").unlink(missing_ok=True)
    schemes = {
        module: part.quantization_scheme
        for module, part in model.named_modules()
        if getattr(part, "quantization_scheme", None) is not None and part.quantization_scheme.weights is not None
    }
    record(place, answers(place, schemes), "compressed-tensors", MADE + how, "llmcompressor", "transformers", "torch")


def llama(seed: int, **shape: Any) -> Any:
    return tiny.model(LlamaConfig(**tiny.SMALL | shape), AutoModelForCausalLM.from_config, seed)


def qwen(seed: int, **shape: Any) -> Any:
    return tiny.model(Qwen3Config(**tiny.SMALL | shape), AutoModelForCausalLM.from_config, seed)


def weights(bits: int, **said: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, **{"type": "int", "strategy": "group", "symmetric": False} | said)


def group(*targets: str, preset: str | None = None, **said: Any) -> QuantizationScheme:
    if preset:
        return preset_name_to_scheme(preset, list(targets))
    return QuantizationScheme(targets=list(targets), **said)


def naive() -> None:
    cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
    small = {"hidden_size": 72, "intermediate_size": 136, "head_dim": 24}
    said = {"targets": "Linear", "scheme": "FP8", "kv_cache_scheme": cache}
    make("ct_fp8_tensor", llama(101, **small), said, calibrated=True)
    said = {"targets": "Linear", "scheme": "FP8_DYNAMIC"}
    make("ct_fp8_channel", qwen(102, **small, tie_word_embeddings=True), said, "12kB")
    make("ct_fp8_block", qwen(103, **RAGGED), {"targets": "Linear", "scheme": "FP8_BLOCK"})

    acts = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)
    make("ct_int8_channel", llama(104, **small), {"targets": "Linear", "scheme": "INT8"})
    for name, seed, strategy in (("channel", 105, {"strategy": "channel"}), ("group", 106, {"group_size": 32})):
        shape = small if name == "channel" else {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
        scheme = group("Linear", weights=weights(8, **strategy), input_activations=acts)
        make(f"ct_int8_{name}_asym", qwen(seed, **shape), {"config_groups": {"group_0": scheme}})


def packed() -> None:
    four = {"num_bits": 4, "symmetric": True, "group_size": 32, "strategy": "group", "type": "int"}
    scheme = group("Linear", weights=QuantizationArgs(**four))
    make(
        "ct_int4_g32",
        llama(107, hidden_size=96, head_dim=48, intermediate_size=160),
        {"config_groups": {"group_0": scheme}},
        "45kB",
    )
    make("ct_int4_g128_asym", llama(108, intermediate_size=256), {"targets": "Linear", "scheme": "W4A16_ASYM"})
    scheme = group("Linear", weights=weights(8, strategy="channel", symmetric=True))
    model = llama(109, hidden_size=98, intermediate_size=150, head_dim=34).to(torch.float16)
    make("ct_int8_packed", model, {"config_groups": {"group_0": scheme}})
    scheme = group("Embedding", "re:.*lm_head$", weights=weights(8, strategy="channel"))
    model = llama(118, hidden_size=70, head_dim=24, vocab_size=75, intermediate_size=64)
    make("ct_embeddings", model, {"config_groups": {"group_0": scheme}, "ignore": []})
    scheme = group("Linear", weights=weights(1, symmetric=True, group_size=32))
    make("ct_int1", llama(119, hidden_size=96, head_dim=32), {"config_groups": {"group_0": scheme}})

    bits = {"q_proj": 2, "k_proj": 3, "v_proj": 4, "o_proj": 5, "gate_proj": 6, "up_proj": 7, "down_proj": 8}
    groups = {
        f"group_{place}": group(f"re:.*{name}$", weights=weights(each, strategy="channel"))
        for place, (name, each) in enumerate(bits.items())
    }
    make("ct_bits", qwen(110, hidden_size=102, intermediate_size=150, head_dim=34), {"config_groups": groups})
    groups = {
        "group_0": group("re:.*self_attn.[qkv]_proj$", preset="FP8_DYNAMIC"),
        "group_1": group("model.layers.0.mlp.down_proj", weights=weights(3, group_size=64)),
        "group_2": group("re:.*mlp.(gate|up)_proj$", weights=weights(4, group_size=32)),
    }
    make("ct_mixed", qwen(111, hidden_size=96, head_dim=32, intermediate_size=128), {"config_groups": groups})


def floats() -> None:
    how = "its unpack and dequantize functions with dtype float32 and scales cast to float32 (decompress is BF16 only)"
    said = {"targets": "Linear", "scheme": "NVFP4"}
    make("ct_nvfp4", llama(112, intermediate_size=176), said, calibrated=True, how=how)
    for place, bits in enumerate((4, 6, 8)):
        said = {"targets": "Linear", "scheme": f"MXFP{bits}A16"}
        make(f"ct_mxfp{bits}", llama(113 + place, hidden_size=96, head_dim=32), said, how=how)


def by_hand(name: str, model: Any, wanted: str, nest: str | None = None) -> None:
    """Pack the linear modules that have `wanted` in their names with compressed-tensors' own functions.

    llmcompressor does not reach experts that transformers holds in one tensor, and publishers of such models have
    written them as this does: one module for each expert.
    """
    place = tiny.clear(DEST / name)
    model.save_pretrained(place)
    tensors = load_file(place / "model.safetensors")
    scheme = group("Linear", weights=weights(4, symmetric=True, group_size=32), format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    schemes, ignored = {}, []
    for weight in [n for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 2]:
        module = weight.removesuffix(".weight")
        if wanted not in module or "embed" in module or "lm_head" in module:
            ignored.append(module)
            continue
        dense = tensors.pop(weight)
        scale = (dense.float().unflatten(-1, (-1, 32)).abs().amax(-1) / 7.5).to(dense.dtype)
        packed = compressor.compress({"weight": dense, "weight_scale": scale}, scheme)
        tensors |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
        schemes[module] = scheme
    save_file(dict(sorted(tensors.items())), place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    outer = config[nest] if nest else config
    dumped = scheme.model_dump(mode="json")
    outer["quantization_config"] = {
        "config_groups": {"group_0": dumped},
        "format": "pack-quantized",
        "ignore": ignored if nest is None else ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    how = (
        "scales of amax/7.5 and PackedQuantizationCompressor.compress of compressed-tensors on each weight, saved by "
        "hand; expected: its decompress, scales cast to float32 before it"
    )
    record(place, answers(place, schemes), "compressed-tensors", how, "transformers", "torch")


def others() -> None:
    shape = tiny.SMALL | {"hidden_size": 96, "moe_intermediate_size": 64, "intermediate_size": 64}
    latent = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    config = DeepseekV3Config(**shape | latent | routed | {"first_k_dense_replace": 0, "num_key_value_heads": 2})
    by_hand("ct_moe", tiny.model(config, AutoModelForCausalLM.from_config, 116), ".mlp.experts.")

    seen = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"model_type": "mistral", **tiny.SMALL, "hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
    vision = {"model_type": "pixtral", **seen, "head_dim": 32, "image_size": 16, "patch_size": 8}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    model = tiny.model(config, AutoModelForImageTextToText.from_config, 117)
    by_hand("ct_nested", model, "language_model", "text_config")


def main() -> None:
    naive()
    packed()
    floats()
    others()


if __name__ == "__main__":
    main()
