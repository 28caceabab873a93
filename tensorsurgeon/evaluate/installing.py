"""One model after the other put into an engine: as it lies, written and loaded, or as other weights into the one there.

Variants of one shape, the same config and the same names, dtypes and shapes of tensors, need no checkpoint: an engine
that can reload takes their weights as they are planned. For each shape that is proved once: the model is written and
loaded too, and both have to give the same logits to the last bit; where they do not, all of that shape are written.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.evaluate.engine import Engine
from tensorsurgeon.kernels.casting import TORCH
from tensorsurgeon.plan import make_plan
from tensorsurgeon.quantized.settings import find_settings
from tensorsurgeon.running import running
from tensorsurgeon.tensor import LazyTensor
from tensorsurgeon.writer import write_plan

DTYPES = {**TORCH, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""The dtypes of models that are not quantised; only these are reloaded."""

Built = Literal["source", "written", "reloaded", "streamed"]
"""How a model came into the engine: as it lies, from a checkpoint in the scratch directory, into the one there, or as
it is planned, layer by layer."""
Answer = Callable[[], bytes]
"""Asks the model in the engine, and returns what it answers to the last bit."""


class Subject(NamedTuple):
    """A model to install: its checkpoint, and the directory of the base if it is an adapter."""

    ckpt: Checkpoint
    base: Path | None = None

    @property
    def is_source(self) -> bool:
        """Whether it lies on disk as it is."""
        return not self.ckpt.steps

    @property
    def identity(self) -> str:
        """What stands for all that decides its answers: models computed alike are one, whatever led to them."""
        # Not only in a source: what an operation computed at once, as an extraction does, lies in a place of its own.
        spans = (span for tensor in self.ckpt.tensors.values() for span in tensor.spans())
        places = {span.path.parent: str(span.path.parent) for span in spans}
        digest = hashlib.sha256(repr((self.base, self.ckpt.config.value)).encode())
        for name, tensor in self.ckpt.tensors.items():
            digest.update(f"{name}={tensor.describe(places)}\n".encode())
        return digest.hexdigest()

    @property
    def shape(self) -> str:
        """What models have in common of which one's weights fit into the other; empty where they do not at all."""
        ckpt = self.ckpt
        if ckpt.is_adapter or find_settings(ckpt).values or any(it.dtype not in DTYPES for it in ckpt.tensors.values()):
            return ""
        described = [(name, it.dtype, it.shape) for name, it in ckpt.tensors.items()]
        return hashlib.sha256(repr((ckpt.config.value, described)).encode()).hexdigest()


class Installer:
    """Puts models into an engine, with room for one of them on disk; use it as a context.

    `notes` tells what a user should know of how it went.
    """

    def __init__(self, engine: Engine, scratch: Path | None = None) -> None:
        self.engine = engine
        self.notes: list[str] = []
        self._scratch = scratch
        self._place: Path | None = None
        self._identity = self._shape = ""
        self._built: Built = "source"
        self._proved: dict[str, bool] = {}

    def __enter__(self) -> Installer:
        if self._scratch:
            self._scratch.mkdir(parents=True, exist_ok=True)
        self._place = Path(tempfile.mkdtemp(prefix="tensorsurgeon-sweep-", dir=self._scratch))
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()
        assert self._place
        shutil.rmtree(self._place, ignore_errors=True)

    def forget(self) -> None:
        """Let go of the model in the engine, and of what was written for it."""
        self._identity = self._shape = ""
        self.engine.close()
        self._remove()

    def install(self, subject: Subject, length: int, answer: Answer) -> Built:
        """Have the engine run a model, for up to `length` tokens, and return how it came there.

        `answer` asks it where that has to be proved; models of one shape are to be given the same length.

        Raises:
            EngineError: where the engine refuses it.
            DestinationError: where it cannot be written.
        """
        identity, shape = subject.identity, subject.shape
        if identity != self._identity:
            fits = self.engine.reloads and shape and shape == self._shape and self._proved.get(shape, True)
            self._identity = ""
            self._built = self._reload(subject, length, answer) if fits else self._load(subject, length)
            self._identity, self._shape = identity, shape
        return self._built

    def _reload(self, subject: Subject, length: int, answer: Answer) -> Built:
        shape = subject.shape
        before = None if shape in self._proved else answer()
        self.engine.reload(weights(subject.ckpt))
        if before is None:
            return "reloaded"
        reloaded = answer()
        self._load(subject, length)
        loaded = answer()
        # A model that answers as the one before it would do so too if no weight had been taken: that proves nothing.
        if loaded == reloaded == before:
            return "written"
        self._proved[shape] = loaded == reloaded
        if not self._proved[shape]:
            self.notes.append(
                "a model whose weights were put into the engine answers otherwise than the same model written and "
                "loaded; all models are written and loaded."
            )
        return "written"

    def _load(self, subject: Subject, length: int) -> Built:
        self._remove()
        ckpt = subject.ckpt
        if subject.is_source:
            self.engine.load(ckpt.sources[0].directory, length)
            return "source"
        assert self._place
        dest = self._place / "model"
        self.engine.close()
        write_plan(make_plan(ckpt, None, running().memory, running().threads), dest, quiet=True)
        if subject.base:
            self.engine.load(subject.base, length, dest)
        else:
            self.engine.load(dest, length)
        return "written"

    def _remove(self) -> None:
        assert self._place
        for path in self._place.iterdir():
            shutil.rmtree(path)


def weights(ckpt: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a plan in memory, in order; the next ones are computed meanwhile, one on each thread."""
    workers = running().workers
    waiting: deque[tuple[str, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, tensor in ckpt.tensors.items():
            waiting.append((name, pool.submit(_in_memory, tensor)))
            if len(waiting) > workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def _in_memory(tensor: LazyTensor) -> torch.Tensor:
    """Compute a tensor in pieces of rows, and return it whole."""
    flat = tensor.flat
    held: Any = torch.empty(tensor.nbytes, dtype=torch.uint8)
    view = memoryview(held.numpy())
    for start, stop in flat.pieces():
        view[start * flat.row_bytes : stop * flat.row_bytes] = memoryview(flat.read(start, stop).data).cast("B")
    found: torch.Tensor = held.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
    return found
