"""Read tensors ahead of what computes on them, several at a time, in the memory that there is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from math import prod
from typing import NamedTuple, TypeVar

from tensorsurgeon.progress import Advance, progress_bar
from tensorsurgeon.running import Budget, running
from tensorsurgeon.tensor import Block, LazyTensor

PIECE = 2**20
"""Elements that a piece of a tensor has at least, where the tensor has as many."""
ROWS = 256
"""Pieces begin at a multiple of this many rows: a whole number of the blocks of block formats."""
WIDEST = 2**24
"""Elements of a piece at most, unless a single row has more."""
AHEAD = 2
"""Pieces of a tensor that are read before they are needed."""

T = TypeVar("T")
R = TypeVar("R")


class Reader:
    """Reads pieces of tensors on threads of its own, and counts the bytes that they took on disk."""

    def __init__(self, pool: ThreadPoolExecutor, advance: Advance) -> None:
        self.pool = pool
        self.advance = advance

    def pieces(self, *tensors: LazyTensor, share: float = 1.0) -> Iterator[tuple[int, list[Block]]]:
        """Yield the first row and a block of each tensor, tensors of one shape; with a `share`, evenly spread ones."""
        rows, step = tensors[0].rows, piece_rows(tensors[0])
        starts = spread(range(0, rows, step), share)
        disk = [sum(span.nbytes for span in tensor.spans()) / max(rows, 1) for tensor in tensors]

        def read(start: int) -> list[Block]:
            return [tensor.read(start, min(start + step, rows)) for tensor in tensors]

        waiting = iter(starts)
        ahead: deque[tuple[int, Future[list[Block]]]] = deque()
        try:
            while True:
                while len(ahead) < AHEAD and (start := next(waiting, None)) is not None:
                    ahead.append((start, self.pool.submit(read, start)))
                if not ahead:
                    return
                start, future = ahead.popleft()
                blocks = future.result()
                self.advance(round(sum(disk) * (min(start + step, rows) - start)))
                yield start, blocks
        finally:
            for _, future in ahead:
                future.cancel()


class Work(NamedTuple):
    """A tensor to look at, or several of one shape: the bytes read, and the memory that this takes.

    `beside` are bytes of memory that are needed besides the pieces.
    """

    tensors: Sequence[LazyTensor]
    share: float = 1.0
    beside: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return round(self.share * sum(span.nbytes for tensor in self.tensors for span in tensor.spans()))

    @property
    def memory(self) -> int:
        """Bytes of the pieces in hand, with what computing them takes."""
        step = min(piece_rows(self.tensors[0]), self.tensors[0].rows)
        pieces = (AHEAD + 2) * sum(step * tensor.row_memory + tensor.fixed_memory for tensor in self.tensors)
        return pieces + self.beside


def flattened(tensor: LazyTensor) -> LazyTensor:
    """Return a tensor that lies in one file as a matrix of its last dimension, so that few of its rows can be read."""
    if tensor.span is None or len(tensor.shape) < 3:
        return tensor
    return LazyTensor(tensor.dtype, (prod(tensor.shape[:-1]), tensor.shape[-1]), tensor.span)


def piece_rows(tensor: LazyTensor) -> int:
    """Return the number of rows of a piece, which depends on nothing but the shape."""
    width = max(1, prod(tensor.shape[1:]))
    wanted = max(ROWS, PIECE // width // ROWS * ROWS)
    return wanted if wanted * width <= WIDEST else max(1, WIDEST // width)


def spread(starts: Sequence[int], share: float) -> list[int]:
    """Return a share of some places, at least one, evenly spread over them."""
    count = max(1, round(len(starts) * share))
    return [starts[(2 * place + 1) * len(starts) // (2 * count)] for place in range(count)] if starts else []


@contextmanager
def reading(total: int, label: str) -> Iterator[Reader]:
    """Give a reader to a block, with a bar over the bytes that it reads."""
    settings = running()
    with progress_bar(total, label, settings.quiet) as advance, ThreadPoolExecutor(settings.workers) as pool:
        yield Reader(pool, advance)


def each(work: Mapping[str, Work], label: str, look: Callable[[str, Reader], R]) -> Iterator[tuple[str, R]]:
    """Look at everything, the largest first and several at a time; yield what was found as it comes."""
    settings = running()
    budget = Budget(settings.memory)
    order = sorted(work, key=lambda name: -work[name].nbytes)
    with reading(sum(it.nbytes for it in work.values()), label) as reader:

        def found(name: str) -> tuple[str, R]:
            with budget.reserve(work[name].memory):
                return name, look(name, reader)

        with ThreadPoolExecutor(settings.workers) as pool:
            futures = [pool.submit(found, name) for name in order]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()
