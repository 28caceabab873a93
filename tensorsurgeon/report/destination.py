"""Where reports are written: files that are whole or absent, under names that every system can have."""

from __future__ import annotations

import re
from pathlib import Path

from tensorsurgeon.durable import replace_file
from tensorsurgeon.errors import DestinationError


def write_report(path: Path, content: bytes) -> Path:
    """Write a file of a report whole, and return its path.

    Raises:
        DestinationError: where its directory is missing, or it cannot be written.
    """
    if not path.absolute().parent.is_dir():
        raise DestinationError(f"{path}: there is no directory {path.parent}; make it first.")
    try:
        replace_file(path, content)
    except OSError as problem:
        raise DestinationError(f"{path}: {problem.strerror or problem}.") from problem
    return path


def make_directory(path: Path) -> None:
    """Make the directory of a report where there is none; the one that it is to lie in must exist.

    Raises:
        DestinationError: where it cannot be made.
    """
    try:
        path.mkdir(exist_ok=True)
    except OSError as problem:
        raise DestinationError(f"{path}: {problem.strerror or problem}.") from problem


def file_stem(text: str, taken: set[str]) -> str:
    """Return a plain ASCII name for a file, made from a text and unlike those `taken`, to which it is added."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "unnamed"
    numbered = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(taken) + 2))
    stem = next(name for name in numbered if name not in taken)
    taken.add(stem)
    return stem
