"""Recipes: a source, a destination, and the operations between them, as YAML or as Python data.

    source: Qwen/Qwen3-8B-FP8
    dest: Qwen3-8B-pruned
    steps:
      - dequantize
      - drop-layers: {layers: 14-17}

Paths are relative to the working directory. All that is wrong in a recipe is said at once, with its line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import tensorsurgeon.ops  # noqa: F401  declares the operations
from tensorsurgeon.checkpoint import Checkpoint, Step, open_checkpoint
from tensorsurgeon.engines import ENGINES, Engine
from tensorsurgeon.errors import UsageError, nearest, raise_all
from tensorsurgeon.mergekit import is_mergekit, translated
from tensorsurgeon.registry import OPERATIONS, apply_steps, find_operation
from tensorsurgeon.sizes import parse_size

KEYS = ("source", "dest", "steps", "max_shard_size", "target")


@dataclass(frozen=True)
class Recipe:
    """What to read, what to do with it, and where to write it."""

    source: str
    dest: str
    steps: tuple[Step, ...]
    max_shard_size: int | None = None
    target: Engine | None = None

    def checkpoint(self) -> Checkpoint:
        """Open the source and apply the steps; no tensor is read."""
        return apply_steps(open_checkpoint(self.source), self.steps)


def load_recipe(path: str | Path, settings: Iterable[str] = (), dest: str | None = None) -> Recipe:
    """Read a recipe from a YAML file, with `settings` such as `steps.1.layers=10-12` laid over it, and `dest`.

    A mergekit config with `merge_method: passthrough` is a recipe too, but for its destination.

    Raises:
        UsageError: with everything that is wrong in it.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path}: cannot be read: {problem}.") from None
    reader = _Reader(str(path))
    data = reader.read(text)
    steps = data.get("steps") if isinstance(data, dict) else None
    if isinstance(steps, list):
        steps[:] = map(_spelled_out, steps)
    for setting in settings if isinstance(data, dict) else ():
        try:
            _set(data, setting)
        except UsageError as problem:
            reader.problems += problem.problems
    if dest and isinstance(data, dict):
        data["dest"] = dest
    return _recipe(data, reader)


def make_recipe(data: Mapping[str, Any]) -> Recipe:
    """Check a recipe given as plain data.

    Raises:
        UsageError: with everything that is wrong in it.
    """
    return _recipe(data, _Reader("recipe"))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes."""
    steps: list[dict[str, Any]] = []
    for spec in OPERATIONS.values():
        schema = spec.model.model_json_schema()
        steps.append({"const": spec.name, "description": spec.summary})
        steps.append(
            {
                "type": "object",
                "properties": {spec.name: schema},
                "required": [spec.name],
                "additionalProperties": False,
            }
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tensorsurgeon recipe",
        "type": "object",
        "properties": {
            "source": {"type": "string", "description": "A checkpoint directory or a hub id."},
            "dest": {"type": "string", "description": "The directory to write."},
            "steps": {"type": "array", "items": {"anyOf": steps}},
            "max_shard_size": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "target": {"enum": list(ENGINES)},
        },
        "required": ["source", "dest"],
        "additionalProperties": False,
    }


class _Loader(yaml.SafeLoader):
    """Reads what looks like a date as text: a model may well be named after a day."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Reader:
    """Reads YAML and remembers the line of each value, for the errors."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[tuple[Any, ...], int] = {}
        self.problems: list[str] = []

    def read(self, text: str) -> Any:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return self._value(loader, node, ()) if node else None
        except (yaml.YAMLError, ValueError, RecursionError) as problem:
            raise UsageError(f"{self.name}: is not YAML: {problem}") from None

    def at(self, *path: Any) -> str:
        """Return where a value stands, as `file:line`."""
        return f"{self.name}:{self.lines[path]}" if path in self.lines else self.name

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, path: tuple[Any, ...]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return loader.construct_object(node)
        if node.tag not in (loader.DEFAULT_MAPPING_TAG, loader.DEFAULT_SEQUENCE_TAG):
            self.problems.append(f"{self.at(*path)}: the tag {node.tag!r} is refused; a recipe holds plain data.")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, item, (*path, place)) for place, item in enumerate(node.value)]
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                self.problems.append(f"{self.name}:{line}: the key {key!r} is not a word.")
            elif key in mapping:
                self.problems.append(f"{self.name}:{line}: the key {key!r} occurs twice.")
            else:
                self.lines[*path, key] = line
                mapping[key] = self._value(loader, value_node, (*path, key))
        return mapping


def _recipe(data: Any, reader: _Reader) -> Recipe:
    if not isinstance(data, Mapping):
        raise UsageError(*reader.problems, f"{reader.name}: a recipe has the keys {', '.join(KEYS)}.")
    if is_mergekit(data):
        try:
            data = translated(data)
        except UsageError as problem:
            raise UsageError(*reader.problems, *(f"{reader.name}: {text}" for text in problem.problems)) from None
    problems = reader.problems + [
        f"{reader.at(key)}: there is no key {key!r} in a recipe.{nearest(str(key), KEYS)}"
        for key in data
        if key not in KEYS
    ]
    for key in ("source", "dest"):
        if not isinstance(data.get(key), str) or not data[key] or "\0" in data[key]:
            problems.append(f"{reader.at(key)}: {key} is missing, or is not a text.")
    steps = [] if data.get("steps") is None else data["steps"]
    if not isinstance(steps, list | tuple):
        problems.append(f"{reader.at('steps')}: steps are a list.")
        steps = []
    parsed = [_step(item, reader, place, problems) for place, item in enumerate(steps)]
    size = None
    try:
        size = parse_size(data["max_shard_size"]) if "max_shard_size" in data else None
    except UsageError as problem:
        problems.append(f"{reader.at('max_shard_size')}: max_shard_size: {problem}")
    target = data.get("target")
    if target not in (None, *ENGINES):
        problems.append(f"{reader.at('target')}: target is one of {', '.join(ENGINES)}, not {target!r}.")
    raise_all(UsageError, problems)
    return Recipe(data["source"], data["dest"], tuple(step for step in parsed if step), size, target)


def _step(item: Any, reader: _Reader, place: int, problems: list[str]) -> Step | None:
    where = reader.at("steps", place)
    item = _spelled_out(item)
    if not isinstance(item, Mapping) or len(item) != 1 or not all(isinstance(name, str) for name in item):
        problems.append(f"{where}: a step is the name of an operation, or that name with its parameters.")
        return None
    name, parameters = next(iter(item.items()))
    if not isinstance(parameters, Mapping):
        problems.append(f"{where}: {name}: parameters are written as {{name: value}}.")
        return None
    try:
        find_operation(name).check(parameters)
    except UsageError as problem:
        problems += [f"{where}: {text}" for text in problem.problems]
    return Step(name, dict(parameters))


def _set(data: Any, setting: str) -> None:
    """Lay one `steps.1.layers=10-12` over a recipe's data; the name of the step's operation is not repeated."""
    path, equals, text = setting.partition("=")
    *parents, last = path.split(".")
    if not equals or not last:
        raise UsageError(f"--set {setting!r}: write it as steps.1.layers=10-12.")
    place = data
    for key in parents:
        if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
            step = place[int(key)]
            place = next(iter(step.values()), None) if isinstance(step, dict) else None
        else:
            place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise UsageError(f"--set {setting!r}: the recipe has no such place; write it as steps.1.layers=10-12.")
    reader = _Reader(f"--set {setting!r}")
    # A glob is text: YAML would look for the anchor of an alias, and there is none in a single value.
    place[last] = text if text.startswith("*") else reader.read(text)
    raise_all(UsageError, reader.problems)


def _spelled_out(step: Any) -> Any:
    """Return a step in its long form, `{name: {parameters}}`, where it is a step at all."""
    if isinstance(step, str):
        return {step: {}}
    if isinstance(step, dict) and len(step) == 1 and None in step.values():
        return {name: {} for name in step}
    return step
