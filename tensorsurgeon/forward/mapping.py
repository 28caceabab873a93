"""Spans of files as memory: a layer that is run as it lies is not copied."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.format import Span
from tensorsurgeon.reading import shortened

POPULATED = mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0)
"""Where the system can, all pages of a mapping are there at once, rather than each when it is first read."""
FAILED = ctypes.c_void_p(-1).value

_system = ctypes.CDLL(None, use_errno=True)
_map, _unmap = _system.mmap, _system.munmap
_map.restype = ctypes.c_void_p


def map_span(span: Span) -> memoryview:
    """Return a span of a file as memory that cannot be written, without a copy; the file must not be shortened.

    No file stays open for it, unlike for a mapping of Python's own: a layer may have a thousand experts.

    Raises:
        CheckpointError: where the file ends before the span does, or cannot be mapped.
    """
    before = span.offset % mmap.ALLOCATIONGRANULARITY
    with open(span.path, "rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        if length < span.offset + span.nbytes:
            raise shortened(span, length)
        if not span.nbytes:
            return memoryview(b"")
        size, place = span.nbytes + before, ctypes.c_long(span.offset - before)
        found = _map(None, ctypes.c_size_t(size), mmap.PROT_READ, POPULATED, file.fileno(), place)
    if found in (None, FAILED):
        raise CheckpointError(f"{span.path}: cannot be mapped: {os.strerror(ctypes.get_errno())}.")
    memory = (ctypes.c_ubyte * size).from_address(found)
    # What is left at the end of the process goes with it: others may still look at it then.
    weakref.finalize(memory, _unmap, ctypes.c_void_p(found), ctypes.c_size_t(size)).atexit = False
    return memoryview(memory).toreadonly().cast("B")[before:]
