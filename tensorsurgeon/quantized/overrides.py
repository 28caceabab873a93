"""What a config says of one module, where that differs from what it says of all.

GPTQModel writes `dynamic`: regular expressions that match a name from its start, after `+:` or nothing, with values
that count for the module in place of the general ones; after `-:` stand modules that are not quantised. The first that
matches counts. AutoRound writes `extra_config`: names, or regular expressions that match anywhere in one.
Source: GPTQModel, quantization/config.py; AutoRound, inference/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.parts import Parts, Settings

WHOLE = -1
"""The group size of a module that has one group."""


def values_of(settings: Settings, module: str) -> Mapping[str, Any]:
    """Return what the config says of a module.

    Raises:
        RefusedError: for a pattern that is no regular expression.
    """
    values = settings.values
    extra, dynamic = values.get("extra_config") or {}, values.get("dynamic") or {}
    if module in extra:
        return {**values, **extra[module]}
    for pattern, changes in dynamic.items():
        if not pattern.startswith("-:") and _matches(re.match, pattern.removeprefix("+:"), module, settings):
            return {**values, **changes}
    for pattern, changes in extra.items():
        if _matches(re.search, pattern, module, settings):
            return {**values, **changes}
    return values


def columns_in_group(parts: Parts, settings: Settings, columns: int) -> int:
    """Return how many columns share a scale, from the config.

    Raises:
        RefusedError: where it does not say that.
    """
    values = values_of(settings, parts.module)
    size = values.get("group_size", values.get("q_group_size"))
    if type(size) is not int or (size < 1 and size != WHOLE):
        raise RefusedError(
            f"{settings.where}: the group size of {parts.module} is {size!r}; a whole number is needed, or -1 for one "
            "group."
        )
    return columns if size == WHOLE else size


def _matches(how: Callable[[str, str], Any], pattern: str, module: str, settings: Settings) -> bool:
    try:
        return bool(how(pattern, module))
    except re.error as problem:
        raise RefusedError(f"{settings.where}: {pattern!r} is no regular expression: {problem}.") from None
