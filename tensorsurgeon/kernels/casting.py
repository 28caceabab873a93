"""Round blocks of numbers to another dtype."""

from __future__ import annotations

from typing import Any

import torch

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.tensor import Block

CHUNK = 2**18
"""Elements rounded at once: temporary tensors stay in the cache, and out of the memory's account."""

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_block(tensor: torch.Tensor, dtype: str) -> Block:
    """Return a tensor as rows of a dtype, rounded to nearest, ties to even."""
    made = tensor.to(TORCH[dtype]).contiguous().cpu()
    data: Any = made.view(torch.uint8).numpy().data
    return Block(dtype, tuple(tensor.shape), data.cast("B"))


def cast_block(block: Block, dtype: str) -> Block:
    """Round each number to nearest, ties to even.

    Raises:
        RefusedError: where a finite number becomes infinite.
    """
    if not len(block.data):
        return Block(dtype, block.shape, b"")
    numbers = torch.frombuffer(block.data, dtype=TORCH[block.dtype])
    rounded = torch.empty(len(numbers), dtype=TORCH[dtype])
    round_into(rounded, numbers, dtype)
    return Block(dtype, block.shape, rounded.view(torch.uint8).numpy().data)


def round_into(rounded: torch.Tensor, numbers: torch.Tensor, dtype: str) -> None:
    """Put numbers, which lie in one dimension, rounded to nearest, where there is room for as many of `dtype`.

    Raises:
        RefusedError: where a finite number becomes infinite.
    """
    for start in range(0, len(numbers), CHUNK):
        part, result = numbers[start : start + CHUNK], rounded[start : start + CHUNK]
        result.copy_(part)
        overflown = torch.isinf(result) & ~torch.isinf(part)
        if overflown.any():
            raise RefusedError(f"holds {part[overflown][0].item():g}, which does not fit {dtype}.")
