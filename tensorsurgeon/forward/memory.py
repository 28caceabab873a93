"""Make the memory of a layer go back to the system as soon as the layer is dropped."""

from __future__ import annotations

import ctypes
from functools import cache

MAPPED = 8 * 10**6
"""Bytes from which a block of memory is mapped by itself, and so returned the moment it is freed."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


@cache
def return_memory() -> None:
    """Tell glibc to map large blocks one by one, for the rest of the process; other C libraries are left as they are.

    By itself glibc raises its threshold to the largest block that was ever freed, up to 32 MiB, and keeps what lies
    below in heaps, one for each thread: of a model streamed in float32 these grew to four times what was in use.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_MMAP_THRESHOLD, MAPPED), (_TRIM_THRESHOLD, MAPPED), (_ARENA_MAX, 2)):
        mallopt(option, value)
