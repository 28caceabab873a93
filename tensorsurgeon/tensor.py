"""LazyTensor: what a tensor is and where its bytes come from, without the bytes.

A tensor is read a block of rows (of its first dimension) at a time, as little-endian bytes in C order. Which
library computes on them is for the function that computes to choose: this module imports none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from typing import NamedTuple

from tensorsurgeon.format import Span, nbytes
from tensorsurgeon.reading import Buffer, once, read_parts, read_span

PIECE = 2**20
"""Elements that a piece of a tensor has at least, where the tensor has as many."""
PIECE_ROWS = 256
"""Pieces begin at a multiple of this many rows, a whole number of the blocks of block formats."""
WIDEST = 2**24
"""Elements of a piece at most, unless a single row has more."""


class Block(NamedTuple):
    """Some rows of a tensor in memory: `data` holds `shape` elements of `dtype`, little-endian, in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer


RowFunction = Callable[..., Block]
"""Takes a Block of each input and returns the Block of output that belongs to them."""

Pieces = Iterator[tuple[int, Block]]
Reduction = Callable[..., Block]
"""Takes pieces of all rows, each with the number of its first, which depend on nothing but the shape."""


class Input(NamedTuple):
    """An input of a computed tensor: `each` rows of it go with `rows` rows of the output, or all with any if 0.

    One that is `streamed` is given as pieces, each with the number of its first row. Of a matrix that is packed the
    other way round `columns` go with the output's rows.
    """

    tensor: LazyTensor
    rows: int = 1
    each: int = 1
    streamed: bool = False
    columns: bool = False

    @property
    def row_memory(self) -> int:
        """Bytes of memory that what goes with one row of the output takes; 0 where all goes with any."""
        if not self.rows:
            return 0
        memory = self.tensor.nbytes // self.tensor.shape[-1] if self.columns else self.tensor.row_memory
        return -(-memory * self.each // self.rows)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return which rows, or columns, go with the output's rows from `first` up to but not including `last`."""
        length = self.tensor.shape[-1] if self.columns else self.tensor.rows
        if not self.rows:
            return 0, length
        return first // self.rows * self.each, min(-(-last // self.rows) * self.each, length)

    def read(self, first: int, last: int) -> Block | Pieces:
        """Read what goes with the output's rows from `first` up to but not including `last`."""
        if self.streamed:
            return ((start, self.tensor.read(start, stop)) for start, stop in self.tensor.pieces())
        read = self.tensor.read_columns if self.columns else self.tensor.read
        return read(*self.span(first, last))


class Rows(NamedTuple):
    """Some rows of a tensor, one part of a stacked one."""

    tensor: LazyTensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A description of a tensor: dtype, shape, and the `span` of a file, a function of `inputs`, or stacked `parts`.

    `grain` is the number of rows that can only be computed together; `history` tells what was done to the
    bytes, with every parameter that changes them, and is empty for a tensor that nobody touched. A `placed` function
    takes the number of the first row before the blocks. A `folded` one has the bytes of its input, several rows to one.
    `working` is how many bytes computing a row takes besides it and its inputs.
    """

    dtype: str
    shape: tuple[int, ...]
    span: Span | None = None
    function: RowFunction | None = None
    inputs: tuple[Input, ...] = ()
    parts: tuple[Rows, ...] = ()
    grain: int = 1
    history: str = ""
    placed: bool = False
    folded: bool = False
    working: int = 0

    @property
    def flat(self) -> LazyTensor:
        """The tensor whose rows are to be read one after the other for the same bytes: itself unless it is folded."""
        return self.inputs[0].tensor if self.folded else self

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return nbytes(self.dtype, self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.rows if self.rows else 0

    @property
    def row_memory(self) -> int:
        """Bytes of memory that computing one row takes: the row itself and, at every step, its inputs."""
        if self.span:
            return self.row_bytes
        parts = max((part.tensor.row_memory for part in self.parts), default=0)
        return self.row_bytes + self.working + parts + sum(it.row_memory for it in self.inputs)

    @property
    def fixed_memory(self) -> int:
        """Bytes of memory that computing takes besides, however few the rows: inputs that are read as a whole."""
        if self.span:
            return 0
        whole = sum(
            it.tensor.row_memory * min(it.tensor.piece_rows if it.streamed else it.tensor.rows, it.tensor.rows)
            for it in self.inputs
            if not it.rows
        )
        parts = max((part.tensor.fixed_memory for part in self.parts), default=0)
        return whole + parts + sum(it.tensor.fixed_memory for it in self.inputs)

    def spans(self) -> Iterator[Span]:
        """Yield every span that has to be read to know this tensor."""
        if self.span:
            yield self.span
            return
        for tensor in dict.fromkeys([it.tensor for it in self.inputs] + [it.tensor for it in self.parts]):
            yield from tensor.spans()

    def describe(self, places: Mapping[Path, str] | None = None) -> str:
        """Return a text that is the same for two tensors just where their bytes are computed alike.

        `places` gives directories names that do not depend on where they lie.
        """
        if self.span:
            place = (places or {}).get(self.span.path.parent, "")
            return f"{place}/{self.span.path.name}@{self.span.offset}+{self.span.nbytes}"
        inputs = ", ".join(f"{other.tensor.describe(places)}/{other.rows}:{other.each}" for other in self.inputs)
        inputs += ", ".join(f"{part.tensor.describe(places)}[{part.start}:{part.stop}]" for part in self.parts)
        return f"{self.history}: {self.dtype}({inputs})"

    def rowwise(
        self,
        function: RowFunction,
        *others: LazyTensor,
        dtype: str,
        history: str,
        grain: int = 1,
        row_shape: tuple[int, ...] | None = None,
        whole: Sequence[LazyTensor] = (),
        placed: bool = False,
    ) -> LazyTensor:
        """Return a tensor of as many rows whose rows depend on the same rows of this one and of `others`.

        An other with as many rows as this is read row for row; any other has one row for each `grain` rows of
        this, as the scales of a block format have. Those that are needed as a `whole` come last. Blocks given to
        `function` begin at a multiple of `grain`. Rows keep their shape unless `row_shape` gives another.

        Raises:
            ValueError: for an other whose rows fit neither way.
        """
        for other in others:
            if other.rows not in (self.rows, -(-self.rows // grain)):
                raise ValueError(f"{other.rows} rows do not go with {self.rows} rows in grains of {grain}.")
        inputs = tuple(Input(other, 1 if other.rows == self.rows else grain) for other in (self, *others))
        grain = lcm(grain, *(other.tensor.grain * other.rows for other in inputs))
        inputs += tuple(Input(other, 0) for other in whole)
        shape = self.shape if row_shape is None else (self.rows, *row_shape)
        return LazyTensor(dtype, shape, None, function, inputs, grain=grain, history=history, placed=placed)

    def reduced(
        self, function: Reduction, *whole: LazyTensor, dtype: str, shape: tuple[int, ...], history: str
    ) -> LazyTensor:
        """Return a small tensor that one pass over this one gives, and `whole` others: `function` is called once."""
        inputs = (Input(self, 0, streamed=True), *(Input(other, 0) for other in whole))
        return LazyTensor(dtype, shape, None, once(function), inputs, grain=max(1, shape[0]), history=history)

    def by_groups(
        self, function: RowFunction, size: int, *, dtype: str, row_shape: tuple[int, ...], history: str
    ) -> LazyTensor:
        """Return a tensor with one row for each `size` rows of this one, the last of which may be fewer."""
        grain = lcm(size, self.grain) // size
        inputs = (Input(self, 1, size),)
        return LazyTensor(
            dtype, (-(-self.rows // size), *row_shape), None, function, inputs, grain=grain, history=history
        )

    def read(self, start: int = 0, stop: int | None = None, into: bytearray | None = None) -> Block:
        """Read or compute the rows from `start` up to but not including `stop`.

        What is only read may be put `into` memory that is large enough, and then lasts until that is used again.

        Raises:
            CheckpointError: for a file that is shorter than its header said, and for rows of a sub-byte dtype
                that neither begin nor end with a byte.
        """
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start} to {stop} are asked of a tensor with {self.rows}.")
        if self.span:
            skipped = self._bytes_of(start)
            span = Span(self.span.path, self.span.offset + skipped, self._bytes_of(stop) - skipped)
            return Block(self.dtype, self._shape_of(stop - start), read_span(span, into))
        if self.parts:
            return Block(self.dtype, self._shape_of(stop - start), bytearray().join(self._stacked(start, stop)))
        assert self.function
        first = start // self.grain * self.grain
        last = min(-(-stop // self.grain) * self.grain, self.rows)
        place = (first,) if self.placed else ()
        block = self.function(*place, *(other.read(first, last) for other in self.inputs))
        data = memoryview(block.data)[self._bytes_of(start - first) : self._bytes_of(stop - first)]
        return Block(self.dtype, self._shape_of(stop - start), data)

    def read_columns(self, start: int, stop: int) -> Block:
        """Read the columns of a matrix from `start` up to but not including `stop`.

        Raises:
            CheckpointError: for a file that is shorter than its header said.
        """
        each = nbytes(self.dtype, (1,))
        begin, end = start * each, stop * each
        if self.span and (start, stop) != (0, self.shape[1]):
            data: Buffer = read_parts(self.span, self.row_bytes, begin, end)
        else:
            whole, width = memoryview(self.read().data), self.row_bytes
            starts = range(0, len(whole), width) if end - begin < width else ()
            data = b"".join(whole[at + begin : at + end] for at in starts) if starts else whole
        return Block(self.dtype, (self.rows, stop - start), data)

    def foresee(self, start: int, stop: int) -> None:
        """Tell the system that rows will be read soon, so that it fetches them from the disk meanwhile."""
        if self.span:
            begin = self._bytes_of(start)
            with open(self.span.path, "rb", buffering=0) as file:
                size = self._bytes_of(stop) - begin
                os.posix_fadvise(file.fileno(), self.span.offset + begin, size, os.POSIX_FADV_WILLNEED)
        for it in self.inputs:
            it.tensor.foresee(*((0, it.tensor.rows) if it.columns else it.span(start, stop)))

    def _stacked(self, start: int, stop: int) -> Iterator[Buffer]:
        begin = 0
        for tensor, first, last in self.parts:
            size = last - first
            if begin < stop and start < begin + size:
                yield tensor.read(first + max(start - begin, 0), first + min(stop - begin, size)).data
            begin += size

    def blocks(self, memory: int) -> Iterator[tuple[int, int]]:
        """Yield row ranges that cover the tensor, each as many whole grains as fit `memory` bytes, at least one."""
        memory -= self.fixed_memory
        step = max(self.grain, memory // max(1, self.row_memory) // self.grain * self.grain)
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    @property
    def piece_rows(self) -> int:
        """Rows of a piece, which depend on nothing but the shape: whole blocks of block formats, where they fit."""
        width = max(1, prod(self.shape[1:]))
        wanted = max(PIECE_ROWS, PIECE // width // PIECE_ROWS * PIECE_ROWS)
        return wanted if wanted * width <= WIDEST else max(1, WIDEST // width)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the row ranges of the pieces that the tensor is looked at in."""
        for start in range(0, self.rows, self.piece_rows):
            yield start, min(start + self.piece_rows, self.rows)

    def _bytes_of(self, rows: int) -> int:
        return nbytes(self.dtype, self._shape_of(rows)) if self.shape or rows else 0

    def _shape_of(self, rows: int) -> tuple[int, ...]:
        return (rows, *self.shape[1:]) if self.shape else ()
