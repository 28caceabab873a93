"""Settings that name modules, of quantisation and of adapters, under a layer sequence: every name follows its layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import QUANTIZATION_KEYS, SETTINGS_FILES, Config
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.renaming import (
    READINGS,
    Matches,
    Reading,
    Renaming,
    changes,
    is_pattern,
    matchers,
    names_a_layer,
    refusal,
    renamed,
)

NAMING = (
    "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "target_parameters",
)  # fmt: skip
"""Settings of a PEFT adapter that may name modules of single layers."""

ACROSS_LAYERS = ("layer_replication", "num_layers", "adapter_layers", "num_virtual_tokens")
"""Settings of a PEFT adapter that is made for a number of layers."""

MODELOPT = "hf_quant_config.json"
"""The settings file of modelopt, which reads patterns as wildcards."""


def renamed_settings(config: Config, parts: Sequence[tuple[Config, Renaming]]) -> Config:
    """Return a config whose quantisation settings name the modules of the output, at whatever level they lie.

    `parts` are the configs of the models whose layers the output holds, the first of which is edited.

    Raises:
        RefusedError: for what names a layer in a way that cannot be renumbered.
    """
    return {
        key: _walked([part.get(key) for part, _ in parts], [it for _, it in parts], key)
        if key in QUANTIZATION_KEYS and isinstance(value, Mapping)
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
        if any(changes(key, renamings, reading) for each in values for key in _mapping(each)):
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
        if not any(changes(item, renamings, reading) for item in texts):
            return [_walked([item], renamings[:1], where, reading) for item in value]
        return list(
            dict.fromkeys(
                name
                for each, renaming in parts
                for item in each or ()
                for name in (renamed(item, renaming, renamings, where, reading) if isinstance(item, str) else [item])
            )
        )
    if isinstance(value, str) and changes(value, renamings, reading):
        raise refusal(value, where)
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
    for key in keys if by_order else sorted(keys, key=is_pattern):
        for each, renaming in parts:
            if key in each:
                for name in renamed(key, renaming, renamings, where, reading):
                    if by_order or name == key or not any(matches(name) for matches in kept):
                        edited.setdefault(name, each[key])
        if key in edited and is_pattern(key):
            kept += matchers(key, reading)
    return edited
