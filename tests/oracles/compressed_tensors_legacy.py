"""Checkpoints that compressed-tensors 0.12 packs, in layouts that later versions no longer read.

ct_old_bits          pack-quantized in 2 to 8 bits, where 3, 5, 6 and 7 bits leave bits of each word unused; symmetric.
                     k_proj [34, 100] has 10 words of 3 bits in a row, as it would have if packed densely: only the
                     `version` tells
ct_old_bits_asym     the same with zero points that are packed likewise down the rows, and shapes that tell
ct_old_actorder      4 bits in groups of 32 with `weight_g_idx`: columns in the order of a permutation of groups; all -1
                     (in order) for one module
ct_old_sparse24      2:4 sparse and not quantised: `compressed`, `bitmask`, `shape`, 13 bytes of mask for 100 columns
ct_old_sparse24_fp8  2:4 sparse FP8, scales [o, 1]
ct_old_sparse        sparse without structure: `compressed` [n], `bitmask`, `row_offsets`, `shape`
ct_old_key           FP8 under `compression_config`, without formats of groups, with `output_scale` of a kv cache
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from common import record
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import sparse24_bitmask_decompress
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import bitmask_decompress
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

DEST = Path(sys.argv[1])
Tensors = dict[str, torch.Tensor]

MADE = (
    "scales by calculate_qparams of compressed-tensors, packed by its ModelCompressor, saved by save_pretrained and "
    "its update_config; expected: "
)
ODD = {"hidden_size": 100, "intermediate_size": 148, "head_dim": 34}


def build(kind: Any, seed: int, **shape: Any) -> Any:
    return tiny.model(kind(**tiny.SMALL | shape), AutoModelForCausalLM.from_config, seed)


def linear(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def observe(module: torch.nn.Linear, order: torch.Tensor | None = None) -> None:
    """Put into a module the scales and zero points of its weight, its columns grouped in `order` where there is one."""
    args = module.quantization_scheme.weights
    weight = module.weight.data.float()
    if order is not None:
        module.weight_g_idx.data.copy_(order)
        weight = weight[:, torch.argsort(order, stable=True)]
    if args.strategy == "group":
        weight = weight.unflatten(-1, (-1, args.group_size))
    scale, zero = calculate_qparams(weight.amin(-1), weight.amax(-1), args)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_scale.shape))


def quantise(model: torch.nn.Module, groups: dict[str, tuple[list[str], QuantizationArgs]]) -> None:
    config = QuantizationConfig(
        config_groups={name: {"targets": targets, "weights": args} for name, (targets, args) in groups.items()},
        ignore=["lm_head"],
    )
    apply_quantization_config(model, config)
    for module in linear(model).values():
        initialize_module_for_quantization(module)


def prune(model: torch.nn.Module, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for module in linear(model).values():
        module.weight.data.masked_fill_(~keep(module.weight.data.float().abs()), 0)


def two_of_four(size: torch.Tensor) -> torch.Tensor:
    fours = size.unflatten(-1, (-1, 4))
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(2, -1).indices, True).flatten(-2)


def save(
    model: Any, name: str, layout: str | None = None, sparse: Any | None = None
) -> tuple[Path, Tensors, dict[str, Any]]:
    """The directory of a compressed model, its tensors, and the arguments of each quantised module."""
    place = tiny.clear(DEST / name)
    compressor = ModelCompressor.from_pretrained_model(model, sparse, layout)
    compressor.compress_model(model)
    model.save_pretrained(place)
    compressor.update_config(place)
    schemes = {n: m.quantization_scheme.weights for n, m in linear(model).items() if hasattr(m, "quantization_scheme")}
    return place, load_file(place / "model.safetensors"), schemes


def of(tensors: Tensors, module: str) -> Tensors:
    return {
        name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")
    }


def unpacked(tensors: Tensors, args: QuantizationArgs) -> np.ndarray:
    shape = torch.Size(tensors["weight_shape"].tolist())
    scale, zero = tensors["weight_scale"].float(), tensors.get("weight_zero_point")
    if zero is not None:
        zero = unpack_from_int32(zero, args.num_bits, (shape[0], scale.shape[-1]), packed_dim=0)
    codes = unpack_from_int32(tensors["weight_packed"], args.num_bits, shape)
    weight = dequantize(codes, scale, zero, args=args, g_idx=tensors.get("weight_g_idx"))
    assert weight.dtype == torch.float32
    return weight.numpy()


def packed(name: str, model: Any) -> None:
    place, tensors, schemes = save(model, name, "pack-quantized")
    expected = {f"{module}.weight": unpacked(of(tensors, module), args) for module, args in schemes.items()}
    how = "its unpack_from_int32 and dequantize with scales cast to float32 (decompress_weight refuses zero points)"
    record(place, expected, "compressed-tensors", MADE + how, "transformers", "torch")


def old_bits() -> None:
    bits = {"q_proj": 2, "k_proj": 3, "v_proj": 4, "o_proj": 5, "gate_proj": 6, "up_proj": 7, "down_proj": 8}
    for suffix, symmetric in (("", True), ("_asym", False)):
        model = build(Qwen3Config, 130 + symmetric, **ODD if symmetric else ODD | {"hidden_size": 132})
        args = {n: QuantizationArgs(num_bits=b, strategy="channel", symmetric=symmetric) for n, b in bits.items()}
        quantise(model, {f"group_{i}": ([f"re:.*{n}$"], each) for i, (n, each) in enumerate(args.items())})
        for module in linear(model).values():
            observe(module)
        packed(f"ct_old_bits{suffix}", model)


def old_actorder() -> None:
    model = build(LlamaConfig, 132, hidden_size=96, head_dim=32)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False, actorder="group")
    quantise(model, {"group_0": (["Linear"], args)})
    random = torch.Generator().manual_seed(132)
    for name, module in linear(model).items():
        groups = torch.arange(module.in_features, dtype=torch.int) // 32
        order = None if name.endswith("o_proj") else groups[torch.randperm(len(groups), generator=random)]
        observe(module, order)
    packed("ct_old_actorder", model)


def sparse(name: str, model: Any, kind: Any, decode: Callable[[Tensors], torch.Tensor], how: str) -> None:
    dense = {n: m.weight.data.clone() for n, m in linear(model).items()}
    place, tensors, schemes = save(model, name, sparse=kind(targets=["Linear"], ignore=["lm_head"]))
    expected = {}
    for module in dense:
        own = of(tensors, module)
        weight = decode(own)
        if module in schemes:
            weight = dequantize(weight, own["weight_scale"].float(), args=schemes[module])
        else:
            assert torch.equal(weight, dense[module].float())
        expected[f"{module}.weight"] = weight.numpy()
    record(place, expected, "compressed-tensors", MADE + how, "transformers", "torch")


def decode24(own: Tensors) -> torch.Tensor:
    # The library writes values where the mask says, which torch on CPU does not do for FP8.
    return sparse24_bitmask_decompress(own["compressed"].float(), own["bitmask"], own["shape"].flatten().tolist())


def decode_any(own: Tensors) -> torch.Tensor:
    return bitmask_decompress(own["compressed"].float(), own["bitmask"], own["shape"].tolist())


def old_sparse() -> None:
    shape = ODD | {"num_attention_heads": 4, "head_dim": 32}
    model = build(LlamaConfig, 133, **shape)
    prune(model, two_of_four)
    how = "its sparse24_bitmask_decompress on values cast to float32"
    sparse("ct_old_sparse24", model, Sparse24BitMaskConfig, decode24, how)

    model = build(LlamaConfig, 134, **shape)
    prune(model, two_of_four)
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    quantise(model, {"group_0": (["Linear"], args)})
    for module in linear(model).values():
        observe(module)
    sparse("ct_old_sparse24_fp8", model, Sparse24BitMaskConfig, decode24, how + ", then its dequantize")

    model = build(LlamaConfig, 135, hidden_size=60, head_dim=20, intermediate_size=100)
    prune(model, lambda size: size > 0.04)
    how = "its bitmask_decompress on values cast to float32"
    sparse("ct_old_sparse", model, BitmaskConfig, decode_any, how)


def old_key() -> None:
    model = build(LlamaConfig, 136, hidden_size=72, head_dim=24, intermediate_size=128)
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)
    quantise(model, {"group_0": (["Linear"], args)})
    for module in linear(model).values():
        weight = module.weight.data.float()
        module.weight_scale.data.copy_(calculate_qparams(weight.amin(), weight.amax(), args)[0])
    place, tensors, schemes = save(model, "ct_old_key", "float-quantized")
    expected = {
        f"{module}.weight": dequantize(
            tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"].float(), args=each
        ).numpy()
        for module, each in schemes.items()
    }
    for projection in ("k_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{projection}.output_scale"] = torch.tensor([0.01], dtype=torch.bfloat16)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    said = config.pop("quantization_config")
    for each in said["config_groups"].values():
        each.pop("format", None)
    (place / "config.json").write_text(json.dumps(config | {"compression_config": said}, indent=2) + "\n")
    how = "its dequantize with scales cast to float32; key, formats and output scales put as early versions had them"
    record(place, expected, "compressed-tensors", MADE + how, "transformers", "torch")


def main() -> None:
    old_bits()
    old_actorder()
    old_sparse()
    old_key()


if __name__ == "__main__":
    main()
