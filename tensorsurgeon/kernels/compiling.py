"""Inner loops are compiled by numba when they are first called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop when it is first called, kept on disk where there is a place for that; it lets go of the GIL."""
    try:
        return numba.njit(nogil=True, cache=True)(loop)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(nogil=True)(loop)  # type: ignore[no-any-return]
