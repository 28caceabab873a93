"""Sizes and parts as people write them: `5GB`, `2GiB`, `500 MB`, `1048576`; `3/16`."""

from __future__ import annotations

import re

from tensorsurgeon.errors import UsageError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return a size in bytes; `GB` is 10^9 and `GiB` 2^30, as the hub counts.

    Raises:
        UsageError: for a text that is not a positive size.
    """
    match = _SIZE.fullmatch(str(text).strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size; write it as 5GB, 500MB or 2GiB.")
    return size


def format_size(size: float) -> str:
    """Return a size as people read it, in decimal units: `5.37 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def parse_part(text: str) -> tuple[int, int]:
    """Parse which of several equal parts is meant: `3/16` is the third of sixteen.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"{text!r} is not a part of a whole; write it as 3/16, the third of sixteen.")
    return int(match[1]), int(match[2])
