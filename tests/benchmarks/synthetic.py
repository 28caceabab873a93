"""Checkpoints to measure on: true names and shapes, bytes that are random, or holes in the file that take no disk.

They are written byte by byte, by neither the code under test nor safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLOCK = 128
WIDTH = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
CHUNK = 32 * 2**20
Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of each tensor, in file order."""
Draw = Callable[[np.random.SFC64, str, int], np.ndarray[Any, Any]]
"""Takes a source of randomness, a dtype and a number of bytes, and returns as many."""


class Qwen3(NamedTuple):
    """The sizes that a Qwen3's shapes follow from; as given here those of Qwen3-4B."""

    layers: int
    hidden: int = 2560
    intermediate: int = 9728
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 151936
    head_dim: int = 128

    def shapes(self) -> Shapes:
        """Return the tensors of the model, BF16, with tied embeddings."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {
            "model.embed_tokens.weight": ("BF16", (self.vocab, self.hidden)),
            **{
                f"model.layers.{index}.{module}.weight": ("BF16", shape)
                for index in range(self.layers)
                for module, shape in layer.items()
            },
            "model.norm.weight": ("BF16", (self.hidden,)),
        }

    def config(self) -> dict[str, Any]:
        """Return the model's config."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
        }


def write_directions(path: Path, model: Qwen3, count: int) -> None:
    """Write random directions for each layer of a model, as rows."""
    random = np.random.default_rng(0)
    bases = [np.linalg.qr(random.standard_normal((model.hidden, count)))[0].T for _ in range(model.layers)]
    np.savez(path, **{f"L{layer}": basis.astype(np.float32) for layer, basis in enumerate(bases)})


def as_llama(model: Qwen3) -> tuple[Shapes, dict[str, Any]]:
    """Return the tensors and config of a Llama of a Qwen3's sizes, with a head of its own."""
    shapes = {name: it for name, it in model.shapes().items() if not name.endswith(("q_norm.weight", "k_norm.weight"))}
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    changes = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    return shapes, model.config() | changes


DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def deepseek_v3() -> Shapes:
    """Return the 91,991 tensors of DeepSeek-V3: 61 layers, of which 3 are dense, and layer 61 for prediction."""
    embedding = ("BF16", (129280, 7168))
    shapes: Shapes = {"model.embed_tokens.weight": embedding}
    for index in range(62):
        layer = _attention() | (_gated_mlp("mlp", 18432) if index < 3 else _experts())
        shapes |= {f"model.layers.{index}.{name}": described for name, described in layer.items()}
    norm = ("BF16", (7168,))
    extra = {name + ".weight": norm for name in ("enorm", "hnorm", "shared_head.norm")}
    extra |= {"eh_proj.weight": ("BF16", (7168, 14336))}
    extra |= {"embed_tokens.weight": embedding, "shared_head.head.weight": embedding}
    shapes |= {f"model.layers.61.{name}": described for name, described in extra.items()}
    return shapes | {"model.norm.weight": norm, "lm_head.weight": embedding}


def _attention() -> Shapes:
    norms = {"input_layernorm": 7168, "post_attention_layernorm": 7168}
    norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    return {
        **{f"{name}.weight": ("BF16", (size,)) for name, size in norms.items()},
        **fp8_linear("self_attn.q_a_proj", 1536, 7168),
        **fp8_linear("self_attn.q_b_proj", 24576, 1536),
        **fp8_linear("self_attn.kv_a_proj_with_mqa", 576, 7168),
        **fp8_linear("self_attn.kv_b_proj", 32768, 512),
        **fp8_linear("self_attn.o_proj", 7168, 16384),
    }


def _gated_mlp(module: str, size: int) -> Shapes:
    return {
        **fp8_linear(f"{module}.gate_proj", size, 7168),
        **fp8_linear(f"{module}.up_proj", size, 7168),
        **fp8_linear(f"{module}.down_proj", 7168, size),
    }


def _experts() -> Shapes:
    shapes: Shapes = {"mlp.gate.weight": ("BF16", (256, 7168)), "mlp.gate.e_score_correction_bias": ("F32", (256,))}
    for module in ["mlp.shared_experts", *(f"mlp.experts.{index}" for index in range(256))]:
        shapes |= _gated_mlp(module, 2048)
    return shapes


def fp8_linear(module: str, rows: int, columns: int) -> Shapes:
    """Return a weight in block FP8 and its scale."""
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    return {f"{module}.weight": ("F8_E4M3", (rows, columns)), f"{module}.weight_scale_inv": ("F32", grid)}


def in_fp8(shapes: Shapes) -> Shapes:
    """Return the shapes with every linear layer in block FP8."""
    quantized: Shapes = {}
    for name, (dtype, shape) in shapes.items():
        module = name.removesuffix(".weight")
        quantized |= fp8_linear(module, *shape) if module.endswith("_proj") else {name: (dtype, shape)}
    return quantized


def fp8_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with the settings of block FP8."""
    settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    return {**config, "quantization_config": {**settings, "weight_block_size": [BLOCK, BLOCK]}}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor."""
    return WIDTH[dtype] * prod(shape)


def write(
    directory: Path,
    shapes: Shapes,
    config: Mapping[str, Any],
    shard_size: int,
    sparse: bool = False,
    normal: bool = False,
) -> Path:
    """Write a checkpoint in shards of at most `shard_size` bytes, durably.

    A sparse one takes no disk; numbers of a normal one are distributed as weights are, with a std of 0.02.
    """
    directory.mkdir(parents=True)
    groups: list[Shapes] = [{}]
    filled = 0
    for name, described in shapes.items():
        if groups[-1] and filled + nbytes(*described) > shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = described
        filled += nbytes(*described)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_shard(directory / file, group, number, sparse, _normal_bytes if normal else _random_bytes)
        weight_map |= dict.fromkeys(group, file)
    total = sum(nbytes(*described) for described in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def _write_shard(path: Path, shapes: Shapes, seed: int, sparse: bool, draw: Draw) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.SFC64(seed)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + end)
            return
        for dtype, shape in shapes.values():
            size = nbytes(dtype, shape)
            for begin in range(0, size, CHUNK):
                file.write(draw(random, dtype, min(CHUNK, size - begin)).data)
        file.flush()
        os.fsync(file.fileno())


@cache
def _normal_numbers(dtype: str) -> np.ndarray[Any, Any]:
    """Return bytes of normal numbers in BF16, or in E4M3 for scales of 2^-12."""
    import torch

    numbers = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)) * 0.02
    made = numbers.bfloat16() if dtype == "BF16" else (numbers * 2**12).to(torch.float8_e4m3fn)
    return made.view(torch.uint8).numpy()  # type: ignore[no-any-return]


def _normal_bytes(random: np.random.SFC64, dtype: str, size: int) -> np.ndarray[Any, Any]:
    if dtype == "F32":
        return np.full(size // 4, 2.0**-12, np.float32).view(np.uint8)
    begin = int(random.random_raw()) % (CHUNK // 2) * 2
    return np.roll(_normal_numbers(dtype), begin)[:size]


def _random_bytes(random: np.random.SFC64, dtype: str, size: int) -> np.ndarray[Any, Any]:
    """Return random bytes; as F8_E4M3 they hold no NaN, as F32 they are scales between 2^-12 and 2^-11."""
    drawn = random.random_raw(-(-size // 8)).view(np.uint8)[:size]
    if dtype == "F8_E4M3":
        return drawn - ((drawn & 0x7F) == 0x7F)
    if dtype == "F32":
        return (drawn.view(np.uint32) >> 9 | 0x39800000).view(np.uint8)
    return drawn
