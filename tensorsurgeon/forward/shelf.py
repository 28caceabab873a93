"""Hidden states that are kept for later: in memory as long as they are few, and then in a file of this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch

from tensorsurgeon.format import Span
from tensorsurgeon.reading import read_span
from tensorsurgeon.running import running
from tensorsurgeon.scratch import Scratch

SHARE = 4
"""States take a quarter of the memory that there is, at most."""


class Shelf:
    """Tensors by a key each, of which a limited part is held in memory."""

    def __init__(self) -> None:
        self._room = running().memory // SHARE
        self._held: dict[Hashable, torch.Tensor] = {}
        self._filed: dict[Hashable, tuple[Span, torch.dtype, torch.Size]] = {}
        self._free: dict[int, list[Span]] = defaultdict(list)
        self._scratch = Scratch()

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a copy of a tensor."""
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._held[key] = tensor.clone()
        else:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            free = self._free.get(len(data))
            span = self._scratch.put(data, free.pop() if free else None)
            self._filed[key] = span, tensor.dtype, tensor.shape

    def drop(self, key: Hashable) -> None:
        """Let go of a tensor; its place in the file is for the next of its size."""
        if key in self._held:
            self._room += self._held.pop(key).nbytes
        else:
            span, _, _ = self._filed.pop(key)
            self._free[span.nbytes].append(span)

    def get(self, key: Hashable) -> torch.Tensor:
        """Return a tensor that was kept."""
        if key in self._held:
            return self._held[key]
        span, dtype, shape = self._filed[key]
        return torch.frombuffer(bytearray(read_span(span)), dtype=dtype).reshape(shape)
