"""The numbers that codes of each kind stand for, as tables of 256 float32.

Codes of fewer than eight bits fill the beginning of a table.

- E4M3: sign, 4 exponent bits (bias 7), 3 mantissa bits: `(-1)^s 2^(e-7) (1 + m/8)`, for e = 0 `(-1)^s 2^-6 m/8`;
  0x7f and 0xff are NaN, and there is no infinity (arXiv:2209.05433).
- E5M2: sign, 5 exponent bits (bias 15), 2 mantissa bits; with infinities and NaN, as IEEE 754 has them (the same).
- E8M0: `2^(e-127)`, 255 is NaN; no sign, no zero (OCP Microscaling Formats v1.0).
- E2M1: sign, 2 exponent bits (bias 1), 1 mantissa bit: 0, .5, 1, 1.5, 2, 3, 4, 6. E2M3: sign, 2, 3 bits: up to 7.5
  (the same).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.arrays import as_array, as_float32
from tensorsurgeon.tensor import Block

Table = npt.NDArray[np.float32]


def _minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> npt.NDArray[np.float64]:
    """Return the numbers of sign, exponent and mantissa, without those that are special."""
    codes = np.arange(2 ** (1 + exponent_bits + mantissa_bits))
    mantissa = codes % 2**mantissa_bits
    exponent = codes >> mantissa_bits & (2**exponent_bits - 1)
    normal = np.ldexp(2.0**mantissa_bits + mantissa, exponent - bias - mantissa_bits)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa.astype(float), 1 - bias - mantissa_bits), normal)
    return np.where(codes >> (exponent_bits + mantissa_bits), -magnitude, magnitude)


def _table(numbers: Any) -> Table:
    padded = np.zeros(256, np.float32)
    padded[: len(numbers)] = numbers
    return padded


def _with_nan(numbers: npt.NDArray[np.float64], *codes: int) -> npt.NDArray[np.float64]:
    """Return a copy in which codes are NaN, of the sign that their numbers would have."""
    return np.where(np.isin(np.arange(len(numbers)), codes), np.copysign(np.nan, numbers), numbers)


E4M3 = _table(_with_nan(_minifloat(4, 3, 7), 0x7F, 0xFF))
E5M2 = _table((np.arange(256, dtype=np.uint16) << 8).view(np.float16))
E8M0 = _table(_with_nan(np.ldexp(1.0, np.arange(256) - 127), 0xFF))
E2M1 = _table(_minifloat(2, 1, 1))
E2M1_POSITIVE = _table(_minifloat(2, 1, 1) + 0.0)
"""E2M1 without a negative zero, as ModelOpt reads it."""
E2M3 = _table(_minifloat(2, 3, 1))
UNSIGNED = _table(np.arange(256))
INT8 = _table(np.arange(256, dtype=np.uint8).view(np.int8))


def offset(bits: int) -> Table:
    """Return the table of codes that stand for `code - 2^(bits - 1)`; it goes on beyond those of so many bits."""
    return _table(np.arange(256) - 2.0 ** (bits - 1))


def signed(bits: int) -> Table:
    """Return the table of codes in two's complement."""
    return _table((np.arange(2**bits) + 2 ** (bits - 1)) % 2**bits - 2.0 ** (bits - 1))


def scale_numbers(block: Block) -> npt.NDArray[np.float32]:
    """Return scales as float32: those in U8 or F8_E8M0 are exponents, those in F8_E4M3 numbers of eight bits.

    Raises:
        RefusedError: for a scale that is NaN.
    """
    if block.dtype in ("U8", "F8_E8M0"):
        numbers = E8M0.take(codes_of(block))
    else:
        numbers = E4M3.take(as_array(block)) if block.dtype == "F8_E4M3" else as_float32(block)
    # The largest is NaN just where any is.
    if numbers.size and np.isnan(numbers.max()):
        raise RefusedError("a scale is NaN, and so would be all weights that it is for; the file is damaged.")
    return numbers


def table_of(block: Block) -> Table:
    """Return the table of a format that keeps what its codes stand for in the file, in F32."""
    return _table(as_float32(block).reshape(-1))


def named(kind: str) -> Table:
    """Return a table by its name: of a small float, INT8, UNSIGNED, OFFSET4 (`code - 8`), or SIGNED4."""
    return NAMED[kind]


NAMED = {
    "E4M3": E4M3, "E5M2": E5M2, "E2M1": E2M1, "E2M1_POSITIVE": E2M1_POSITIVE, "E2M3": E2M3,
    "INT8": INT8, "UNSIGNED": UNSIGNED,
    **{f"OFFSET{bits}": offset(bits) for bits in range(1, 9)},
    **{f"SIGNED{bits}": signed(bits) for bits in range(1, 9)},
}  # fmt: skip


def codes_of(block: Block) -> npt.NDArray[np.uint8]:
    """Return codes of eight bits in the block's shape, whatever they stand for."""
    return np.frombuffer(block.data, np.uint8).reshape(block.shape)
