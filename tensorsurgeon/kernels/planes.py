"""From planes of bits, as GPTQModel packs them, to one code a byte.

For 32 codes there are as many words as bits: those of their low bits come first, then those of higher ones. Planes are
4, 2 or 1 bits wide: 3 bits are 2 and 1, 5 are 4 and 1, 6 are 4 and 2, 7 are 4, 2 and 1. Each is a bit stream: of 1, 2,
4 or 8 bits there is no more than that.
Source: GPTQModel, utils/planar_packing.py.
"""

from __future__ import annotations

import numpy as np

from tensorsurgeon.kernels.arrays import Array
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.kernels.unpacking import unpack, unpack_rows, unpack_rows_plainly

EVEN = (1, 2, 4, 8)
"""Widths of codes that are one plane."""


def unpack_planes(words: Array, bits: int, columns: int) -> Array:
    """Return the first `columns` codes of each row, whose bits lie in planes: (rows, columns) of uint8."""
    words = np.ascontiguousarray(words).view(np.uint32)
    if bits in EVEN:
        return unpack_rows(words, bits, columns)
    codes = np.empty((len(words), words.shape[1] // bits * 32), np.uint8)
    _planes(words, bits, codes)
    return codes[:, :columns]


def unpack_planes_plainly(words: Array, bits: int, columns: int) -> Array:
    """Do what `unpack_planes` does, plane by plane."""
    if bits in EVEN:
        return unpack_rows_plainly(words, bits, columns)
    blocks = words.view(np.uint32).reshape(len(words), -1, bits)
    codes, shift = np.zeros((len(words), 32 * blocks.shape[1]), np.uint8), 0
    for width in (4, 2, 1):
        if bits & width:
            plane = blocks[:, :, shift : shift + width].reshape(len(words), -1)
            codes |= unpack_rows_plainly(plane, width, codes.shape[1]) << np.uint8(shift)
            shift += width
    return codes[:, :columns]


@compiled
def _planes(words: Array, bits: int, codes: Array) -> None:
    codes[:] = 0
    blocks = codes.shape[1] // 32
    part = np.empty((1, codes.shape[1]), np.uint8)
    for r in range(words.shape[0]):
        shift = 0
        for width in (4, 2, 1):
            if not bits & width:
                continue
            plane = np.empty((1, blocks * width), np.uint32)
            for place in range(blocks * width):
                plane[0, place] = words[r, place // width * bits + shift + place % width]
            unpack(plane.view(np.uint8), width, part)
            _merge(part[0], np.uint8(shift), codes[r])
            shift += width


@compiled
def _merge(part: Array, shift: int, codes: Array) -> None:
    for c in range(codes.shape[0]):
        codes[c] |= part[c] << shift
