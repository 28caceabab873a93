"""The nearest sequence of layers that is possible, for the message that refuses one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

Layer = tuple[int, int]
"""A model's place among the models, and a layer of it."""

MOST_TRIES = 4000
"""How many sequences are tried: enough for two changes to a small model and for one to a large one."""


def nearest_origins(
    origins: Sequence[Layer], counts: Sequence[int], possible: Callable[[tuple[Layer, ...]], bool]
) -> tuple[Layer, ...] | None:
    """Return a sequence near `origins` for which `possible` holds, or None where none was found.

    Tried are, in this order: one layer less, more or exchanged; the first few layers kept first; a stretch of
    missing or repeated layers made longer or shorter at both ends; the layers in ascending order; two layers less,
    more or exchanged.
    """
    tried = {tuple(origins)}
    for candidate in islice(_candidates(tuple(origins), counts), MOST_TRIES):
        if candidate and candidate not in tried:
            tried.add(candidate)
            if possible(candidate):
                return candidate
    return None


def _candidates(origins: tuple[Layer, ...], counts: Sequence[int]) -> Iterator[tuple[Layer, ...]]:
    yield from _changed_once(origins, counts)
    for count in range(1, 9):
        first = [(0, layer) for layer in range(min(count, counts[0]))]
        yield (*first, *(layer for layer in origins if layer not in first))
    yield from _stretched(origins, counts)
    yield tuple(sorted(origins))
    yield tuple(sorted(set(origins)))
    for once in _changed_once(origins, counts):
        yield from _changed_once(once, counts)


def _changed_once(origins: tuple[Layer, ...], counts: Sequence[int]) -> Iterator[tuple[Layer, ...]]:
    for place, (model, layer) in enumerate(origins):
        before, after = origins[:place], origins[place + 1 :]
        yield before + after
        for other in (layer - 1, layer + 1):
            if 0 <= other < counts[model]:
                yield (*before, (model, other), *after)
                yield (*before, *sorted([(model, layer), (model, other)]), *after)
        yield (*before, (model, layer), (model, layer), *after)


def _stretched(origins: tuple[Layer, ...], counts: Sequence[int]) -> Iterator[tuple[Layer, ...]]:
    """Yield the sequence with each of its joints, where layers do not follow each other, moved or widened."""
    joints = [
        place
        for place in range(1, len(origins))
        if origins[place] != (origins[place - 1][0], origins[place - 1][1] + 1)
    ]
    reach = 12
    for joint in joints:
        before, after = origins[:joint], origins[joint:]
        for less in range(reach):
            for more in range(reach):
                if less < len(before) and more < len(after):
                    yield before[: len(before) - less] + after[more:]
                head = [(before[-1][0], before[-1][1] + step) for step in range(1, less + 1)]
                if more < len(after) and all(layer < counts[model] for model, layer in head):
                    yield (*before, *head, *after[more:])
                tail = [(after[0][0], after[0][1] - step) for step in range(more, 0, -1)]
                if less < len(before) and all(layer >= 0 for _, layer in tail):
                    yield (*before[: len(before) - less], *tail, *after)
    for end in range(1, reach):
        last = origins[-1][1]
        if last + end < counts[origins[-1][0]]:
            yield (*origins, *((origins[-1][0], last + step) for step in range(1, end + 1)))
        if end < len(origins):
            yield origins[:-end]
            yield origins[end:]
