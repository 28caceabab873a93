"""Bytes of files, and results that are made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock
from typing import Any

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.format import Span

Buffer = bytes | bytearray | memoryview


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
                raise CheckpointError(
                    f"{span.path}: ends at byte {span.offset + position}, before byte "
                    f"{span.offset + span.nbytes} that its header promised; it was changed while it was read."
                )
            position += count
    return data
