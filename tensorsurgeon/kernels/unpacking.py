"""From packed words to one code a byte.

A bit stream: little-endian words follow one another, value i occupies bits [i b, (i+1) b) of them, lowest first.
"""

from __future__ import annotations

import numpy as np

from tensorsurgeon.kernels.arrays import Array
from tensorsurgeon.kernels.compiling import compiled

LINE = 16
"""Words in a line of the cache."""


def unpack_rows(packed: Array, bits: int, columns: int) -> Array:
    """Return the first `columns` codes of each row, which is a bit stream of its own: (rows, columns) of uint8."""
    stream = np.ascontiguousarray(packed).view(np.uint8).reshape(packed.shape[0], -1)
    if bits == 8:
        return stream[:, :columns]
    codes = np.empty((len(stream), columns), np.uint8)
    unpack(stream, bits, codes)
    return codes


def unpack_rows_plainly(packed: Array, bits: int, columns: int) -> Array:
    """Do what `unpack_rows` does, bit by bit."""
    stream = np.ascontiguousarray(packed).view(np.uint8).reshape(packed.shape[0], -1)
    single = np.unpackbits(stream, axis=1, bitorder="little")[:, : columns * bits].reshape(len(stream), columns, bits)
    return np.packbits(single, axis=2, bitorder="little")[:, :, 0]


def unpack_high_first(stream: Array, count: int) -> Array:
    """Return `count` codes of four bits, two a byte and the first in its high half; those beyond the stream are 0."""
    codes = np.zeros(count, np.uint8)
    _high_nibbles(stream, codes)
    return codes


def unpack_high_first_plainly(stream: Array, count: int) -> Array:
    """Do what `unpack_high_first` does, in the plain way."""
    codes = np.stack([stream >> 4, stream & 15], axis=1).reshape(-1)[:count]
    return np.pad(codes, (0, count - len(codes)))


def unpack_row_pairs(packed: Array) -> Array:
    """Return codes of four bits of which each byte holds two, one below the other, the upper in its low half."""
    codes = np.empty((2 * len(packed), packed.shape[1]), np.uint8)
    _row_pairs(packed, codes)
    return codes


def unpack_row_pairs_plainly(packed: Array) -> Array:
    """Do what `unpack_row_pairs` does, in the plain way."""
    return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])


def unswizzle(tiles: Array, rows: int, columns: int) -> Array:
    """Return scales of one byte in rows and columns, of which each 128 x 4 lie together as a tile: (tall, wide, 512).

    A tile lies as 32 rows of 16: in row r stand the four scales of rows r, r + 32, r + 64 and r + 96.
    """
    straight = np.empty((rows, columns), np.uint8)
    _unswizzle(tiles, straight)
    return straight


def unswizzle_plainly(tiles: Array, rows: int, columns: int) -> Array:
    """Do what `unswizzle` does, in the plain way."""
    tall, wide, _ = tiles.shape
    turned = tiles.reshape(tall, wide, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return turned.reshape(128 * tall, 4 * wide)[:rows, :columns]


def unpack_lanes(words: Array, bits: int, columns: int) -> Array:
    """Return codes of which each word of 32 bits holds as many as fit whole, lowest first; its last bits are unused."""
    lanes = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (words.view(np.uint32)[:, :, None] >> lanes) & np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(len(words), -1)[:, :columns]


def unpack_columns(words: Array, bits: int, rows: int) -> Array:
    """Return the codes of columns of words, each a bit stream down its column, transposed: (columns, rows) of uint8."""
    words = np.ascontiguousarray(words).view(np.uint32)
    if bits == 8:
        return transposed(words).view(np.uint8)[:, :rows]
    codes = np.empty((words.shape[1], rows), np.uint8)
    _columns(words, bits, codes)
    return codes


def unpack_columns_plainly(words: Array, bits: int, rows: int) -> Array:
    """Do what `unpack_columns` does, bit by bit."""
    return unpack_rows_plainly(np.ascontiguousarray(words.T), bits, rows)


def transposed(words: Array) -> Array:
    """Return the transpose of a matrix of words."""
    turned = np.empty(words.shape[::-1], words.dtype)
    _transpose(words, turned)
    return turned


@compiled
def unpack(stream: Array, bits: int, codes: Array) -> None:
    """Unpack rows of bytes, each a bit stream, into codes of fewer than eight bits."""
    if bits == 4:
        _nibbles(stream, codes)
    elif bits == 2:
        _pairs(stream, codes)
    elif bits == 1:
        _singles(stream, codes)
    else:
        _stream(stream, bits, codes)


@compiled
def _nibbles(stream: Array, codes: Array) -> None:
    for r in range(stream.shape[0]):
        row, out = stream[r], codes[r]
        for c in range(out.shape[0] // 2):
            out[2 * c] = row[c] & np.uint8(15)
            out[2 * c + 1] = row[c] >> np.uint8(4)
        if out.shape[0] % 2:
            out[out.shape[0] - 1] = row[out.shape[0] // 2] & np.uint8(15)


@compiled
def _row_pairs(packed: Array, codes: Array) -> None:
    for r in range(packed.shape[0]):
        row, upper, lower = packed[r], codes[2 * r], codes[2 * r + 1]
        for c in range(row.shape[0]):
            upper[c] = row[c] & np.uint8(15)
            lower[c] = row[c] >> np.uint8(4)


@compiled
def _high_nibbles(stream: Array, codes: Array) -> None:
    whole = min(stream.shape[0], codes.shape[0] // 2)
    for c in range(whole):
        codes[2 * c] = stream[c] >> np.uint8(4)
        codes[2 * c + 1] = stream[c] & np.uint8(15)
    if codes.shape[0] % 2 and whole < stream.shape[0]:
        codes[2 * whole] = stream[whole] >> np.uint8(4)


@compiled
def _stream(stream: Array, bits: int, codes: Array) -> None:
    mask = np.uint32(2**bits - 1)
    for r in range(stream.shape[0]):
        row, out = stream[r], codes[r]
        for c in range(out.shape[0]):
            place = c * bits
            byte = place // 8
            pair = np.uint32(row[byte])
            if place % 8 + bits > 8:
                pair |= np.uint32(row[byte + 1]) << np.uint32(8)
            out[c] = (pair >> np.uint32(place % 8)) & mask


@compiled
def _pairs(stream: Array, codes: Array) -> None:
    low = np.uint8(3)
    for r in range(stream.shape[0]):
        row, out = stream[r], codes[r]
        for c in range(out.shape[0] // 4):
            for k in range(4):
                out[4 * c + k] = (row[c] >> np.uint8(2 * k)) & low
        for c in range(out.shape[0] // 4 * 4, out.shape[0]):
            out[c] = (row[c // 4] >> np.uint8(c % 4 * 2)) & low


@compiled
def _singles(stream: Array, codes: Array) -> None:
    for r in range(stream.shape[0]):
        row, out = stream[r], codes[r]
        for c in range(out.shape[0] // 8):
            for k in range(8):
                out[8 * c + k] = (row[c] >> np.uint8(k)) & np.uint8(1)
        for c in range(out.shape[0] // 8 * 8, out.shape[0]):
            out[c] = (row[c // 8] >> np.uint8(c % 8)) & np.uint8(1)


@compiled
def _unswizzle(tiles: Array, straight: Array) -> None:
    for r in range(straight.shape[0]):
        row, part = tiles[r // 128], straight[r]
        place = r % 32 * 16 + r % 128 // 32 * 4
        for c in range(straight.shape[1]):
            part[c] = row[c // 4, place + c % 4]


@compiled
def _columns(words: Array, bits: int, codes: Array) -> None:
    """Turn a line of words of each row at a time, so that both sides stay in the cache, and unpack them as rows."""
    turned = np.empty((LINE, words.shape[0]), np.uint32)
    for left in range(0, words.shape[1], LINE):
        out = codes[left : left + LINE]
        turn(words, left, turned)
        unpack(turned[: out.shape[0]].view(np.uint8), bits, out)


@compiled
def _transpose(words: Array, turned: Array) -> None:
    for left in range(0, words.shape[1], LINE):
        turn(words, left, turned[left : left + LINE])


@compiled
def turn(words: Array, left: int, turned: Array) -> None:
    """Transpose the columns from `left` on, as many as `turned` has rows."""
    whole = words.shape[0] // LINE * LINE if left + LINE <= words.shape[1] else 0
    for top in range(0, whole, LINE):
        for c in range(LINE):
            for r in range(LINE):
                turned[c, top + r] = words[top + r, left + c]
    for r in range(whole, words.shape[0]):
        for c in range(min(LINE, words.shape[1] - left)):
            turned[c, r] = words[r, left + c]
