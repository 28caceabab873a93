"""AutoRound's checkpoints: round to nearest without data, its own packing and writers.

Half of the models have rows without negative weights, whose zero points are 0.

autoround_gptq_sym      `auto_round:auto_gptq`, 4 bits, symmetric, several shards: stored zeros are z-1, no g_idx.
autoround_gptq_asym     the same, asymmetric: a zero point 0 is stored as if it were 1, and decodes so.
autoround_gptq_3bit     the same with 3 bits, symmetric.
autoround_gptqmodel     `auto_round:gptqmodel`, 4 bits, asymmetric: zeros as they are, with g_idx.
autoround_2bit          `auto_round`, asymmetric: zeros as they are, no g_idx.
autoround_3bit          `auto_round`, asymmetric, 3 bits, group_size -1.
autoround_5bit          `auto_round`, asymmetric, 5 bits: a plain bit stream where GPTQModel's 5 bits are planar.
autoround_7bit          the same with 7 bits.
autoround_awq           what AutoRound chooses for 4 bits asymmetric: `auto_round:auto_awq`, AWQ GEMM.
autoround_awq_sym       the same, symmetric.
autoround_awq_5bit      5 bits in AWQ GEMM: the order of AWQ in a bit stream along the outputs.
autoround_extra         `extra_config`: 8 bits in one group, 2 bits, 16 bits; 4 bits for a head that it leaves plain.
autoround_as_gptq       `auto_gptq`: a GPTQ checkpoint as AutoRound writes it.
autoround_as_gptq_asym  the same, asymmetric.
autoround_as_awq        `auto_awq`: an AWQ checkpoint as AutoRound writes it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import whole_model
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from common import record
from safetensors.torch import load_file
from transformers import PreTrainedModel

torch.set_num_threads(1)  # Sums in one order, so that a rerun gives the same bytes.

AWQ = "dequantize_gemm of auto_round.export.export_to_awq.utils on the saved tensors, scales cast to float32 first"
GPTQ = (
    "what forward of auto_round_extension.torch.{}.QuantLinear multiplies by, with the saved tensors, scales cast to "
    "float32 first; without g_idx, which where present says nothing"
)
Tensors = dict[str, torch.Tensor]


def quantise(place: Path, made: PreTrainedModel, packing: str, told: dict[str, Any], saving: dict[str, Any]) -> None:
    """Quantise a model and write it; AutoRound writes into a directory of its own below the one that it is told."""
    with tempfile.TemporaryDirectory() as spare:
        plain = whole_model.save(made, Path(spare) / "plain")
        rounder = AutoRound(str(plain), iters=0, disable_opt_rtn=True, disable_model_free=True, **told)
        rounder.quantize_and_save(str(Path(spare) / "made"), format=packing, **saving)
        (written,) = (Path(spare) / "made").rglob("config.json")
        shutil.copytree(written.parent, place, dirs_exist_ok=True)


def packed(own: Tensors, told: dict[str, Any], kind: Any) -> torch.Tensor:
    """What a layer of AutoRound multiplies by."""
    groups, tall = own["scales"].shape
    # Of rows only words are counted on disk, and AutoRound's layers have a whole number of groups.
    wide = own["qweight"].shape[0] * 32 // told["bits"]
    assert wide == groups * (wide if told["group_size"] == -1 else told["group_size"])
    layer = kind(told["bits"], told["group_size"], wide, tall, bias=False)
    if "g_idx" in own:
        # Its forward with g_idx is for square weights only; this g_idx says what it takes for granted without one.
        assert torch.equal(own["g_idx"], torch.arange(wide, dtype=torch.int32) // told["group_size"])
    for name in layer._buffers:
        setattr(layer, name, own[name])
    layer.scales = layer.scales.float()
    # Not the product with a unit matrix: of a zero whose scale is negative that loses the sign.
    with mock.patch.object(torch, "matmul", lambda _, weight: weight):
        return layer(torch.eye(wide))


def dequantised(place: Path, kind: Any) -> dict[str, Any]:
    tensors = {name: each for file in place.glob("*.safetensors") for name, each in load_file(file).items()}
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    expected = {}
    for name in sorted(tensors):
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            own = {key.removeprefix(f"{module}."): t for key, t in tensors.items() if key.startswith(f"{module}.")}
            told = config | config.get("extra_config", {}).get(module, {})
            if kind is None:
                given = (own["qweight"], own["qzeros"], own["scales"].float(), told["bits"], told["group_size"])
                weight = dequantize_gemm(*given)
            else:
                weight = packed(own, told, kind)
            expected[f"{module}.weight"] = weight.T.contiguous().numpy()
    return expected


class Maker:
    """Makes the fixtures one after another in one directory."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def make(
        self, name: str, model: PreTrainedModel, packing: str, zeros: str, saving: Any = None, **told: Any
    ) -> None:
        """Zeros are `v1`, stored one less, `v2`, stored as they are, or `awq`."""
        place = self.made / f"autoround_{name}"
        quantise(place, model, packing, {"bits": 4, "group_size": 32} | told, saving or {})
        module = {"v1": qlinear_torch_zp, "v2": qlinear_torch, "awq": None}[zeros]
        expected = dequantised(place, module and module.QuantLinear)
        how = GPTQ.format(module.__name__.rsplit(".", 1)[1]) if module else AWQ
        record(place, expected, "auto-round", how, "torch", "transformers")


def positive(made: PreTrainedModel) -> PreTrainedModel:
    """The model with the weights of a third of its rows moved above 0."""

    def move(weight: torch.Tensor) -> torch.Tensor:
        weight[::3] = weight[::3].abs() + 0.05
        return weight

    return whole_model.change(made, r".*proj\.weight", move)


def main(made: Path) -> None:
    model, make = whole_model.model, Maker(made).make
    bf16 = torch.bfloat16
    make("gptq_sym", model(1, "qwen2"), "auto_round:auto_gptq", "v1", {"max_shard_size": "16KB"}, sym=True)
    make("gptq_asym", positive(model(2)), "auto_round:auto_gptq", "v1", sym=False)
    make("gptq_3bit", model(3, dtype=bf16), "auto_round", "v1", bits=3, sym=True)
    make("gptqmodel", positive(model(4, "qwen3")), "auto_round:gptqmodel", "v2", sym=False)
    make("2bit", model(5), "auto_round", "v2", bits=2, sym=False)
    make("3bit", positive(model(6)), "auto_round", "v2", bits=3, group_size=-1, sym=False)
    make("5bit", positive(model(7, dtype=bf16)), "auto_round", "v2", bits=5, sym=False)
    make("7bit", model(8), "auto_round", "v2", bits=7, sym=False)
    make("awq", positive(model(9, "qwen2")), "auto_round", "awq", sym=False)
    make("awq_sym", model(10), "auto_round:auto_awq", "awq", sym=True)
    make("awq_5bit", positive(model(11)), "auto_round:auto_awq", "awq", bits=5, sym=False)
    layers = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1},
        "model.layers.0.mlp.up_proj": {"bits": 2, "group_size": 16},
        "model.layers.0.self_attn.v_proj": {"bits": 16},
        "lm_head": {"bits": 4, "group_size": 32},
    }
    untied = model(12, tie_word_embeddings=False)
    make("extra", untied, "auto_round", "v1", sym=True, layer_config=layers)
    make("as_gptq", model(13, "qwen3"), "auto_gptq", "v1", sym=True)
    make("as_gptq_asym", positive(model(14)), "auto_gptq", "v1", sym=False)
    make("as_awq", positive(model(15)), "auto_awq", "awq", sym=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
