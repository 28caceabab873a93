"""What a config says of each layer, and how it says that of other layers.

A layer sequence makes output layer k of source layer `seq[k]`. A field is read as one value for each source
layer; the values are taken in the order of the sequence; and the field is written so that it reads as those.
Here are the fields that do that by the shape of their value: a list with an entry for each layer, a list of layer
numbers, a mapping. What follows a rule is in `rules`, and which keys are which in `known_fields` and `families`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tensorsurgeon.config import Config, extra_layers

Meaning = list[Any]
"""What a field says of each layer."""

REMOVED = object()
"""In edits, the value of a key that is taken out."""

Fill = Callable[[Config, int], Meaning]
"""What a model class makes of a config with a number of layers."""

Candidates = Callable[[Meaning, Config], Iterable[Config]]
"""Settings that may say what a meaning says."""


class InexpressibleError(Exception):
    """No value of a field says what it would have to say."""


class Positions(frozenset[int]):
    """The places of a layer's copies in the output: equal to the number of any of them."""

    def __eq__(self, other: object) -> bool:
        return other in self if isinstance(other, int) else super().__eq__(other)

    __hash__ = frozenset.__hash__


@dataclass(frozen=True)
class Field:
    """A way to say something of each layer.

    `read` takes a config and its number of layers, and gives None where the field says nothing. `write` takes
    what the field shall say, the config, and the number of layers that its present value is about; it gives the
    keys to edit, or raises InexpressibleError. A field that `points` names other layers by their numbers.
    """

    keys: tuple[str, ...]
    read: Callable[[Config, int], Meaning | None]
    write: Callable[[Meaning, Config, int], Config]
    points: bool = False

    def says_something(self, config: Config, count: int) -> bool:
        """Tell whether the config speaks of single layers in this field, even if in a way that cannot be read."""
        try:
            return self.read(config, count) is not None
        except InexpressibleError:
            return True


def lookup(config: Config, key: str) -> Any:
    """Return the value under a key such as `a` or `a.b`, or None."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def with_edits(config: Config, edits: Config) -> Config:
    """Return a config with values set or removed under keys such as `a` or `a.b`."""
    edited = dict(config)
    for key, value in edits.items():
        first, _, rest = key.partition(".")
        if rest:
            edited[first] = with_edits(edited[first], {rest: value})
        elif value is REMOVED:
            edited.pop(first, None)
        else:
            edited[first] = value
    return edited


def entries(value: Any, config: Config, count: int) -> list[Any]:
    """Return the entries for the layers of the stack: a list or a text has one for each, and for an MTP tail or not.

    Raises:
        InexpressibleError: for another length.
    """
    if not isinstance(value, list | tuple | str):
        raise InexpressibleError("it is not a list with an entry for each layer")
    if len(value) not in (count, count + extra_layers(config)):
        raise InexpressibleError(f"it has {len(value)} entries, not one for each of {count} layers")
    return list(value[:count])


def listed(key: str, always: bool = True) -> Field:
    """Return the field of a list, or a text, with one entry for each layer; entries of an MTP tail stay behind.

    One that is not `always` per layer says nothing of layers where it has another length.
    """

    def read(config: Config, count: int) -> Meaning | None:
        value = lookup(config, key)
        if not value or not (always or isinstance(value, list)):
            return None
        if not always and len(value) not in (count, count + extra_layers(config)):
            return None
        return entries(value, config, count)

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        value = lookup(config, key)
        tail = list(value[count:]) if isinstance(value, list | tuple | str) else []
        return {key: "".join(meaning + tail) if isinstance(value, str) else meaning + tail}

    return Field((key,), read, write)


def repeating(key: str) -> Field:
    """Return the field of a list that is repeated until there is an entry for each layer; a number is for all."""

    def read(config: Config, count: int) -> Meaning | None:
        value = lookup(config, key)
        return [value[layer % len(value)] for layer in range(count)] if isinstance(value, list) and value else None

    return Field((key,), read, lambda meaning, config, count: {key: meaning})


def indices(key: str, base: int = 0) -> Field:
    """Return the field of a list, or a text such as `3,4,5`, of the layers that something holds for."""

    def numbers(config: Config) -> list[int] | None:
        value = lookup(config, key)
        if value is None or value is False:
            return None
        if isinstance(value, str):
            value = [int(part) if part.strip().isdecimal() else None for part in value.split(",") if value]
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise InexpressibleError("it is not a list of layers")
        return value

    def read(config: Config, count: int) -> Meaning | None:
        found = numbers(config)
        return None if found is None else [layer + base in found for layer in range(count)]

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        tail = [number - count + len(meaning) for number in numbers(config) or () if number - base >= count]
        found = [place + base for place, held in enumerate(meaning) if held] + tail
        return {key: ",".join(map(str, found)) if isinstance(lookup(config, key), str) else found}

    return Field((key,), read, write)


def numbered(key: str) -> Field:
    """Return the field of a mapping from a layer's number, as a text such as `07`, to what holds for it."""

    def read(config: Config, count: int) -> Meaning | None:
        value = lookup(config, key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise InexpressibleError("it has no keys that are the numbers of layers")
        by_layer = {int(number): settings for number, settings in value.items() if str(number).isdecimal()}
        if len(by_layer) < len(value) or max(by_layer, default=0) >= count:
            raise InexpressibleError(f"it has keys that are not the numbers of {count} layers")
        return [by_layer.get(layer) for layer in range(count)]

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        width = max(map(len, lookup(config, key)), default=1)
        return {key: {f"{place:0{width}}": it for place, it in enumerate(meaning) if it is not None}}

    return Field((key,), read, write)


def runs(key: str, default: Any = None) -> Field:
    """Return the field of a list of `[[types], times]`, as GPT-Neo has it."""

    def read(config: Config, count: int) -> Meaning | None:
        value = lookup(config, key) or default
        if not value:
            return None
        try:
            types = [kind for kinds, times in value for _ in range(times) for kind in kinds]
        except (TypeError, ValueError):
            raise InexpressibleError("it is not a list of types and how often they occur") from None
        if len(types) != count:
            raise InexpressibleError(f"it describes {len(types)} layers, not {count}")
        return types

    return Field((key,), read, lambda meaning, config, count: {key: [[meaning, 1]]})


def pointers(key: str) -> Field:
    """Return the field of a list that names, for each layer, the one whose state it uses: itself or an earlier one."""
    written = listed(key)

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        found = []
        for place, positions in enumerate(meaning):
            earlier = [position for position in positions if position <= place]
            if not earlier:
                raise InexpressibleError("it names a layer that would no longer stand before the one that uses it")
            found.append(max(earlier))
        return written.write(found, config, count)

    return Field((key,), written.read, write, points=True)
