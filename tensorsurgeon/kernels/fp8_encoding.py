"""Quantise rows of numbers as FP8 with one scale for each block of `rows x columns` elements."""

from __future__ import annotations

import torch

from tensorsurgeon.kernels.arrays import as_float32
from tensorsurgeon.kernels.casting import as_block
from tensorsurgeon.tensor import Block

LARGEST = 448.0
"""The largest number of E4M3."""


def encode_blocks(numbers: Block, block: tuple[int, int], scale_dtype: str) -> tuple[Block, Block]:
    """Return codes and scales: `s = max |W| / 448` of each block, 1 for a block of zeros; `q = W / s`, to nearest even.

    Args:
        numbers: Rows in F32, (rows, columns), beginning at a block.
        block: Rows and columns that share a scale; the last block of an axis may be smaller.
        scale_dtype: F32, BF16 or F16; codes are made with the scale as it is rounded to it.
    """
    weight = torch.from_numpy(as_float32(numbers))
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    grid = padded.reshape(padded.shape[0] // block[0], block[0], -1, block[1])
    largest = grid.abs().amax(dim=(1, 3))
    scales = as_block(torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest)), scale_dtype)
    divisors = torch.from_numpy(as_float32(scales))[:, None, :, None]
    codes = (grid / divisors).clamp(-LARGEST, LARGEST).reshape(padded.shape)[:rows, :columns]
    stored = codes.to(torch.float8_e4m3fn).contiguous().view(torch.uint8).numpy().data
    return Block("F8_E4M3", (rows, columns), stored.cast("B")), scales
