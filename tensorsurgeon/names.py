"""Tensor names: globs, the decoder layers in them, and the notation for a sequence of layers.

Layer sequences, one notation everywhere: `0-7,12,9` are source layers in output order, ranges inclusive as
people read page ranges; `51-36` counts down; `0-63/2` takes every second; `32*5` a layer five times;
`(8-15)*2` a block twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

from tensorsurgeon.errors import CheckpointError, UsageError

LayerSequence = tuple[int, ...]
"""Source layers in output order."""

LONGEST_SEQUENCE = 100_000
"""More layers than any model has; a slip such as `0-9*1000000` must not fill the memory."""

DEEPEST_NESTING = 50

_LAYER = re.compile(
    r"^(?P<prefix>(?:.*?\.)?(?:layers|layer|h|blocks|block)\.)(?P<index>0|[1-9][0-9]{0,5})\.(?P<rest>.+)$"
)
_NOT_THE_STACK = re.compile(r"vision|visual|audio|image|speech|qformer|perceiver|talker|code2wav|(^|\.)mtp")


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that the glob matches; `*` crosses dots, and a comma separates alternatives."""
    alternatives = re.compile("|".join(translate(part.strip()) for part in pattern.split(",")))
    return [name for name in names if alternatives.match(name)]


@dataclass(frozen=True)
class LayerName:
    """A tensor name taken apart: `prefix` + `index` + `.` + `rest`."""

    prefix: str
    index: int
    rest: str


def layer_name(name: str) -> LayerName | None:
    """Take a name apart at its first numbered layer; experts and blocks inside a layer do not count."""
    match = _LAYER.match(name)
    return LayerName(match["prefix"], int(match["index"]), match["rest"]) if match else None


@dataclass(frozen=True)
class LayerStack:
    """The decoder layers of a model: `count` of them, named `prefix` + index.

    `extra` layers follow the stack under the next indices: the multi-token prediction layers of DeepSeek-V3
    and its kin.
    """

    prefix: str
    count: int
    extra: int = 0

    def layer_of(self, name: str) -> int | None:
        """Return the layer that the tensor `name` belongs to, or None for a tensor outside the stack."""
        found = layer_name(name)
        return found.index if found and found.prefix == self.prefix else None

    def renamed(self, name: str, index: int) -> str:
        """Return `name`, a tensor of the stack, as a tensor of layer `index`."""
        found = layer_name(name)
        assert found
        return f"{self.prefix}{index}.{found.rest}"

    def check(self, layers: Iterable[int]) -> None:
        """Raise UsageError for a layer that the stack does not have."""
        beyond = sorted({layer for layer in layers if not 0 <= layer < self.count})
        if beyond:
            raise UsageError(
                f"layers: there is no layer {', '.join(map(str, beyond))}; "
                f"the model has {self.count} layers, 0 to {self.count - 1}."
            )

    def without(self, layers: Iterable[int]) -> LayerSequence:
        """Return the sequence of all layers but `layers`."""
        gone = set(layers)
        self.check(gone)
        return tuple(layer for layer in range(self.count) if layer not in gone)


def layer_stacks(names: Iterable[str]) -> Mapping[str, set[int]]:
    """Return every prefix under which layers are numbered, the indices found there, towers and MTP left out."""
    stacks: dict[str, set[int]] = {}
    for name in names:
        found = layer_name(name)
        if found and not _NOT_THE_STACK.search(found.prefix):
            stacks.setdefault(found.prefix, set()).add(found.index)
    return stacks


def find_stack(names: Iterable[str], count: int | None = None, extra: int = 0) -> LayerStack:
    """Find the stack of decoder layers among tensor names.

    `count` is what the config says, or None where it does not say; `extra` is the number of multi-token
    prediction layers that may follow the stack under the next indices.

    Raises:
        CheckpointError: for no stack, more than one, gaps in its numbers, or another count than the config's.
    """
    stacks = layer_stacks(names)
    fitting = {prefix: found for prefix, found in stacks.items() if count and max(found) + 1 in (count, count + extra)}
    chosen = fitting or stacks
    if len(chosen) != 1:
        listed = ", ".join(f"{prefix}N (0 to {max(found)})" for prefix, found in stacks.items()) or "none"
        raise CheckpointError(f"cannot tell which tensors are the decoder layers; numbered stacks found: {listed}.")
    ((prefix, found),) = chosen.items()
    present = max(found) + 1
    missing = [layer for layer in range(present) if layer not in found]
    if missing:
        listed = format_layers(missing)
        raise CheckpointError(f"layers {listed} have no tensors under {prefix}N; the checkpoint is incomplete.")
    if count is None and extra:
        raise CheckpointError("config.json counts layers for multi-token prediction, but not the layers before them.")
    if count is None or present == count:
        return LayerStack(prefix, present)
    if present == count + extra:
        return LayerStack(prefix, count, extra)
    raise CheckpointError(
        f"config.json says {count} layers, but there are tensors of {present} under {prefix}N; "
        "the config does not belong to these weights."
    )


def parse_layers(text: str | int | Sequence[int]) -> LayerSequence:
    """Parse the notation for a sequence of layers.

    `sequence = item {"," item}`, `item = unit ["*" times]`, `unit = "(" sequence ")" | number ["-" number
    ["/" step]]`. A number, or a sequence of numbers, stands for itself.

    Raises:
        UsageError: with the place in the text that was not understood.
    """
    if isinstance(text, str):
        return _SequenceParser(text).parse()
    layers = (text,) if isinstance(text, int) else tuple(text)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise UsageError(f"layers: {layer!r} is not a layer; layers are whole numbers from 0.")
    return layers


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

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0

    def parse(self) -> LayerSequence:
        layers = self._sequence()
        if self.position < len(self.text):
            raise self._error("expected a comma or the end")
        return tuple(layers)

    def _sequence(self) -> list[int]:
        layers = self._item()
        while self._take(","):
            layers += self._item()
            if len(layers) > LONGEST_SEQUENCE:
                raise self._error(f"more than {LONGEST_SEQUENCE} layers")
        return layers

    def _item(self) -> list[int]:
        unit = self._unit()
        if self._take("*"):
            times = self._number("how many times", least=1)
            if len(unit) * times > LONGEST_SEQUENCE:
                raise self._error(f"more than {LONGEST_SEQUENCE} layers")
            unit = unit * times
        return unit

    def _unit(self) -> list[int]:
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
            return [first]
        last = self._number("the last layer of the range")
        step = self._number("a step", least=1) if self._take("/") else 1
        if abs(last - first) >= LONGEST_SEQUENCE:
            raise self._error(f"more than {LONGEST_SEQUENCE} layers")
        return list(range(first, last + 1, step) if first <= last else range(first, last - 1, -step))

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
