"""The file that a derivation writes: seen to before the work, and written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from tensorsurgeon.durable import replace_file
from tensorsurgeon.errors import DestinationError, raise_all


def check_out(out: Path, what: str, suffixes: tuple[str, ...]) -> None:
    """See, before the work, that a file of such a kind can be written at its end.

    Raises:
        DestinationError: with all that is against it.
    """
    problems = []
    if out.suffix not in suffixes:
        problems.append(f"{out}: the name of a file of {what} ends in {' or '.join(suffixes)}.")
    if not out.absolute().parent.is_dir():
        problems.append(f"{out}: there is no directory {out.parent}; make it first.")
    if out.exists():
        problems.append(f"{out}: exists already; remove it, or give another name.")
    raise_all(DestinationError, problems)


def write_out(out: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        DestinationError: where it cannot be written.
    """
    try:
        replace_file(out, content)
    except OSError as problem:
        raise DestinationError(f"{out}: {problem.strerror or problem}.") from problem
