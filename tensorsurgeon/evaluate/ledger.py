"""What a sweep leaves: a directory with the study, and its records as lines of JSON, whole at any moment.

RESULTS/study.json      the study as it was understood, what was asked, and the digests of all models that it reads
RESULTS/records.jsonl   one record a line, in the order in which they came

A run that finds records goes on behind them, where the study is the same in all that they depend on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tensorsurgeon._version import __version__
from tensorsurgeon.durable import write_small
from tensorsurgeon.errors import DestinationError
from tensorsurgeon.evaluate.digest import checkpoint_digest, digested_files
from tensorsurgeon.evaluate.results import RECORDS, STUDY
from tensorsurgeon.source import Source

MOST_SHOWN = 12
"""Differences of two studies that are told."""

ONLY_TOLD = ("about", "damage")
"""What a study says to those who read its report, and no record depends on: it may be said otherwise later."""

Record = Mapping[str, Any]
Key = tuple[str, int, str, str]
"""What a record answers: variant, repetition, kind and id of what was asked."""


class Ledger:
    """The records of a study, which are added to; only one process at a time has it.

    `held` has of each record what later ones need: the perplexity of texts.

    Raises:
        DestinationError: for the records of another study, with the differences; for a line that is none; and where
            another process is at work on them.
    """

    def __init__(self, place: Path, study: Mapping[str, Any], force: bool = False) -> None:
        self.place, self.study = place, dict(study)
        place.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(place / RECORDS, "a+b")  # noqa: SIM115  closed by `close`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise DestinationError(f"{place}: another sweep is writing its records there.") from None
        try:
            if force:
                self._file.truncate(0)
                (place / STUDY).unlink(missing_ok=True)
            self.sources: dict[str, Any] = self._compare()
            self.held: dict[Key, Record] = dict(self._read())
        except BaseException:
            self._file.close()
            raise

    def _compare(self) -> dict[str, Any]:
        """Write down the study, or see that it is the one whose records there are; return what is known of models."""
        path = self.place / STUDY
        if not path.exists():
            if os.fstat(self._file.fileno()).st_size:
                raise DestinationError(f"{path}: is not there, but {RECORDS} is; name another directory, or --force.")
            self._write({})
            return {}
        try:
            before = json.loads(path.read_bytes())
            sources = dict(before.pop("sources"))
        except (ValueError, AttributeError, KeyError, TypeError):
            raise DestinationError(f"{path}: is not a study; name another directory, or --force.") from None
        before.pop("tensorsurgeon", None)
        found = [
            f"{key}: {_shown(old)} then, {_shown(new)} now"
            for key, old, new in _differences(before, _plain(self.study))
            if key not in ONLY_TOLD
        ]
        if found:
            more = [f"and {len(found) - MOST_SHOWN} more"] if len(found) > MOST_SHOWN else []
            listed = "\n  ".join([*found[:MOST_SHOWN], *more])
            raise DestinationError(
                f"{self.place}: holds the records of another study. Name another directory with --results, or do it "
                f"all anew with --force. The differences:\n  {listed}"
            )
        if before != _plain(self.study):
            self._write(sources)
        return sources

    def _write(self, sources: Mapping[str, Any]) -> None:
        data = {**self.study, "tensorsurgeon": __version__, "sources": dict(sources)}
        write_small(self.place / STUDY, (json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n").encode())

    def digest(self, location: str, source: Source) -> str:
        """Return the digest of a model; its bytes are read again only where its files are others than before."""
        stats = {name: (source.directory / name).stat() for name in digested_files(source)}
        stamp = {name: [it.st_size, it.st_mtime_ns] for name, it in stats.items()}
        known = self.sources.get(location)
        if not known or known["stamp"] != stamp:
            digest = checkpoint_digest(source)
            if known and known["digest"] != digest and self.held:
                raise DestinationError(
                    f"{location}: is not the model that the records in {self.place} begin with; name another directory "
                    "with --results, or do it all anew with --force."
                )
            self.sources[location] = known = {"digest": digest, "stamp": stamp}
            self._write(self.sources)
        return str(known["digest"])

    def _read(self) -> Iterator[tuple[Key, Record]]:
        """Yield the records; what a killed process left of a last line is cut off."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                if line.strip():
                    yield _key_and_needed(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise DestinationError(
                    f"{self.place / RECORDS}:{number}: is not a record; remove the line, or do all anew with --force."
                ) from None
            whole += len(line)
        self._file.truncate(whole)

    def keep(self, record: Record) -> None:
        """Add a record; it is in the file when this returns."""
        self._file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
        self._file.flush()
        key, needed = _key_and_needed(record)
        self.held[key] = needed

    def earlier(self, variant: str, repeat: int) -> dict[tuple[str, str], Record]:
        """Return what there is of a variant's repetition, by kind and id."""
        return {key[2:]: it for key, it in self.held.items() if key[:2] == (variant, repeat)}

    def close(self) -> None:
        """Let others at the records."""
        self._file.close()


def _key_and_needed(record: Record) -> tuple[Key, Record]:
    key = (record["variant"], record["repeat_index"], record["record"], record["prompt_id"])
    return key, {"perplexity": record["perplexity"]} if record["record"] == "text" else {}


def _plain(data: Any) -> Any:
    """Return data as it comes back from JSON."""
    return json.loads(json.dumps(data, default=str))


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where two studies differ, and what each has there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{where}.{place}")
    elif old != new:
        yield where, old, new


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
