"""Load a checkpoint into its model class on the meta device: names and shapes are matched, no memory is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import transformers

from tensorsurgeon.forward.silence import silence

SHOWN = 5


def model_class(config: Mapping[str, Any]) -> Any:
    """Return the class that the config names, or None where transformers does not have it."""
    match config.get("architectures"):
        case [str(name), *_]:
            return getattr(transformers, name, None)
    return None


def load_problems(directory: Path, config: Mapping[str, Any], described: Set[str]) -> Iterator[str]:
    """Yield what the model class of transformers misses, does not know, or has in another shape.

    Names that are `described`, scales above all, are no tensors of the plain model.
    """
    architecture = config["architectures"][0]
    try:
        with silence():
            plain = _plain_config(directory, config)
            _, info = model_class(config).from_pretrained(
                str(directory),
                config=plain,
                device_map="meta",
                ignore_mismatched_sizes=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as problem:
        yield f"{architecture}: does not load in transformers: {_first_line(problem)}"
        return
    yield from _named(info["missing_keys"], f"{architecture} misses")
    yield from _named(set(info["unexpected_keys"]) - described, f"{architecture} does not know")
    mismatched = [f"{name} {list(found)}, not {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    yield from _named(mismatched, f"{architecture} has another shape for")


def _plain_config(directory: Path, config: Mapping[str, Any]) -> Any:
    """Return the config without its quantisation: names and shapes of block FP8 are those of plain weights."""
    described = model_class(config).config_class.from_pretrained(str(directory), local_files_only=True)
    for part in (described, described.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return described


def _named(keys: Any, what: str) -> Iterator[str]:
    names = sorted(keys)
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{what} {', '.join(names[:SHOWN])}{more}."


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else 'no reason given'}"
