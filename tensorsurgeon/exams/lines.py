"""A file with a line of JSON for each tensor that is done, so that an interrupted exam goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tensorsurgeon._version import __version__
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import DestinationError

if TYPE_CHECKING:
    from tensorsurgeon.exams.vitals import Vitals


class Lines:
    """The lines of an exam: what is there is kept, and what is put is on disk at once.

    The first line says which files of which models were read, under which settings.

    Raises:
        DestinationError: for a file of other models or settings, and one that is no such file.
    """

    def __init__(self, path: str | None, models: Sequence[Checkpoint], settings: Mapping[str, Any]) -> None:
        self.path = Path(path) if path else None
        self.header = {"tensorsurgeon": __version__, "models": [_digest(it) for it in models], **settings}
        self.held: dict[tuple[int, str], Vitals] = {}
        self.file: TextIO | None = None

    def __enter__(self) -> Lines:
        if self.path:
            try:
                whole = self._read()
                self.file = open(self.path, "r+" if whole else "w", encoding="utf-8")
                # A line that was cut off is written anew.
                self.file.truncate(whole)
                self.file.seek(whole)
            except OSError as problem:
                raise DestinationError(f"{self.path}: cannot be written: {problem.strerror}.") from None
            if not whole:
                self._write(self.header)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def get(self, model: int, name: str) -> Vitals | None:
        """Return what is there of a tensor of the first (0) or second (1) model."""
        return self.held.get((model, name))

    def put(self, model: int, name: str, vitals: Vitals) -> None:
        """Append a line."""
        if self.file:
            lattice = [list(it) for it in vitals.lattice]
            self._write({"model": model, "name": name, **vitals._asdict(), "lattice": lattice})

    def _write(self, value: Mapping[str, Any]) -> None:
        assert self.file
        try:
            self.file.write(json.dumps(value) + "\n")
            self.file.flush()
        except OSError as problem:
            raise DestinationError(f"{self.path}: cannot be written: {problem.strerror}.") from None

    def _read(self) -> int:
        """Take over the lines of the file; return how many bytes of it are whole lines."""
        from tensorsurgeon.exams.vitals import Vitals
        from tensorsurgeon.kernels.lattice import Lattice

        assert self.path
        if not self.path.exists() or not self.path.stat().st_size:
            return 0
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if not whole and text.startswith(b'{"tensorsurgeon"'):
            return 0
        try:
            header, *lines = (json.loads(line) for line in text[:whole].splitlines())
            known = header if isinstance(header, dict) and "tensorsurgeon" in header else None
            for it in lines:
                lattice = tuple(Lattice(*seen) for seen in it["lattice"])
                vitals = Vitals(it["row"], it["detail"], lattice, it["fingerprint"])
                self.held[it["model"], it["name"]] = vitals
        except (ValueError, KeyError, TypeError):
            known = None
        if known is None:
            raise DestinationError(f"{self.path}: holds something else than lines of an autopsy; name another file.")
        if known != self.header:
            raise DestinationError(
                f"{self.path}: holds lines of another model, version or settings; name another file, or remove it."
            )
        return whole


def _digest(ckpt: Checkpoint) -> str:
    """Return a digest of which files are read: their names, sizes and times of change, and what is made of them."""
    places = {source.directory: str(number) for number, source in enumerate(ckpt.sources)}
    parts = [str(sorted(source.stamp().items())) for source in ckpt.sources]
    parts += [f"{name} {tensor.describe(places)}" for name, tensor in ckpt.tensors.items()]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
