"""From states to logits by the model's own code: what lies behind the last layer, and the head, whole or in slices."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers.utils import ModelOutput

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.forward.parts import aligned, read_rows, set_parameter
from tensorsurgeon.forward.recording import arguments, as_left, replaced
from tensorsurgeon.forward.shell import Shell
from tensorsurgeon.forward.silence import silence
from tensorsurgeon.running import running
from tensorsurgeon.tensor import LazyTensor

NormUse = Literal["own", "no-beta", "none"]


@dataclass
class _Left(ModelOutput):  # type: ignore[misc]
    """What a decoder returns, of which only the states are there."""

    last_hidden_state: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Head:
    """The final norm and the head of a model, to be used under `held`.

    `exact` computes the products of the head in float32 whatever the dtype of the layers, so that logits differ where
    half precision would tie them.

    Raises:
        RefusedError: where what lies between the last layer and the head is more than modules one after the other.
    """

    def __init__(self, shell: Shell, exact: bool = True) -> None:
        self.shell, self.skeleton = shell, shell.skeleton
        self.module: Any = self.skeleton.module(self.skeleton.head)
        self.dtype = torch.float32 if exact else self.skeleton.dtype
        self.after = [self.skeleton.module(name) for name in shell.recordings[0].after]
        self._lazy = self._tensor("weight")
        for recording in shell.recordings:
            if not torch.equal(self.normed(recording.embedded), recording.tail):
                kind = type(self.skeleton.model).__name__
                raise RefusedError(f"{kind}: what lies between its last layer and its head cannot be told apart.")

    @property
    def norms(self) -> list[nn.Module]:
        """The norms behind the last layer."""
        return [it for it in self.after if "norm" in type(it).__name__.lower()]

    @property
    def rows(self) -> int:
        """The number of tokens that the head has."""
        return int(self._lazy.rows)

    @property
    def slices(self) -> list[tuple[int, int]]:
        """The rows of the head that are held at a time: half of the memory that there is takes at most as many."""
        each = self._lazy.shape[-1] * self.dtype.itemsize
        step = max(1, running().memory // 2 // each)
        count = -(-self.rows // step)
        step = -(-self.rows // count)
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def normed(self, states: torch.Tensor, use: NormUse = "own") -> torch.Tensor:
        """Return states as the head takes them; `no-beta` leaves out what the norm adds, `none` the norm."""
        with torch.inference_mode():
            for module in self.after:
                if module not in self.norms or use == "own":
                    states = module(states)
                elif use == "no-beta":
                    bias = getattr(module, "bias", None)
                    states = module(states) - bias if isinstance(bias, torch.Tensor) else module(states)
        return states

    @contextmanager
    def held(self) -> Iterator[Head]:
        """Hold the head for the time of a block, whole if it is one slice."""
        self.shell.parts.load("outer")
        if len(self.slices) == 1:
            self._load(0, self.rows)
        try:
            yield self
        finally:
            self.shell.parts.drop("head")
            self.shell.parts.drop("outer")

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of normed states of shape (prompts, positions, width), with soft-caps and all."""
        return torch.cat([compute(states) for _, compute in self.sliced()], -1)

    def sliced(self) -> Iterator[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]:
        """Hold one slice of the head after the other; yield its first row, and what gives normed states' logits."""
        for start, stop in self.slices:
            if len(self.slices) > 1:
                self._load(start, stop)
            yield start, self._held_logits

    def _held_logits(self, states: torch.Tensor) -> torch.Tensor:
        left = _Left(last_hidden_state=states)
        stubs = {place: (self.skeleton.module(name), lambda *_, **__: left)
                 for place, name in enumerate(self.skeleton.path)}  # fmt: skip
        ids = torch.zeros(states.shape[:2], dtype=torch.int64)
        return self._computed(stubs, lambda: self.skeleton.model(input_ids=ids).logits)

    def whole(self, place: int, states: torch.Tensor, keep: Sequence[int]) -> torch.Tensor:
        """Return the logits at some positions by the model's whole forward, whose layers give a batch's last states."""
        given = arguments(self.skeleton, self.shell.batches[place])
        left = as_left(states, self.shell.recordings[place].width)
        stubs = {number: (layer, lambda *_, **__: left) for number, layer in enumerate(self.skeleton.layers)}
        kept = torch.tensor(list(keep))
        return torch.cat([self._computed(stubs, lambda: self._kept(given, kept)) for _ in self.sliced()], -1)

    def _kept(self, given: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
        if "logits_to_keep" in inspect.signature(self.skeleton.model.forward).parameters:
            found: torch.Tensor = self.skeleton.model(**given, logits_to_keep=kept).logits
            return found
        whole: torch.Tensor = self.skeleton.model(**given).logits
        return whole[:, kept]

    def _computed(
        self, stubs: dict[int, tuple[nn.Module, Callable[..., Any]]], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        exact = {-1: (self.module, self._in_float32)} if self.dtype != self.skeleton.dtype else {}
        with torch.inference_mode(), replaced({**stubs, **exact}):
            return compute()

    def _load(self, start: int, stop: int) -> None:
        for name in self._names():
            lazy = self._tensor(name)
            with silence():
                rows = read_rows(lazy, start, stop)
            set_parameter(self.module, name, aligned(rows.to(self.skeleton.dtype).to(self.dtype)))

    def _names(self) -> list[str]:
        return [name for name in ("weight", "bias") if self.module._parameters.get(name) is not None]

    def _tensor(self, name: str) -> LazyTensor:
        """Return a parameter of the head as it lies: its own, or the embedding where they are tied."""
        found = self.shell.parts.plain(f"{self.skeleton.head}.{name}")
        if found is None and name == "weight":
            found = self.shell.parts.plain(f"{self.skeleton.embedding}.weight")
        if found is None:
            raise RefusedError(f"{self.skeleton.head}.{name}: is made of several tensors, so it cannot be sliced.")
        return found

    def _in_float32(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states.float(), self.module.weight, self.module.bias)
