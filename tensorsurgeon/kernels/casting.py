"""Round blocks of numbers to another dtype."""

from __future__ import annotations

import torch

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.tensor import Block

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def cast_block(block: Block, dtype: str) -> Block:
    """Round each number to nearest, ties to even.

    Raises:
        RefusedError: where a finite number becomes infinite.
    """
    if not len(block.data):
        return Block(dtype, block.shape, b"")
    numbers = torch.frombuffer(block.data, dtype=TORCH[block.dtype])
    rounded = numbers.to(TORCH[dtype])
    if torch.isinf(rounded).any() and not torch.equal(torch.isinf(rounded), torch.isinf(numbers)):
        largest = numbers[torch.isfinite(numbers)].abs().max().item()
        raise RefusedError(f"holds {largest:g}, which does not fit {dtype}; choose a wider dtype for it.")
    return Block(dtype, block.shape, rounded.view(torch.uint8).numpy().data)
