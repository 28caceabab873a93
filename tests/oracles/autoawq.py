"""AutoAWQ's checkpoints: its own search for scales on a CPU, its own packing and writer. All are asymmetric.

AutoAWQ writes no others: its packers fail without zero points. Norms and neighbours hold the smoothing, so decoded
weights are not near those of the plain model.

autoawq_gemm_g32        GEMM, nibbles in the order 0 2 4 6 1 3 5 7, several shards.
autoawq_gemm_g128       GEMM with groups of 128 and biases (Qwen2).
autoawq_gemm_one_group  GEMM with group_size -1, inputs of 64 and 192.
autoawq_gemm_skip       GEMM with `modules_to_not_convert`, which AutoAWQ takes for parts of names.
autoawq_gemm_moe        GEMM, experts one by one (Qwen3-MoE), router left plain.
autoawq_gemv_g32        GEMV: packed along the inputs in natural order, groups padded to multiples of 32 and 4 words.
autoawq_gemv_g128       GEMV with groups of 128, padded to 8.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import whole_model
from awq import AutoAWQForCausalLM
from awq.models._config import AwqConfig
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm, unpack_awq
from common import record
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

torch.set_num_threads(1)  # Sums in one order, so that a rerun gives the same bytes.

GEMM = "awq.utils.packing_utils.dequantize_gemm on the saved tensors, scales cast to float32 first"
GEMV = (
    "codes and zero points by awq.utils.packing_utils.unpack_awq, (code - zero point) * scale in float32 by hand, as "
    "AutoAWQ has only kernels for CUDA; the same numbers as those of the same model in GEMM by dequantize_gemm"
)
ROWS = (
    "AwqQuantizer.pseudo_quantize_tensor and WQLinear_GEMM.from_linear on each layer, as AutoAWQ fails on group_size -1"
)
Tensors = dict[str, torch.Tensor]


def searched(loaded: Any, plain: str, told: dict[str, Any]) -> None:
    """Quantise as AutoAWQ does, on tokens drawn at random."""
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, loaded.model.config.vocab_size, (16, 64), generator=draw).tolist()
    tokenizer = AutoTokenizer.from_pretrained(plain)
    loaded.quantize(tokenizer, quant_config=told, calib_data=tokens, max_calib_seq_len=64)


def unsearched(loaded: Any, told: dict[str, Any]) -> None:
    """Quantise whole rows without a search for scales, which fails where group_size is -1, as does packing by it."""
    quantiser = SimpleNamespace(group_size=-1, zero_point=True, w_bit=4)
    for name, module in list(loaded.model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            module.weight.data, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(quantiser, module.weight.data)
            groups = {"scales": scales.T.contiguous(), "zeros": zeros.T.contiguous()}
            packed = WQLinear_GEMM.from_linear(module, 4, module.in_features, **groups)
            loaded.model.model.layers.set_submodule(name, packed)
    loaded.quant_config = AwqConfig.from_dict(told)


def quantise(place: Path, made: PreTrainedModel, told: dict[str, Any], size: str) -> Any:
    """Quantise a model, write it, and return it."""
    with tempfile.TemporaryDirectory() as plain:
        whole_model.save(made, Path(plain))
        loaded = AutoAWQForCausalLM.from_pretrained(plain, device_map="cpu")
        if told["q_group_size"] == -1:
            unsearched(loaded, told)
        else:
            searched(loaded, plain, told)
        loaded.save_quantized(str(place), shard_size=size)
    return loaded.model


def gemm(own: Tensors, group: int) -> torch.Tensor:
    return dequantize_gemm(own["qweight"], own["qzeros"], own["scales"].float(), 4, group).T


def gemv(own: Tensors, group: int) -> torch.Tensor:
    codes, zeros = (each & 15 for each in unpack_awq(own["qweight"], own["qzeros"], 4))
    groups = codes.shape[1] // group
    scales, zeros = (each[:, :groups].repeat_interleave(group, dim=1) for each in (own["scales"].float(), zeros))
    return (codes - zeros) * scales


def dequantised(place: Path, model: Any, dequantise: Callable[[Tensors, int], torch.Tensor]) -> dict[str, Any]:
    tensors = {name: each for file in place.glob("*.safetensors") for name, each in load_file(file).items()}
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, WQLinear_GEMM | WQLinear_GEMV):
            own = {kind: tensors[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales")}
            expected[f"{name}.weight"] = dequantise(own, module.group_size).contiguous().numpy()
    return expected


def make(
    place: Path,
    made: PreTrainedModel,
    group: int,
    version: str = "GEMM",
    skipped: list[str] | None = None,
    size: str = "5GB",
) -> None:
    told = {"zero_point": True, "q_group_size": group, "w_bit": 4, "version": version}
    model = quantise(place, made, told | {"modules_to_not_convert": skipped}, size)
    if version == "GEMM":
        how = GEMM if group > 0 else f"{ROWS}; {GEMM}"
        record(place, dequantised(place, model, gemm), "autoawq", how, "torch", "transformers")
        return
    expected = dequantised(place, model, gemv)
    twin = np.load(place.with_name(place.name.replace("gemv", "gemm")) / "expected.npz")
    assert all(np.array_equal(numbers, twin[name]) for name, numbers in expected.items())
    record(place, expected, "autoawq", GEMV, "torch", "transformers")


def main(made: Path) -> None:
    # Of tied embeddings AutoAWQ's writer makes a note in the metadata, whose order changes from run to run.
    untied = {"tie_word_embeddings": False, "head_dim": 64}
    small = {**untied, "num_attention_heads": 1, "intermediate_size": 192}
    wide = {**untied, "hidden_size": 128, "intermediate_size": 128}
    make(made / "autoawq_gemm_g32", whole_model.model(1, **small), 32, size="16KB")
    make(made / "autoawq_gemm_g128", whole_model.model(2, "qwen2", **wide), 128)
    make(made / "autoawq_gemm_one_group", whole_model.model(3, **small), -1)
    make(made / "autoawq_gemm_skip", whole_model.model(4, "qwen3", **small), 64, skipped=["v_proj", "up"])
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    make(made / "autoawq_gemm_moe", whole_model.model(5, "qwen3_moe", **small, **experts), 32, skipped=["mlp.gate"])
    make(made / "autoawq_gemv_g32", whole_model.model(1, **small), 32, "GEMV")
    make(made / "autoawq_gemv_g128", whole_model.model(2, "qwen2", **wide), 128, "GEMV")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
