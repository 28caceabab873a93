"""Count what is not a finite number."""

from __future__ import annotations

import torch

from tensorsurgeon.tensor import Block

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def count_nonfinite(block: Block) -> tuple[int, int]:
    """Return how many elements are NaN and how many infinite; E4M3 has no infinity, and 0x7f and 0xff are NaN."""
    if not len(block.data):
        return 0, 0
    if block.dtype == "F8_E4M3":
        codes = torch.frombuffer(block.data, dtype=torch.uint8)
        return int(((codes & 0x7F) == 0x7F).sum()), 0
    if block.dtype not in _FLOATS:
        return 0, 0
    numbers = torch.frombuffer(block.data, dtype=_FLOATS[block.dtype])
    return int(torch.isnan(numbers).sum()), int(torch.isinf(numbers).sum())
