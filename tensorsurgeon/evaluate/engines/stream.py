"""The streamed forward pass as an engine: a model larger than the memory, read once for all that it is asked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tensorsurgeon.checkpoint import Checkpoint, open_checkpoint
from tensorsurgeon.errors import EngineError
from tensorsurgeon.evaluate.engine import Foreseen, Generation, Pictured, Prompt, Sampling, Scores, Settings
from tensorsurgeon.evaluate.measures import Logits
from tensorsurgeon.evaluate.streaming import Known, Streaming
from tensorsurgeon.forward.skeleton import make_skeleton
from tensorsurgeon.ops.dequantization import as_plain


class StreamEngine:
    """Runs a model with one layer of it in memory, on a processor; quantised weights are decoded as they are read.

    Each call reads the whole model, but for what was foreseen and so is known already.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reloads = False
        self._ckpt: Checkpoint | None = None
        self._known = Known()
        if settings.threads:
            torch.set_num_threads(settings.threads)

    def load(self, directory: Path, length: int, adapter: Path | None = None) -> None:
        """Take a model in place of any other; only its headers are read.

        Raises:
            EngineError: for an adapter.
            RefusedError: for a model whose layers need more than the states before them.
        """
        self.close()
        if adapter:
            raise EngineError(f"{adapter}: layers are streamed without adapters; put it on by 'merge-lora' before.")
        ckpt = open_checkpoint(directory)
        make_skeleton(as_plain(ckpt, self.settings.dtype), self.settings.dtype)
        self._ckpt = ckpt

    def know(self, ckpt: Checkpoint, known: Known) -> None:
        """Take a model, which may be a planned one, of which something is known already."""
        self._ckpt, self._known = ckpt, known

    def reload(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Refuse: there is no model in memory."""
        raise EngineError("stream: takes no other weights into a model; it reads them where they lie.")

    def foresee(self, foreseen: Foreseen) -> None:
        """Compute all that will be asked, in one pass over the model, or two, but for continuations.

        Raises:
            EngineError: for answers by chance, and for pictures.
        """
        for prompt, sampling in foreseen.continued:
            _require_greedy(sampling)
            _plain(prompt)
        found = self._compute(self._known.missing(foreseen))
        self._known.logits |= found.logits
        self._known.scores |= found.scores

    def generate(
        self, prompts: Sequence[Prompt | Pictured], sampling: Sampling, ends: Sequence[int]
    ) -> list[Generation]:
        """Continue prompts by the most probable token, all of them together: every token reads the whole model.

        Raises:
            EngineError: for answers by chance, and for pictures.
        """
        _require_greedy(sampling)
        started = time.perf_counter()
        given = [_plain(prompt) for prompt in prompts]
        made: list[list[int]] = [[] for _ in given]
        for _ in range(sampling.tokens):
            going = [(one, it) for one, it in zip(given, made, strict=True) if not it or it[-1] not in ends]
            if not going:
                break
            asked = [[*one, *it] for one, it in going]
            for (_, it), logits in zip(going, self._compute(Foreseen(asked)).next_logits(asked), strict=True):
                it.append(int(np.argmax(logits)))
        seconds = time.perf_counter() - started
        ended = [bool(it) and it[-1] in ends for it in made]
        return [Generation(tuple(it[:-1] if done else it), done, seconds) for it, done in zip(made, ended, strict=True)]

    def next_logits(self, prompts: Sequence[Prompt | Pictured]) -> Iterator[Logits]:
        """Yield the raw logits after each prompt."""
        given = [_plain(prompt) for prompt in prompts]
        self.foresee(Foreseen(given))
        return self._known.next_logits(given)

    def score(self, prompts: Sequence[Prompt]) -> list[Scores]:
        """Return log probabilities by a softmax in float64."""
        self.foresee(Foreseen(scores=prompts))
        return self._known.score(prompts)

    def describe(self) -> dict[str, Any]:
        """Return what a record has to say of this engine."""
        return described(self.settings)

    def close(self) -> None:
        """Let go of the model, and of what is known of it."""
        self._ckpt = None
        self._known = Known()

    def _compute(self, foreseen: Foreseen) -> Known:
        if not foreseen.logits and not foreseen.scores:
            return Known()
        assert self._ckpt
        ((_, known),) = Streaming([(self._ckpt, foreseen)], self.settings).answers(self._ckpt.sources[0].name)
        return known


def described(settings: Settings) -> dict[str, Any]:
    """Return what a record has to say of streamed answers."""
    return {
        "engine": "stream",
        "version": transformers.__version__,
        "torch": torch.__version__,
        "dtype": settings.dtype,
        "head": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "batch": settings.batch,
        "eager": True,
        "prefix_caching": False,
        "seed": settings.seed,
        "logits": "raw",
    }


def _require_greedy(sampling: Sampling) -> None:
    if sampling.temperature:
        raise EngineError("stream: gives no answers by chance; leave 'temperature' out, or name another engine.")


def _plain(prompt: Prompt | Pictured) -> Prompt:
    if isinstance(prompt, Pictured):
        raise EngineError(f"stream: shows no pictures ({prompt.picture.name}); ask with --engine transformers.")
    return prompt
