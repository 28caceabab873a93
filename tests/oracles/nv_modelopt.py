"""Checkpoints that NVIDIA's ModelOpt quantises and exports (`export_hf_checkpoint`).

modelopt_fp8               FP8 with scales of an FP8 kv cache (`k_proj.k_scale`, `v_proj.v_scale`)
modelopt_fp8_old           the same as ModelOpt 0.29 and older left it: only `hf_quant_config.json` says anything
modelopt_fp8_kv_affine     FP8 with an affine kv cache: `k_proj.k_bias` and `v_proj.v_bias` are no biases of k and v
modelopt_fp8_pb_wo         FP8 in blocks of 128x128, ragged, scales of four dimensions [2, 1, 2, 1]
modelopt_fp8_pb_wo_single  the same where most weights are one block: the scale of that has no dimension
modelopt_fp8_pb_real       the same after `mtq.compress`: scales [2, 2]
modelopt_fp8_pc_pt         FP8_PER_CHANNEL_PER_TOKEN: scales [o] of one dimension, several shards
modelopt_nvfp4             NVFP4, two layers, several shards, an NVFP4 kv cache
modelopt_w4a16_nvfp4       W4A16_NVFP4 (Qwen3)
modelopt_w4a8_nvfp4        W4A8_NVFP4_FP8: blocks of 32, not 16
modelopt_nvfp4_awq         NVFP4_AWQ, with `pre_quant_scale` for o_proj and down_proj and without for all others
modelopt_mxfp8             MXFP8
modelopt_mxfp4             mxfp4 in the MLP only; attention is excluded by a wildcard
modelopt_w4a8_mxfp4        W4A8_MXFP4_FP8
modelopt_int8_sq           W8A8_SQ_PER_CHANNEL: `pre_quant_scale` everywhere
modelopt_int8_wo           W8A16: the same without
modelopt_w4a16_awq         W4A16_AWQ: pairs of rows in a byte, `pre_quant_scale` for o_proj and down_proj
modelopt_w4a8_awq          W4A8_AWQ: `weight_scale_2` beside it, which is no factor of the weight
modelopt_mixed             MIXED_PRECISION with `quantized_layers`: FP8, NVFP4, MXFP8, W8A16 and dense
modelopt_moe               NVFP4 experts of a Qwen3 MoE, each by itself
modelopt_llama4_fp8        FP8 experts of Llama 4 in one tensor: `gate_up_proj` beside `gate_up_proj_weight_scale`
modelopt_llama4_nvfp4      the same in NVFP4
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import tiny
import torch
from common import record
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from modelopt.torch.quantization.qtensor.int8_tensor import INT8QTensor
from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import load_file
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

DEST = Path(sys.argv[1])
SMALLER = tiny.SMALL | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 32}
Tensors = dict[str, torch.Tensor]

MADE = "quantised by mtq.quantize on CPU with its {scheme}, saved by export_hf_checkpoint; expected: "
DEQUANTIZE = MADE + "dequantize(torch.float32) of ModelOpt's {kinds} on the tensors of the file"
SMOOTHED = ", times pre_quant_scale (cast to float32) along the input axis where there is one"
INT4 = (
    MADE + "nibbles unpacked here, since ModelOpt has no decoder of its own for them, times weight_scale in float32; "
    "its pack_int4_in_uint8 makes of the answer the bytes of the file"
)
KINDS = {
    "FP8": FP8QTensor,
    "fp8_pb_wo": FP8QTensor,
    "fp8_pb_real": FP8QTensor,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8QTensor,
    "NVFP4": NVFP4QTensor,
    "W4A16_NVFP4": NVFP4QTensor,
    "W4A8_NVFP4_FP8": NVFP4QTensor,
    "NVFP4_AWQ": NVFP4QTensor,
    "MXFP8": MXFP8QTensor,
    "mxfp4": MXFP4QTensor,
    "W4A8_MXFP4_FP8": MXFP4QTensor,
    "W8A8_SQ_PER_CHANNEL": INT8QTensor,
    "W8A16": INT8QTensor,
}
NIBBLES = ("W4A16_AWQ", "W4A8_AWQ")


def calibrate(made: torch.nn.Module) -> None:
    """What ModelOpt calls to see activations: random tokens through the model."""
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        made(torch.randint(32, (2, 16), generator=random))


def of_nibbles(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows 2r and 2r + 1 from the low and the high nibbles of row r, in two's complement."""
    halves = torch.stack([packed & 15, packed >> 4], dim=1).to(torch.int8)
    codes = torch.where(halves > 7, halves - 16, halves).reshape(-1, packed.shape[-1])
    block = packed.shape[-1] // scales.shape[-1]
    numbers = codes.float() * scales.float().repeat_interleave(block, dim=-1)
    assert torch.equal(pack_int4_in_uint8(numbers, scales.float(), block), packed)
    return numbers


def fp8_arguments(scale: torch.Tensor, algorithm: str) -> dict[str, Any]:
    """A scale in the shape in which FP8QTensor wants it."""
    if algorithm.startswith("fp8_pb"):
        grid = scale.reshape(scale.shape[0], -1) if scale.dim() else scale.reshape(1, 1)
        return {"scale": grid, "block_sizes": {-1: 128, -2: 128}}
    return {"scale": scale[:, None] if scale.dim() else scale}


def dense(algorithm: str, shape: torch.Size, weight: torch.Tensor, own: Tensors) -> torch.Tensor:
    """What ModelOpt takes a weight of `shape` to be, `own` being its companions by suffix."""
    scale = own["weight_scale"]
    if algorithm in NIBBLES:
        return of_nibbles(weight, scale)
    kind = KINDS[algorithm]
    options: dict[str, Any] = {"scale": scale}
    if kind is FP8QTensor:
        options = fp8_arguments(scale, algorithm)
    elif kind is INT8QTensor:
        options = {"scale": scale[:, None]}
    elif kind in (NVFP4QTensor, MXFP4QTensor):
        options |= {"block_sizes": {-1: shape[-1] // scale.shape[-1]}, "double_scale": own.get("weight_scale_2")}
    return kind(shape, torch.float32, weight).dequantize(dtype=torch.float32, **options)


def stacked_nvfp4(shape: torch.Size, weight: torch.Tensor, own: Tensors) -> torch.Tensor:
    """Experts of Llama 4 that lie [E, i, o] are packed along i, and transposed for ModelOpt as it does itself."""
    turned = {key: value.transpose(-1, -2) if key == "weight_scale" else value for key, value in own.items()}
    return dense("NVFP4", torch.Size((shape[0], shape[2], shape[1])), weight.mT.contiguous(), turned).mT


def companions(tensors: Tensors, name: str) -> Tensors:
    """What belongs to a weight: `M.weight_scale` of `M.weight`, but `M_weight_scale` of a stacked `M`."""
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    names = ("weight_scale", "weight_scale_2", "pre_quant_scale")
    return {each: tensors[stem + each] for each in names if stem + each in tensors}


def algorithms(place: Path, module: str) -> str:
    said = json.loads((place / "hf_quant_config.json").read_text())["quantization"]
    return said["quantized_layers"][module]["quant_algo"] if "quantized_layers" in said else said["quant_algo"]


def answers(place: Path, originals: Tensors) -> Tensors:
    tensors: Tensors = {}
    for path in place.glob("*.safetensors"):
        tensors |= load_file(path)
    expected = {}
    for name, weight in tensors.items():
        own = companions(tensors, name)
        if "weight_scale" not in own:
            continue
        shape, algorithm = originals[name].shape, algorithms(place, name.removesuffix(".weight"))
        stacked = algorithm == "NVFP4" and len(shape) == 3
        numbers = stacked_nvfp4(shape, weight, own) if stacked else dense(algorithm, shape, weight, own)
        if "pre_quant_scale" in own:
            numbers = numbers * own["pre_quant_scale"].float()[None, :]
        expected[name] = numbers
        check(name, numbers, originals, tensors)
    return expected


def check(name: str, numbers: torch.Tensor, originals: Tensors, tensors: Tensors) -> None:
    """No answer that was misread is near its original, times what smoothing took out of the norm before it."""
    layer, _, module = name.removesuffix(".weight").rpartition(".")
    before = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}.get(layer.rpartition(".")[2])
    if before and module not in ("o_proj", "down_proj"):
        norm = f"{layer.rpartition('.')[0]}.{before}.weight"
        numbers = numbers * (tensors[norm].float() / originals[norm].float())
    original = originals[name].float()
    assert numbers.shape == original.shape, name
    assert (numbers - original).norm() < 0.4 * original.norm(), name


def plain(made: PreTrainedModel) -> Tensors:
    """Parameters under the names of published checkpoints, which have every expert by itself."""
    tensors = {}
    for name, parameter in made.state_dict().items():
        parameter = parameter.clone()
        stem, _, last = name.rpartition(".")
        if stem.endswith(".experts") and isinstance(made, Qwen3MoeForCausalLM):
            for index, expert in enumerate(parameter):
                parts = expert.chunk(2) if last == "gate_up_proj" else [expert]
                names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
                for each, part in zip(names, parts, strict=True):
                    tensors[f"{stem}.{index}.{each}.weight"] = part
        else:
            tensors[name] = parameter
    return tensors


def scheme(name: str, *entries: dict[str, Any], kv: str | None = None) -> dict[str, Any]:
    """ModelOpt's configuration of that name, `entries` coming after its own and so before them."""
    config = copy.deepcopy(getattr(mtq, name))
    if kv:
        config = mtq.update_quant_cfg_with_kv_cache_quant(config, getattr(mtq, kv)["quant_cfg"])
    config["quant_cfg"] = [*config["quant_cfg"], *entries]
    return config


def write(
    name: str,
    made: PreTrainedModel,
    configuration: str,
    how: str = DEQUANTIZE,
    entries: tuple[dict[str, Any], ...] = (),
    kv: str | None = None,
    shard: str = "10GB",
    also: Callable[[torch.nn.Module], None] | None = None,
) -> Path:
    """The fixture `name`; `also` is done to the quantised model before it is exported."""
    place = tiny.clear(DEST / name)
    originals = plain(made)
    made.config.architectures = [type(made).__name__]
    made = mtq.quantize(made, scheme(configuration, *entries, kv=kv), calibrate)
    if also:
        also(made)
    export_hf_checkpoint(made, export_dir=place, max_shard_size=shard)
    expected = answers(place, originals)
    found = {algorithms(place, each.removesuffix(".weight")) for each in expected}
    how = how.format(scheme=configuration, kinds=" and ".join(sorted({KINDS[a].__name__ for a in found if a in KINDS})))
    numbers = {key: np.ascontiguousarray(value.numpy()) for key, value in expected.items()}
    record(place, numbers, "nvidia-modelopt", how, "torch", "transformers", "safetensors")
    return place


def llama(seed: int, **sizes: Any) -> PreTrainedModel:
    return tiny.model(LlamaConfig(**(SMALLER | sizes)), LlamaForCausalLM, seed)


def qwen3(seed: int, **sizes: Any) -> PreTrainedModel:
    return tiny.model(Qwen3Config(**(SMALLER | sizes)), Qwen3ForCausalLM, seed)


def smooth(made: torch.nn.Module) -> None:
    """A `pre_quant_scale` for o_proj and down_proj, whose search ModelOpt does on CUDA only."""
    random = torch.Generator().manual_seed(1)
    for name, module in made.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.input_quantizer._amax_for_smoothing = module.input_quantizer.amax.expand(module.in_features)
            scale = torch.exp(0.5 * torch.randn(module.in_features, generator=random))
            apply_pre_quant_scale_and_smooth(module, scale)


def eight_bits() -> None:
    fp8 = write("modelopt_fp8", llama(1), "FP8_DEFAULT_CFG", kv="FP8_KV_CFG")
    old = tiny.clear(DEST / "modelopt_fp8_old")
    for path in fp8.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config, indent=4))
    write("modelopt_fp8_kv_affine", qwen3(2), "FP8_DEFAULT_CFG", kv="FP8_AFFINE_KV_CFG")
    blocks = "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"
    write("modelopt_fp8_pb_wo", llama(3, hidden_size=136, intermediate_size=200), blocks)
    write("modelopt_fp8_pb_wo_single", qwen3(21, intermediate_size=136), blocks)
    write("modelopt_fp8_pb_real", llama(4, hidden_size=136, intermediate_size=136), blocks, also=mtq.compress)
    write("modelopt_fp8_pc_pt", llama(5), "FP8_PER_CHANNEL_PER_TOKEN_CFG", shard="6KB")
    write("modelopt_mxfp8", llama(6), "MXFP8_DEFAULT_CFG")
    write("modelopt_int8_sq", llama(7), "INT8_SMOOTHQUANT_CFG", DEQUANTIZE + SMOOTHED)
    write("modelopt_int8_wo", llama(8), "INT8_WEIGHT_ONLY_CFG")


def four_bits() -> None:
    write("modelopt_nvfp4", llama(9, num_hidden_layers=2), "NVFP4_DEFAULT_CFG", kv="NVFP4_KV_CFG", shard="3KB")
    write("modelopt_w4a16_nvfp4", qwen3(10), "W4A16_NVFP4_CFG")
    write("modelopt_w4a8_nvfp4", llama(11), "W4A8_NVFP4_FP8_CFG")
    chosen = DEQUANTIZE + SMOOTHED + "; pre_quant_scale is random, as the search for it needs CUDA"
    write("modelopt_nvfp4_awq", llama(12), "NVFP4_DEFAULT_CFG", chosen, also=smooth)
    write("modelopt_mxfp4", llama(13), "MXFP4_MLP_WEIGHT_ONLY_CFG")
    write("modelopt_w4a8_mxfp4", llama(14), "W4A8_MXFP4_FP8_CFG")
    whole = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    write("modelopt_w4a16_awq", llama(15, **whole), "INT4_AWQ_CFG", INT4 + SMOOTHED)
    second = INT4 + SMOOTHED + "; weight_scale_2 is the step of a second rounding, to FP8, at run time"
    write("modelopt_w4a8_awq", llama(16, **(whole | {"intermediate_size": 128})), "W4A8_AWQ_BETA_CFG", second)


def several() -> None:
    fp8 = {"num_bits": (4, 3), "axis": None}
    nvfp4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    mxfp8 = {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
    entries = []
    for pattern, config in (("[qkv]_proj", fp8), ("gate_proj", nvfp4), ("up_proj", nvfp4), ("down_proj", mxfp8)):
        kinds = ("weight_quantizer", "input_quantizer")
        entries += [{"quantizer_name": f"*{pattern}.{kind}", "cfg": config} for kind in kinds]
    entries += [
        {"quantizer_name": "*o_proj.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*o_proj.input_quantizer", "enable": False},
        {"quantizer_name": "*layers.1.mlp*", "enable": False},
    ]
    write("modelopt_mixed", llama(17, num_hidden_layers=2), "FP8_DEFAULT_CFG", entries=tuple(entries))
    moe = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    write("modelopt_moe", tiny.model(Qwen3MoeConfig(**SMALLER, **moe), Qwen3MoeForCausalLM, 18), "NVFP4_DEFAULT_CFG")
    write("modelopt_llama4_fp8", llama4(19), "FP8_DEFAULT_CFG")
    write("modelopt_llama4_nvfp4", llama4(20), "NVFP4_DEFAULT_CFG")


def llama4(seed: int) -> PreTrainedModel:
    moe = {"num_local_experts": 3, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_chunk_size": 64}
    sizes = SMALLER | {"intermediate_size": 48, "intermediate_size_mlp": 48}
    return tiny.model(Llama4TextConfig(**sizes, **moe), Llama4ForCausalLM, seed)


eight_bits()
four_bits()
several()
