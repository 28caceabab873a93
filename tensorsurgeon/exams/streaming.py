"""Read tensors piece by piece, several at a time, in the memory that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import FileIO
from itertools import product
from typing import NamedTuple, TypeVar

from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.progress import Advance, progress_bar
from tensorsurgeon.running import Budget, running
from tensorsurgeon.tensor import Block, LazyTensor

CHUNK = 2**18
"""Bytes that are compared at once, small enough for two of them to stay in the cache."""
AHEAD = 4
"""Pieces that the system is told of at once, before they are needed."""

R = TypeVar("R")


class Reader:
    """Reads pieces of tensors, and counts the bytes that they took on disk.

    The system is told of pieces before they are needed, and fetches them while others are computed. A piece is read by
    the thread that computes on it, so that it is in that core's cache.
    """

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def pieces(
        self, *tensors: LazyTensor, share: float = 1.0, lasting: bool = True
    ) -> Iterator[tuple[int, list[Block]]]:
        """Yield the first row and a block of each tensor, tensors of one shape; with a `share`, evenly spread ones.

        Blocks that are not `lasting` are overwritten by the next ones.
        """
        rows, step = tensors[0].rows, tensors[0].piece_rows
        places = [None if lasting else bytearray(min(step, rows) * tensor.row_bytes) for tensor in tensors]
        starts = spread(range(0, rows, step), share)
        disk = sum(span.nbytes for tensor in tensors for span in tensor.spans()) / max(rows, 1)
        for place, start in enumerate(starts):
            if place % AHEAD == 0:
                for tensor, run in product(tensors, _runs(starts[place : place + 2 * AHEAD], step)):
                    tensor.foresee(run.start, min(run.stop, rows))
            stop = min(start + step, rows)
            blocks = [tensor.read(start, stop, into) for tensor, into in zip(tensors, places, strict=True)]
            self.advance(round(disk * (stop - start)))
            yield start, blocks


class Work(NamedTuple):
    """A tensor to look at, or several of one shape: the bytes read, and the memory that this takes.

    `share` of it is read; `besides` are bytes that are needed besides the pieces in hand.
    """

    tensors: Sequence[LazyTensor]
    share: float = 1.0
    besides: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return round(self.share * sum(span.nbytes for tensor in self.tensors for span in tensor.spans()))

    @property
    def memory(self) -> int:
        """Bytes of the pieces in hand, with what computing them takes."""
        step = min(self.tensors[0].piece_rows, self.tensors[0].rows)
        pieces = sum(step * tensor.row_memory + tensor.fixed_memory for tensor in self.tensors)
        return 2 * pieces + self.besides


def same_bytes(one: LazyTensor, other: LazyTensor) -> bool:
    """Tell whether two tensors of one dtype and shape hold the same bytes; reading ends where they differ."""
    if not one.span or not other.span:
        blocks = Reader(lambda count: None).pieces(one, other)
        return all(bytes(first.data) == bytes(second.data) for _, (first, second) in blocks)
    if one.span == other.span:
        return True
    left, here, there = one.nbytes, bytearray(CHUNK), bytearray(CHUNK)
    with open(one.span.path, "rb", buffering=0) as file, open(other.span.path, "rb", buffering=0) as twin:
        file.seek(one.span.offset)
        twin.seek(other.span.offset)
        while left:
            size = min(left, CHUNK)
            if size < CHUNK:
                here, there = bytearray(size), bytearray(size)
            # Byte arrays are compared at the speed of memory; views of them are not.
            if not _fill(file, here) or not _fill(twin, there) or here != there:
                return False
            left -= size
    return True


def _fill(file: FileIO, place: bytearray) -> bool:
    """Read until a place is full, and tell whether that went."""
    view, filled = memoryview(place), 0
    while filled < len(place) and (count := file.readinto(view[filled:])):
        filled += count
    return filled == len(place)


def _runs(starts: Sequence[int], step: int) -> list[range]:
    """Return the rows of pieces, those of neighbours as one range."""
    runs: list[range] = []
    for start in starts:
        joined = runs and runs[-1].stop == start
        runs[-1:] = [range(runs[-1].start, start + step)] if joined else [*runs[-1:], range(start, start + step)]
    return runs


def spread(starts: Sequence[int], share: float) -> list[int]:
    """Return a share of some places, at least one, evenly spread over them."""
    count = max(1, round(len(starts) * share))
    return [starts[(2 * place + 1) * len(starts) // (2 * count)] for place in range(count)] if starts else []


def each(work: Mapping[str, Work], label: str, look: Callable[[str, Reader], R]) -> Iterator[tuple[str, R]]:
    """Look at everything, the largest first and several at a time; yield what was found as it comes."""
    settings = running()
    budget = Budget(settings.memory)
    order = sorted(work, key=lambda name: -work[name].nbytes)
    with progress_bar(sum(it.nbytes for it in work.values()), label, settings.quiet) as advance:
        reader = Reader(advance)

        def found(name: str) -> tuple[str, R]:
            try:
                with budget.reserve(work[name].memory):
                    return name, look(name, reader)
            except SurgeonError as problem:
                raise type(problem)(*(f"{name}: {text}" for text in problem.problems)) from None

        with ThreadPoolExecutor(settings.workers) as pool:
            futures = [pool.submit(found, name) for name in order]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()
