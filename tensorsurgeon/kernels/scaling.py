"""From codes to weights: what each code stands for, less a zero point, times a scale, rounded once.

    W[r, c] = round(((table[code[r, c]] - zero[R, C]) * scale[R, C] + bias[R, C]) * factor[c])

R is `r` divided by the rows that share a scale; C is `c` divided by the columns that do, or `places[c]`. Everything is
float32, in this order; the last step rounds to nearest, ties to even. Where scales divide, `* scale` is `/ scale`.
A row is looked up, scaled and rounded while it is in the first-level cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.arrays import STORAGE, Array, as_array, from_float32
from tensorsurgeon.kernels.codes import UNSIGNED, Table
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.tensor import Block

TOO_LARGE = "a weight beyond 65504 does not fit float16; decode to bfloat16."
Numbers = npt.NDArray[np.float32]
NONE = np.empty((0, 0), np.float32)
NO_PLACES = np.empty(0, np.int32)


class Scaling(NamedTuple):
    """What goes with codes: `scales`, `zeros` and `biases` are (row groups, column groups), `factors` (columns,).

    A row group is `rows` rows, the first of which begins `start` rows before the codes do; a column group is `columns`
    columns, or what `places` says.
    """

    scales: Numbers
    rows: int = 1
    columns: int = 1
    zeros: Numbers = NONE
    biases: Numbers = NONE
    factors: Numbers = NONE[0:0].reshape(0)
    places: npt.NDArray[np.int32] = NO_PLACES
    start: int = 0
    divide: bool = False


def group_places(block: Block, groups: int, name: str) -> npt.NDArray[np.int32]:
    """Return the group of each column; none at all where all are -1, which says that columns are in order.

    Raises:
        RefusedError: for a group that is not there.
    """
    places = as_array(block).astype(np.int32, copy=False)
    if (places == -1).all():
        return NO_PLACES
    if places.min() < 0 or places.max() >= groups:
        raise RefusedError(f"{name}: names groups {places.min()} to {places.max()}, but there are 0 to {groups - 1}.")
    return places


def decode(codes: Array, table: Table, scaling: Scaling, dtype: str) -> Block:
    """Decode rows of codes to BF16, F16 or F32.

    Args:
        codes: One code a byte, (rows, columns).
        table: What each of 256 codes stands for.

    Raises:
        RefusedError: where a finite weight is too large for F16.
    """
    scales, zeros, biases, factors = (
        np.ascontiguousarray(it, np.float32) for it in (scaling.scales, scaling.zeros, scaling.biases, scaling.factors)
    )
    decoded = np.empty(codes.shape, np.uint16 if dtype == "BF16" else np.float32)
    codes = np.ascontiguousarray(codes).view(np.uint8)
    # Unsigned, places need no look whether they count from the end.
    places = scaling.places.astype(np.uint32)
    grouping = (scaling.rows, scaling.columns, scaling.start, places, scaling.divide)
    if np.array_equal(table, UNSIGNED + table[0]):
        # Codes that stand for themselves, but for where they begin, are converted faster than looked up.
        table = table[:1]
    _decode(codes, table, scales, zeros, biases, factors, *grouping, decoded.view(f"u{decoded.itemsize}"))
    return as_rows(decoded, dtype)


def decode_plainly(codes: Array, table: Table, scaling: Scaling, dtype: str) -> Block:
    """Do what `decode` does, in the plain way that its formula states."""
    rows = (np.arange(codes.shape[0]) + scaling.start) // scaling.rows - scaling.start // scaling.rows
    columns = scaling.places if len(scaling.places) else np.arange(codes.shape[1]) // scaling.columns
    place = np.ix_(rows, columns)
    numbers = table[np.ascontiguousarray(codes).view(np.uint8)]
    if scaling.zeros.size:
        numbers = numbers - scaling.zeros[place]
    with np.errstate(all="ignore"):
        numbers = numbers / scaling.scales[place] if scaling.divide else numbers * scaling.scales[place]
        if scaling.biases.size:
            numbers = numbers + scaling.biases[place]
        if scaling.factors.size:
            numbers = numbers * scaling.factors
    return as_rows(numbers if dtype != "BF16" else from_float32(numbers, dtype), dtype)


def as_rows(decoded: Array, dtype: str) -> Block:
    """Return float32 numbers as F32 or F16, and bits as BF16.

    Raises:
        RefusedError: where a finite weight is too large for F16.
    """
    if dtype == "F16" and decoded.dtype != np.float16:
        # torch does this with the processor's own instruction, NumPy bit by bit.
        narrow = torch.from_numpy(decoded).to(torch.float16).numpy()
        if np.isinf(narrow).any() and (np.isinf(narrow) & np.isfinite(decoded)).any():
            raise RefusedError(TOO_LARGE)
        decoded = narrow
    stored = np.ascontiguousarray(decoded, STORAGE[dtype])
    return Block(dtype, stored.shape, memoryview(stored.data).cast("B") if stored.size else b"")


@compiled
def _decode(
    codes: Array, table: Table, scales: Numbers, zeros: Numbers, biases: Numbers, factors: Numbers,
    rows: int, columns: int, start: int, places: Array, divide: bool, decoded: Array,
) -> None:  # fmt: skip
    numbers = np.empty(codes.shape[1], np.float32)
    bits = numbers.view(np.uint32)
    for r in range(codes.shape[0]):
        at = (start + r) // rows - start // rows
        if table.size == 1:
            _convert(codes[r], table[0], numbers)
        else:
            _look_up(codes[r], table, numbers)
        if places.size:
            if zeros.size:
                _subtract_and_multiply_at(numbers, zeros[at], scales[at], places)
            else:
                _multiply_at(numbers, scales[at], places)
        else:
            if zeros.size:
                _subtract(numbers, zeros[at], columns)
            if divide:
                _divide(numbers, scales[at], columns)
            else:
                _multiply(numbers, scales[at], columns)
            if biases.size:
                _add(numbers, biases[at], columns)
        if factors.size:
            _multiply(numbers, factors, 1)
        if decoded.itemsize == 2:
            _round(bits, decoded[r])
        else:
            decoded[r] = bits


# Each loop is a function of its own: of slices that are arguments the compiler knows that they do not overlap.
@compiled
def _look_up(codes: Array, table: Table, numbers: Numbers) -> None:
    for c in range(codes.shape[0]):
        numbers[c] = table[codes[c]]


@compiled
def _convert(codes: Array, first: float, numbers: Numbers) -> None:
    for c in range(codes.shape[0]):
        numbers[c] = np.float32(codes[c]) + first


@compiled
def _multiply(numbers: Numbers, by: Numbers, columns: int) -> None:
    if columns == 1:
        for c in range(numbers.shape[0]):
            numbers[c] *= by[c]
        return
    for g in range(by.shape[0]):
        factor = by[g]
        part = numbers[g * columns : (g + 1) * columns]
        for c in range(part.shape[0]):
            part[c] *= factor


@compiled
def _divide(numbers: Numbers, by: Numbers, columns: int) -> None:
    for g in range(by.shape[0]):
        divisor = by[g]
        part = numbers[g * columns : (g + 1) * columns]
        for c in range(part.shape[0]):
            part[c] = part[c] / divisor


@compiled
def _subtract(numbers: Numbers, what: Numbers, columns: int) -> None:
    for g in range(what.shape[0]):
        zero = what[g]
        part = numbers[g * columns : (g + 1) * columns]
        for c in range(part.shape[0]):
            part[c] -= zero


@compiled
def _add(numbers: Numbers, what: Numbers, columns: int) -> None:
    for g in range(what.shape[0]):
        bias = what[g]
        part = numbers[g * columns : (g + 1) * columns]
        for c in range(part.shape[0]):
            part[c] += bias


@compiled
def _subtract_and_multiply_at(numbers: Numbers, what: Numbers, by: Numbers, places: Array) -> None:
    for c in range(numbers.shape[0]):
        numbers[c] = (numbers[c] - what[places[c]]) * by[places[c]]


@compiled
def _multiply_at(numbers: Numbers, by: Numbers, places: Array) -> None:
    for c in range(numbers.shape[0]):
        numbers[c] *= by[places[c]]


@compiled
def _round(bits: Array, rounded: Array) -> None:
    """Round float32 to BF16: `(u + 0x7fff + ((u >> 16) & 1)) >> 16`; of NaN the upper half, made quiet."""
    for c in range(bits.shape[0]):
        u = np.uint32(bits[c])
        high = np.uint32(u >> np.uint32(16))
        nearest = np.uint32(
            np.uint32(u + np.uint32(np.uint32(high & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
        )
        is_nan = np.uint32(u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        rounded[c] = np.uint16(np.uint32(high | np.uint32(0x40)) if is_nan else nearest)
