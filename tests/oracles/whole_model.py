"""Tiny causal language models with weights like real ones, for libraries that quantise a whole model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def model(seed: int, kind: str = "llama", dtype: torch.dtype = torch.float16, **sizes: Any) -> PreTrainedModel:
    """A model of model_type `kind`, weights heavy-tailed and each row off centre, as asymmetric codes need."""
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | sizes))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        numbers = torch.randn(parameter.shape, generator=draw)
        if "norm" in name:
            parameter.data = 1 + numbers * 0.1
            continue
        numbers *= 0.03
        if parameter.dim() == 2:
            numbers *= torch.where(torch.rand(parameter.shape, generator=draw) < 0.01, 5, 1)
            numbers += torch.randn(len(numbers), 1, generator=draw) * 0.02
        parameter.data = numbers
    return made.to(dtype).eval()


def save(made: PreTrainedModel, place: Path) -> Path:
    """Write a plain checkpoint with a tokenizer of words without meaning, which some libraries insist on."""
    made.save_pretrained(place)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{each}": each for each in range(3, made.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(place)
    return place


def change(made: PreTrainedModel, pattern: str, how: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """The model with the parameters whose whole names match `pattern` changed."""
    for name, parameter in made.named_parameters():
        if re.fullmatch(pattern, name):
            parameter.data = how(parameter.data)
    return made
