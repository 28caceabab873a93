"""Put numbers where bits of a mask are set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.kernels.arrays import as_array, as_bytes
from tensorsurgeon.tensor import Block


def spread(mask: Block, held: Sequence[Block], start: int, columns: int, module: str) -> Block:
    """Return rows with numbers where the mask's bits are set and zeros elsewhere.

    Args:
        mask: (rows, ceil(columns / 8)), lowest bits first.
        held: The numbers of these rows, or where the numbers of each of all rows begin, and all numbers.
        start: The first row.

    Raises:
        RefusedError: where there are more or fewer numbers than bits.
    """
    places = np.unpackbits(as_bytes(mask), axis=1, count=columns, bitorder="little").astype(bool)
    numbers = as_array(held[-1]).reshape(-1)
    if len(held) == 2:
        begins = np.append(np.frombuffer(held[0].data, np.int64), numbers.size)
        numbers = numbers[begins[start] : begins[start + len(places)]]
    if numbers.size != places.sum():
        raise RefusedError(f"{module}.bitmask: has {places.sum()} bits for {numbers.size} numbers; a file is damaged.")
    dense = np.zeros(places.shape, numbers.dtype)
    dense[places] = numbers
    return Block(held[-1].dtype, dense.shape, memoryview(dense.data).cast("B"))
