"""Decode FP8 weights that have one scale for each block of `rows x columns` elements.

    W[r, c] = float32(q[r, c]) * float32(s[r // rows, c // columns]), rounded once to the output dtype

E4M3 has one sign, four exponent (bias 7) and three mantissa bits: `(-1)^s * 2^(e-7) * (1 + m/8)`, for e = 0
`(-1)^s * 2^-6 * m/8`; the codes 0x7f and 0xff are NaN and there is no infinity (arXiv:2209.05433).

A block has 16384 elements but only 256 codes: each code is decoded once a block, into a table small enough
for the first-level cache, and looked up for each element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.arrays import STORAGE, Array, as_array, as_float32, from_float32
from tensorsurgeon.tensor import Block


def e4m3_values() -> npt.NDArray[np.float32]:
    """Return the float32 value of each of the 256 E4M3 codes."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


E4M3 = e4m3_values()


def decode_blocks(weight: Block, scale: Block, block: tuple[int, int], dtype: str) -> Block:
    """Decode rows of a block-FP8 weight.

    Args:
        weight: F8_E4M3 codes, (rows, columns), beginning at a block.
        scale: Scales in F32, BF16 or F16, (ceil(rows / block rows), ceil(columns / block columns)).
        block: Rows and columns that share a scale; the last block of an axis may be smaller.
        dtype: F32, F16 or BF16.

    Raises:
        RefusedError: where a finite weight is too large for F16.
    """
    tables = _tables(as_float32(scale), dtype)
    codes = as_array(weight)
    decoded = np.empty(codes.shape, STORAGE[dtype])
    bits = np.uint32 if dtype == "F32" else np.uint16
    if codes.shape[1] % 8 == 0 and block[1] % 8 == 0:
        _look_up_words(codes.view(np.uint64), tables.view(bits), block[0], block[1] // 8, decoded.view(bits))
    else:
        _look_up(codes, tables.view(bits), block[0], block[1], decoded.view(bits))
    if dtype == "F16" and np.isinf(tables).any() and np.isinf(decoded).any():
        raise RefusedError("a weight beyond 65504 does not fit float16; decode to bfloat16.")
    return Block(dtype, weight.shape, decoded.data.cast("B"))


def decode_blocks_plainly(weight: Block, scale: Block, block: tuple[int, int], dtype: str) -> Block:
    """Do what `decode_blocks` does, in the plain way that its formula states."""
    rows, columns = weight.shape
    scales = as_float32(scale).repeat(block[0], axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]
    decoded = from_float32(E4M3[as_array(weight)] * scales, dtype)
    return Block(dtype, weight.shape, decoded.tobytes())


def _tables(scales: npt.NDArray[np.float32], dtype: str) -> Array:
    """Return what each code decodes to in each block: (block rows, block columns, 256)."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.ascontiguousarray(from_float32(scales[:, :, None] * E4M3, dtype))


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop when it is first called, kept on disk where there is a place for that."""
    try:
        return numba.njit(nogil=True, cache=True)(loop)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(nogil=True)(loop)  # type: ignore[no-any-return]


@compiled
def _look_up_words(words: Array, tables: Array, rows: int, width: int, decoded: Array) -> None:
    """Do what `_look_up` does with one load for eight codes."""
    low = np.uint64(0xFF)
    for r in range(words.shape[0]):
        for b in range(tables.shape[1]):
            table = tables[r // rows, b]
            for place in range(b * width, min((b + 1) * width, words.shape[1])):
                word = words[r, place]
                for code in range(8):
                    decoded[r, 8 * place + code] = table[(word >> np.uint64(8 * code)) & low]


@compiled
def _look_up(codes: Array, tables: Array, rows: int, columns: int, decoded: Array) -> None:
    for r in range(codes.shape[0]):
        for b in range(tables.shape[1]):
            table = tables[r // rows, b]
            for c in range(b * columns, min((b + 1) * columns, codes.shape[1])):
                decoded[r, c] = table[codes[r, c]]
