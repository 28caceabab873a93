"""Bytes of files, and results that are made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock
from typing import Any

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.format import Span

Buffer = bytes | bytearray | memoryview

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
                raise shortened(span, span.offset + position)
            position += count
    return data


def shortened(span: Span, end: int) -> CheckpointError:
    """Return the error for a file that ends before a span does."""
    return CheckpointError(
        f"{span.path}: ends at byte {end}, before byte {span.offset + span.nbytes} that its header promised; it was "
        "changed while it was read."
    )


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
