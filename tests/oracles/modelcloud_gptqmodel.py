"""GPTQModel's checkpoints, quantised with its own calibration on a CPU and written by its own writer.

gptq_v1_sym        4 bits, symmetric, two shards, biases: what most GPTQ files are; stored zeros are z-1.
gptq_v1_asym       4 bits, asymmetric, desc_act: rows keep their order and g_idx says which group each is of.
gptq_v1_zero0      4 bits, asymmetric, some zero points 0: z-1 borrows from the neighbour in the word.
gptq_v2_asym       4 bits, asymmetric, some zero points 0, zeros stored as they are.
gptq_v2_as_v1      4 bits, symmetric, zeros stored as they are and a config that says `gptq` (Qwen3.5-27B-GPTQ-Int4).
gptq_v1_2bit       2 bits, asymmetric.
gptq_v1_3bit       3 bits, asymmetric, zero points 0 too: codes straddle words; 96 inputs in groups of 64.
gptq_v1_8bit       8 bits, symmetric, lm_head quantised too.
gptq_planar        planar, v2 zeros: 6 bits, by `dynamic` 5 in the MLP and 7 in v, o_proj left plain.
gptq_planar_3bit   planar 3 bits, which has the shapes of the 3 bits that straddle.
gptq_v1_5bit       5 bits labelled `gptq`: planar all the same.
gptq_dynamic       4 bits, per module 8 or 2 bits, other groups, symmetric or not, one module skipped.
gptq_one_group     group_size -1.
gptq_ragged        100 inputs in groups of 32 and 100 outputs: neither is a multiple of the 8 codes of a word.
gptq_moe           experts one by one (Qwen3-MoE), router left plain.
awq_gptqmodel_bf16 AWQ GEMM with BF16 scales, which AutoAWQ itself never writes.
fp8_gptqmodel_tensor, _row, _block  FP8 whose `weight_scale_inv` divides; names are those of DeepSeek's FP8.
bnb_gptqmodel_nf4, _fp4, _nf4_plain, _int8  bitsandbytes under GPTQModel's names; _plain: absmax not quantised again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# GPTQModel counts its threads by the machine's cores and fails where they are few; its packer in C++ is compiled at
# first use, which takes longer than everything here, and packs what its packer in Python does.
os.environ |= {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1"}

import torch
import whole_model
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_blockwise
from common import record
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.bitsandbytes import BitsAndBytesLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import AWQConfig, BitsAndBytesConfig, FP8Config
from gptqmodel.quantization.dtype import _dequantize_f8_reference
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import load_file
from transformers import PreTrainedModel

torch.set_num_threads(1)  # Sums in one order, so that a rerun gives the same bytes.

GPTQ = "TorchLinear.dequantize_weight on the saved tensors, scales cast to float32 first"
V1 = f"convert_gptq_v1_to_v2_format_module, then {GPTQ}"
Tensors = dict[str, torch.Tensor]


def quantise(place: Path, made: PreTrainedModel, config: Any, **saving: Any) -> Tensors:
    """Quantise a model on tokens drawn at random and return what GPTQModel wrote."""
    draw = torch.Generator().manual_seed(7)
    tokens = [torch.randint(3, made.config.vocab_size, (1, 64), generator=draw) for _ in range(16)]
    with tempfile.TemporaryDirectory() as plain:
        loaded = GPTQModel.load(str(whole_model.save(made, Path(plain))), config, dtype=made.dtype)
        loaded.quantize([{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in tokens], batch_size=1)
        loaded.save(str(place), **saving)
    return {name: tensor for file in sorted(place.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def modules(tensors: Tensors, mark: str) -> Iterator[tuple[str, Tensors]]:
    """The modules that have a tensor named `mark`, each with its tensors."""
    for name in sorted(tensors):
        if name.endswith(f".{mark}"):
            module = name.removesuffix(mark)
            yield module[:-1], {key.removeprefix(module): t for key, t in tensors.items() if key.startswith(module)}


def shared(config: Any) -> dict[str, Any]:
    return {"group_size": config.group_size, "sym": config.sym, "desc_act": config.desc_act, "bias": False}


def fill(layer: torch.nn.Module, tensors: Tensors) -> torch.nn.Module:
    for name in layer._buffers.keys() & tensors.keys():
        layer._buffers[name] = tensors[name]
    return layer.eval()


def gptq(tensors: Tensors, config: QuantizeConfig) -> dict[str, Any]:
    expected = {}
    for name, own in modules(tensors, "qweight"):
        told = {key: config.dynamic_get(name, key, usual) for key, usual in shared(config).items()}
        sizes = {"in_features": len(own["g_idx"]), "out_features": own["scales"].shape[1]}
        bits = config.dynamic_get(name, "bits", config.bits)
        layer = fill(TorchLinear(bits=bits, format=config.format, **told, **sizes), own)
        layer.scales = layer.scales.float()
        if config.format == "gptq":
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        expected[f"{name}.weight"] = layer.dequantize_weight().T.contiguous().numpy()
    return expected


def awq(tensors: Tensors, config: AWQConfig) -> dict[str, Any]:
    expected = {}
    for name, own in modules(tensors, "qweight"):
        weight = dequantize_gemm(own["qweight"], own["qzeros"], own["scales"].float(), 4, config.group_size)
        expected[f"{name}.weight"] = weight.T.contiguous().numpy()
    return expected


def fp8(tensors: Tensors, config: FP8Config) -> dict[str, Any]:
    expected = {}
    for name, own in modules(tensors, "weight_scale_inv"):
        axis = None if config.weight_scale_method == "block" else 0
        given = {"scale_inv": own["weight_scale_inv"], "axis": axis, "target_dtype": torch.float32}
        weight = _dequantize_f8_reference(own["weight"], **given)
        expected[f"{name}.weight"] = weight.numpy()
    return expected


def bnb(tensors: Tensors, config: BitsAndBytesConfig) -> dict[str, Any]:
    expected = {}
    for name, own in modules(tensors, "weight_quant_state" if config.bits == 4 else "weight_scb"):
        # The layer needs its sizes only to allocate what `fill` replaces.
        given = {"in_features": 64, "out_features": 64, **shared(config), **config.quant_linear_init_kwargs()}
        layer = fill(BitsAndBytesLinear(bits=config.bits, **given), own)
        weight = of_four_bits(layer) if config.bits == 4 else layer.dequantize_weight()
        expected[f"{name}.weight"] = weight.numpy()
    return expected


def of_four_bits(layer: BitsAndBytesLinear) -> torch.Tensor:
    """The weight by the arithmetic that bitsandbytes has for every device.

    The kernel for CPU that GPTQModel ends in here begins a block anew with each row, which is wrong where columns are
    no multiple of the block.
    """
    state = layer._refresh_quant_state(force=True)
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return _dequantize_4bit_compute(
        layer.weight.reshape(-1), scales, state.code, state.blocksize, state.shape, torch.float32
    )


def relabel(place: Path) -> None:
    """Call v2 what is v1, as some makers did."""
    for name in ("config.json", "quantize_config.json"):
        said = json.loads((place / name).read_text())
        told = said.get("quantization_config", said)
        told["checkpoint_format"] = told["format"] = "gptq"
        (place / name).write_text(json.dumps(said, indent=2) + "\n")


def positive(made: PreTrainedModel) -> PreTrainedModel:
    """The model with weights of a third of its rows moved above 0, so that their zero points are 0."""

    def move(weight: torch.Tensor) -> torch.Tensor:
        weight[::3] = weight[::3].abs() + 0.05
        return weight

    return whole_model.change(made, r".*(proj|lm_head)\.weight", move)


class Maker:
    """Makes the fixtures one after another in one directory."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def gptq(self, name: str, model: PreTrainedModel, saving: dict[str, Any] | None = None, **config: Any) -> Path:
        # Kept in memory, as the writer notes in config.json the directory that it would offload to.
        told = QuantizeConfig(**{"bits": 4, "group_size": 32, "desc_act": False, "offload_to_disk": False} | config)
        place = self.made / name
        expected = gptq(quantise(place, model, told, **saving or {}), told)
        record(place, expected, "gptqmodel", V1 if told.format == "gptq" else GPTQ, "torch", "transformers")
        return place

    def other(self, name: str, dequantise: Any, config: Any, how: str, *libraries: str, **sizes: Any) -> None:
        place = self.made / name
        tensors = quantise(place, whole_model.model(40, "llama", torch.bfloat16, **sizes), config)
        record(place, dequantise(tensors, config), "gptqmodel", how, "torch", "transformers", *libraries)


def make(made: Path) -> None:
    model, maker = whole_model.model, Maker(made)
    maker.gptq("gptq_v1_sym", model(1, "qwen2"), {"max_shard_size": "16KB"}, sym=True)
    maker.gptq("gptq_v1_asym", model(2), sym=False, desc_act=True)
    maker.gptq("gptq_v1_zero0", positive(model(3)), sym=False)
    maker.gptq("gptq_v2_asym", positive(model(4, "qwen3")), sym=False, format="gptq_v2")
    relabel(maker.gptq("gptq_v2_as_v1", model(5, "qwen3"), sym=True, format="gptq_v2"))
    maker.gptq("gptq_v1_2bit", model(6), sym=False, bits=2)
    maker.gptq("gptq_v1_3bit", positive(model(7)), sym=False, bits=3, group_size=64)
    maker.gptq("gptq_v1_8bit", model(8, tie_word_embeddings=False), sym=True, bits=8, lm_head=True)
    by_module = {"-:.*o_proj": {}, "+:.*mlp.*": {"bits": 5}, "+:.*v_proj": {"bits": 7}}
    maker.gptq("gptq_planar", positive(model(9)), sym=False, bits=6, format="gptq_p", dynamic=by_module)
    maker.gptq("gptq_planar_3bit", model(10), sym=False, bits=3, format="gptq_p")
    maker.gptq("gptq_v1_5bit", model(11), sym=False, bits=5)
    by_module = {
        "-:.*up_proj": {},
        "+:.*down_proj": {"bits": 8, "group_size": 32},
        "+:.*gate_proj": {"bits": 2, "group_size": 16, "sym": False},
        "+:.*o_proj": {"group_size": 32, "desc_act": True},
    }
    maker.gptq("gptq_dynamic", model(12, "qwen2"), sym=True, group_size=16, dynamic=by_module)
    maker.gptq("gptq_one_group", model(13), sym=False, group_size=-1, act_group_aware=False)
    maker.gptq("gptq_ragged", model(14, intermediate_size=100), sym=False, pack_impl="original")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    maker.gptq("gptq_moe", model(15, "qwen3_moe", **experts), sym=True)

    plain = {"offload_to_disk": False}
    told = AWQConfig(bits=4, group_size=32, sym=False, **plain)
    sizes = {"head_dim": 64, "intermediate_size": 192}
    maker.other("awq_gptqmodel_bf16", awq, told, "dequantize_gemm with scales cast to float32", **sizes)
    divide = "_dequantize_f8_reference (what TorchFP8Linear.dequantize_weight calls on a CPU) in float32: a division"
    for method, block in (("tensor", None), ("row", None), ("block", [32, 32])):
        told = FP8Config(weight_scale_method=method, weight_block_size=block, **plain)
        maker.other(f"fp8_gptqmodel_{method}", fp8, told, divide)
    state = (
        "BitsAndBytesLinear's quant state, then _dequantize_4bit_compute of bitsandbytes' default backend, in float32"
    )
    for kind, nested in (("nf4", True), ("fp4", True), ("nf4_plain", False)):
        told = BitsAndBytesConfig(bits=4, format=kind[:3], compress_statistics=nested, **plain)
        maker.other(f"bnb_gptqmodel_{kind}", bnb, told, state, "bitsandbytes")
    told = BitsAndBytesConfig(bits=8, **plain)
    maker.other("bnb_gptqmodel_int8", bnb, told, "BitsAndBytesLinear.dequantize_weight", "bitsandbytes")


if __name__ == "__main__":
    made = Path(sys.argv[1]).resolve()
    # GPTQModel leaves a directory of logs where it runs.
    with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):
        make(made)
