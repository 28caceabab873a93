"""How the work at hand is run: what an operation that reads the weights at once has to keep to.

Most operations only describe what is to be computed. One whose result cannot be described before the weights are read,
as the rank that captures a share of a delta, computes when it is called, in the memory and on the threads given here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Condition
from typing import NamedTuple

MEMORY = 2**30
"""Most bytes that blocks of tensors take together where nothing else is said."""


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


class Running(NamedTuple):
    """Limits of memory (bytes) and threads; whether all is only `planned`, and whether progress is hidden."""

    memory: int = MEMORY
    threads: int = 0
    planned: bool = False
    quiet: bool = False

    @property
    def workers(self) -> int:
        """Number of threads: as many as there are cores where none is given."""
        return self.threads or cores()


_USUAL = Running()
_CURRENT: ContextVar[Running] = ContextVar("running", default=_USUAL)


def running() -> Running:
    """Return how the work at hand is run."""
    return _CURRENT.get()


@contextmanager
def run_under(settings: Running) -> Iterator[None]:
    """Run a block under other settings."""
    token = _CURRENT.set(settings)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Budget:
    """Memory that threads share: each waits until what it needs is free; one alone may have more than there is."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.changed = Condition()

    @contextmanager
    def reserve(self, needed: int) -> Iterator[None]:
        """Hold `needed` bytes for the time of a block."""
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + needed <= self.limit)
            self.used += needed
        try:
            yield
        finally:
            with self.changed:
                self.used -= needed
                self.changed.notify_all()
