"""Names and patterns of modules under a layer sequence: each follows the layers that it speaks of.

Engines read them in ways of their own: exactly, as a beginning, an end or any part of a module's name, as a wildcard
or as a regular expression; `model.layers.1` may hit layers 10 to 19 as well. So what would no longer hit what it hit
is written out as whole module names, which all of them read alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import translate
from typing import Literal, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.names import LayerStack, companions, is_tower, layer_name

_PATTERN = re.compile(r"[\\*+?()\[\]{}|^$]")
_SIGN = re.compile(r"^(re:|[+-]:)")
_NUMBERED = re.compile(r"(?<![a-z])(layers|layer|h|blocks?)\\?\.[\\(\[]*\d")
_ONLY_REGEX = re.compile(r"[\\()|+^$\[\]]")
_OTHER_PREFIXES = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.", "layers.")

Matches = Callable[[str], object]
"""What tells whether a pattern matches a module's name."""

Reading = Literal["from the beginning", "anywhere", "as a whole", "as a wildcard", "by order"]
"""How an engine reads patterns; all but `by order`, where the first that matches decides, take exact names first."""

READINGS: Mapping[str, Reading] = {
    "dynamic": "by order", "extra_config": "anywhere", "module_fqn_to_config": "as a whole",
}  # fmt: skip
"""Settings whose patterns are read in a way of their own: GPTQModel's, AutoRound's, torchao's."""


class Renaming(NamedTuple):
    """Where each layer of a stack goes: `places` by source layer, those behind the stack included.

    `modules` are those of each layer, without its prefix, `others` those outside the stack, in full; `plain` are the
    layers of which no module is quantised, of a model in which some are.
    """

    stack: LayerStack
    places: Mapping[int, Sequence[int]]
    modules: Mapping[int, Sequence[str]]
    others: Sequence[str]
    plain: Collection[int] = ()


def names_a_layer(text: str) -> bool:
    """Tell whether a name or pattern has the number of a layer in it."""
    return bool(_NUMBERED.search(text))


def make_renaming(ckpt: Checkpoint, stack: LayerStack, places: Mapping[int, Sequence[int]]) -> Renaming:
    """Return the renaming of a checkpoint's modules; a module is what holds a matrix, or codes and scales of one."""
    modules: dict[int, dict[str, None]] = {}
    others: dict[str, None] = {}
    quantized = set(companions(ckpt.tensors).values())
    holding = set()
    for name, tensor in ckpt.tensors.items():
        module = name.rpartition(".")[0]
        found = layer_name(name)
        if not found or found.prefix != stack.prefix:
            others[module] = None
            continue
        if len(tensor.shape) > 1:
            modules.setdefault(found.index, {})[module.removeprefix(f"{stack.prefix}{found.index}.")] = None
        if module in quantized:
            holding.add(found.index)
    plain = modules.keys() - holding if holding else ()
    return Renaming(stack, places, {layer: list(names) for layer, names in modules.items()}, list(others), plain)


def changes(entry: str, renamings: Sequence[Renaming], reading: Reading) -> bool:
    """Tell whether an entry would say of an output layer what it did not say of its source.

    Plain names that have a number are always taken to: engines differ in what else they find in them.
    """
    numbered = names_a_layer(entry)
    if not is_pattern(entry) or (numbered and (len(renamings) > 1 or not matchers(entry, reading))):
        return numbered
    return any(
        (layer in hits) != (place in hits)
        for renaming in renamings
        for hits in _hits(entry, renaming, reading)
        for layer, places in renaming.places.items()
        for place in places
    )


def _hits(entry: str, renaming: Renaming, reading: Reading) -> Iterator[set[int]]:
    """Yield the numbers with which a pattern matches a module, for every module and every way to read it."""
    numbers = renaming.places.keys() | {place for places in renaming.places.values() for place in places}
    rests = dict.fromkeys(rest for modules in renaming.modules.values() for rest in modules)
    for matches in matchers(entry, reading):
        for prefix in _prefixes(renaming):
            for rest in rests:
                yield {number for number in numbers if matches(f"{prefix}{number}.{rest}")}


def _prefixes(renaming: Renaming) -> Iterable[str]:
    """Return what may stand before a layer's number: in the files, and in the names that engines use."""
    return dict.fromkeys((renaming.stack.prefix, *_OTHER_PREFIXES))


def is_pattern(entry: str) -> bool:
    """Tell whether an entry is a pattern rather than a name."""
    return bool(_SIGN.match(entry) or _PATTERN.search(entry))


def renamed(
    entry: str, renaming: Renaming, renamings: Sequence[Renaming], where: str, reading: Reading
) -> Iterable[str]:
    """Return what an entry of a list, or a key, is in the output: nothing where its layers are gone."""
    if not changes(entry, renamings, reading):
        return [entry]
    if is_pattern(entry):
        return _expanded(entry, renaming, where, reading)
    found = layer_name(f"{entry.rstrip('.')}.weight")
    stack = renaming.stack
    if not found or is_tower(found.prefix):
        return [entry]
    if found.prefix != stack.prefix and any(name.startswith(found.prefix) for name in renaming.others):
        return [entry]
    if found.rest != "weight":
        rest = found.rest.removesuffix(".weight")
        return [f"{found.prefix}{place}.{rest}" for place in renaming.places.get(found.index, ())]
    # Engines that take a name for any part of another skip layers 10 to 19 with layer 1: the tensors tell.
    begun = () if entry.endswith(".") else (it for it in renaming.plain if str(it).startswith(str(found.index)))
    layers = sorted({found.index, *begun})
    return [
        f"{found.prefix}{place}.{rest}"
        for layer in layers
        for place in renaming.places.get(layer, ())
        for rest in renaming.modules.get(layer, ())
    ]


def _expanded(entry: str, renaming: Renaming, where: str, reading: Reading) -> list[str]:
    """Write a pattern out as the modules that it matches, by the names that the files or the engines use."""
    ways = matchers(entry, reading)
    modules = [(layer, rest) for layer, rests in renaming.modules.items() for rest in rests]
    for prefix in _prefixes(renaming):
        found = [[it for it in modules if matches(f"{prefix}{it[0]}.{it[1]}")] for matches in ways]
        if not any(found):
            continue
        if any(each != found[0] for each in found):
            raise refusal(entry, where)
        names = [f"{prefix}{place}.{rest}" for layer, rest in found[0] for place in renaming.places.get(layer, ())]
        names += [name for name in renaming.others if ways[0](name)]
        sign = _SIGN.match(entry)
        return [f"{sign[0]}{re.escape(name)}$" for name in names] if sign and sign[0] != "re:" else names
    if not ways:
        raise refusal(entry, where)
    return []


def matchers(entry: str, reading: Reading) -> list[Matches]:
    """Return the ways to read a pattern: as a regular expression, as a wildcard, or both where none can tell."""
    sign = _SIGN.match(entry)
    pattern = entry[sign.end() :] if sign else entry
    wildcard = re.compile(translate(pattern)).match
    if reading == "as a wildcard":
        return [wildcard]
    found: list[Matches] = [wildcard] if not sign and "*" in pattern and not _ONLY_REGEX.search(pattern) else []
    with suppress(re.error):
        regex = re.compile(pattern)
        found.insert(0, {"anywhere": regex.search, "as a whole": regex.fullmatch}.get(reading, regex.match))
    return found


def refusal(text: str, where: str) -> RefusedError:
    """Return the error for a name or pattern that cannot follow."""
    place = where if "." in where else f"config.json: {where!r}"
    return RefusedError(
        f"{place}: {text!r} names a layer by number in a way that cannot be renumbered; dequantize first."
    )
