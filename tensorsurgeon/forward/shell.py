"""What a model is beside its layers: its class without weights, and what its own code makes of each batch.

Models of one config that differ in nothing but their layers share a shell: a class is made, and its forward recorded,
once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import UsageError, raise_all
from tensorsurgeon.forward.batches import Batch
from tensorsurgeon.forward.memory import return_memory
from tensorsurgeon.forward.parts import Parts, as_tensor, set_parameter
from tensorsurgeon.forward.recording import Recording, record
from tensorsurgeon.forward.skeleton import Dtype, make_skeleton
from tensorsurgeon.ops.dequantization import as_plain
from tensorsurgeon.running import running


class Shell:
    """A checkpoint as it is run on some batches, but for its layers.

    It may be a planned one: an operation's result, or quantised weights, which are decoded as they are read.

    Raises:
        UsageError: for prompts that are empty, or longer than the model's context.
        RefusedError: for a model that cannot be run layer by layer, by the name of its class.
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
