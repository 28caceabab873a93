"""The logit lens: what the model would say next if its layers ended here.

The states after each layer go through the model's own final norm and head (nostalgebraist, 2020). The states of all
layers are kept, and the head is brought into memory once, after the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.forward.batches import make_batches
from tensorsurgeon.forward.head import Head, NormUse
from tensorsurgeon.forward.readings import Reading, read
from tensorsurgeon.forward.shelf import Shelf
from tensorsurgeon.forward.skeleton import Dtype
from tensorsurgeon.forward.stream import Stream
from tensorsurgeon.running import running

WORKING = 48
"""Bytes that reading a distribution takes for each token of the vocabulary: some copies in float64."""


class Seen(NamedTuple):
    """What is seen of some positions of a prompt at a depth, with the RMS, mean and deviation of their states."""

    prompt: int
    positions: range
    depth: int
    reading: Reading
    rms: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor


class Lens:
    """A model seen through the logit lens on some prompts, one at a time: results depend on nothing beside them.

    Raises:
        RefusedError: where the logits behind the last layer are not, to the bit, those of the model's own forward.
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        prompts: Sequence[Sequence[int]],
        dtype: Dtype = "float32",
        norm: NormUse = "own",
        exact: bool = True,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.norm = norm
        self.shelf = Shelf()
        self.stream = Stream(ckpt, make_batches(prompts), dtype)
        for depth, states in self.stream.walk():
            for prompt, it in enumerate(states):
                self.shelf.put((depth, prompt), it[0])
            advance(1)
        self.head = Head(self.stream, exact)

    def see(self, count: int, tracked: Sequence[Sequence[int]] = (), last_only: bool = False) -> Iterator[Seen]:
        """Yield what is seen of each prompt, at each depth, of a few positions at a time."""
        with self.head.held():
            for prompt, batch in enumerate(self.stream.batches):
                for positions in self._chunks(batch.ids.shape[1], last_only):
                    yield from self._see(prompt, positions, count, tracked)

    def _chunks(self, length: int, last_only: bool) -> Iterator[range]:
        if last_only:
            yield range(length - 1, length)
            return
        step = max(1, running().memory // 2 // (WORKING * self.head.rows))
        for start in range(0, length, step):
            yield range(start, min(start + step, length))

    def _see(self, prompt: int, positions: range, count: int, tracked: Sequence[Sequence[int]]) -> Iterator[Seen]:
        depth = self.stream.depth
        last = self.shelf.get((depth, prompt))[None]
        own = self.head.logits(self.head.normed(last)[:, positions.start : positions.stop])
        if not torch.equal(own, self.head.whole(prompt, last, positions)):
            kind = type(self.stream.skeleton.model).__name__
            raise RefusedError(f"{kind}: the lens behind the last layer does not give the logits of the model's own "
                               "forward, so nothing that it gives can be relied on.")  # fmt: skip
        final = own[0]
        for number in range(depth + 1):
            states = self.shelf.get((number, prompt))[None]
            if number == depth and self.norm == "own":
                logits = final
            else:
                normed = self.head.normed(states, self.norm)[:, positions.start : positions.stop]
                logits = self.head.logits(normed)[0]
            wide = states[0, positions.start : positions.stop].double()
            yield Seen(
                prompt,
                positions,
                number,
                read(logits, final, count, tracked),
                wide.square().mean(1).sqrt(),
                wide.mean(1),
                wide.std(1, correction=0),
            )

    def describe(self) -> dict[str, Any]:
        """Return the settings on which the numbers depend, beside the model and the prompts."""
        import transformers

        norms = self.head.norms
        return {
            "layers": self.stream.depth,
            "dtype": str(self.stream.skeleton.dtype).removeprefix("torch."),
            "head": str(self.head.dtype).removeprefix("torch."),
            "norm": ", ".join(type(it).__name__ for it in norms) or "none",
            "norm has beta": any(getattr(it, "bias", None) is not None for it in norms),
            "norm used": self.norm,
            "batch": 1,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "last layer": "bit for bit",
        }
