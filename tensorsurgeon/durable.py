"""Files that are whole or absent, even after a crash: written under another name, flushed, renamed, flushed again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorsurgeon.errors import DestinationError
from tensorsurgeon.source import SideFile

CHUNK = 2**20


def write_small(path: Path, content: SideFile) -> str:
    """Write a small file of a checkpoint whole, and its directory where there is none; return its SHA-256."""
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return replace_file(path, content)


def replace_file(path: Path, content: SideFile) -> str:
    """Write a file under another name, flushed, and rename it; return its SHA-256."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    digest = hashlib.sha256()
    with open(temporary, "wb") as file:
        for chunk in [content] if isinstance(content, bytes) else _chunks(content):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    fsync_directory(path.parent)
    return digest.hexdigest()


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn what the system says into an error that tells where, and that nothing is lost."""
    try:
        yield
    except OSError as problem:
        where = problem.filename or path
        raise DestinationError(
            f"{where}: {problem.strerror or problem}; finished shards are kept, and the same command goes on."
        ) from problem


def fsync_directory(path: Path) -> None:
    """Flush what a directory lists to the disk: names given and taken there then outlive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
