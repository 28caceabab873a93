"""The streamed forward pass: each layer is read, run on all batches, and dropped.

Memory is that of one layer, of the rows of the embedding that the prompts use, and of the states of all batches. The
layers are transformers' own, called with what the model's own code gives them, so the states are those of the whole
model in memory to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import CheckpointError, UsageError, raise_all
from tensorsurgeon.forward.batches import Batch
from tensorsurgeon.forward.memory import return_memory
from tensorsurgeon.forward.parts import Parts, as_tensor, set_parameter
from tensorsurgeon.forward.recording import Recording, record
from tensorsurgeon.forward.skeleton import Dtype, make_skeleton
from tensorsurgeon.ops.dequantization import as_plain
from tensorsurgeon.running import running

States = list[torch.Tensor]
"""Hidden states, (prompts, length, width), one tensor for each batch."""
RunLayer = Callable[[int, torch.Tensor], torch.Tensor]
"""Takes the number of a batch and its states before a layer, and returns those after it."""


class Stream:
    """A checkpoint that is run layer by layer on some batches.

    It may be a planned one: an operation's result, or quantised weights, which are decoded as they are read. `embedded`
    are the states before the first layer. A layer may be run on any states, and as often as one likes, while it is
    held: `layer` is for whoever runs layers in orders of his own, `walk` for all of them in theirs.

    Raises:
        UsageError: for prompts that are empty, or longer than the model's context.
        RefusedError: for a model that cannot be run so, by the name of its class.
        CheckpointError: for weights that are missing or have another shape.
    """

    def __init__(self, ckpt: Checkpoint, batches: Sequence[Batch], dtype: Dtype = "float32") -> None:
        return_memory()
        if running().threads:
            torch.set_num_threads(running().threads)
        plain = as_plain(ckpt, dtype)
        self.batches = list(batches)
        self.skeleton = make_skeleton(plain, dtype)
        raise_all(UsageError, self._length_problems())
        self.parts = Parts(plain, self.skeleton)
        self.parts.load("decoder")
        self._embed()
        with torch.inference_mode():
            self.recordings: list[Recording] = [record(self.skeleton, batch) for batch in self.batches]

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.skeleton.layers)

    @property
    def embedded(self) -> States:
        """The states before the first layer."""
        return [it.embedded for it in self.recordings]

    @contextmanager
    def layer(self, number: int) -> Iterator[RunLayer]:
        """Hold a layer in memory for the time of a block, and yield what runs it.

        Raises:
            CheckpointError: for states that are NaN or infinite after it, with the weights that are to blame.
        """
        module = self.skeleton.layers[number]

        def run(place: int, states: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                left = self.recordings[place].calls[number].on(module, states)
            self._require_finite(number, self.batches[place], left)
            return left

        with self.parts.loaded(number):
            self.parts.foresee(number + 1)
            yield run

    def walk(self, keep: Callable[[int], None] = lambda number: None) -> Iterator[tuple[int, States]]:
        """Run all layers in their order; yield how many were run, and the states, first those before any.

        `keep` is called with each layer's number once it was run, while it is still held.
        """
        states = self.embedded
        yield 0, states
        for number in range(self.depth):
            with self.layer(number) as run:
                states = [run(place, held) for place, held in enumerate(states)]
                keep(number)
            yield number + 1, states

    def _length_problems(self) -> Iterator[str]:
        most = getattr(self.skeleton.model.config.get_text_config(), "max_position_embeddings", None)
        lengths = [length for batch in self.batches for length in batch.mask.sum(1).tolist()]
        for number, length in enumerate(lengths, 1):
            if not length:
                yield f"prompt {number} has no tokens."
            elif isinstance(most, int) and 0 < most < length:
                yield f"prompt {number} has {length} tokens, and the model's context {most}; shorten it."
        size = self.skeleton.module(self.skeleton.embedding).num_embeddings
        largest = max((int(it.ids.max()) for it in self.batches if it.ids.numel()), default=0)
        if largest >= size:
            yield f"token {largest} is beyond the {size} rows of the embedding."

    def _embed(self) -> None:
        """Read the rows of the embedding that the batches use, and have the model look them up by their new places."""
        embedding: Any = self.skeleton.module(self.skeleton.embedding)
        lazy = self.parts.plain(f"{self.skeleton.embedding}.weight")
        if lazy is None:
            self.parts.load("embedding")
            return
        used = torch.unique(torch.cat([batch.ids.flatten() for batch in self.batches]))
        rows = torch.empty((len(used), *lazy.shape[1:]), dtype=self.skeleton.dtype)
        for place, number in enumerate(used.tolist()):
            rows[place] = as_tensor(lazy.read(number, number + 1))[0]
        set_parameter(embedding, "weight", rows)
        embedding.padding_idx = None
        own = embedding.forward

        def forward(ids: torch.Tensor) -> torch.Tensor:
            looked: torch.Tensor = own(torch.searchsorted(used, ids))
            return looked

        embedding.forward = forward

    def _require_finite(self, number: int, batch: Batch, states: torch.Tensor) -> None:
        # A sum is taken several times as fast as each number is asked, and is not finite where one of them is not.
        if bool(states.sum().isfinite()) or bool(torch.isfinite(states[batch.mask.bool()]).all()):
            return
        bad = self.parts.not_finite(number)
        reason = f"{', '.join(bad[:3])} {'holds' if len(bad) == 1 else 'hold'} some" if bad else (
            "its weights hold none; the numbers grow beyond the dtype")  # fmt: skip
        raise CheckpointError(f"layer {number}: its states are NaN or infinite: {reason}.")
