"""A file of this process's own, for results that are not to fill the memory; it goes with the process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from threading import Lock

from tensorsurgeon.format import Span
from tensorsurgeon.reading import Buffer, read_span
from tensorsurgeon.tensor import Block, Pieces, Reduction


class Scratch:
    """A file, made when it is first needed, that threads put bytes into and read them from again."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._path: Path | None = None

    def put(self, data: Buffer, over: Span | None = None) -> Span:
        """Append bytes, or write them over others of as many, and return where they are."""
        with self._lock:
            if self._path is None:
                directory = tempfile.mkdtemp(prefix="tensorsurgeon-")
                atexit.register(shutil.rmtree, directory, ignore_errors=True)
                self._path = Path(directory, "scratch")
                self._path.touch()
            with open(self._path, "r+b") as file:
                span = over or Span(self._path, file.seek(0, os.SEEK_END), len(data))
                file.seek(span.offset)
                file.write(data)
        return span

    def keep(self, function: Reduction) -> Reduction:
        """Return a function that computes its block when it is first called, and then reads it from the file."""
        lock = Lock()
        kept: list[tuple[Block, Span]] = []

        def call(pieces: Pieces, *blocks: Block) -> Block:
            with lock:
                if not kept:
                    block = function(pieces, *blocks)
                    kept.append((block._replace(data=b""), self.put(block.data)))
                    return block
            described, span = kept[0]
            return described._replace(data=read_span(span))

        return call
