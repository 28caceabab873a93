"""Bytes of files, and results that are made once."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.format import Span

Buffer = bytes | bytearray | memoryview

POPULATE_READ = 22
"""Linux's advice to have all pages of a mapping there at once, rather than each when it is first read."""

NEAR = 8192
"""Bytes between parts that are read sooner with them than passed over by one more call."""
AT_ONCE = 512
"""Parts that are read by one call; the system allows 1024 pieces of memory, of which half are for what is between."""


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes its result when it is first called, whatever it is then given, and keeps it."""
    lock = Lock()
    kept: list[Any] = []

    def call(*arguments: Any) -> Any:
        with lock:
            if not kept:
                kept.append(function(*arguments))
        return kept[0]

    return call


def read_span(span: Span, into: bytearray | None = None) -> Buffer:
    """Read a span of a file into new memory, or into some that is large enough.

    Raises:
        CheckpointError: where the file ends before the span does.
    """
    data: Buffer = bytearray(span.nbytes) if into is None else memoryview(into)[: span.nbytes]
    view, position = memoryview(data), 0
    with open(span.path, "rb", buffering=0) as file:
        while position < span.nbytes:
            count = os.preadv(file.fileno(), [view[position:]], span.offset + position)
            if count == 0:
                raise _shortened(span, span.offset + position)
            position += count
    return data


def _shortened(span: Span, end: int) -> CheckpointError:
    return CheckpointError(
        f"{span.path}: ends at byte {end}, before byte {span.offset + span.nbytes} that its header promised; it was "
        "changed while it was read."
    )


def map_span(span: Span) -> memoryview:
    """Return a span of a file as memory, without a copy where the file is in the page cache; it must not be shortened.

    What is written there stays in this process.

    Raises:
        CheckpointError: where the file ends before the span does.
    """
    begin = span.offset - span.offset % mmap.ALLOCATIONGRANULARITY
    with open(span.path, "rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        if length < span.offset + span.nbytes:
            raise _shortened(span, length)
        if not span.nbytes:
            return memoryview(bytearray())
        mapped = mmap.mmap(file.fileno(), span.offset - begin + span.nbytes, access=mmap.ACCESS_COPY, offset=begin)
    with suppress(OSError):
        mapped.madvise(POPULATE_READ)
    return memoryview(mapped)[span.offset - begin :]


def read_parts(span: Span, stride: int, begin: int, end: int) -> Buffer:
    """Read the bytes from `begin` up to but not including `end` of every `stride` bytes of a span.

    Raises:
        CheckpointError: where the file ends before the span does.
    """
    size, count = end - begin, span.nbytes // stride
    data = bytearray(count * size)
    view, between = memoryview(data), bytearray(stride - size)
    together = AT_ONCE if stride - size <= NEAR else 1
    with open(span.path, "rb", buffering=0) as file:
        for first in range(0, count, together):
            last = min(first + together, count)
            parts: list[Buffer] = [between] * (2 * (last - first) - 1)
            parts[::2] = [view[place * size : (place + 1) * size] for place in range(first, last)]
            wanted = (last - first - 1) * stride + size
            if os.preadv(file.fileno(), parts, span.offset + first * stride + begin) != wanted:
                raise CheckpointError(
                    f"{span.path}: ends before its header promised; it was changed while it was read."
                )
    return data
