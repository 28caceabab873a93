"""Count which numbers a tensor holds, in one pass over its bits.

A number of sixteen bits is one of 65536 patterns: how often each occurs tells everything that does not depend on where
a number stands (moments, extremes, quantiles, zeros, NaN, what another dtype could not hold), exactly, and sums of
counts are the same in whatever order blocks and threads come. Numbers of 32 and 64 bits are counted on the same grid,
by the upper sixteen bits of their float32; what has to be exact is summed beside, tile by tile, in `moments`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tensorsurgeon.kernels.arrays import Array, as_array
from tensorsurgeon.kernels.compiling import compiled
from tensorsurgeon.tensor import Block

PATTERNS = 65536
TABLES = 4
"""Tables that neighbours are counted in by turns: equal neighbours would wait for each other in one."""
STRETCH = 8192
"""Elements that are counted, and then looked at for their magnitude, while they are in the first-level cache."""

Counts = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


class Grid(NamedTuple):
    """What patterns mean in a dtype: `values` of all 65536, and the places of finite ones from the least upwards."""

    values: Numbers
    ordered: npt.NDArray[np.intp]


class Census:
    """What the bits of a matrix say: how often each pattern occurs, and the largest magnitude of each row and column.

    `rows` and `columns` are magnitudes as bits without the sign, of a float32's upper half for wider dtypes; NaN is
    above all. Only rows that were `seen` count.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.tables = np.zeros((TABLES, PATTERNS), np.uint32)
        self.carried = np.zeros(PATTERNS, np.int64)
        self.pending = 0
        self.rows = np.zeros(rows, np.uint16)
        self.columns = np.zeros(columns, np.uint16)
        self.seen = np.zeros(rows, np.bool_)

    def add(self, block: Block, start: int) -> None:
        """Count some rows, the first of which is row `start`."""
        bits = patterns(block).reshape(-1, len(self.columns))
        stop = start + len(bits)
        self.pending += bits.size
        if self.pending >= 2**32:
            self._carry()
        flat = bits.reshape(-1)
        words = flat[: flat.size // TABLES * TABLES].view(np.uint64)
        _count(words, flat, bits, self.tables, self.rows[start:stop], self.columns)
        self.seen[start:stop] = True

    @property
    def counts(self) -> Counts:
        """How often each pattern occurs."""
        self._carry()
        return self.carried

    def _carry(self) -> None:
        self.carried += self.tables.sum(0, dtype=np.int64)
        self.tables[:] = 0
        self.pending = 0


def patterns(block: Block) -> npt.NDArray[np.uint16]:
    """Return the bits of BF16 and F16, and the upper half of a float32 for F32 and F64, as a vector."""
    array = as_array(block).reshape(-1)
    if block.dtype in ("BF16", "F16"):
        return array.view(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(array.astype(np.float32, copy=False).view(np.uint16)[1::2])


@cache
def grid(dtype: str) -> Grid:
    """Return what patterns mean in F16, or as the upper half of a float32, which is BF16."""
    bits = np.arange(PATTERNS, dtype=np.uint16)
    narrow = bits.view(np.float16) if dtype == "F16" else (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        values = narrow.astype(np.float64)
    # Negative zero before zero: a pattern's place is that of its number.
    ordered = np.argsort(np.where(bits >> 15, -(bits.astype(np.int64) & 0x7FFF) - 1, bits), kind="stable")
    return Grid(values, ordered[np.isfinite(values)[ordered]])


def count_plainly(bits: Array) -> tuple[Counts, Array, Array]:
    """Do what `Census` does, in the plain way: counts, and the largest magnitudes of rows and columns."""
    magnitudes = bits & 0x7FFF
    return np.bincount(bits.reshape(-1), minlength=PATTERNS), magnitudes.max(1, initial=0), magnitudes.max(0, initial=0)


@compiled
def _count(words: Array, flat: Array, bits: Array, tables: Array, rows: Array, columns: Array) -> None:
    low = np.uint64(0xFFFF)
    group = max(1, STRETCH // max(1, bits.shape[1]))
    counted = 0
    for first in range(0, bits.shape[0], group):
        last = min(first + group, bits.shape[0])
        # One load for four numbers: what stands across the end of a row is counted with the next.
        upto = last * bits.shape[1] // 4
        for place in range(counted, upto):
            word = words[place]
            tables[0, word & low] += np.uint32(1)
            tables[1, (word >> np.uint64(16)) & low] += np.uint32(1)
            tables[2, (word >> np.uint64(32)) & low] += np.uint32(1)
            tables[3, word >> np.uint64(48)] += np.uint32(1)
        counted = upto
        for r in range(first, last):
            largest = np.uint16(0)
            for c in range(bits.shape[1]):
                magnitude = np.uint16(bits[r, c] & np.uint16(0x7FFF))
                largest = max(largest, magnitude)
                columns[c] = max(columns[c], magnitude)
            rows[r] = largest
    for place in range(4 * words.size, flat.size):
        tables[0, flat[place]] += np.uint32(1)
