"""Variants of a recipe: one recipe for each combination of values, which stand in braces where they go.

dest: degraded/{method}-{level}-{seed}
variants:
  - method: mult-gauss
    level: {from: 0, to: 1.4, steps: 5}
    seed: {from: 42, repeats: 10}
  - method: uniform-quant
    level: [256, 16]
    seed: 42
steps:
  - perturb: {method: "{method}", level: "{level}", seed: "{seed}", group: mlp}

A variant may have a `source` and `steps` of its own. Layers are moved over the whole depth of the source by
`{window: 4, step: 2}`, and found by their depth in any model by `{50%}`, the layer in the middle, and `{0-12.5%}`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import floor
from typing import Any, Literal, NamedTuple

from tensorsurgeon.errors import UsageError, nearest
from tensorsurgeon.notation import format_layers

Spacing = Literal["linear", "geometric"]
Depth = Callable[[Any], int]
"""Tells how many layers a source has; not asked where no layers are found by depth."""

OWN = ("source", "steps", "base", "variant", "dest")
"""What a variant may have of its own, instead of what all have."""

_NUMBER = r"\d+(?:\.\d+)?"
_PLACE = re.compile(r"\{(\w+)\}")
_SHARE = re.compile(rf"\{{({_NUMBER})(?:-({_NUMBER}))?%\}}")


class Variant(NamedTuple):
    """One combination of values by name, and the recipe that they make."""

    values: dict[str, Any]
    recipe: dict[str, Any]


def levels(
    first: float, last: float, steps: int, spacing: Spacing = "linear", whole: bool = False
) -> tuple[float | int, ...]:
    """Return so many numbers from the first to the last, `first + k d` or `first r^k`; rounded where they are `whole`.

    Raises:
        UsageError: for fewer than two steps, a geometric spacing of other than positive numbers, and whole levels that
            are not all different.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise UsageError(f"levels: steps is {steps!r}; two or more are needed.")
    if spacing not in ("linear", "geometric"):
        raise UsageError(f"levels: spacing is {spacing!r}, neither linear nor geometric.")
    if spacing == "geometric" and not (first > 0 and last > 0):
        raise UsageError(f"levels: from {first} to {last} cannot be spaced geometrically; both have to be above 0.")
    shares = [place / (steps - 1) for place in range(steps)]
    if spacing == "linear":
        found = [first + (last - first) * share for share in shares]
    else:
        found = [first * (last / first) ** share for share in shares]
    # Both ends are as they were given, and digits that only binary fractions have are left out.
    made = [first, *(float(f"{level:.12g}") for level in found[1:-1]), last]
    if not whole:
        return tuple(made)
    rounded = tuple(map(round, made))
    if len(set(rounded)) < steps:
        raise UsageError(f"levels: {steps} whole levels from {first} to {last} are not all different: {rounded}.")
    return rounded


def expanded(data: Mapping[str, Any], depth: Depth, more: Mapping[str, Any] | None = None) -> list[Variant]:
    """Return the recipes that a recipe with `variants` stands for, in order; all have the values that are `more`.

    Raises:
        UsageError: with all that is wrong in its variants, and for places that no value goes to.
    """
    rows = data.get("variants")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) and row for row in rows):
        raise UsageError("variants: are a list of mappings such as {level: [0, 0.5], seed: {from: 1, repeats: 3}}.")
    problems: list[str] = []
    made = []
    for row in rows:
        shared = {key: value for key, value in data.items() if key != "variants"}
        template = {**shared, **{key: row[key] for key in OWN if key in row}}
        varied = {key: value for key, value in row.items() if key not in OWN}
        for values in _combinations(varied, partial(depth, template.get("source")), problems):
            known = {**(more or {}), **dict(values)}
            recipe = _filled(template, known, problems)
            made.append(Variant(dict(values), _placed(recipe, depth, problems)))
    if problems:
        raise UsageError(*dict.fromkeys(problems))
    return made


def _combinations(
    row: Mapping[str, Any], depth: Callable[[], int], problems: list[str]
) -> Iterator[list[tuple[str, Any]]]:
    values = []
    for name, value in row.items():
        try:
            values.append([(name, it) for it in _values(value, depth)])
        except (UsageError, TypeError, ZeroDivisionError, OverflowError) as problem:
            problems.append(f"variants: {name}: {problem}")
    return map(list, itertools.product(*values))


def _values(value: Any, depth: Callable[[], int]) -> list[Any]:
    """Return what a name stands for: a value, those of a list, levels between two, seeds from one on, or windows."""
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, list) else [value]
    if set(value) == {"from", "repeats"}:
        return [value["from"] + repeat for repeat in range(value["repeats"])]
    if "window" in value and set(value) <= {"window", "step"}:
        return list(windows(depth(), value["window"], value.get("step", 1)))
    if not {"from", "to", "steps"} <= set(value) <= {"from", "to", "steps", "spacing", "whole"}:
        forms = "{from, to, steps, spacing, whole}, {from, repeats} nor {window, step}"
        raise UsageError(f"{value!r} is neither {forms}.")
    options = {key: value[key] for key in ("spacing", "whole") if key in value}
    return list(levels(value["from"], value["to"], value["steps"], **options))


def windows(depth: int, size: int, step: int = 1) -> tuple[str, ...]:
    """Return blocks of so many neighbouring layers, `0-3`, `2-5` and so on, as far as they fit.

    Raises:
        UsageError: for a size or step that is no whole number from 1, and a window larger than the model.
    """
    for name, number in (("window", size), ("step", step)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UsageError(f"{name} is {number!r}; a whole number from 1 is needed.")
    if size > depth:
        raise UsageError(f"a window of {size} layers does not fit into {depth}.")
    return tuple(format_layers(range(start, start + size)) for start in range(0, depth - size + 1, step))


def layers_at(depth: int, first: float, last: float | None = None) -> str:
    """Return the layer at `first` percent of the depth, or those from there to `last` percent, at least one.

    Of N layers they begin with `floor(first N / 100 + 1/2)` and end before the like of `last`.
    """
    begin = min(depth - 1, floor(first * depth / 100 + (last is not None) / 2))
    end = begin + 1 if last is None else max(begin + 1, floor(last * depth / 100 + 0.5))
    return format_layers(range(begin, min(end, depth)))


def _placed(recipe: dict[str, Any], depth: Depth, problems: list[str]) -> dict[str, Any]:
    """Return a recipe with layers that are given by their depth as numbers."""

    def numbers(match: re.Match[str]) -> str:
        first, last = float(match[1]), float(match[2]) if match[2] else None
        if not first <= (last if last is not None else 100) <= 100:
            problems.append(f"{match[0]}: shares of the depth lie between 0 and 100 %, the lower one first.")
            return "0"
        return layers_at(depth(recipe.get("source")), first, last)

    def placed(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: placed(value) for key, value in part.items()}
        if isinstance(part, list):
            return [placed(value) for value in part]
        return _SHARE.sub(numbers, part) if isinstance(part, str) else part

    return {key: placed(value) if key == "steps" else value for key, value in recipe.items()}


def _filled(part: Any, values: Mapping[str, Any], problems: list[str]) -> Any:
    """Return data with values in their places; a text that is nothing but a place becomes the value itself."""
    if isinstance(part, Mapping):
        return {key: _filled(value, values, problems) for key, value in part.items()}
    if isinstance(part, list):
        return [_filled(value, values, problems) for value in part]
    if not isinstance(part, str):
        return part
    for name in _PLACE.findall(part):
        if name not in values:
            problems.append(f"{part!r}: there is no value {name!r} among the variants.{nearest(name, values)}")
    whole = _PLACE.fullmatch(part)
    if whole:
        return values.get(whole[1], part)
    return _PLACE.sub(lambda match: str(values.get(match[1], match[0])), part)
