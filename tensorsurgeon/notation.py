"""The notation for a sequence of layers, one everywhere.

`0-7,12,9` are source layers in output order, ranges inclusive as people read page ranges; `51-36` counts down;
`0-63/2` takes every second; `32*5` a layer five times; `(8-15)*2` a block twice; `base:0-31,instruct:32-63`
takes layers from named models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from tensorsurgeon.errors import UsageError

LayerSequence = tuple[int, ...]
"""Source layers in output order."""

LONGEST_SEQUENCE = 100_000
"""More layers than any model has; a slip such as `0-9*1000000` must not fill the memory."""

DEEPEST_NESTING = 50


class NamedLayer(NamedTuple):
    """A layer of a named model; the name is empty where the notation gives none."""

    model: str
    layer: int


def parse_layers(text: str | int | Sequence[int]) -> LayerSequence:
    """Parse the notation for a sequence of layers.

    `sequence = item {"," item}`, `item = [model ":"] unit ["*" times]`, `unit = "(" sequence ")" | number
    ["-" number ["/" step]]`. A number, or a sequence of numbers, stands for itself.

    Raises:
        UsageError: with the place in the text that was not understood.
    """
    if isinstance(text, str):
        return tuple(layer for _, layer in _SequenceParser(text, named=False).parse())
    layers = (text,) if isinstance(text, int) else tuple(text)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise UsageError(f"layers: {layer!r} is not a layer; layers are whole numbers from 0.")
    return layers


def parse_named_layers(text: str | int | Sequence[int]) -> tuple[NamedLayer, ...]:
    """Parse the notation for a sequence of layers in which models may be named.

    Raises:
        UsageError: with the place in the text that was not understood.
    """
    if isinstance(text, str):
        return tuple(_SequenceParser(text, named=True).parse())
    if isinstance(text, Sequence) and all(isinstance(item, NamedLayer) for item in text):
        return tuple(text)  # type: ignore[arg-type]
    return tuple(NamedLayer("", layer) for layer in parse_layers(text))


def format_named_layers(layers: Iterable[NamedLayer]) -> str:
    """Return the notation of a sequence of layers from named models: `base:0-15,instruct:8-31`."""
    blocks = groupby(layers, key=lambda item: item.model)
    parts = [(model, format_layers(layer for _, layer in block)) for model, block in blocks]
    return ",".join(f"{model}:{part}" if model else part for model, text in parts for part in text.split(","))


def format_layers(layers: Iterable[int]) -> str:
    """Return the notation of a sequence, runs of neighbours as ranges: `0-3,7,6-4`."""
    parts = []
    for first, last in _runs(layers):
        parts.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(parts)


def _runs(layers: Iterable[int]) -> Iterator[tuple[int, int]]:
    run: list[int] = []
    for layer in layers:
        step = run[1] - run[0] if len(run) > 1 else layer - run[0] if run and abs(layer - run[0]) == 1 else None
        if run and (step is None or layer != run[-1] + step):
            yield run[0], run[-1]
            run = []
        run.append(layer)
    if run:
        yield run[0], run[-1]


class _SequenceParser:
    """A recursive-descent parser that remembers where it is, so that an error can point there."""

    def __init__(self, text: str, named: bool) -> None:
        self.text = text
        self.named = named
        self.model = ""
        self.position = 0
        self.depth = 0

    def parse(self) -> list[NamedLayer]:
        layers = self._sequence()
        if self.position < len(self.text):
            raise self._error("expected a comma or the end")
        return layers

    def _sequence(self) -> list[NamedLayer]:
        layers = self._item()
        while self._take(","):
            layers += self._item()
            if len(layers) > LONGEST_SEQUENCE:
                raise self._error(f"more than {LONGEST_SEQUENCE} layers")
        return layers

    def _item(self) -> list[NamedLayer]:
        outer = self.model
        self.model = self._name() or outer
        unit = self._unit()
        self.model = outer
        if self._take("*"):
            times = self._number("how many times", least=1)
            if len(unit) * times > LONGEST_SEQUENCE:
                raise self._error(f"more than {LONGEST_SEQUENCE} layers")
            unit = unit * times
        return unit

    def _name(self) -> str:
        self._skip_spaces()
        match = re.compile(r"([A-Za-z_][\w.-]*) *:").match(self.text, self.position)
        if match and not self.named:
            raise self._error(f"layers of another model ({match[1]}) are for 'stitch'; expected a layer number")
        self.position = match.end() if match else self.position
        return match[1] if match else ""

    def _unit(self) -> list[NamedLayer]:
        if self._take("("):
            self.depth += 1
            if self.depth > DEEPEST_NESTING:
                raise self._error(f"more than {DEEPEST_NESTING} brackets inside each other")
            unit = self._sequence()
            if not self._take(")"):
                raise self._error("expected a closing bracket")
            self.depth -= 1
            return unit
        first = self._number("a layer number")
        if not self._take("-"):
            return [NamedLayer(self.model, first)]
        last = self._number("the last layer of the range")
        step = self._number("a step", least=1) if self._take("/") else 1
        if abs(last - first) >= LONGEST_SEQUENCE:
            raise self._error(f"more than {LONGEST_SEQUENCE} layers")
        layers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [NamedLayer(self.model, layer) for layer in layers]

    def _number(self, what: str, least: int = 0) -> int:
        self._skip_spaces()
        match = re.compile(r"[0-9]{1,9}(?![0-9])").match(self.text, self.position)
        if not match or int(match[0]) < least:
            raise self._error(f"expected {what}" + (f", {least} or more" if least else ""))
        self.position = match.end()
        return int(match[0])

    def _take(self, symbol: str) -> bool:
        self._skip_spaces()
        found = self.text.startswith(symbol, self.position)
        self.position += found
        self._skip_spaces()
        return found

    def _skip_spaces(self) -> None:
        while self.text.startswith(" ", self.position):
            self.position += 1

    def _error(self, what: str) -> UsageError:
        return UsageError(
            f"layers: {what} at character {self.position + 1}, for example 0-7,12,51-36,0-63/2,32*5,(8-15)*2.\n"
            f"    {self.text}\n    {' ' * self.position}^"
        )
