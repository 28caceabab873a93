"""From codes to weights where many codes share a scale: each of 256 codes is decoded once, then looked up.

A block of 128 x 128 has 16384 elements but only 256 codes: a table of what they decode to is small enough for the
first-level cache, and looking up is all that is left to do for an element.
"""

from __future__ import annotations

import numpy as np

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.arrays import STORAGE, Array, as_array, from_float32
from tensorsurgeon.kernels.codes import Table
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.kernels.scaling import NO_PLACES, TOO_LARGE, Scaling, as_rows, decode
from tensorsurgeon.tensor import Block

SHARED = 4096
"""Elements that share a scale from which tables are faster than arithmetic."""


def worthwhile(scaling: Scaling, dtype: str) -> bool:
    """Tell whether codes are to be decoded by tables: many share a scale, and nothing but the scale differs."""
    special = (scaling.zeros, scaling.biases, scaling.factors, scaling.places)
    return scaling.rows * scaling.columns >= SHARED and not any(it.size for it in special)


def look_up(codes: Array, table: Table, scaling: Scaling, dtype: str) -> Block:
    """Decode rows of codes, one a byte, to BF16, F16 or F32.

    Raises:
        RefusedError: where a finite weight is too large for F16.
    """
    with np.errstate(all="ignore"):
        scales = scaling.scales[:, :, None]
        products = (table / scales if scaling.divide else table * scales).astype(np.float32, copy=False)
        tables = np.ascontiguousarray(from_float32(products, dtype))
    decoded = np.empty(codes.shape, STORAGE[dtype])
    bits = f"u{decoded.itemsize}"
    offset, columns = scaling.start % scaling.rows, scaling.columns
    if codes.shape[1] % 8 == 0 and columns % 8 == 0 and codes.flags.c_contiguous:
        words = codes.view(np.uint64)
        _look_up_words(words, tables.view(bits), offset, scaling.rows, columns // 8, decoded.view(bits))
    else:
        _look_up(codes.view(np.uint8), tables.view(bits), offset, scaling.rows, columns, decoded.view(bits))
    if dtype == "F16" and (np.isinf(tables) & np.isfinite(products)).any() and np.isinf(decoded).any():
        raise RefusedError(TOO_LARGE)
    return as_rows(decoded, dtype)


def few(scaling: Scaling, levels: int, columns: int, dtype: str) -> bool:
    """Tell whether columns go with `places` and so few codes that a table for each place is soon made."""
    return dtype != "F16" and bool(scaling.places.size) and 2 * levels * scaling.scales.shape[1] <= columns


def look_up_places(codes: Array, table: Table, scaling: Scaling, levels: int, dtype: str) -> Block:
    """Decode rows of codes less than `levels` to BF16 or F32: each row has a table of all codes at all places."""
    rows, places = len(codes), scaling.scales.shape[1]
    every = np.broadcast_to(np.tile(np.arange(levels, dtype=np.uint8), places), (rows, places * levels))
    tables = as_array(decode(every, table, scaling._replace(places=NO_PLACES, columns=levels), dtype))
    decoded = np.empty(codes.shape, STORAGE[dtype])
    bits = f"u{decoded.itemsize}"
    keys = scaling.places.astype(np.uint32) * np.uint32(levels)
    _look_up_places(np.ascontiguousarray(codes), keys, tables.view(bits), decoded.view(bits))
    return as_rows(decoded, dtype)


@compiled
def _look_up_places(codes: Array, keys: Array, tables: Array, decoded: Array) -> None:
    for r in range(codes.shape[0]):
        row, table, out = codes[r], tables[r], decoded[r]
        for c in range(out.shape[0]):
            out[c] = table[keys[c] + np.uint32(row[c])]


@compiled
def _look_up_words(words: Array, tables: Array, offset: int, rows: int, width: int, decoded: Array) -> None:
    """Do what `_look_up` does with one load for eight codes."""
    low = np.uint64(0xFF)
    for r in range(words.shape[0]):
        for b in range(tables.shape[1]):
            table = tables[(offset + r) // rows, b]
            for place in range(b * width, min((b + 1) * width, words.shape[1])):
                word = words[r, place]
                for code in range(8):
                    decoded[r, 8 * place + code] = table[(word >> np.uint64(8 * code)) & low]


@compiled
def _look_up(codes: Array, tables: Array, offset: int, rows: int, columns: int, decoded: Array) -> None:
    for r in range(codes.shape[0]):
        for b in range(tables.shape[1]):
            table = tables[(offset + r) // rows, b]
            for c in range(b * columns, min((b + 1) * columns, codes.shape[1])):
                decoded[r, c] = table[codes[r, c]]
