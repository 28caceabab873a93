"""A file of directions: one basis for all layers, or one for each, by the names of its arrays."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tensorsurgeon.errors import CheckpointError, RefusedError
from tensorsurgeon.notation import format_layers

if TYPE_CHECKING:
    from tensorsurgeon.kernels.archives import Archive
    from tensorsurgeon.kernels.bases import Basis

Place = int | None
"""A layer, or None for what lies outside of layers."""

_LAYER = re.compile(r"(?:.*[^a-z0-9])?(?:(?:l|layers?|h|blocks?)[._-]?)?(\d+)(?:[._-].*)?", re.IGNORECASE | re.DOTALL)
_ONLY_A_LAYER = re.compile(r"(?:l|layers?)?[._-]?\d+", re.IGNORECASE)
MOST_SAID = 6
"""Wrong names of arrays that are told one by one."""
_POSITIONAL = re.compile(r"arr_\d+")
"""What numpy.savez calls arrays that were given no name, by the place where they stood."""


class Directions(NamedTuple):
    """Bases by layer, what a user should know about them, and what keeps them from being used."""

    bases: Mapping[Place, Basis]
    warnings: list[str]
    problems: list[str]


def read_directions(path: Path, width: int, places: Collection[Place], rank: int | None) -> Directions:
    """Return the basis for each of some layers; a single array is for all of them, unless its name is a layer's.

    Raises:
        SurgeonError: for a file that cannot be read.
    """
    from tensorsurgeon.kernels.archives import open_archive

    archive = open_archive(path)
    names = list(archive.entries)
    if len(names) == 1 and not _ONLY_A_LAYER.fullmatch(names[0]):
        return _read(archive, dict.fromkeys(places, names[0]), width, rank, [])
    by_layer: dict[int, str] = {}
    problems = []
    for name in names:
        match = None if _POSITIONAL.fullmatch(name) else _LAYER.fullmatch(name)
        layer = int(match[1]) if match else -1
        if not match:
            problems.append(
                f"{path}: {name}: its name tells no layer, as L9 does; of several arrays each is one layer's."
            )
        elif layer in by_layer:
            problems.append(f"{path}: {by_layer[layer]} and {name} are both of layer {layer}.")
        else:
            by_layer[layer] = name
    if len(problems) > MOST_SAID:
        problems[MOST_SAID:] = [
            f"{path}: {len(problems) - MOST_SAID} more arrays are like these; is this the right file?"
        ]
    if None in places:
        problems.append(f"{path}: holds a basis for each layer; an embedding lies outside of layers, give one for all.")
    missing = sorted(place for place in places if place is not None and place not in by_layer)
    if missing and not problems:
        there = f"it has {format_layers(sorted(by_layer))}" if by_layer else "it has none"
        problems.append(f"{path}: there are no directions for layers {format_layers(missing)}; {there}, see 'layers'.")
    return _read(archive, {place: by_layer[place] for place in places if place in by_layer}, width, rank, problems)


def _read(
    archive: Archive, names: Mapping[Place, str], width: int, rank: int | None, problems: list[str]
) -> Directions:
    from tensorsurgeon.kernels.bases import make_basis

    made: dict[str, Basis] = {}
    for name in dict.fromkeys(names.values()):
        try:
            made[name] = make_basis(archive.read(name), width, rank)
        except RefusedError as problem:
            problems += [f"{archive.path}: {name}: {text}" for text in problem.problems]
        except CheckpointError as problem:
            problems += problem.problems
    changed = [name for name, basis in made.items() if basis.changed]
    warnings = [f"directions: not orthonormal, and made so: {_some(changed)}."] if changed else []
    return Directions({place: made[name] for place, name in names.items() if name in made}, warnings, problems)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
