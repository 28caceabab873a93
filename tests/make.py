"""Small checkpoints for tests, written by safetensors and transformers, never by the code under test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tensorsurgeon.format import BITS

BLOCK = (128, 128)


def config(layers: int = 4, **changes: Any) -> dict[str, Any]:
    """Return the config of a Qwen3 that fits `tensors`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 192,
        "intermediate_size": 320,
        "max_position_embeddings": 256,
        "max_window_layers": layers,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 304,
        **changes,
    }


def tensors(layers: int = 4, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors of that Qwen3, norms random as well, in the order of its layers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, mean: float = 0.0, std: float = 0.05) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(dtype)

    made = {"model.embed_tokens.weight": random(304, 192, std=1.0)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        made |= {
            prefix + "input_layernorm.weight": random(192, mean=1.0, std=0.3),
            prefix + "self_attn.q_proj.weight": random(256, 192),
            prefix + "self_attn.k_proj.weight": random(128, 192),
            prefix + "self_attn.v_proj.weight": random(128, 192),
            prefix + "self_attn.o_proj.weight": random(192, 256),
            prefix + "self_attn.q_norm.weight": random(64, mean=1.0, std=0.3),
            prefix + "self_attn.k_norm.weight": random(64, mean=1.0, std=0.3),
            prefix + "post_attention_layernorm.weight": random(192, mean=1.0, std=0.3),
            prefix + "mlp.gate_proj.weight": random(320, 192),
            prefix + "mlp.up_proj.weight": random(320, 192),
            prefix + "mlp.down_proj.weight": random(192, 320),
        }
    made["model.norm.weight"] = random(192, mean=1.0, std=0.3)
    made["lm_head.weight"] = random(304, 192, std=0.3)
    return made


def quantize(weight: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of a weight in block FP8, by the formula of transformers' Fp8Quantize."""
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    blocks = padded.view(rows, block[0], columns, block[1])
    amax = blocks.abs().amax(dim=(1, 3))
    factors = torch.where(amax == 0, torch.ones_like(amax), 448 / amax)
    codes = (blocks * factors[:, None, :, None]).view(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return codes.clamp(-448, 448).contiguous().to(torch.float8_e4m3fn), 1 / factors


def quantized(
    plain: Mapping[str, torch.Tensor],
    block: tuple[int, int] = BLOCK,
    scale_dtype: torch.dtype = torch.float32,
    skipped: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Return the tensors with every linear layer in block FP8, but for the modules `skipped`."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and module not in skipped:
            codes, scale = quantize(tensor, block)
            made[name] = codes
            made[module + ".weight_scale_inv"] = scale.to(scale_dtype)
        else:
            made[name] = tensor
    return made


def fp8_settings(block: tuple[int, int] = BLOCK, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the quantization_config of block FP8."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *skipped],
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }


def save(
    directory: Path,
    made: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint directory; with several shards, neighbours in `made` land in different ones."""
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    if shards == 1:
        save_file(dict(made), directory / "model.safetensors", metadata)
    else:
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(made.items())[number::shards])
            save_file(part, directory / file, metadata)
            weight_map |= dict.fromkeys(part, file)
        size = sum(tensor.nbytes for tensor in made.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "generation_config.json").write_text('{\n  "temperature": 0.60,\n  "top_p": 0.95\n}\n')
    return directory


def plain(directory: Path, layers: int = 4, shards: int = 1, **changes: Any) -> Path:
    """Write a BF16 checkpoint."""
    return save(directory, tensors(layers), config(layers, **changes), shards)


def fp8(
    directory: Path,
    layers: int = 4,
    shards: int = 3,
    block: tuple[int, int] = BLOCK,
    scale_dtype: torch.dtype = torch.float32,
    skipped: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """Write a block-FP8 checkpoint, each scale in another shard than its weight."""
    made = quantized(tensors(layers), block, scale_dtype, skipped)
    return save(directory, made, config(layers, quantization_config=fp8_settings(block, skipped), **changes), shards)


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file of a directory, by its path in it."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint directory, as the safetensors library reads them."""
    read: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        read |= read_file(file)
    return read


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one file, as the safetensors library reads them."""
    return load_file(path)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, so that NaN compares equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Tell whether two sets of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(bits(one[name]), bits(other[name]))
        for name in one
    )


def sparse(directory: Path, described: Mapping[str, tuple[str, list[int]]], settings: Mapping[str, Any]) -> Path:
    """Write a checkpoint of zeros that takes no room on the disk."""
    directory.mkdir(parents=True)
    header, end = {}, 0
    for name, (dtype, shape) in described.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(settings))
    return directory
