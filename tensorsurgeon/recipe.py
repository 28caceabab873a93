"""Recipes: a source, a destination, and the operations between them, as YAML or as Python data.

    source: Qwen/Qwen3-8B-FP8
    dest: Qwen3-8B-pruned
    steps:
      - dequantize
      - drop-layers: {layers: 14-17}

Paths are relative to the working directory. All that is wrong in a recipe is said at once, with its line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorsurgeon.ops  # noqa: F401  declares the operations
from tensorsurgeon.checkpoint import Checkpoint, Step, open_checkpoint
from tensorsurgeon.engines import ENGINES, Engine
from tensorsurgeon.errors import UsageError, nearest, raise_all
from tensorsurgeon.mergekit import is_mergekit, translated
from tensorsurgeon.registry import OPERATIONS, apply_steps, find_operation
from tensorsurgeon.sizes import parse_size
from tensorsurgeon.variants import expanded
from tensorsurgeon.yaml_lines import Reader

KEYS = ("source", "dest", "variants", "steps", "max_shard_size", "target")


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
    """Read a recipe from a YAML file, as `load_recipes` does.

    Raises:
        UsageError: with everything that is wrong in it, and for one with several variants.
    """
    found = load_recipes(path, settings, dest)
    if len(found) > 1:
        raise UsageError(f"{path}: stands for {len(found)} variants; load_recipes returns them all.")
    return found[0]


def load_recipes(path: str | Path, settings: Iterable[str] = (), dest: str | None = None) -> tuple[Recipe, ...]:
    """Read a YAML file, with `settings` such as `steps.1.layers=10-12` laid over it, and `dest`: each of its variants.

    A mergekit config with `merge_method: passthrough` is a recipe too, but for its destination.

    Raises:
        UsageError: with everything that is wrong in it.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path}: cannot be read: {problem}.") from None
    reader = Reader(str(path))
    data = reader.read(text)
    steps = data.get("steps") if isinstance(data, dict) else None
    if isinstance(steps, list):
        steps[:] = map(_spelled_out, steps)
    for setting in settings if isinstance(data, dict) else ():
        try:
            lay_over(data, setting)
        except UsageError as problem:
            reader.problems += problem.problems
    if dest and isinstance(data, dict):
        data["dest"] = dest
    return _variants(data, reader) if isinstance(data, dict) and "variants" in data else (_recipe(data, reader),)


def _variants(data: Mapping[str, Any], reader: Reader) -> tuple[Recipe, ...]:
    try:
        each = [it.recipe for it in expanded(data, depth_of)]
    except UsageError as problem:
        raise UsageError(*reader.problems, *(f"{reader.name}: {text}" for text in problem.problems)) from None
    problems: dict[str, None] = {}
    recipes = []
    for it in each:
        try:
            recipes.append(_recipe(it, reader))
        except UsageError as problem:
            problems |= dict.fromkeys(problem.problems)
    for dest, times in Counter(it.dest for it in recipes).items():
        if times > 1:
            what = "variants would be written to it; name what differs in braces"
            problems[f"{reader.name}: dest: {dest}: {times} {what}."] = None
    raise_all(UsageError, problems)
    return tuple(recipes)


def depth_of(source: Any) -> int:
    """Return how many layers a model has."""
    return open_checkpoint(str(source)).layers.count


def make_recipe(data: Mapping[str, Any]) -> Recipe:
    """Check a recipe given as plain data.

    Raises:
        UsageError: with everything that is wrong in it.
    """
    return _recipe(data, Reader("recipe"))


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
            "variants": {"type": "array", "items": {"type": "object"}, "description": "Values by name, to combine."},
            "steps": {"type": "array", "items": {"anyOf": steps}},
            "max_shard_size": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "target": {"enum": list(ENGINES)},
        },
        "required": ["source", "dest"],
        "additionalProperties": False,
    }


def _recipe(data: Any, reader: Reader) -> Recipe:
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
    steps: tuple[Step, ...] = ()
    try:
        steps = read_steps(data.get("steps"), reader)
    except UsageError as problem:
        problems += problem.problems
    size = None
    try:
        size = parse_size(data["max_shard_size"]) if "max_shard_size" in data else None
    except UsageError as problem:
        problems.append(f"{reader.at('max_shard_size')}: max_shard_size: {problem}")
    target = data.get("target")
    if target not in (None, *ENGINES):
        problems.append(f"{reader.at('target')}: target is one of {', '.join(ENGINES)}, not {target!r}.")
    raise_all(UsageError, problems)
    return Recipe(data["source"], data["dest"], steps, size, target)


def read_steps(steps: Any, reader: Reader) -> tuple[Step, ...]:
    """Return steps given as plain data.

    Raises:
        UsageError: with everything that is wrong in them.
    """
    if not isinstance(steps, list | tuple | None):
        raise UsageError(f"{reader.at('steps')}: steps are a list.")
    problems: list[str] = []
    parsed = [_step(item, reader, place, problems) for place, item in enumerate(steps or ())]
    raise_all(UsageError, problems)
    return tuple(step for step in parsed if step)


def _step(item: Any, reader: Reader, place: int, problems: list[str]) -> Step | None:
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


def lay_over(data: Any, setting: str) -> None:
    """Lay one `steps.1.layers=10-12` over a recipe's data; the name of the step's operation is not repeated."""
    path, equals, text = setting.partition("=")
    *parents, last = path.split(".")
    if not equals or not last:
        raise UsageError(f"--set {setting!r}: write it as steps.1.layers=10-12.")
    place = data
    for key in parents:
        if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
            step = place[int(key)]
            is_step = isinstance(step, dict) and parents[0] == "steps"
            place = next(iter(step.values()), None) if is_step else step
        else:
            place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise UsageError(f"--set {setting!r}: the recipe has no such place; write it as steps.1.layers=10-12.")
    reader = Reader(f"--set {setting!r}")
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
