"""Tiny models with weights that look like those of trained ones; the same bytes at every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
"""What most configurations here say; k and v are half as tall as they are wide, gate and up not square."""


def model(config: Any, kind: Callable[..., PreTrainedModel], seed: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model of `kind` with weights of its own for each `seed`."""
    made = kind(config).to(dtype)
    # What transformers loads as float32 whatever it is told is so in real checkpoints.
    for name, parameter in [*made.named_parameters(), *made.named_buffers()]:
        if any(part in name for part in getattr(made, "_keep_in_fp32_modules_strict", None) or ()):
            parameter.data = parameter.data.float()
    fill(made, seed)
    return made.eval()


def fill(made: torch.nn.Module, seed: int) -> None:
    """Weights of a spread of 0.03 that differs from row to row, off centre by a third of it, with outliers.

    An off-centre weight has zero points that matter, and rows that differ have scales that do.
    """
    random = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(made.state_dict().items()):
        shape = parameter.shape
        numbers = torch.randn(shape, generator=random)
        if len(shape) < 2:
            numbers = 1 + 0.05 * numbers
        else:
            rows = torch.exp(0.4 * torch.randn((*shape[:-1], 1), generator=random))
            outliers = torch.rand(shape, generator=random) < 0.002
            numbers = 0.03 * rows * (numbers + 0.3 + 8 * numbers * outliers)
        parameter.data.copy_(numbers)


def clear(place: Path) -> Path:
    """`place` as an empty directory."""
    place.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    return place
