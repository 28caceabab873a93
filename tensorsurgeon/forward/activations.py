"""What layers leave behind on prompts: the residual stream, or what attention or MLP write, as arrays in float32."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.format import header_bytes
from tensorsurgeon.forward.batches import make_batches
from tensorsurgeon.forward.sites import Site, listening, require_site
from tensorsurgeon.forward.skeleton import Dtype
from tensorsurgeon.forward.stream import Stream
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.running import running

Position = Literal["last", "all", "mean"]
Numbers = npt.NDArray[np.float32]


class Activations:
    """What is taken of a model on prompts, at a site and a position of each."""

    def __init__(
        self,
        ckpt: Checkpoint,
        prompts: Sequence[Sequence[int]],
        site: Site = "residual",
        position: Position = "last",
        batch: int = 1,
        dtype: Dtype = "float32",
    ) -> None:
        self.stream = Stream(ckpt, make_batches(prompts, batch), dtype)
        self.site, self.position = site, position

    def collect(self, layers: Sequence[int] | None = None) -> dict[int, list[torch.Tensor]]:
        """Return for each layer what is taken of each prompt, (samples, width) each; no layer is run in vain."""
        modules = self.stream.skeleton.layers
        wanted = sorted(set(range(self.stream.depth) if layers is None else layers))
        require_site({it: modules[it] for it in wanted}, self.site, type(self.stream.skeleton.model).__name__)
        found: dict[int, list[torch.Tensor]] = {}
        states = self.stream.embedded
        with progress_bar(max(wanted) + 1, "collect", running().quiet, "layer") as advance:
            for number in range(max(wanted) + 1):
                heard: list[torch.Tensor] = []
                with self.stream.layer(number) as run, listening(modules[number], self.site, heard):
                    states = [run(place, it) for place, it in enumerate(states)]
                if number in wanted:
                    found[number] = list(self._taken(heard or states))
                advance(1)
        return found

    def _taken(self, states: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for batch, held in zip(self.stream.batches, states, strict=True):
            for row in batch.rows(held.float()):
                if self.position == "last":
                    yield row[-1:].clone()
                else:
                    yield row.clone() if self.position == "all" else row.mean(0, keepdim=True)


def joined(rows: Sequence[torch.Tensor]) -> Numbers:
    """Return samples of several prompts as one array."""
    return np.asarray(torch.cat(list(rows)).numpy(), np.float32)


def as_file(arrays: Mapping[str, Numbers], told: Mapping[str, str], suffix: str) -> bytes:
    """Return arrays as a file of safetensors, with what is told of them, or as `.npz`."""
    if suffix == ".npz":
        content = io.BytesIO()
        plain: Mapping[str, Any] = arrays
        np.savez(content, **plain)
        return content.getvalue()
    described = {name: ("F32", array.shape) for name, array in arrays.items()}
    return header_bytes(described, told) + b"".join(array.tobytes() for array in arrays.values())
