"""Every error that this toolkit raises on purpose, with the exit status that the command line gives it.

    SurgeonError              1   could not be done
    ├── UsageError            2   the request was not understood: an option, a recipe, a layer sequence
    ├── CheckpointError       1   what lies on disk is not a sound checkpoint
    │   └── FormatError       1   a file breaks the safetensors format
    ├── RefusedError          1   it could be done, but the result would be silently wrong
    ├── DestinationError      1   the destination cannot be written, or holds something else
    ├── ResultsError          1   what a sweep has left is broken
    └── EngineError           1   an inference engine cannot be had, refused a model, or failed to answer
        └── OutOfMemoryError  1   it had not enough memory for what was asked at once

A message says what is wrong, where (file, tensor, key, value) and what to do. One error carries all the
problems that were found, so that a user mends them in one go.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeonError(Exception):
    """Something could not be done; `problems` holds one sentence or two for each reason."""

    exit_status = 1

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UsageError(SurgeonError):
    """A request was not understood."""

    exit_status = 2


class CheckpointError(SurgeonError):
    """A checkpoint on disk is broken or incomplete."""


class FormatError(CheckpointError):
    """A file breaks the safetensors format."""


class RefusedError(SurgeonError):
    """An operation would give a silently wrong checkpoint."""


class DestinationError(SurgeonError):
    """A destination cannot be written."""


class ResultsError(SurgeonError):
    """What a sweep has left on disk is broken."""


class EngineError(SurgeonError):
    """An inference engine cannot be had, refused a model, or failed to answer."""


class OutOfMemoryError(EngineError):
    """An inference engine had not enough memory for what was asked at once."""


def raise_all(kind: type[SurgeonError], problems: Iterable[str]) -> None:
    """Raise one `kind` that carries all `problems`; do nothing where there are none."""
    found = tuple(problems)
    if found:
        raise kind(*found)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known word that resembles `word` most, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
