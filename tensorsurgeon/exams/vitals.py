"""Look at one tensor in a single pass: its numbers, its channels, its spectrum, and whether it was once FP8."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tensorsurgeon.exams.streaming import Reader
from tensorsurgeon.kernels.arrays import Array, as_array, as_numbers
from tensorsurgeon.kernels.census import Census, grid
from tensorsurgeon.kernels.lattice import CORNER, SIDE, WIDTH, Lattice, find_lattice, may_be_lattice
from tensorsurgeon.kernels.moments import Moments, block_moments
from tensorsurgeon.kernels.statistics import WIDE, exact_moments, histogram, present, statistics
from tensorsurgeon.shaping import flattened
from tensorsurgeon.tensor import PIECE_ROWS, Block, LazyTensor

PROBES = 2
"""Pieces of a matrix that are probed for codes of FP8, at two corners each."""
BLOCK = 2**23
"""Bytes of a matrix that are decomposed at once."""
POINTS = 256
"""Groups of rows or columns that are shown of a tensor at most."""
FAINT = 0.01
"""A channel is faint whose largest magnitude is below this share of the median channel's."""
HEAD = 64
"""Bytes of a row by which rows of a table are compared."""


class Vitals(NamedTuple):
    """What was found of a tensor.

    Attributes:
        row: Its statistics by name.
        detail: Its histogram, and the largest magnitudes of groups of rows and columns.
        lattice: What probes for FP8 codes show; none where it was never FP8.
        fingerprint: A digest of how often each number occurs and of all channels: the same for the same bytes.
    """

    row: dict[str, Any]
    detail: dict[str, Any]
    lattice: tuple[Lattice, ...]
    fingerprint: str


def look_at(
    tensor: LazyTensor, reader: Reader, share: float = 1.0, table: bool = False, points: int = POINTS
) -> Vitals:
    """Read a tensor of numbers once, or a share of it, and return what was found.

    `table` tells that its rows belong to tokens: equal ones are counted. Rows and columns are shown in `points` groups.
    """
    tensor = flattened(tensor)
    columns = prod(tensor.shape[1:])
    census, moments = Census(tensor.rows, columns), Moments()
    exact = tensor.dtype not in WIDE
    lattice: list[Lattice] = []
    heads: list[Array] = []
    band = 0
    for start, (block,) in reader.pieces(tensor, share=share, lasting=False):
        band = band or block.shape[0] if block.shape else 1
        census.add(block, start)
        if not exact:
            for found in block_moments(block, columns, band):
                moments = moments.merge(found)
        if len(tensor.shape) > 1 and columns > 1:
            if _is_probed(start, band, tensor.rows):
                lattice += _probe(block, columns)
            if table:
                heads.append(_heads(block))
    counts = census.counts
    numbers = present(counts, tensor.dtype)
    row = statistics(numbers, exact_moments(numbers) if exact else moments)
    detail = {"histogram": histogram(numbers)}
    values = grid(tensor.dtype).values
    sides = {"row": census.rows[census.seen], "column": census.columns if columns > 1 else None}
    for side, magnitudes in sides.items():
        row |= _channels(side, None if magnitudes is None else values[magnitudes])
        if magnitudes is not None:
            detail[f"{side}s"] = _grouped(values[magnitudes], points)
    row["equal rows"] = _equal(heads, census) if table and share == 1 else None
    digest = hashlib.blake2b(digest_size=16)
    for part in (np.flatnonzero(counts), counts[counts > 0], census.rows, census.columns):
        digest.update(np.ascontiguousarray(part).tobytes())
    return Vitals(row, detail, tuple(lattice), digest.hexdigest())


def _is_probed(start: int, band: int, rows: int) -> bool:
    places = {rows * (2 * probe) // (2 * PROBES) // band * band for probe in range(PROBES)}
    return start in places and start % PIECE_ROWS == 0


def _probe(block: Block, columns: int) -> Iterator[Lattice]:
    """Yield what the first and the last corner of a block show; nothing where the first was never FP8."""
    matrix = as_array(block).reshape(-1, columns)
    last = tuple(max(0, size // side - 1) * side for size, side in zip(matrix.shape, (SIDE, WIDTH), strict=True))
    for r, c in dict.fromkeys([(0, 0), last]):
        part = matrix[r : r + SIDE, c : c + WIDTH]
        if not may_be_lattice(_numbers(block.dtype, part[:CORNER, :CORNER])):
            return
        found = find_lattice(_numbers(block.dtype, part))
        if found is None:
            return
        yield found


def _numbers(dtype: str, part: Array) -> Any:
    whole = np.ascontiguousarray(part)
    return as_numbers(Block(dtype, whole.shape, whole.data.cast("B")))


def _heads(block: Block) -> Array:
    """Return the first bytes of each row, as whole numbers that can be compared."""
    rows = np.frombuffer(block.data, np.uint8).reshape(block.shape[0], -1)
    width = min(HEAD, rows.shape[1]) // 8 * 8
    return rows[:, :width].copy().view(f"V{width}").reshape(-1) if width else rows[:, 0].copy()


def _equal(heads: list[Array], census: Census) -> int:
    """Return how many rows begin as another row does that is not all zero."""
    if not heads:
        return 0
    _, times = np.unique(np.concatenate(heads)[census.rows > 0], return_counts=True)
    return int(times[times > 1].sum())


def _channels(side: str, largest: Array | None) -> dict[str, Any]:
    """Return how many channels are all zero, which has the largest magnitude, and how that compares to the median."""
    if largest is None or not np.isfinite(largest).all():
        return dict.fromkeys((f"dead {side}s", f"faint {side}s", f"largest {side}", f"{side} ratio"))
    median, place = float(np.median(largest)), int(largest.argmax())
    return {
        f"dead {side}s": int((largest == 0).sum()),
        f"faint {side}s": int(((largest > 0) & (largest < FAINT * median)).sum()),
        f"largest {side}": place,
        f"{side} ratio": float(largest[place]) / median if median else None,
    }


def _grouped(largest: Array, points: int) -> dict[str, Any]:
    group = max(1, -(-len(largest) // points))
    tops = np.maximum.reduceat(largest, range(0, len(largest), group))
    return {"largest": [float(top) if np.isfinite(top) else None for top in tops], "group": group}


def with_spectrum(vitals: Vitals, tensor: LazyTensor) -> Vitals:
    """Return the vitals of a matrix with its singular values; the matrix is read again."""
    from tensorsurgeon.kernels.spectrum import singular_values, spectral_statistics

    if len(tensor.shape) != 2 or vitals.row["NaN"] or vitals.row["Inf"]:
        return vitals._replace(row=vitals.row | spectral_statistics(np.zeros(1)))
    singular = singular_values(tensor.shape, lambda: (tensor.read(*rows) for rows in tensor.blocks(BLOCK)))
    step = max(1, -(-len(singular) // POINTS))
    shown = [float(f"{value:.6g}") for value in singular[::step]]
    return vitals._replace(
        row=vitals.row | spectral_statistics(singular),
        detail=vitals.detail | {"spectrum": {"values": shown, "step": step}},
    )


def spectral_memory(shape: tuple[int, ...]) -> int:
    """Return the bytes that singular values of a matrix take: its Gram matrix of the shorter side, three times."""
    return 3 * 8 * min(shape) ** 2 if len(shape) == 2 else 0
