"""Which scheme of a compressed-tensors config is for a module.

`config_groups` are tried in their order: first those whose targets name the module, by name or by a pattern after
`re:`, then those that name a class, such as `Linear`. That a module is listed under `ignore` means nothing here: it is
quantised where it has codes.
Source: compressed-tensors, utils/match.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.parts import Settings

METHODS = ("compressed-tensors",)
Scheme = Mapping[str, Any]


def weight_scheme(module: str, settings: Settings) -> Scheme:
    """Return the arguments for a module's weight.

    Raises:
        RefusedError: where the config is of another method, has no scheme for the module, or transforms weights.
    """
    settings.require(METHODS, "those of compressed-tensors")
    groups = settings.values.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise RefusedError(f"{settings.where}: quantization_config has no config_groups; the schemes are not known.")
    _require_no_transform(settings)
    for group in _matching(module, [dict(group) for group in groups.values()]):
        weights = group.get("weights")
        if isinstance(weights, Mapping):
            return weights
    raise RefusedError(f"{settings.where}: none of the config_groups is for {module}, which has codes.")


def _matching(module: str, groups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    named = [group for group in groups if any(_names(str(target), module) for target in group.get("targets") or ())]
    yield from named
    yield from (group for group in groups if group not in named and any(map(_is_class, group.get("targets") or ())))


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module or module.endswith(f".{target}")


def _is_class(target: str) -> bool:
    return target[:1].isupper()


def _require_no_transform(settings: Settings) -> None:
    """Refuse rotations that are done to activations while the model runs: weights alone do not show them."""
    transform = settings.values.get("transform_config") or {}
    for group in (transform.get("config_groups") or {}).values():
        for apply in group.get("apply") or ():
            if apply.get("location") not in ("weight_input", "weight_output"):
                raise RefusedError(
                    f"{settings.where}: transform_config rotates {apply.get('location')!r} while the model runs; plain "
                    "weights would not be those of this model."
                )
