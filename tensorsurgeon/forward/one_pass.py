"""Many models run in one pass over their layers: deletions, repetitions, perturbations and whatever else is planned.

Each layer is read once and run for every model that has it there, on the states of what the models have in common. At
the end of a model's path its states at the positions that are wanted, behind the final norm, are kept, and become
logits when all layers are through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tensorsurgeon.forward.head import Head
from tensorsurgeon.forward.paths import Node, Paths, Prompt, Wanted
from tensorsurgeon.forward.schedule import make_schedule
from tensorsurgeon.forward.shelf import SHARE, Shelf
from tensorsurgeon.forward.skeleton import Dtype
from tensorsurgeon.progress import Advance
from tensorsurgeon.running import running

SCORING = 24
"""Bytes that scoring a position takes for each token of the vocabulary: the logits, and copies of them in float64."""


class Scored(NamedTuple):
    """Of every token of a prompt but the first its log probability, and whether no other is more probable."""

    logprobs: npt.NDArray[np.float64]
    greedy: npt.NDArray[np.bool_]


class Answered(NamedTuple):
    """What a model gives: the logits after prompts, and the scores of prompts."""

    logits: dict[Prompt, npt.NDArray[np.float32]]
    scores: dict[Prompt, Scored]


class Costs(NamedTuple):
    """What running models together takes: passes over the layers, layers read, runs of a layer on a batch, and states.

    `naive` and `naive_layers` are the runs and the layers read that the models take one by one, `peak` the most bytes
    that states take at a time, and `filed` those of them that lie on disk.
    """

    models: int
    passes: int
    layers: int
    naive_layers: int
    calls: int
    naive: int
    peak: int
    filed: int


class OnePass:
    """Models that are to be run together on the prompts that each is asked.

    Raises:
        UsageError: for prompts that are empty, or longer than a model's context.
        RefusedError: for a model that cannot be run layer by layer.
        CheckpointError: for weights that are missing or have another shape.
    """

    def __init__(self, wanted: Sequence[Wanted], dtype: Dtype = "float32", batch: int = 1) -> None:
        self.shelf = Shelf()
        self.paths = Paths(wanted, dtype, batch, self.shelf)
        self._of = {model: kin for kin in self.paths.kin.values() for model in kin.models}
        self.schedule = make_schedule(self.paths, {model: self._kept(model) for model in self._of})

    @property
    def costs(self) -> Costs:
        """What it takes."""
        schedule = self.schedule
        return Costs(
            len(self._of),
            len(schedule.passes),
            len(schedule.holds),
            sum(kin.shell.depth for kin in self._of.values()),
            schedule.calls,
            self.paths.naive,
            schedule.peak,
            max(0, schedule.peak - running().memory // SHARE),
        )

    def run(self, advance: Advance = lambda count: None) -> None:
        """Run all layers; `advance` is told of each run of one on a batch."""
        left = {node: len(node.children) for node in (*self.paths.roots.values(), *self.paths.nodes)}
        holds = self.schedule.holds
        for place, (identity, nodes) in enumerate(holds):
            shell, parts, number = self.paths.layers[identity]
            with parts.loaded(number):
                for after in holds[place + 1 : place + 2]:
                    following = self.paths.layers[after.identity]
                    following.parts.foresee(following.number)
                module = shell.skeleton.layers[number]
                for node in nodes:
                    assert node.parent
                    for batch in sorted(node.needed):
                        with torch.inference_mode():
                            states = self.shelf.get((node.parent, batch))
                            states = shell.recordings[batch].calls[number].on(module, states)
                        self._keep(node, batch, states)
                        advance(1)
                    left[node.parent] -= 1
                    if not left[node.parent]:
                        for batch in node.parent.needed:
                            self.shelf.drop((node.parent, batch))

    def answers(self, scores: bool = True) -> Iterator[tuple[int, Answered]]:
        """Yield each model by its number, and what it answers, with `scores` or without.

        A head is held for all models that share it, the first model's first.
        """
        for kin in self.paths.kin.values():
            with kin.head.held():
                for model in kin.models:
                    with torch.inference_mode():
                        answered = self._answer(model, kin.head, scores)
                    yield model, answered

    def _keep(self, node: Node, batch: int, states: torch.Tensor) -> None:
        if node.children:
            self.shelf.put((node, batch), states)
        for kin in dict.fromkeys(self._of[it] for it in node.ends):
            normed = kin.head.normed(states)
            for model in node.ends:
                if self._of[model] is kin:
                    self._keep_end(model, batch, normed)

    def _keep_end(self, model: int, batch: int, normed: torch.Tensor) -> None:
        wanted, size = self.paths.wanted[model], len(self.paths.batches[0].ids)
        prompts = self.paths.prompts[batch * size : batch * size + len(normed)]
        for row, prompt in enumerate(prompts):
            own = normed[row : row + 1, normed.shape[1] - len(prompt) :]
            if prompt in wanted.whole:
                self.shelf.put((model, prompt), own)
            elif prompt in wanted.last:
                self.shelf.put((model, prompt), own[:, -1:])

    def _kept(self, model: int) -> int:
        """Return how many bytes are kept of a model."""
        root = self.paths.roots[self._of[model].begins]
        wanted, total = self.paths.wanted[model], 0
        for prompt in wanted.prompts:
            place = self.paths.places[prompt][0]
            each = root.sizes[place] // self.paths.batches[place].ids.numel()
            total += each * (len(prompt) if prompt in wanted.whole else 1)
        return total

    def _answer(self, model: int, head: Head, scored: bool) -> Answered:
        wanted = self.paths.wanted[model]
        states = {prompt: self.shelf.get((model, prompt)) for prompt in wanted.prompts}
        logits: dict[Prompt, list[torch.Tensor]] = {prompt: [] for prompt in wanted.last}
        scores = {prompt: Scoring(prompt) for prompt in wanted.whole if scored}
        for first, compute in head.sliced():
            for prompt, parts in logits.items():
                parts.append(compute(states[prompt][:, -1:])[0, 0].float())
            for prompt, scoring in scores.items():
                step = max(1, running().memory // SHARE // (SCORING * head.rows // len(head.slices)))
                for start in range(0, len(prompt), step):
                    scoring.add(first, start, compute(states[prompt][:, start : start + step])[0])
        return Answered(
            {prompt: torch.cat(parts).numpy() for prompt, parts in logits.items()},
            {prompt: it.scored() for prompt, it in scores.items()},
        )


class Scoring:
    """A prompt that is scored, by a softmax in float64, as the logits of some positions and tokens come."""

    def __init__(self, prompt: Prompt) -> None:
        self.given = torch.tensor(prompt[1:])
        size = len(prompt) - 1
        self.sums, self.most = (torch.full((size,), -torch.inf, dtype=torch.float64) for _ in range(2))
        self.chosen = torch.full((size,), torch.nan, dtype=torch.float64)

    def add(self, first: int, start: int, logits: torch.Tensor) -> None:
        """Take logits of the tokens from `first` on, at the positions from `start` on."""
        at = slice(start, min(start + len(logits), len(self.given)))
        wide = logits[: at.stop - at.start].float().double()
        if not len(wide):
            return
        sums = wide.logsumexp(1)
        self.sums[at] = torch.logaddexp(self.sums[at], sums) if first else sums
        self.most[at] = torch.maximum(self.most[at], wide.max(1).values)
        own = self.given[at] - first
        here = (own >= 0) & (own < wide.shape[1])
        chosen = wide.gather(1, own.clamp(0, wide.shape[1] - 1)[:, None])[:, 0]
        self.chosen[at] = torch.where(here, chosen, self.chosen[at])

    def scored(self) -> Scored:
        """Return the scores."""
        return Scored((self.chosen - self.sums).numpy(), (self.chosen >= self.most).numpy())
