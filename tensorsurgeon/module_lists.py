"""Quantisation settings that name modules, under a layer sequence: every name follows its layer.

Engines read such names in ways of their own: exactly, as a beginning, an end or any part of a module's name, as
a wildcard or as a regular expression; `model.layers.1` may hit layers 10 to 19 as well. So what names a layer by
number is written out as whole module names, which all of them read alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import translate
from typing import Any, Literal, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import SETTINGS_FILES, Config
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.names import LayerStack, is_tower, layer_name
from tensorsurgeon.quantized import companions

SETTINGS = ("quantization_config", "compression_config", "quantization")

NAMING = (
    "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "target_parameters",
)  # fmt: skip
"""Settings of a PEFT adapter that may name modules of single layers."""

ACROSS_LAYERS = ("layer_replication", "num_layers", "adapter_layers", "num_virtual_tokens")
"""Settings of a PEFT adapter that is made for a number of layers."""

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

MODELOPT = "hf_quant_config.json"
"""The settings file of modelopt, which reads patterns as wildcards."""


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


def renamed_settings(config: Config, parts: Sequence[tuple[Config, Renaming]]) -> Config:
    """Return a config whose quantisation settings name the modules of the output, at whatever level they lie.

    `parts` are the configs of the models whose layers the output holds, the first of which is edited.

    Raises:
        RefusedError: for what names a layer in a way that cannot be renumbered.
    """
    return {
        key: _walked([part.get(key) for part, _ in parts], [it for _, it in parts], key)
        if key in SETTINGS and isinstance(value, Mapping)
        else renamed_settings(value, [(_mapping(part.get(key)), it) for part, it in parts])
        if key.endswith("_config") and isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }


def adapter_settings(ckpt: Checkpoint, renaming: Renaming) -> Config:
    """Return the config of an adapter whose layers are renumbered.

    Raises:
        RefusedError: for an adapter of a kind that lies across layers, and for one that replicates layers itself.
    """
    config = ckpt.config.value
    raise_all(
        RefusedError,
        (f"adapter_config.json: {key!r} is {config[key]!r}, which ties the adapter to the model's layers as they are."
         for key in ACROSS_LAYERS if config.get(key)),
    )  # fmt: skip
    edited = {
        key: _walked([value], [renaming], "adapter_config.json") if key in NAMING else value
        for key, value in config.items()
    }
    chosen = config.get("layers_to_transform")
    if chosen is not None:
        layers = [chosen] if isinstance(chosen, int) else chosen
        edited["layers_to_transform"] = sorted(place for layer in layers for place in renaming.places.get(layer, ()))
    return edited


def renamed_files(ckpt: Checkpoint, renaming: Renaming) -> dict[str, bytes]:
    """Return the settings files that name layers, with the modules of the output.

    Raises:
        RefusedError: for one that is no JSON, or that names a layer in a way that cannot be renumbered.
    """
    edited = {}
    for file in sorted(ckpt.files.keys() & set(SETTINGS_FILES)):
        content = ckpt.files[file]
        text = content.decode(errors="replace") if isinstance(content, bytes) else content.read_text(errors="replace")
        try:
            settings = json.loads(text)
        except ValueError:
            if names_a_layer(text):
                raise RefusedError(
                    f"{file}: names layers by number, which would not hold under the sequence; dequantize first."
                ) from None
            continue
        renamed = _walked([settings], [renaming], file)
        if renamed != settings:
            edited[file] = (json.dumps(renamed, indent=2) + "\n").encode()
    return edited


def _mapping(value: Any) -> Config:
    return value if isinstance(value, Mapping) else {}


def _walked(
    values: Sequence[Any], renamings: Sequence[Renaming], where: str, reading: Reading = "from the beginning"
) -> Any:
    """Return the first of the values with its names renumbered, and those of the others added."""
    value, parts = values[0], list(zip(values, renamings, strict=True))
    if isinstance(value, Mapping):
        if value.get("quant_method") == "modelopt" or where == MODELOPT:
            reading = "as a wildcard"
        if any(_changes(key, renamings, reading) for each in values for key in _mapping(each)):
            return _renamed_keys([(_mapping(each), it) for each, it in parts], where, reading)
        return {
            key: _walked(
                [each[key] for each in values if key in _mapping(each)],
                [it for each, it in parts if key in _mapping(each)],
                where if where in SETTINGS_FILES else key,
                READINGS.get(key, reading),
            )
            for key in value
        }
    if isinstance(value, list | tuple):
        texts = [item for each in values for item in each or () if isinstance(item, str)]
        if not any(_changes(item, renamings, reading) for item in texts):
            return [_walked([item], renamings[:1], where, reading) for item in value]
        return list(
            dict.fromkeys(
                name
                for each, renaming in parts
                for item in each or ()
                for name in (_renamed(item, renaming, renamings, where, reading) if isinstance(item, str) else [item])
            )
        )
    if isinstance(value, str) and _changes(value, renamings, reading):
        raise _refusal(value, where)
    return value


def _renamed_keys(parts: Sequence[tuple[Config, Renaming]], where: str, reading: Reading) -> Config:
    """Return a mapping whose keys name modules, in which the key that decides over a module goes on deciding.

    Names decide before patterns, and of patterns the first; where the order alone decides, it stays as it is.
    """
    renamings = [it for _, it in parts]
    keys = dict.fromkeys(key for each, _ in parts for key in each)
    by_order = reading == "by order"
    edited: dict[str, Any] = {}
    kept: list[Matches] = []
    for key in keys if by_order else sorted(keys, key=_is_pattern):
        for each, renaming in parts:
            if key in each:
                for name in _renamed(key, renaming, renamings, where, reading):
                    if by_order or name == key or not any(matches(name) for matches in kept):
                        edited.setdefault(name, each[key])
        if key in edited and _is_pattern(key):
            kept += _matchers(key, reading)
    return edited


def _changes(entry: str, renamings: Sequence[Renaming], reading: Reading) -> bool:
    """Tell whether an entry would say of an output layer what it did not say of its source.

    Plain names that have a number are always taken to: engines differ in what else they find in them.
    """
    numbered = names_a_layer(entry)
    if not _is_pattern(entry) or (numbered and (len(renamings) > 1 or not _matchers(entry, reading))):
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
    for matches in _matchers(entry, reading):
        for prefix in _prefixes(renaming):
            for rest in rests:
                yield {number for number in numbers if matches(f"{prefix}{number}.{rest}")}


def _prefixes(renaming: Renaming) -> Iterable[str]:
    """Return what may stand before a layer's number: in the files, and in the names that engines use."""
    return dict.fromkeys((renaming.stack.prefix, *_OTHER_PREFIXES))


def _is_pattern(entry: str) -> bool:
    return bool(_SIGN.match(entry) or _PATTERN.search(entry))


def _renamed(
    entry: str, renaming: Renaming, renamings: Sequence[Renaming], where: str, reading: Reading
) -> Iterable[str]:
    """Return what an entry of a list, or a key, is in the output: nothing where its layers are gone."""
    if not _changes(entry, renamings, reading):
        return [entry]
    if _is_pattern(entry):
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
    matchers = _matchers(entry, reading)
    modules = [(layer, rest) for layer, rests in renaming.modules.items() for rest in rests]
    for prefix in _prefixes(renaming):
        found = [[it for it in modules if matches(f"{prefix}{it[0]}.{it[1]}")] for matches in matchers]
        if not any(found):
            continue
        if any(each != found[0] for each in found):
            raise _refusal(entry, where)
        names = [f"{prefix}{place}.{rest}" for layer, rest in found[0] for place in renaming.places.get(layer, ())]
        names += [name for name in renaming.others if matchers[0](name)]
        sign = _SIGN.match(entry)
        return [f"{sign[0]}{re.escape(name)}$" for name in names] if sign and sign[0] != "re:" else names
    if not matchers:
        raise _refusal(entry, where)
    return []


def _matchers(entry: str, reading: Reading) -> list[Matches]:
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


def _refusal(text: str, where: str) -> RefusedError:
    place = where if "." in where else f"config.json: {where!r}"
    return RefusedError(
        f"{place}: {text!r} names a layer by number in a way that cannot be renumbered; dequantize first."
    )
