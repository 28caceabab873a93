"""Quantisation settings that name modules, under a layer sequence: every name follows its layer.

Engines read such names in ways of their own: exactly, as a beginning, an end or any part of a module's name, as
a wildcard or as a regular expression; `model.layers.1` may hit layers 10 to 19 as well. So what names a layer by
number is written out as whole module names, which all of them read alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import translate
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import SETTINGS_FILES, Config
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.names import LayerStack, is_tower, layer_name

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
_OTHER_PREFIXES = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.", "layers.")


class Renaming(NamedTuple):
    """Where each layer of a stack goes: `places` by source layer, those behind the stack included."""

    stack: LayerStack
    places: Mapping[int, Sequence[int]]
    modules: Mapping[int, Sequence[str]]
    others: Sequence[str]


def names_a_layer(text: str) -> bool:
    """Tell whether a name or pattern speaks of a layer by its number."""
    return bool(_NUMBERED.search(text))


def make_renaming(ckpt: Checkpoint, stack: LayerStack, places: Mapping[int, Sequence[int]]) -> Renaming:
    """Return the renaming of a checkpoint's modules; a module is what holds a matrix, or codes and scales of one."""
    modules: dict[int, dict[str, None]] = {}
    others: dict[str, None] = {}
    for name, tensor in ckpt.tensors.items():
        module = name.rpartition(".")[0]
        found = layer_name(name)
        if found and found.prefix == stack.prefix:
            if len(tensor.shape) > 1:
                modules.setdefault(found.index, {})[module] = None
        else:
            others[module] = None
    return Renaming(stack, places, {layer: list(names) for layer, names in modules.items()}, list(others))


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
        if not names_a_layer(text):
            continue
        try:
            settings = json.loads(text)
        except ValueError:
            raise RefusedError(
                f"{file}: names layers by number, which would not hold under the sequence; dequantize first."
            ) from None
        edited[file] = (json.dumps(_walked([settings], [renaming], file), indent=2) + "\n").encode()
    return edited


def _mapping(value: Any) -> Config:
    return value if isinstance(value, Mapping) else {}


def _walked(values: Sequence[Any], renamings: Sequence[Renaming], where: str) -> Any:
    """Return the first of the values with its names renumbered, and those of the others added."""
    value = values[0]
    if isinstance(value, Mapping):
        edited: dict[str, Any] = {}
        keys = {key: None for each in values for key in _mapping(each)}
        for key in keys:
            having = [(each, it) for each, it in zip(values, renamings, strict=True) if key in _mapping(each)]
            if names_a_layer(key):
                for each, renaming in having:
                    edited |= dict.fromkeys(_renamed(key, renaming, where), each[key])
            elif key in value:
                edited[key] = _walked([each[key] for each, _ in having], [it for _, it in having], where)
        return edited
    if isinstance(value, list | tuple):
        if any(isinstance(item, str) and names_a_layer(item) for each in values for item in each or ()):
            entries: dict[Any, None] = {}
            for each, renaming in zip(values, renamings, strict=True):
                for item in each or ():
                    found = _renamed(item, renaming, where) if isinstance(item, str) else [item]
                    entries |= dict.fromkeys(found)
            return list(entries)
        return [_walked([item], renamings[:1], where) for item in value]
    if isinstance(value, str) and names_a_layer(value):
        raise _refusal(value, where)
    return value


def _renamed(entry: str, renaming: Renaming, where: str) -> list[str]:
    """Return what an entry of a list, or a key, is in the output: nothing where its layers are gone."""
    if not names_a_layer(entry):
        return [entry]
    if _PATTERN.search(_SIGN.sub("", entry)) or _SIGN.match(entry):
        return _expanded(entry, renaming, where)
    found = layer_name(f"{entry.rstrip('.')}.weight")
    stack = renaming.stack
    if not found or is_tower(found.prefix):
        return [entry]
    if found.prefix != stack.prefix and any(name.startswith(found.prefix) for name in renaming.others):
        return [entry]
    if found.rest != "weight":
        rest = found.rest.removesuffix(".weight")
        return [f"{found.prefix}{place}.{rest}" for place in renaming.places.get(found.index, ())]
    modules = [name.removeprefix(f"{stack.prefix}{found.index}.") for name in renaming.modules.get(found.index, ())]
    return [f"{found.prefix}{place}.{rest}" for place in renaming.places.get(found.index, ()) for rest in modules]


def _expanded(entry: str, renaming: Renaming, where: str) -> list[str]:
    """Write a pattern out as the modules that it matches, by the names that the files or the engines use."""
    sign = (_SIGN.match(entry) or [""])[0]
    pattern = entry.removeprefix(sign)
    for prefix in dict.fromkeys((renaming.stack.prefix, *_OTHER_PREFIXES)):
        readings = list(_readings(pattern, bool(sign), prefix, renaming))
        if not any(readings):
            continue
        if any(reading != readings[0] for reading in readings):
            break
        found = [f"{prefix}{place}.{rest}" for layer, rest in readings[0] for place in renaming.places.get(layer, ())]
        others = [name for name in renaming.others if _matcher(pattern, bool(sign))(name)]
        as_pattern = sign not in ("", "re:")
        return [f"{sign}{re.escape(name)}$" if as_pattern else name for name in (*found, *others)]
    raise _refusal(entry, where)


def _readings(pattern: str, is_regex: bool, prefix: str, renaming: Renaming) -> Iterator[list[tuple[int, str]]]:
    """Yield what a pattern matches as a regular expression and, where it may be one, as a wildcard."""
    wildcard = not is_regex and "*" in pattern and not re.search(r"[\\()|+^$\[\]]", pattern)
    for as_regex in (True, False) if wildcard else (True,):
        try:
            matches = _matcher(pattern, as_regex)
        except re.error:
            continue
        yield [
            (layer, rest)
            for layer, names in renaming.modules.items()
            for name in names
            for rest in [name.removeprefix(f"{renaming.stack.prefix}{layer}.")]
            if matches(f"{prefix}{layer}.{rest}")
        ]


def _matcher(pattern: str, as_regex: bool) -> Any:
    return re.compile(pattern if as_regex else translate(pattern)).match


def _refusal(text: str, where: str) -> RefusedError:
    place = where if "." in where else f"config.json: {where!r}"
    return RefusedError(
        f"{place}: {text!r} names a layer by number in a way that cannot be renumbered; dequantize first."
    )
