"""Checkpoints that mlx-lm quantises and saves, as the mlx-community publishes them: words of 32 bits.

mlx_2bit, mlx_3bit      affine, groups of 32 and 64, BF16 scales and biases
mlx_4bit                what most of mlx-community is: 4 bits, groups of 64, embeddings and head quantised
mlx_4bit_f32            F32 scales and biases: here the rounding between product and sum shows
mlx_5bit, mlx_6bit      affine, groups of 64 and 128; F16 and, in the latter, tied embeddings that have no head
mlx_8bit                affine, with biases of Qwen2's own (`q_proj.bias`) beside those of the groups (`q_proj.biases`)
mlx_mixed               the recipe mixed_3_6 of mlx-lm: an entry for each module in `quantization`
mlx_overrides           one module each in 1, 2, 3, 5, 6 and 8 bits, mxfp4, nvfp4 and mxfp8, two left dense
mlx_shards              4 bits, several shards: scales and biases lie elsewhere than their weights
mlx_unquantisable       groups of 64, but columns of 96, which stay dense with no word of it in the configuration
mlx_mxfp4, mlx_nvfp4, mlx_mxfp8  one mode each for all: U8 scales, no biases
mlx_moe                 stacked experts `switch_mlp` and a router in 8 bits, under the names that mlx has for them
mlx_moe_global_scale    the same in nvfp4 with a `global_scale` for each expert
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import record
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

DEST = Path(sys.argv[1])
# Columns are multiples of 64 here, since mlx leaves dense what its groups do not divide.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 32,
    "max_position_embeddings": 128,
}
EXPERTS = SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}

HOW = (
    "quantised by mlx_lm.utils.quantize_model on CPU, saved by its save_model and save_config, loaded again by its "
    "load_model; expected: mx.dequantize on the loaded module with scales and biases (of affine) cast to float32 and "
    "the answer's dtype set to float32"
)
Chosen = bool | dict[str, Any]


def numbers(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Numbers like those of a trained weight: rows of different spread, off centre, with outliers."""
    plain = random.standard_normal(shape)
    if len(shape) < 2:
        return 1 + 0.05 * plain
    rows = np.exp(0.4 * random.standard_normal((*shape[:-1], 1)))
    outliers = random.random(shape) < 0.002
    return 0.03 * rows * (plain + 0.3 + 8 * plain * outliers)


def model(config: dict[str, Any], seed: int, dtype: mx.Dtype) -> nn.Module:
    kind, arguments = utils._get_classes(config=config)
    made = kind(arguments.from_dict(config))
    random = np.random.default_rng(seed)
    fresh = [
        (name, mx.array(numbers(old.shape, random).astype(np.float32)).astype(dtype))
        for name, old in sorted(tree_flatten(made.parameters()))
    ]
    made.update(tree_unflatten(fresh))
    return made


def dense(module: nn.Module) -> np.ndarray:
    """What mlx takes the weight of a quantised module to be."""
    scales, biases = module.scales, module.get("biases")
    if module.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    options = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode, "dtype": mx.float32}
    whole = module.get("global_scale")
    if whole is None:
        return np.array(mx.dequantize(module.weight, scales, biases, **options))
    # A scale for each expert, which mlx takes one at a time.
    parts = zip(module.weight, scales, whole, strict=True)
    return np.stack([np.array(mx.dequantize(w, s, None, global_scale=g, **options)) for w, s, g in parts])


def quantised(made: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    return ((name, module) for name, module in sorted(made.named_modules()) if isinstance(module, kinds))


def small_shards(weights: dict[str, mx.array]) -> list[dict[str, mx.array]]:
    """Shards of five tensors; mlx-lm itself measures them in whole gigabytes."""
    names = list(weights)
    return [{name: weights[name] for name in names[at : at + 5]} for at in range(0, len(names), 5)]


def write(
    name: str,
    config: PreTrainedConfig,
    seed: int,
    group_size: int | None = None,
    bits: int | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    how: str = HOW,
    choose: Callable[[nn.Module], Callable[[str, nn.Module], Chosen]] | None = None,
    also: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    place = DEST / name
    place.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    config.dtype = str(dtype).rpartition(".")[2]
    plain = config.to_dict() | (also or {})
    made = model(plain, seed, dtype)
    originals = dict(tree_flatten(made.parameters()))
    options["quant_predicate"] = choose(made) if choose else None
    made, described = utils.quantize_model(made, plain, group_size, bits, **options)
    utils.save_model(place, made)
    utils.save_config(described, place / "config.json")
    expected = {}
    for path, module in quantised(utils.load_model(place)[0]):
        expected[f"{path}.weight"] = answer = dense(module)
        original = np.array(originals[f"{path}.weight"].astype(mx.float32))
        # Nothing that was misread is that near; but of one bit, the lowest or the highest number, nothing is.
        assert module.bits == 1 or np.linalg.norm(answer - original) < 0.5 * np.linalg.norm(original), path
    record(place, expected, "mlx", how, "mlx-lm", "transformers", "numpy")


def llama(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**(SMALL | sizes), architectures=["LlamaForCausalLM"])


def qwen3(**sizes: Any) -> Qwen3Config:
    return Qwen3Config(**(SMALL | sizes), architectures=["Qwen3ForCausalLM"])


def affine() -> None:
    write("mlx_2bit", llama(), 1, 32, 2)
    write("mlx_3bit", qwen3(), 2, 64, 3)
    write("mlx_4bit", llama(), 3, 64, 4)
    write("mlx_4bit_f32", llama(), 4, 32, 4, dtype=mx.float32)
    write("mlx_5bit", llama(), 5, 64, 5, dtype=mx.float16)
    tied = qwen3(hidden_size=128, tie_word_embeddings=True)
    write("mlx_6bit", tied, 6, 128, 6, dtype=mx.float16)
    write("mlx_8bit", Qwen2Config(**SMALL, architectures=["Qwen2ForCausalLM"]), 7, 64, 8)
    write("mlx_unquantisable", llama(intermediate_size=96), 8, 64, 4)
    sharded = HOW + "; shards of five tensors in place of those of 5 GB that its save_model makes"
    with patch.object(utils, "make_shards", small_shards):
        write("mlx_shards", llama(), 9, 64, 4, how=sharded)


def by_module() -> None:
    mixed = partial(mixed_quant_predicate_builder, "mixed_3_6", group_size=32)
    write("mlx_mixed", llama(num_hidden_layers=2), 10, 32, 3, choose=mixed)
    chosen: dict[str, Chosen] = {
        "embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
        "q_proj": {"group_size": 64, "bits": 3, "mode": "affine"},
        "k_proj": {"group_size": 32, "bits": 6, "mode": "affine"},
        "v_proj": {"group_size": 32, "bits": 5, "mode": "affine"},
        "o_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "gate_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "up_proj": {"group_size": 128, "bits": 2, "mode": "affine"},
        "down_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "lm_head": {"group_size": 64, "bits": 1, "mode": "affine"},
    }
    # In the second layer two modules stay dense and the others are what `quantization` says of all.
    later = {"q_proj": False, "gate_proj": False}

    def choose(path: str, module: nn.Module) -> Chosen:
        last = path.rpartition(".")[2]
        return later.get(last, True) if ".1." in path else chosen[last]

    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    write("mlx_overrides", llama(**sizes), 11, 32, 4, choose=lambda made: choose)


def other_modes() -> None:
    write("mlx_mxfp4", llama(intermediate_size=160), 12, mode="mxfp4")
    write("mlx_nvfp4", qwen3(intermediate_size=80), 13, mode="nvfp4")
    write("mlx_mxfp8", llama(intermediate_size=96), 14, mode="mxfp8")


def experts() -> None:
    config = Qwen3MoeConfig(**EXPERTS, architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True)
    options = {
        "how": HOW + "; experts under the names of mlx: one stacked weight [E, o, i] for each `switch_mlp` projection",
        "choose": attrgetter("quant_predicate"),
        # As published configurations say it and mlx-lm expects it; transformers 5 would write other keys.
        "also": {"num_experts": EXPERTS["num_experts"], "rope_theta": 10000.0},
    }
    write("mlx_moe", config, 15, 64, 4, **options)
    write("mlx_moe_global_scale", config, 16, mode="nvfp4", global_scale=True, **options)


mx.set_default_device(mx.cpu)
affine()
by_module()
other_modes()
experts()
