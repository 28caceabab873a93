"""Checkpoints that transformers quantises with bitsandbytes on loading and saves: 4 bits (nf4, fp4) and LLM.int8.

bnb_nf4                nf4 with F32 absmax, shards so small that companions lie in others than their weights do
bnb_fp4                fp4 of an F16 model with biases (Qwen2); everything is quantised but the head
bnb_nf4_double         nf4 with double quantisation: U8 absmax, `nested_absmax` of two blocks of 256 and a ragged third
bnb_nf4_bf16_storage   the same with `bnb_4bit_quant_storage` bfloat16: weights are BF16 [n/4, 1] that are none
bnb_fp4_f32_storage    fp4 with F32 storage [n/8, 1] of an F32 model
bnb_nf4_ragged         hidden 65 and intermediate 101: odd products, a padding nibble, ragged last blocks, blocks that
                       cross rows
bnb_nf4_blocks         blocks of 32, 128, 256, 512 and 4096 instead of 64, module by module; double quantisation
bnb_nf4_skip           `llm_int8_skip_modules` leaves attention dense and so quantises the head
bnb_int8               LLM.int8 (Qwen3), several shards
bnb_int8_skip          the same of an F16 model with biases, one name skipped, a head that is quantised
bnb_nf4_conv1d         GPT-2: bitsandbytes holds [out, in] what the plain model holds as [in, out]
bnb_int8_conv1d        the same in 8 bits
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import tiny
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from common import record
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

DEST = Path(sys.argv[1])
SMALLER = tiny.SMALL | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 32}

MADE = "quantised by transformers on loading, saved by its save_pretrained, loaded again; expected: "
FOUR = (
    MADE + "_dequantize_4bit_compute of bitsandbytes' default backend in float32 on the loaded weight, absmax (from "
    "dequantize_blockwise where it is quantised itself) and quant_map; functional.dequantize_4bit says the same where "
    "columns are a multiple of the block, and on CPU is wrong where they are not"
)
EIGHT = MADE + "bitsandbytes.functional.int8_vectorwise_dequant on the loaded weight and SCB, which answers in float32"
CONV1D = "; transposed to the orientation of the plain model's Conv1D"


def of_four_bits(weight: bnb.nn.Params4bit) -> torch.Tensor:
    """The weight by the arithmetic that bitsandbytes has for every device.

    Its kernel for CPU, which `dequantize_4bit` calls here, begins a block anew with each row. That is not how the
    weight was quantised where columns are no multiple of the block, nor how CUDA reads it.
    """
    state = weight.quant_state
    state.dtype = torch.float32
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = weight.data.view(torch.uint8).reshape(-1)
    numbers = _dequantize_4bit_compute(codes, scales, state.code, state.blocksize, state.shape, torch.float32)
    if state.shape[-1] % state.blocksize == 0:
        assert torch.equal(numbers, bnb.functional.dequantize_4bit(weight.data, state))
    return numbers


def dense(module: torch.nn.Module) -> torch.Tensor:
    """What bitsandbytes takes the weight of a quantised module to be."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        numbers = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
    else:
        numbers = of_four_bits(module.weight)
    return numbers.T if module.source_cls is Conv1D else numbers


def quantised(made: PreTrainedModel) -> dict[str, torch.nn.Module]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in made.named_modules() if isinstance(module, kinds)}


def near(numbers: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether an answer is what its original would be in 4 bits; none is that was misread."""
    return bool((numbers - original).norm() < 0.4 * original.norm())


def load(place: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place, dtype="auto", device_map="cpu", **options)


def write(
    name: str, made: PreTrainedModel, how: str, shard: str = "50GB", blocks: dict[str, int] | None = None, **scheme: Any
) -> None:
    """The fixture `name`: what transformers makes of the model `made` under the quantisation `scheme`.

    `blocks` are sizes of blocks by the last part of a module's name, of which transformers knows only 64.
    """
    place = tiny.clear(DEST / name)
    with tempfile.TemporaryDirectory() as plain:
        made.save_pretrained(plain)
        small = load(Path(plain), quantization_config=BitsAndBytesConfig(**scheme))
    originals = made.state_dict()
    for path, module in quantised(small).items():
        if size := (blocks or {}).get(path.rpartition(".")[2]):
            module.weight = bnb.nn.Params4bit(
                originals[f"{path}.weight"],
                requires_grad=False,
                compress_statistics=scheme.get("bnb_4bit_use_double_quant", False),
                quant_type=scheme["bnb_4bit_quant_type"],
                blocksize=size,
            ).to("cpu")
    small.save_pretrained(place, max_shard_size=shard)
    expected = {f"{path}.weight": dense(module) for path, module in quantised(load(place)).items()}
    for key, numbers in expected.items():
        assert numbers.shape == originals[key].shape, key
        assert near(numbers, originals[key].float()), key
    answers = {key: np.ascontiguousarray(numbers.numpy()) for key, numbers in expected.items()}
    record(place, answers, "bitsandbytes", how, "torch", "transformers", "accelerate", "safetensors")


def llama(seed: int, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> PreTrainedModel:
    return tiny.model(LlamaConfig(**(SMALLER | sizes)), LlamaForCausalLM, seed, dtype)


def qwen3(seed: int, **sizes: Any) -> PreTrainedModel:
    return tiny.model(Qwen3Config(**(SMALLER | sizes)), Qwen3ForCausalLM, seed)


def qwen2(seed: int, dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    return tiny.model(Qwen2Config(**SMALLER), Qwen2ForCausalLM, seed, dtype)


def gpt2(seed: int) -> PreTrainedModel:
    config = GPT2Config(n_embd=64, n_inner=96, n_layer=1, n_head=2, vocab_size=32, n_positions=64)
    return tiny.model(config, GPT2LMHeadModel, seed)


def four_bits() -> None:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    fp4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    double = {"bnb_4bit_use_double_quant": True}
    write("bnb_nf4", llama(1), FOUR, "3KB", **nf4)
    write("bnb_fp4", qwen2(2), FOUR, **fp4)
    # 262 columns and 130 rows make 532 blocks of 64, which is 2 blocks of 256 absmax and a ragged third.
    write("bnb_nf4_double", llama(3, hidden_size=130, intermediate_size=262), FOUR, **nf4, **double)
    write("bnb_nf4_bf16_storage", llama(4), FOUR, "4KB", **nf4, **double, bnb_4bit_quant_storage=torch.bfloat16)
    write("bnb_fp4_f32_storage", llama(5, torch.float32), FOUR, **fp4, bnb_4bit_quant_storage=torch.float32)
    write("bnb_nf4_ragged", qwen3(6, hidden_size=65, intermediate_size=101), FOUR, **nf4)
    sizes = {"q_proj": 32, "k_proj": 128, "v_proj": 256, "gate_proj": 512, "down_proj": 4096}
    other = FOUR + "; sizes of blocks other than 64 through Params4bit, since transformers offers no choice"
    write("bnb_nf4_blocks", llama(7), other, blocks=sizes, **nf4, **double)
    write("bnb_nf4_skip", llama(8), FOUR, **nf4, llm_int8_skip_modules=["self_attn"])
    write("bnb_nf4_conv1d", gpt2(9), FOUR + CONV1D, **nf4)


def eight_bits() -> None:
    write("bnb_int8", qwen3(10), EIGHT, "6KB", load_in_8bit=True)
    write("bnb_int8_skip", qwen2(11), EIGHT, load_in_8bit=True, llm_int8_skip_modules=["gate_proj"])
    write("bnb_int8_conv1d", gpt2(12), EIGHT + CONV1D, load_in_8bit=True)


torch.compiler.set_stance("force_eager")  # What bitsandbytes would compile for each shape is too small to be worth it.
four_bits()
eight_bits()
