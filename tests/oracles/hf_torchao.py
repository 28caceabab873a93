"""Checkpoints that transformers quantises with torchao on loading and saves: `M._weight_qdata`, kinds in the metadata.

torchao_int8             Int8Tensor, F32 scales [o, 1], zero points of 0
torchao_int8_tensor      the same with one scale [1, 1]
torchao_int8_group       the same with groups of 32, F16
torchao_int8_pre_scale   the same with `_weight_act_pre_scale`, which multiplies the input
torchao_intx4            IntxUnpackedToInt8Tensor, 4 bits in groups of 32, asymmetric; several shards
torchao_intx3            the same in 3 bits, symmetric, one scale for each row (Qwen3)
torchao_intx4_da8        the same in 4 bits with activations quantised at run time (8da4w)
torchao_float8           Float8Tensor, F32 scales [o, 1]
torchao_float8_tensor    the same with scales [1, 1]
torchao_float8_group     the same with scales for each 32 columns
torchao_float8_blocks    the same with scales for blocks of 32x32
torchao_float8_e5m2      the same as F8_E5M2
torchao_nvfp4            NVFP4Tensor, swizzled scales of two tiles of rows by two of columns, `per_tensor_scale`
torchao_nvfp4_one_level  the same without `per_tensor_scale`; one padded tile
torchao_nvfp4_plain      the same with scales that are not swizzled
torchao_nvfp4_static     with `act_per_tensor_scale` for the input, which is no factor of the weight, and which
                         transformers 5.23 saves but cannot load
torchao_mxfp8            MXTensor of F8_E4M3, swizzled scales
torchao_mxfp8_plain      the same with scales that are not swizzled
torchao_mxfp4            MXTensor of FP4
torchao_mixed            FqnToConfig: int8, float8, nvfp4 and intx by name, embeddings and head quantised, o_proj dense
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from common import record
from safetensors import safe_open
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
)
from torchao.quantization.granularity import PerAxis, PerBlock, PerGroup, PerRow, PerTensor
from torchao.quantization.quant_primitives import dequantize_affine
from torchao.utils import TorchAOBaseTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    TorchAoConfig,
)

DEST = Path(sys.argv[1])
SMALLER = tiny.SMALL | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 32}
HOW = (
    "quantised by transformers on loading, saved by its save_pretrained (metadata put in order), loaded again by "
    "torchao's unflatten_tensor_state_dict; expected: dequantize() of the loaded tensor with float32 as its "
    "output_dtype (for intx dequantize_affine, which it calls, with float32)"
)
Change = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def dense(weight: TorchAOBaseTensor) -> torch.Tensor:
    """What torchao takes a quantised weight to be."""
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        codes = (weight.qdata, weight.block_size, weight.scale, weight.zero_point, torch.int8)
        numbers = dequantize_affine(*codes, output_dtype=torch.float32)
        assert torch.equal(numbers.to(weight.dtype), weight.dequantize())
    else:
        numbers = weight.dequantize(output_dtype=torch.float32)
    before = getattr(weight, "act_pre_scale", None)
    return numbers if before is None else numbers * before.float()


def quantised(made: PreTrainedModel) -> dict[str, TorchAOBaseTensor]:
    return {name: weight for name, weight in made.state_dict().items() if isinstance(weight, TorchAOBaseTensor)}


def load(place: Path) -> dict[str, TorchAOBaseTensor]:
    """The quantised tensors of a checkpoint as torchao reads them."""
    tensors, metadata = {}, {}
    for path in place.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata |= file.metadata()
    whole, rest = unflatten_tensor_state_dict(tensors, metadata)
    assert not rest
    return {name: tensor for name, tensor in whole.items() if isinstance(tensor, TorchAOBaseTensor)}


def put_in_order(path: Path) -> None:
    """The same file with its metadata in order, which safetensors writes in another one at every run."""
    old = path.read_bytes()
    start = 8 + int.from_bytes(old[:8], "little")
    header = json.loads(old[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    new = json.dumps(header, separators=(",", ":")).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + old[start:])


def write(
    name: str,
    made: PreTrainedModel,
    scheme: Any,
    how: str = HOW,
    shard: str = "50GB",
    change: Change | None = None,
    **options: Any,
) -> None:
    """The fixture `name`; `change` says what a quantised weight becomes, from its name, itself and its original."""
    place = tiny.clear(DEST / name)
    with tempfile.TemporaryDirectory() as plain:
        made.save_pretrained(plain)
        config = TorchAoConfig(scheme, **options)
        small = AutoModelForCausalLM.from_pretrained(plain, dtype="auto", device_map="cpu", quantization_config=config)
    originals = made.state_dict()
    if change:
        for path, weight in quantised(small).items():
            module, _, last = path.rpartition(".")
            changed = torch.nn.Parameter(change(path, weight, originals[path]), requires_grad=False)
            setattr(small.get_submodule(module), last, changed)
    small.save_pretrained(place, max_shard_size=shard)
    for path in place.glob("*.safetensors"):
        put_in_order(path)
    expected = {}
    for path, weight in load(place).items():
        expected[path] = numbers = dense(weight)
        before = getattr(weight, "act_pre_scale", None)
        original = originals[path].float() * (1 if before is None else before.float())
        assert (numbers - original).norm() < 0.4 * original.norm(), path
    answers = {path: np.ascontiguousarray(numbers.numpy()) for path, numbers in expected.items()}
    record(place, answers, "torchao", how, "torch", "transformers", "accelerate", "safetensors")


def llama(seed: int, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> PreTrainedModel:
    return tiny.model(LlamaConfig(**(SMALLER | sizes)), LlamaForCausalLM, seed, dtype)


def qwen3(seed: int, **sizes: Any) -> PreTrainedModel:
    return tiny.model(Qwen3Config(**(SMALLER | sizes)), Qwen3ForCausalLM, seed)


def pre_scale(path: str, weight: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    weight.act_pre_scale = torch.exp(0.5 * torch.randn(original.shape[1], generator=random)).to(original.dtype)
    return weight


def integers() -> None:
    write("torchao_int8", llama(1), Int8WeightOnlyConfig())
    write("torchao_int8_tensor", qwen3(2), Int8WeightOnlyConfig(granularity=PerTensor()))
    write("torchao_int8_group", llama(3, torch.float16), Int8WeightOnlyConfig(granularity=PerGroup(32)))
    chosen = HOW + ", times act_pre_scale along the input axis; act_pre_scale is random and was set by hand"
    write("torchao_int8_pre_scale", llama(4), Int8WeightOnlyConfig(), chosen, change=pre_scale)
    four = {"weight_dtype": torch.int4, "granularity": PerGroup(32), "mapping_type": MappingType.ASYMMETRIC}
    write("torchao_intx4", llama(5), IntxWeightOnlyConfig(**four), shard="6KB")
    write("torchao_intx3", qwen3(6), IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0)))
    dynamic = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    write("torchao_intx4_da8", llama(7), dynamic)


def in_blocks(path: str, weight: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    return Float8Tensor.from_hp(original, granularity=PerBlock([32, 32]))


def eights() -> None:
    write("torchao_float8", llama(8), Float8WeightOnlyConfig(), shard="6KB")
    write("torchao_float8_tensor", llama(9), Float8WeightOnlyConfig(granularity=PerTensor()))
    write("torchao_float8_group", llama(10), Float8WeightOnlyConfig(granularity=PerGroup(32)))
    blocks = HOW + "; weights through Float8Tensor.from_hp, as its configuration has no such granularity"
    write("torchao_float8_blocks", llama(11), Float8WeightOnlyConfig(granularity=PerRow()), blocks, change=in_blocks)
    write("torchao_float8_e5m2", llama(12), Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2))


def unswizzled(path: str, weight: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, MXTensor):
        return MXTensor.to_mx(original, weight.elem_dtype, weight.block_size, is_swizzled_scales=False)
    return NVFP4Tensor.to_nvfp4(original, per_tensor_scale=weight.per_tensor_scale, is_swizzled_scales=False)


def with_input_scale(path: str, weight: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    weight.act_per_tensor_scale = torch.tensor(0.0123)
    return weight


def fours() -> None:
    tiles = {"hidden_size": 96, "intermediate_size": 144}
    write("torchao_nvfp4", llama(13, **tiles), NVFP4WeightOnlyConfig())
    one = NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=False)
    write("torchao_nvfp4_one_level", qwen3(14), one)
    plain = HOW + "; scales that are not swizzled through the tensor's own constructor"
    write("torchao_nvfp4_plain", llama(15), NVFP4WeightOnlyConfig(), plain, change=unswizzled)
    static = HOW + "; act_per_tensor_scale was set by hand"
    write("torchao_nvfp4_static", llama(16), NVFP4WeightOnlyConfig(), static, change=with_input_scale)
    eight = MXDynamicActivationMXWeightConfig()
    write("torchao_mxfp8", llama(17, hidden_size=96, intermediate_size=160), eight)
    write("torchao_mxfp8_plain", llama(18), eight, plain, change=unswizzled)
    four = replace(eight, activation_dtype=torch.float4_e2m1fn_x2, weight_dtype=torch.float4_e2m1fn_x2)
    write("torchao_mxfp4", llama(19), four)


def by_name() -> None:
    scheme = FqnToConfig(
        {
            "model.embed_tokens": IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
            "re:.*self_attn.[qk]_proj": Float8WeightOnlyConfig(),
            "re:.*o_proj": None,
            "re:.*gate_proj": NVFP4WeightOnlyConfig(),
            "_default": Int8WeightOnlyConfig(),
        }
    )
    options = {"include_input_output_embeddings": True}
    write("torchao_mixed", llama(20), scheme, **options)


integers()
eights()
fours()
by_name()
