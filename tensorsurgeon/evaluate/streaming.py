"""Models run together, streamed, on all that each will be asked, and the answers handed out afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import DestinationError
from tensorsurgeon.evaluate.engine import Foreseen, Prompt, Scores, Settings
from tensorsurgeon.evaluate.measures import Logits
from tensorsurgeon.forward.one_pass import Answered, Costs, OnePass
from tensorsurgeon.forward.paths import Wanted
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.running import running
from tensorsurgeon.sizes import format_size

Tokens = tuple[int, ...]


class Known:
    """What is known of a model: the logits after some prompts, and the scores of some."""

    def __init__(self) -> None:
        self.logits: dict[Tokens, Logits] = {}
        self.scores: dict[Tokens, Scores] = {}

    def missing(self, foreseen: Foreseen) -> Foreseen:
        """Return what is asked and not known."""
        return foreseen._replace(
            logits=[it for it in foreseen.logits if tuple(it) not in self.logits],
            scores=[it for it in foreseen.scores if tuple(it) not in self.scores],
        )

    def next_logits(self, prompts: Sequence[Prompt]) -> Iterator[Logits]:
        """Yield the logits after each prompt."""
        return (self.logits[tuple(prompt)] for prompt in prompts)

    def score(self, prompts: Sequence[Prompt]) -> list[Scores]:
        """Return the scores of each prompt."""
        return [self.scores[tuple(prompt)] for prompt in prompts]


class Streaming:
    """Some models, each with what will be asked of it.

    They are run together; where scores are wanted because of what the first run gave, there is a second one.
    """

    def __init__(self, models: Sequence[tuple[Checkpoint, Foreseen]], settings: Settings) -> None:
        self.models, self.settings = list(models), settings
        asked = [(_all(foreseen.logits), _all(foreseen.scores)) for _, foreseen in self.models]
        self.first = self._plan(asked) if any(map(any, asked)) else None
        self.costs: list[Costs] = [self.first.costs] if self.first else []

    def answers(self, label: str) -> Iterator[tuple[int, Known]]:
        """Run the models, and yield each by its number with what is known of it then.

        Raises:
            DestinationError: where the disk has no room for the states that do not fit into the memory.
        """
        if self.first is None:
            yield from ((number, Known()) for number in range(len(self.models)))
            return
        self._run(self.first, label)
        scored: dict[int, dict[Tokens, Scores]] = {}
        if any(foreseen.following for _, foreseen in self.models):
            more = {}
            for number, answered in self.first.answers():
                scored[number] = _scores(answered)
                following = self.models[number][1].following
                if following:
                    found = [it for prompt, logits in answered.logits.items() for it in following(prompt, logits)]
                    more[number] = _all(found) - scored[number].keys()
            asked = [number for number, prompts in sorted(more.items()) if prompts]
            if asked:
                second = self._plan([(frozenset(), more[number]) for number in asked], asked)
                self._run(second, f"{label}: spellings")
                self.costs.append(second.costs)
                for place, answered in second.answers():
                    scored[asked[place]] |= _scores(answered)
        for number, answered in self.first.answers(scores=not scored):
            known = Known()
            known.logits = answered.logits
            known.scores = scored[number] if scored else _scores(answered)
            yield number, known

    def _plan(self, asked: Sequence[tuple[frozenset[Tokens], frozenset[Tokens]]], of: Sequence[int] = ()) -> OnePass:
        models = [self.models[number][0] for number in of or range(len(self.models))]
        wanted = [Wanted(ckpt, *prompts) for ckpt, prompts in zip(models, asked, strict=True)]
        return OnePass(wanted, self.settings.dtype, self.settings.batch)

    def _run(self, planned: OnePass, label: str) -> None:
        costs, place = planned.costs, tempfile.gettempdir()
        free = shutil.disk_usage(place).free
        if costs.filed > free:
            raise DestinationError(
                f"states take up to {format_size(costs.peak)}, of which {format_size(costs.filed)} do not fit into "
                f"--memory, and free in {place} are {format_size(free)}; give more memory, or set TMPDIR."
            )
        with progress_bar(costs.calls, label, running().quiet, "layer") as advance:
            planned.run(advance)


def _scores(answered: Answered) -> dict[Tokens, Scores]:
    return {prompt: Scores(*it) for prompt, it in answered.scores.items()}


def _all(prompts: Sequence[Prompt]) -> frozenset[Tokens]:
    return frozenset(map(tuple, prompts))
