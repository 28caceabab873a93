"""The types of parameters: what may be given for each, in Python, in a recipe and on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import UsageError
from tensorsurgeon.notation import LayerSequence, NamedLayer, parse_layers, parse_named_layers
from tensorsurgeon.sizes import parse_size


def _checked_by(parse: Callable[[Any], Any], schema: dict[str, Any]) -> tuple[BeforeValidator, WithJsonSchema]:
    def check(value: Any) -> Any:
        try:
            return parse(value)
        except UsageError as problem:
            raise ValueError(str(problem)) from None
        except TypeError:
            raise ValueError(f"{value!r} is of no type that it may have") from None

    return BeforeValidator(check), WithJsonSchema(schema)


_layers = _checked_by(
    parse_layers,
    {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
)
_named_layers = _checked_by(parse_named_layers, {"anyOf": [{"type": "string"}, {"type": "integer"}]})


def _parse_model(value: Any, name: str = "model") -> Any:
    """Return a model that is given as a directory or hub id, as a recipe without a destination, or as a Checkpoint."""
    is_recipe = isinstance(value, Mapping) and set(value) <= {"source", "steps"} and value.get("source")
    if not (value and (is_recipe or isinstance(value, str | Checkpoint))):
        raise UsageError(f"{name!r} is neither a directory or hub id, nor {{source: …, steps: […]}}")
    return value


def _parse_models(value: Any) -> dict[str, Any]:
    """Return models by name, given as a mapping or as texts such as `instruct=DIR`."""
    if not isinstance(value, Mapping):
        pairs = [value] if isinstance(value, str) else list(value)
        split = [str(pair).partition("=")[::2] for pair in pairs]
        value = dict(split)
        if len(value) < len(pairs) or not all(value.values()):
            raise UsageError(f"{', '.join(map(str, pairs))!r} is not NAME=MODEL, each name once")
    return {
        name: _parse_model(model if name and isinstance(name, str) else None, name) for name, model in value.items()
    }


def _parse_several(value: Any) -> tuple[Any, ...]:
    """Return models given one by one, as text, mappings or Checkpoints."""
    items = [value] if isinstance(value, str | Mapping | Checkpoint) else list(value)
    return tuple(_parse_model(item) for item in items)


def _parse_scales(value: Any) -> tuple[float, ...]:
    """Return numbers given one by one."""
    try:
        return tuple(float(item) for item in ([value] if isinstance(value, str | int | float) else value))
    except ValueError:
        raise UsageError(f"{value!r} is not a number or a list of numbers") from None


def _parse_directories(value: Any) -> tuple[str, ...]:
    """Return directories, one or several."""
    return tuple(map(str, [value] if isinstance(value, str | Path) else value))


def _parse_words(value: Any) -> tuple[str, ...]:
    """Return words given as a list, or as one text with commas between them."""
    parts = [value] if isinstance(value, str) else list(value)
    return tuple(word.strip() for part in parts for word in str(part).split(",") if word.strip())


def _parse_settings(value: Any) -> tuple[str, ...]:
    """Return texts such as `source=DIR`, given one by one."""
    texts = [value] if isinstance(value, str) else list(value)
    for text in texts:
        if not isinstance(text, str) or "=" not in text:
            raise UsageError(f"{text!r} is not KEY=VALUE, such as variants.0.level=0.5")
    return tuple(texts)


def _parse_ranks(value: Any) -> dict[str, int]:
    """Return ranks by pattern, given as a mapping or as texts such as `*.mlp.*=64`."""
    if not isinstance(value, Mapping):
        pairs = [value] if isinstance(value, str) else list(value)
        value = dict(str(pair).rpartition("=")[::2] for pair in pairs)
    for pattern, rank in value.items():
        if not pattern or not str(rank).isdecimal() or int(rank) < 1:
            raise UsageError(f"{pattern}={rank} is not PATTERN=RANK with a rank from 1")
    return {str(pattern): int(rank) for pattern, rank in value.items()}


def _parse_grid(value: Any) -> str:
    """Return rows and columns, given as text such as 128x128 or as two numbers, as text."""
    sizes = value.lower().split("x") if isinstance(value, str) else list(value)
    if len(sizes) != 2 or not all(str(size).strip().isdecimal() and int(size) > 0 for size in sizes):
        raise UsageError(f"{value!r} is not ROWSxCOLUMNS, such as 128x128")
    return "x".join(str(int(size)) for size in sizes)


def _parse_thresholds(value: Any) -> dict[str, Any]:
    """Return limits by rule, given as a mapping or as a YAML file."""
    if isinstance(value, str | Path):
        import yaml

        try:
            value = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except OSError as problem:
            raise UsageError(f"{problem.filename}: {problem.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as problem:
            raise UsageError(f"is not YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(value, Mapping):
        raise UsageError("is no mapping of rules, such as `exploded: {std: 20}`")
    return dict(value)


_models = _checked_by(_parse_models, {"type": "object", "additionalProperties": {"type": ["string", "object"]}})
_size = _checked_by(parse_size, {"anyOf": [{"type": "string"}, {"type": "integer"}]})

Layers = Annotated[LayerSequence, *_layers]
"""A layer sequence, in its notation or as numbers."""
NamedLayers = Annotated[tuple[NamedLayer, ...], *_named_layers]
"""A layer sequence in which models may be named."""
Models = Annotated[dict[str, Any], *_models]
"""Further models by name: a directory or hub id, or `{source: …, steps: […]}`; in Python also a Checkpoint."""
Model = Annotated[Any, *_checked_by(_parse_model, {"type": ["string", "object"]})]
"""A further model: a directory or hub id, or `{source: …, steps: […]}`; in Python also a Checkpoint."""
Ranks = Annotated[
    dict[str, int], *_checked_by(_parse_ranks, {"type": "object", "additionalProperties": {"type": "integer"}})
]
"""Ranks by pattern, as a mapping or as texts such as `*.mlp.*=64`."""
Several = Annotated[tuple[Any, ...], *_checked_by(_parse_several, {"type": ["string", "object", "array"]})]
"""One or several further models."""
Scales = Annotated[tuple[float, ...], *_checked_by(_parse_scales, {"type": ["number", "array"]})]
"""One or several factors."""
Words = Annotated[tuple[str, ...], *_checked_by(_parse_words, {"type": ["string", "array"]})]
"""Words with commas between them, or a list of them."""
Settings = Annotated[tuple[Any, ...], *_checked_by(_parse_settings, {"type": ["string", "array"]})]
"""Values to lay over a file, as texts such as `source=DIR`."""
Grid = Annotated[str, *_checked_by(_parse_grid, {"type": ["string", "array"]})]
"""Rows and columns, as text such as 128x128 or as two numbers."""
Share = Annotated[float, Field(gt=0, le=1)]
"""A number above 0, up to 1."""
Size = Annotated[int, *_size]
"""A size in bytes, as a number or as text such as 5GB."""
Thresholds = Annotated[Any, *_checked_by(_parse_thresholds, {"type": ["string", "object"]})]
"""Limits by rule, or the YAML file that holds them."""
File = Annotated[str, Field(min_length=1)]
"""A file."""
Count = Annotated[int, Field(ge=1)]
"""A whole number from 1."""
Glob = Annotated[str, Field(min_length=1)]
"""A pattern for tensor names; commas separate alternatives."""
Location = Annotated[str, Field(min_length=1)]
"""Where a checkpoint lies, given to an exam that must see it even where it cannot be opened."""
Directories = Annotated[tuple[str, ...], *_checked_by(_parse_directories, {"type": ["string", "array"]})]
"""One or several directories."""
