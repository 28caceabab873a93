"""From activations of groups of samples to the directions in which the groups differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tensorsurgeon.derivations.destination import check_out, write_out
from tensorsurgeon.errors import CheckpointError, RefusedError, UsageError, nearest, raise_all
from tensorsurgeon.format import header_bytes
from tensorsurgeon.notation import format_layers
from tensorsurgeon.parameters import Count, File, Layers, Words
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.registry import Findings, derivation
from tensorsurgeon.running import Budget, running

if TYPE_CHECKING:
    from tensorsurgeon.kernels.archives import Archive
    from tensorsurgeon.kernels.contrasts import Contrast

MethodName = Literal["deviations", "mean-difference", "difference-pca", "whitened-difference"]
RANK = 10
"""Directions where nothing is said, unless groups are too few for as many."""
_KEY = re.compile(r"(.+)_L(\d+)", re.DOTALL)


class Samples(NamedTuple):
    """Arrays of activations by layer and group, in the order of groups; `others` have no such name."""

    layers: Mapping[int, Mapping[str, str]]
    groups: tuple[str, ...]
    others: list[str]


@derivation
def directions(
    activations: File,
    out: File,
    method: MethodName = "deviations",
    rank: Count | None = None,
    layers: Layers | None = None,
    groups: Words | None = None,
) -> Findings:
    """Find the directions in which groups of activations differ, and write them as a basis for each layer.

    ACTIVATIONS holds arrays of shape (samples, width), named after group and layer: `en_L9`, `zh_L9`. OUT is a
    safetensors file of orthonormal rows in float32, the most important first, named `L9`, for `project`. A table tells
    what share they hold of what the method decomposes, and of the variance of all samples.

    `deviations`: of each sample the mean over groups is removed, and the principal directions of all that is left are
    taken; sample i of every group is the same one, such as one problem in several languages. `mean-difference`: the
    means of groups, from the mean of these; of two groups, their difference. `difference-pca`: the principal directions
    of the differences of pairs of two groups, about zero. `whitened-difference`: means with the covariance within
    groups divided out (linear discriminants), which is shrunk as Ledoit and Wolf (2004) do.

    Args:
        out: The file to write, .safetensors.
        method: How directions are found.
        rank: How many directions; else 10, or for the two methods of means one less than groups if that is fewer.
        layers: Layers to take, such as 9-26; else all that are there.
        groups: Groups to take, with commas between them; else all that are there.

    Raises:
        UsageError: for groups and layers that are not there, and for too few or too many of them.
        RefusedError: for arrays that do not go together, and for NaN or infinity.
        DestinationError: for a file that exists already or cannot be written.
    """
    from tensorsurgeon.kernels.archives import open_archive
    from tensorsurgeon.kernels.contrasts import METHODS

    place = Path(out)
    archive = open_archive(Path(activations))
    samples = _find_samples(archive, groups)
    chosen = sorted(set(samples.layers if layers is None else layers))
    usage = [*_choice_problems(samples, groups, layers), *_method_problems(method, len(samples.groups), rank)]
    raise_all(UsageError, (f"directions: {text}" for text in usage))
    check_out(place, "directions", (".safetensors",))
    most = rank or (min(RANK, len(samples.groups) - 1) if METHODS[method].means else RANK)
    raise_all(RefusedError, _shape_problems(archive, samples, chosen, METHODS[method].paired))
    found = _contrasts(archive, samples, chosen, method, most)
    told = {
        "method": method,
        "groups": ",".join(samples.groups),
        "captured": json.dumps({f"L{layer}": _short(it.captured) for layer, it in found.items()}),
    }
    write_out(place, _as_safetensors(found, told))
    tables = {"directions": _rows(archive, samples, found)}
    return Findings(tables | ({"not read": [{"array": name} for name in samples.others]} if samples.others else {}))


def _find_samples(archive: Archive, groups: Sequence[str] | None) -> Samples:
    """Return the arrays of the groups that are wanted, all of them where nothing is said, in order of their names."""
    named = {name: _KEY.fullmatch(name) for name in archive.entries}
    keys = {name: (match[1], int(match[2])) for name, match in named.items() if match}
    wanted = tuple(dict.fromkeys(groups or sorted({group for group, _ in keys.values()})))
    layers: dict[int, dict[str, str]] = {}
    for name, (group, layer) in keys.items():
        held = layers.setdefault(layer, {})
        if group in wanted:
            held[group] = name
    ordered = {layer: {group: held[group] for group in wanted if group in held} for layer, held in layers.items()}
    return Samples(ordered, wanted, [name for name in archive.entries if name not in keys])


def _choice_problems(samples: Samples, groups: Sequence[str] | None, layers: Sequence[int] | None) -> Iterator[str]:
    if not samples.layers:
        yield f"no array is named as en_L9 is, after group and layer; there are {', '.join(samples.others[:4])}."
        return
    there = {group for held in samples.layers.values() for group in held}
    for group in samples.groups:
        if group not in there:
            yield f"groups: there is no {group!r}.{nearest(group, there)}"
    missing = sorted(set(layers or ()) - samples.layers.keys())
    if missing:
        listed = format_layers(sorted(samples.layers))
        yield f"layers: there are no activations of layers {format_layers(missing)}; there are {listed}."
    for layer in sorted(set(layers or samples.layers) & samples.layers.keys()):
        lacking = [group for group in samples.groups if group in there and group not in samples.layers[layer]]
        if lacking:
            yield f"layer {layer} has no array of {', '.join(lacking)}; leave out the layer or the group."


def _method_problems(name: str, groups: int, rank: int | None) -> Iterator[str]:
    from tensorsurgeon.kernels.contrasts import METHODS

    method = METHODS[name]
    if groups < 2 or (method.two and groups != 2):
        yield f"{name} takes {'two groups' if method.two else 'two groups or more'}, not {groups}."
    elif method.means and rank and rank > groups - 1:
        yield f"rank: {name} finds one direction less than there are groups, {groups - 1} and not {rank}."


def _shape_problems(archive: Archive, samples: Samples, layers: Sequence[int], paired: bool) -> Iterator[str]:
    names = [name for layer in layers for name in samples.layers[layer].values()]
    shapes = {name: archive.entries[name].shape for name in names}
    wrong = [name for name, shape in shapes.items() if len(shape) != 2 or not min(shape)]
    yield from (f"{name}: has shape {list(shapes[name])}, not (samples, width)." for name in wrong)
    sound = [name for name in names if name not in wrong]
    for name in sound:
        if shapes[name][1] != shapes[sound[0]][1]:
            yield f"{name}: is {shapes[name][1]} wide, and {sound[0]} is {shapes[sound[0]][1]}."
    for layer in layers if paired else ():
        counts = {shapes[name][0] for name in samples.layers[layer].values() if name not in wrong}
        if len(counts) > 1:
            listed = ", ".join(f"{name} {shapes[name][0]}" for name in samples.layers[layer].values())
            yield f"layer {layer}: samples of all groups belong together, but their numbers differ: {listed}."


def _contrasts(
    archive: Archive, samples: Samples, layers: Sequence[int], method: str, rank: int
) -> dict[int, Contrast]:
    """Return the directions of each layer, several layers at a time.

    Raises:
        RefusedError: with what is wrong with each of the layers.
    """
    from tensorsurgeon.kernels.contrasts import find_contrast

    budget = Budget(running().memory)
    sizes = {layer: _nbytes(archive, samples.layers[layer].values()) for layer in layers}
    problems: list[str] = []

    def find(layer: int) -> Contrast | None:
        with budget.reserve(4 * sizes[layer]):
            try:
                arrays = [_finite(archive, name) for name in samples.layers[layer].values()]
                return find_contrast(method, arrays, rank)
            except (RefusedError, CheckpointError) as problem:
                problems.extend(f"layer {layer}: {text}" for text in problem.problems)
                return None
            finally:
                advance(sizes[layer])

    with (
        progress_bar(sum(sizes.values()), "directions", running().quiet) as advance,
        ThreadPoolExecutor(running().workers) as pool,
    ):
        found = dict(zip(layers, pool.map(find, layers), strict=True))
    raise_all(RefusedError, sorted(problems))
    return {layer: it for layer, it in found.items() if it}


def _finite(archive: Archive, name: str) -> Any:
    from tensorsurgeon.kernels.bases import require_finite

    numbers = archive.read(name)
    require_finite(numbers, name)
    return numbers


def _nbytes(archive: Archive, names: Any) -> int:
    return sum(8 * archive.entries[name].shape[0] * archive.entries[name].shape[1] for name in names)


def _as_safetensors(found: Mapping[int, Contrast], metadata: Mapping[str, str]) -> bytes:
    arrays = {f"L{layer}": it.vectors.astype("<f4") for layer, it in found.items()}
    described = {name: ("F32", array.shape) for name, array in arrays.items()}
    return header_bytes(described, metadata) + b"".join(array.tobytes() for array in arrays.values())


def _rows(archive: Archive, samples: Samples, found: Mapping[int, Contrast]) -> list[dict[str, Any]]:
    from tensorsurgeon.kernels.bases import neighbouring_angles

    angles = neighbouring_angles([it.vectors for it in found.values()])
    return [
        {
            "layer": layer,
            "samples": sum(archive.entries[name].shape[0] for name in samples.layers[layer].values()),
            "groups": len(samples.groups),
            "rank": len(it.vectors),
            "captured": _short(it.captured),
            "of all variance": _short(it.of_all),
            "angle to the next": angle,
        }
        for (layer, it), angle in zip(found.items(), angles, strict=True)
    ]


def _short(number: float) -> float:
    return float(f"{number:.6g}")
