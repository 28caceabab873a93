"""From words of AWQ to one code a byte.

Each row is a bit stream in which of every eight columns the even ones come before the odd ones. Of four bits a word
holds eight columns, and is turned fast.
"""

from __future__ import annotations

import numpy as np

from tensorsurgeon.kernels.arrays import Array
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.kernels.unpacking import LINE, turn, unpack, unpack_rows

NIBBLE = 4

INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which place among eight codes each of eight columns has."""


def unpack_interleaved(words: Array, bits: int) -> Array:
    """Return the codes of all columns, transposed: (columns, rows) of uint8."""
    if bits != NIBBLE:
        return unpack_interleaved_plainly(words, bits)
    words = np.ascontiguousarray(words).view(np.uint32)
    rows = len(words)
    codes = np.empty((8 * words.shape[1], rows), np.uint8)
    _interleaved(np.pad(words, ((0, -words.shape[0] % 8), (0, 0))) if len(words) % 8 else words, codes)
    return codes


def unpack_interleaved_plainly(words: Array, bits: int) -> Array:
    """Do what `unpack_interleaved` does for codes of any width, as it is said."""
    codes = unpack_rows(words, bits, words.shape[1] * 32 // bits).reshape(len(words), -1, 8)
    return np.ascontiguousarray(codes[:, :, INTERLEAVED].reshape(len(words), -1).T)


@compiled
def _interleaved(words: Array, codes: Array) -> None:
    """Bring the nibbles of eight rows that belong to a column into one word of it, then go on as for streams."""
    packed = np.empty((8, words.shape[0] // 8, LINE), np.uint32)
    turned = np.empty((LINE, words.shape[0] // 8), np.uint32)
    for left in range(0, words.shape[1], LINE):
        width = min(LINE, words.shape[1] - left)
        right = left + width
        for top in range(packed.shape[1]):
            r = 8 * top
            for j in range(8):
                _combine(
                    words[r, left:right], words[r + 1, left:right], words[r + 2, left:right], words[r + 3, left:right],
                    words[r + 4, left:right], words[r + 5, left:right], words[r + 6, left:right],
                    words[r + 7, left:right], np.uint32(NIBBLE * INTERLEAVED[j]), packed[j, top, :width],
                )  # fmt: skip
        for j in range(8):
            turn(packed[j], 0, turned)
            for w in range(width):
                column = 8 * (left + w) + j
                unpack(turned[w : w + 1].view(np.uint8), 4, codes[column : column + 1])


@compiled
def _combine(
    a: Array, b: Array, c: Array, d: Array, e: Array, f: Array, g: Array, h: Array, shift: int, packed: Array
) -> None:
    """Put the nibbles at `shift` of eight words into one, for each place."""
    low = np.uint32(15)
    for w in range(packed.shape[0]):
        word = (a[w] >> shift) & low
        word |= ((b[w] >> shift) & low) << np.uint32(4)
        word |= ((c[w] >> shift) & low) << np.uint32(8)
        word |= ((d[w] >> shift) & low) << np.uint32(12)
        word |= ((e[w] >> shift) & low) << np.uint32(16)
        word |= ((f[w] >> shift) & low) << np.uint32(20)
        word |= ((g[w] >> shift) & low) << np.uint32(24)
        packed[w] = word | ((h[w] >> shift) & low) << np.uint32(28)
