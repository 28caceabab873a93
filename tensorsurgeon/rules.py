"""Fields that follow a rule: settings from which a model class makes something of each layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from tensorsurgeon.config import Config
from tensorsurgeon.fields import (
    REMOVED,
    Candidates,
    Field,
    Fill,
    InexpressibleError,
    Meaning,
    listed,
    lookup,
    with_edits,
)


def _makes(fill: Fill, config: Config, meaning: Meaning) -> bool:
    try:
        return fill(config, len(meaning)) == meaning
    except InexpressibleError:
        return False


def searched(keys: Sequence[str], fill: Fill, candidates: Candidates, points: bool = False) -> Field:
    """Return the field of settings from which a model class makes something of each layer, by rule `fill`.

    There is no list to write: the first of the candidates that make what is wanted is taken.
    """

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        for settings in ({}, *candidates(meaning, config)):
            if _makes(fill, with_edits(config, settings), meaning):
                return {key: value for key, value in settings.items() if lookup(config, key) != value}
        raise InexpressibleError("no value says what it would have to say")

    return Field(tuple(keys), fill, write, points)


def implied(
    key: str,
    fill: Fill,
    keys: Sequence[str] = (),
    candidates: Candidates = lambda meaning, config: (),
    explicit: Callable[[Meaning], Meaning] = list,
    stale: Candidates = lambda meaning, config: (),
) -> Field:
    """Return the field of a list that a model class makes by rule `fill` where the config leaves it out.

    The rule's own settings, `keys`, are kept where they make the list, else set to the first of the candidates
    that do, else to the first that is `stale`, else removed: a reader that knows only them is not misled.
    `explicit` is what the class makes of a list that is there.
    """
    written = listed(key)

    def read(config: Config, count: int) -> Meaning | None:
        found = written.read(config, count)
        return fill(config, count) if found is None else explicit(found)

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        rest = {name: value for name, value in config.items() if name != key}
        present = [name for name in keys if lookup(config, name) is not None]
        edits: dict[str, Any] = {}
        for settings in ({}, *(candidates(meaning, config) if present else ())):
            if _makes(fill, with_edits(rest, settings), meaning):
                edits = {name: value for name, value in settings.items() if name in present}
                break
        else:
            outdated = next(iter(stale(meaning, config)), {}) if present else {}
            edits = {**dict.fromkeys(present, REMOVED), **outdated}
        if not lookup(config, key) and _makes(fill, with_edits(rest, edits), meaning):
            return edits
        return {**edits, **written.write(meaning, config, count)}

    return Field((key, *keys), read, write)


def counted(key: str, default: int, hit: Any, rest: Any) -> Fill:
    """Return the rule by which the first layers, as many as a key says, are `hit` and the others `rest`."""
    return lambda config, count: [hit if layer < number(config, key, default) else rest for layer in range(count)]


def checked_count(key: str) -> Fill:
    """Return the rule by which something holds for the first layers, as many as a key says."""

    def fill(config: Config, count: int) -> Meaning:
        if lookup(config, key) and type(lookup(config, key)) is not int:
            raise InexpressibleError("it is not a number of layers")
        return counted(key, 0, True, False)(config, count)

    return fill


def windows(config: Config, count: int) -> Meaning:
    """Return which layers slide by the rule of Qwen2: from layer `max_window_layers` on, if any do."""
    first = number(config, "max_window_layers", count) if config.get("use_sliding_window") else count
    return [layer >= first for layer in range(count)]


def counts(key: str, hit: Any) -> Candidates:
    """Return the candidates of a number of first layers."""
    return lambda meaning, config: [{key: meaning.count(hit)}]


def periods(key: str) -> Candidates:
    """Return the candidates of a period: those by which the meaning repeats itself."""
    return lambda meaning, config: (
        {key: size, f"_{key}": size}
        for size in range(1, len(meaning) + 2)
        if all(map(operator.eq, meaning, meaning[size:]))
    )


def number(config: Config, key: str, default: int) -> int:
    """Return a whole number of a config, or the default of the class."""
    value = lookup(config, key)
    return default if type(value) is not int else value


def as_is(key: str) -> Field:
    """Return the field of a period whose explicit form nobody knows: it must hold as it stands, unless a list."""
    entries = listed(key)

    def read(config: Config, count: int) -> Meaning | None:
        period = lookup(config, key)
        if type(period) is int:
            return [layer % period for layer in range(count)] if period > 1 else None
        if isinstance(period, str):
            raise InexpressibleError("it is neither a period nor a list")
        return entries.read(config, count)

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        if type(lookup(config, key)) is not int:
            return entries.write(meaning, config, count)
        if read(config, len(meaning)) == meaning:
            return {}
        raise InexpressibleError("it is a period that counts layers from the first, and no list can take its place")

    return Field((key,), read, write)


def place(key: str, from_the_first: bool = False) -> Field:
    """Return the field of a setting that ties layers to their places: only the identity leaves it as it is.

    Where it counts `from_the_first` layer and knows no last one, so do any first layers in their order.
    """

    def read(config: Config, count: int) -> Meaning | None:
        return list(range(count)) if lookup(config, key) else None

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        if meaning == list(range(len(meaning) if from_the_first else count)):
            return {}
        raise InexpressibleError("it ties layers to their places")

    return Field((key,), read, write)
