"""The streamed forward pass: each layer is read, run on all batches, and dropped.

Memory is that of one layer, of the rows of the embedding that the prompts use, and of the states of all batches. The
layers are transformers' own, called with what the model's own code gives them, so the states are those of the whole
model in memory to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.forward.batches import Batch
from tensorsurgeon.forward.shell import Shell

States = list[torch.Tensor]
"""Hidden states, (prompts, length, width), one tensor for each batch."""
RunLayer = Callable[[int, torch.Tensor], torch.Tensor]
"""Takes the number of a batch and its states before a layer, and returns those after it."""


class Stream(Shell):
    """A checkpoint that is run layer by layer on some batches.

    `embedded` are the states before the first layer. A layer may be run on any states, and as often as one likes, while
    it is held: `layer` is for whoever runs layers in orders of his own, `walk` for all of them in theirs.
    """

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

    def _require_finite(self, number: int, batch: Batch, states: torch.Tensor) -> None:
        # A sum is taken several times as fast as each number is asked, and is not finite where one of them is not.
        if bool(states.sum().isfinite()) or bool(torch.isfinite(states[batch.mask.bool()]).all()):
            return
        bad = self.parts.not_finite(number)
        reason = f"{', '.join(bad[:3])} {'holds' if len(bad) == 1 else 'hold'} some" if bad else (
            "its weights hold none; the numbers grow beyond the dtype")  # fmt: skip
        raise CheckpointError(f"layer {number}: its states are NaN or infinite: {reason}.")
