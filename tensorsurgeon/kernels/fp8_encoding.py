"""Quantise rows of numbers as FP8 with one scale for each block of `rows x columns` elements.

    s = 448 (1 / max |W|) of the block,  scale = 1 / s,  q = E4M3(W s)

rounded to nearest, ties to even, each step in float32; s is 1 for a block of zeros. That is the recipe of
transformers, bit for bit (integrations/finegrained_fp8.py, Fp8Quantize, whose `448 / x` is 448 times the reciprocal
in torch), and the only one here, so that a public implementation vouches for every code and scale. `s' = max |W| /
448; q = W / s'`, as DeepSeek's own tools have it, is as good: of BF16 weights 3 codes in 10,000 are one step off,
where `W s` is next to a tie, and scales are one bit off.

Scales may be rounded to BF16 or F16, or up to powers of two (`ue8m0`); codes are then made with `s = 1 / scale`, the
scale being as it is stored. None is below 2^-126: smaller ones are subnormal, which GPUs flush to zero.

The last step of E4M3 is 32, so `|W - scale q| <= 16 scale`, which is `max |W| / 28` unless the scale was rounded up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.arrays import STORAGE, Array, as_array, as_float32, from_float32
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.tensor import Block

Numbers = npt.NDArray[np.float32]

LARGEST = np.float32(448)
"""The largest number of E4M3."""
CLIPPED = np.float32(464)
"""What is beyond it by more than half a step."""
BEYOND = np.float32(2.0**127)
"""From here on the nearest code may stand for what float32 does not hold."""
SMALLEST = -126
"""The exponent of the smallest scale, also that of the smallest normal float32."""
HALF = 2**14
"""Added to a float32 below it, it leaves multiples of 2^-9, the step of the smallest numbers of E4M3."""


class Recipe(NamedTuple):
    """Rows and columns that share a scale; what scales are stored in, and whether they are powers of two."""

    rows: int
    columns: int
    scale_dtype: str = "F32"
    powers: bool = False


class Scales(NamedTuple):
    """Scales of a grid of blocks as they are stored and as numbers, and the factors that codes are made with."""

    stored: Array
    numbers: Numbers
    factors: Numbers


def encode_blocks(numbers: Block, recipe: Recipe) -> tuple[Block, Block]:
    """Return codes and scales of rows in F32, BF16 or F16 that begin at a block; the last ones may be smaller.

    Raises:
        RefusedError: for NaN, infinity and numbers from 2^127, and for a scale that its dtype cannot hold.
    """
    bits = bits_of(numbers)
    scales = scales_of(largest_of(bits, recipe), recipe)
    codes = np.empty(bits.shape, np.uint8)
    _encode(bits, scales.factors, recipe.rows, recipe.columns, codes)
    return _block("F8_E4M3", codes), _block(recipe.scale_dtype, scales.stored)


def find_scales(numbers: Block, recipe: Recipe) -> Block:
    """Return the scales alone; see `encode_blocks`."""
    return _block(recipe.scale_dtype, scales_of(largest_of(bits_of(numbers), recipe), recipe).stored)


def encode_plainly(numbers: Block, recipe: Recipe) -> tuple[Block, Block]:
    """Do what `encode_blocks` does, in the plain way that its formula states."""
    import torch  # Takes a second, and the loop does without.

    weight = torch.from_numpy(as_float32(numbers))
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % recipe.columns, 0, -rows % recipe.rows))
    grid = padded.reshape(padded.shape[0] // recipe.rows, recipe.rows, -1, recipe.columns)
    scales = scales_of(grid.abs().amax(dim=(1, 3)).numpy(), recipe)
    scaled = grid * torch.from_numpy(scales.factors)[:, None, :, None]
    codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).reshape(padded.shape)[:rows, :columns]
    return _block("F8_E4M3", codes.contiguous().view(torch.uint8).numpy()), _block(recipe.scale_dtype, scales.stored)


def scales_of(largest: Numbers, recipe: Recipe) -> Scales:
    """Return the scales of blocks whose largest magnitudes are given.

    Raises:
        RefusedError: for NaN, infinity and numbers from 2^127, and for a scale that its dtype cannot hold.
    """
    if not (largest < BEYOND).all():
        raise RefusedError("holds NaN, infinity or numbers from 2^127, which no scale can hold; 'autopsy' tells where.")
    one, most = np.float32(1), np.float32(2.0**-SMALLEST)
    with np.errstate(all="ignore"):
        factors: Numbers = np.where(largest > 0, np.minimum(LARGEST * (one / largest), most), one)
        numbers: Numbers = _power_above(largest, recipe.scale_dtype) if recipe.powers else one / factors
    if recipe.scale_dtype == "F32" and not recipe.powers:
        return Scales(numbers, numbers, factors)
    stored = from_float32(numbers, recipe.scale_dtype)
    numbers = _widened(stored, recipe.scale_dtype)
    if recipe.scale_dtype != "F32":
        # Only the smallest scales in F16 are so coarse that the nearest would clip.
        stored = (stored.view(np.uint16) + (largest > CLIPPED * numbers)).astype(np.uint16).view(stored.dtype)
        numbers = _widened(stored, recipe.scale_dtype)
    if not np.isfinite(numbers).all():
        raise RefusedError(f"holds numbers whose scales are too large for {recipe.scale_dtype}.")
    return Scales(stored, numbers, one / numbers)


def _power_above(largest: Numbers, scale_dtype: str) -> Numbers:
    """Return the least power of two with `448 * it >= largest`; with 448 = 0.875 * 2^9 that is exact."""
    fraction, exponent = np.frexp(largest)
    least = -24 if scale_dtype == "F16" else SMALLEST
    powers = np.where(largest > 0, np.maximum(exponent - 9 + (fraction > 0.875), least), 0)
    above: Numbers = np.ldexp(np.ones_like(largest), powers)
    return above


def _widened(stored: Array, dtype: str) -> Numbers:
    return as_float32(_block(dtype, stored))


def _block(dtype: str, array: Array) -> Block:
    array = np.ascontiguousarray(array, STORAGE[dtype])
    return Block(dtype, array.shape, memoryview(array.data).cast("B") if array.size else b"")


def bits_of(numbers: Block) -> Array:
    """Return rows as the bits of BF16, or of float32."""
    array = as_array(numbers)
    return array if numbers.dtype == "BF16" else array.astype(np.float32, copy=False).view(np.uint32)


def largest_of(bits: Array, recipe: Recipe) -> Numbers:
    """Return the largest magnitude of each block; those of NaN and infinity are larger than all others."""
    grid = (-(-bits.shape[0] // recipe.rows), -(-bits.shape[1] // recipe.columns))
    found = np.zeros(grid, bits.dtype)
    _find_largest(bits, bits.dtype.type(2 ** (8 * bits.itemsize - 1) - 1), recipe.rows, recipe.columns, found)
    return (found.astype(np.uint32) << (32 - 8 * bits.itemsize)).view(np.float32)


# Each loop is a function of its own: of slices that are arguments the compiler knows that they do not overlap.
@compiled
def _find_largest(bits: Array, mask: int, rows: int, columns: int, found: Array) -> None:
    for g in range(found.shape[0]):
        most = np.zeros_like(bits[0])
        for r in range(g * rows, min((g + 1) * rows, bits.shape[0])):
            _raise_to(most, bits[r], mask)
        for c in range(bits.shape[1]):
            found[g, c // columns] = max(found[g, c // columns], most[c])


@compiled
def _raise_to(most: Array, row: Array, mask: int) -> None:
    for c in range(row.shape[0]):
        most[c] = max(most[c], row[c] & mask)


@compiled
def _encode(bits: Array, factors: Numbers, rows: int, columns: int, codes: Array) -> None:
    numbers = np.empty(bits.shape[1], np.float32)
    by, scaled, small = np.empty_like(numbers), np.empty_like(numbers), np.empty_like(numbers)
    number_bits, scaled_bits, small_bits = numbers.view(np.uint32), scaled.view(np.uint32), small.view(np.uint32)
    for g in range(factors.shape[0]):
        spread(factors[g], columns, by)
        for r in range(g * rows, min((g + 1) * rows, bits.shape[0])):
            widen(bits[r], number_bits)
            scale(numbers, by, scaled, small)
            _round(scaled_bits, small_bits, codes[r])


@compiled
def spread(few: Array, columns: int, many: Array) -> None:
    """Repeat what belongs to a block for each of its columns."""
    for c in range(many.shape[0]):
        many[c] = few[c // columns]


@compiled
def widen(row: Array, bits: Array) -> None:
    """Put the bits of BF16 or float32 where the bits of float32 are wanted."""
    shift = np.uint32(32 - 8 * row.itemsize)
    for c in range(row.shape[0]):
        bits[c] = np.uint32(row[c]) << shift


@compiled
def scale(numbers: Numbers, by: Numbers, scaled: Numbers, small: Numbers) -> None:
    """Multiply; `small` are the magnitudes with HALF, in which those of subnormal codes are rounded."""
    for c in range(numbers.shape[0]):
        number = np.float32(numbers[c] * by[c])
        scaled[c] = number
        small[c] = np.float32(abs(number) + np.float32(HALF))


@compiled
def _round(bits: Array, small: Array, codes: Array) -> None:
    """Round float32 to codes: of a normal number `(u - (120 << 23) + 0x7ffff + ((u >> 20) & 1)) >> 20`."""
    for c in range(codes.shape[0]):
        u = np.uint32(bits[c])
        size = min(np.uint32(u & np.uint32(0x7FFFFFFF)), np.uint32(0x43E00000))
        odd = np.uint32(np.uint32(size >> np.uint32(20)) & np.uint32(1))
        normal = np.uint32(np.uint32(np.uint32(size + np.uint32(0xC407FFFF)) + odd) >> np.uint32(20))
        subnormal = np.uint32(np.uint32(small[c]) - np.uint32(0x46800000))
        code = subnormal if size < np.uint32(0x3C800000) else normal
        codes[c] = np.uint8(np.uint32(code | np.uint32(np.uint32(u >> np.uint32(24)) & np.uint32(0x80))))
