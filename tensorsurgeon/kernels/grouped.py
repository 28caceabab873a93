"""Zero points, scales and groups of columns, as GPTQ and AWQ store them beside codes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.arrays import Array, as_array
from tensorsurgeon.kernels.planes import unpack_planes
from tensorsurgeon.kernels.scaling import Numbers, Scaling, group_places
from tensorsurgeon.kernels.unpacking import transposed, unpack_columns, unpack_rows
from tensorsurgeon.tensor import Block, Pieces


def as_words(block: Block) -> npt.NDArray[np.uint32]:
    """Return words of 32 bits, without a copy."""
    return as_array(block).view(np.uint32)


def is_true(block: Block) -> bool:
    """Tell what a block of one whole number says."""
    return bool(as_words(block).any())


def unpack_down(words: Block, bits: int, rows: int, planar: bool) -> Array:
    """Return the codes of columns of words, transposed: (columns, rows) of uint8."""
    if planar:
        return unpack_planes(transposed(as_words(words)), bits, rows)
    return unpack_columns(as_words(words), bits, rows)


def zero_points(words: Block, bits: int, count: int, planar: bool, less_one: bool) -> Array:
    """Return the first `count` zero points of each group: (groups, count) of uint8.

    Those that are stored less one were taken from whole words where that is known to be so, with a borrow from the
    next field for a zero point of 0; so the one is added to whole words again. Fields that cross words have no borrow.
    """
    packed = as_words(words)
    if less_one and not planar and 32 % bits == 0:
        packed = packed + np.uint32(0xFFFFFFFF // (2**bits - 1))
        less_one = False
    fields = (unpack_planes if planar else unpack_rows)(packed, bits, count)
    return (fields + np.uint8(1)) & np.uint8(2**bits - 1) if less_one else fields


def are_less_one(pieces: Pieces, bits: int, count: int, planar: bool, said: bool) -> Block:
    """Tell whether symmetric zero points are stored less one: all `2^(b-1) - 1`, not `2^(b-1)`; else as is `said`."""
    found: set[int] = set()
    for _, words in pieces:
        fields = zero_points(words, bits, count, planar, False)
        found |= {int(fields.min()), int(fields.max())} if fields.size else set()
    half = 2 ** (bits - 1)
    less_one = said if found not in ({half}, {half - 1}) else found == {half - 1}
    return Block("I32", (1,), np.array([less_one], np.int32).tobytes())


def grouped(scales: Numbers, zeros: Array, columns: int) -> Scaling:
    """Return what goes with codes whose groups are `columns` each; scales and zero points are (rows, groups)."""
    return Scaling(np.ascontiguousarray(scales), columns=columns, zeros=zeros.astype(np.float32, order="C"))


def placed(scaling: Scaling, index: Block, name: str) -> Scaling:
    """Return the same with the group of each column as an index says it; where they are in order, without places.

    Raises:
        RefusedError: for a group that is not there.
    """
    places = group_places(index, scaling.scales.shape[1], name)
    if not places.size:
        raise RefusedError(f"{name}: names group -1 throughout; which scales go with a column is not known.")
    each = int((places != 0).argmax()) or len(places)
    if np.array_equal(places, np.arange(len(places)) // each):
        return scaling._replace(columns=each)
    return scaling._replace(columns=1, places=places)
