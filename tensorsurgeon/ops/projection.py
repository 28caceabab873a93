"""Project what weights write into the residual stream away from directions, or onto them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, SurgeonError, UsageError, raise_all
from tensorsurgeon.ops.dequantization import FloatName, as_numbers, decoded
from tensorsurgeon.ops.directions_file import Directions, Place, read_directions
from tensorsurgeon.ops.projecting import (
    LAYERS_TABLE,
    Projection,
    by_layer,
    energies,
    joined,
    make_projection,
    measured,
    report_rows,
)
from tensorsurgeon.ops.residual import Target, choose_writers, warnings_of
from tensorsurgeon.parameters import Count, File, Layers, Words
from tensorsurgeon.quantized import Found, find_modules, format_name, fp8
from tensorsurgeon.registry import operation
from tensorsurgeon.running import running
from tensorsurgeon.scratch import Scratch
from tensorsurgeon.tensor import LazyTensor

if TYPE_CHECKING:
    from tensorsurgeon.kernels.bases import Basis
    from tensorsurgeon.kernels.projecting import Change, Sums

MOST_COMPARED = 128
"""Directions of a basis up to which all pairs of layers are compared."""


@operation
def project(
    ckpt: Checkpoint,
    directions: File,
    layers: Layers | None = None,
    weights: Words = ("mlp.down",),
    keep: bool = False,
    scale: float = 1.0,
    preserve_norms: bool = False,
    rank: Count | None = None,
    dequantize: bool = False,
    requantize: bool = False,
    dtype: FloatName = "bfloat16",
) -> Checkpoint:
    """Take directions out of what weights write into the residual stream: `W_new = (I - scale U U') W`.

    U has orthonormal columns: vectors that are not are made so, one after the other (QR). Weights are changed from the
    side of their output, their biases with them, in float32, and rounded once to their own dtype. With `keep` what is
    left is `U U' W`; a scale of 2 reflects (Householder). A square array is taken for a projector P, and `W_new = P W`.
    Each weight is read once before, for the table of what is removed, and once while it is written.

    This is directional ablation of weights (Arditi et al., 2024, arXiv 2406.11717) for any number of directions.

    Args:
        directions: Safetensors or .npz with one array for all layers, or one for each, named after it (L9, layers.9):
            directions as rows, as columns where only that fits, or a projector.
        layers: Layers to change, such as 9-26; else all.
        weights: What is changed: roles (mlp.down, attention.o, expert.down, embedding.token) or names (down_proj).
        keep: Keep what lies in the subspace, and nothing else.
        scale: How much of it is taken: 1 all, 0.5 half, 2 to the other side.
        preserve_norms: Give each output vector, a column of W, the length that it had, unless nothing of it is left.
        rank: Use the first so many directions.
        dequantize: Decode a quantised model to plain numbers.
        requantize: Write changed FP8 weights as block FP8 again.
        dtype: What FP8 weights become where they are decoded.

    Raises:
        UsageError: for options that contradict each other, and for weights and layers that are not there.
        RefusedError: for directions that are no basis of the residual stream, weights that do not write into it or
            hold NaN, and quantised ones that are neither to be decoded nor quantised again.
    """
    quantization = find_modules(ckpt)
    usage = list(_contradictions(quantization, keep, scale, dequantize, requantize))
    if layers:
        try:
            ckpt.layers.check(layers)
        except UsageError as problem:
            usage += problem.problems
            layers = tuple(layer for layer in layers if layer < ckpt.layers.count)
    decode = dequantize or requantize
    seen, quantized = as_numbers(ckpt, quantization, decode)
    chosen = choose_writers(seen, weights, layers)
    usage += chosen.usage
    touched = sorted(quantized & {it.name for it in chosen.targets})
    problems = [*chosen.problems, *([] if decode else _quantized_problems(ckpt, quantization, touched))]
    found = Directions({}, [], [])
    if chosen.width:
        try:
            found = read_directions(Path(directions), chosen.width, _places(chosen.targets, layers), rank)
        except SurgeonError as problem:
            (usage if isinstance(problem, UsageError) else problems).extend(problem.problems)
    if keep and any(it.projector for it in found.bases.values()):
        usage.append("project: keep: a projector says itself what it keeps; leave keep out.")
    problems += found.problems
    raise_all(UsageError if usage else RefusedError, [*usage, *problems])
    plain, exact = (decoded(ckpt, quantization, dtype), seen) if decode else (ckpt, ckpt)
    kept = ckpt if requantize else plain
    changes = {place: _change(basis, keep, scale, preserve_norms) for place, basis in found.bases.items()}
    scratch = Scratch()
    known = {place: _known(basis, changes[place]) for place, basis in found.bases.items()}
    projections = [
        make_projection(it, exact[it.name], changes[it.layer], known[it.layer], scratch) for it in chosen.targets
    ]
    tensors = dict(kept.tensors)
    for it in projections:
        tensors |= _written(kept, it)
    report = {**kept.report, **joined(kept.report, _report(projections, found.bases))}
    changed = kept.replace(tensors=tensors, report=report)
    return changed.warn(*found.warnings, *warnings_of(plain, chosen.targets))


def _contradictions(found: Found, keep: bool, scale: float, dequantize: bool, requantize: bool) -> Iterator[str]:
    if keep and scale != 1:
        yield "project: keep and scale: what is kept is kept whole; leave one of them out."
    if not math.isfinite(scale):
        yield f"project: scale: {scale} is not a finite number."
    if dequantize and requantize:
        yield "project: dequantize and requantize: choose one of them."
    elif (dequantize or requantize) and not found.coded:
        yield f"project: {'dequantize' if dequantize else 'requantize'}: no weight of the model is quantised."


def _quantized_problems(ckpt: Checkpoint, found: Found, touched: Sequence[str]) -> Iterator[str]:
    if touched:
        yield (
            f"project: {len(touched)} of these weights are quantised ({format_name(ckpt, found)}), for example "
            f"{touched[0]!r}; say dequantize to decode the model, or requantize to write them as block FP8 again."
        )


def _places(targets: Sequence[Target], layers: Sequence[int] | None) -> set[Place]:
    """Return the layers that need a basis: those of the weights, and all that were asked for."""
    return {it.layer for it in targets} | set(layers or ())


def _change(basis: Basis, keep: bool, scale: float, preserve: bool) -> Change:
    from tensorsurgeon.kernels.projecting import make_change

    # A projector P = U U' gives I - a (I - P) = (1 - a) I + a U U'.
    m, s = (0.0, 1.0) if keep else (1.0, -scale) if basis.complement else (1.0 - scale, scale)
    return make_change(basis.vectors, m, s, preserve)


def _known(basis: Basis, change: Change) -> str:
    return f"{change.m!r} W + {change.s!r} U U'W{', norms preserved' * change.preserve}, U {basis.digest()}"


def _written(kept: Checkpoint, projection: Projection) -> dict[str, LazyTensor]:
    """Return what becomes of a weight: itself, or codes and scales."""
    name = projection.target.name
    if kept[name].dtype != "F8_E4M3":
        return {name: projection.tensor(kept[name].dtype)}
    return fp8.requantized(kept, name, projection.tensor("F32"))


def _report(projections: Sequence[Projection], bases: Mapping[Place, Basis]) -> dict[str, Any]:
    """Return tables of the weights, of layers and of pairs of bases; what is only planned has no figures of weights."""
    sums: dict[str, Sums] = {} if running().planned else measured(projections)
    rows = []
    groups = list(by_layer(projections))
    in_layers = {place: bases[place] for place, _ in groups if place is not None}
    # A file with a basis for each layer has none for embeddings.
    distinct = len({id(it) for it in in_layers.values()}) > 1
    angles = _angles(list(in_layers.values()))
    for place, group in groups:
        row: dict[str, Any] = {"layer": place, "tensors": len(group), "directions": len(bases[place].vectors)}
        row |= energies([sums[it.target.name] for it in group]) if sums else {}
        rows.append(row | ({"angle to the next": next(angles)} if distinct else {}))
    tables: dict[str, Any] = {LAYERS_TABLE: rows}
    pairs = _widest_pair(in_layers) if distinct else {}
    return tables | ({"projected": report_rows(projections, sums)} if sums else {}) | pairs


def _angles(bases: Sequence[Basis]) -> Iterator[float | None]:
    from tensorsurgeon.kernels.bases import neighbouring_angles

    return iter(neighbouring_angles([it.vectors for it in bases]))


def _widest_pair(bases: Mapping[int, Basis]) -> dict[str, Any]:
    """Return a table of the two layers whose bases are farthest apart, unless these are large."""
    from tensorsurgeon.kernels.bases import largest_angle

    if max(len(it.vectors) for it in bases.values()) > MOST_COMPARED:
        return {}
    angle, one, other = max(
        (largest_angle(bases[one].vectors, bases[other].vectors), -one, -other)
        for one, other in combinations(sorted(bases), 2)
    )
    return {"bases farthest apart": [{"layer": -one, "and": -other, "largest angle": angle}]}
