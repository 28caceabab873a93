"""Variants of a recipe: one recipe for each combination of values, which stand in braces where they go.

dest: degraded/{method}-{level}-{seed}
variants:
  - method: mult-gauss
    level: {from: 0, to: 1.4, steps: 5}
    seed: {from: 42, repeats: 10}
steps:
  - perturb: {method: "{method}", level: "{level}", seed: "{seed}", group: mlp}
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tensorsurgeon.errors import UsageError, nearest

Spacing = Literal["linear", "geometric"]

_PLACE = re.compile(r"\{(\w+)\}")


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


def expanded(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the recipes that a recipe with `variants` stands for, in order.

    Raises:
        UsageError: with all that is wrong in its variants, and for places that no value goes to.
    """
    rows = data.get("variants")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) and row for row in rows):
        raise UsageError("variants: are a list of mappings such as {level: [0, 0.5], seed: {from: 1, repeats: 3}}.")
    problems: list[str] = []
    combinations = [dict(them) for row in rows for them in _combinations(row, problems)]
    if problems:
        raise UsageError(*problems)
    template = {key: value for key, value in data.items() if key != "variants"}
    made = [_filled(template, values, problems) for values in combinations]
    dests = [str(recipe.get("dest")) for recipe in made]
    for dest in sorted({dest for dest in dests if dests.count(dest) > 1}):
        problems.append(f"dest: {dests.count(dest)} variants would be written to {dest}; name what differs in braces.")
    if problems:
        raise UsageError(*dict.fromkeys(problems))
    return made


def _combinations(row: Mapping[str, Any], problems: list[str]) -> Iterator[list[tuple[str, Any]]]:
    values = []
    for name, value in row.items():
        try:
            values.append([(name, it) for it in _values(value)])
        except (UsageError, TypeError, ZeroDivisionError, OverflowError) as problem:
            problems.append(f"variants: {name}: {problem}")
    return map(list, itertools.product(*values))


def _values(value: Any) -> list[Any]:
    """Return what a name stands for: one value, those of a list, levels between two, or seeds from one on."""
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, list) else [value]
    if set(value) == {"from", "repeats"}:
        return [value["from"] + repeat for repeat in range(value["repeats"])]
    if not {"from", "to", "steps"} <= set(value) <= {"from", "to", "steps", "spacing", "whole"}:
        raise UsageError(f"{value!r} is neither {{from, to, steps, spacing, whole}} nor {{from, repeats}}.")
    options = {key: value[key] for key in ("spacing", "whole") if key in value}
    return list(levels(value["from"], value["to"], value["steps"], **options))


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
