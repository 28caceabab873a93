"""Which layers of one model are those of another, and which tensors belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.kernels.arrays import as_numbers
from tensorsurgeon.names import LayerStack, layer_name
from tensorsurgeon.quantized import PLAIN
from tensorsurgeon.tensor import LazyTensor

SAMPLE = 1024
"""Numbers of a tensor by which layers are recognised."""
KIN = 0.5
"""Cosine from which two layers are taken for the same, changed: layers that are not are at 0, but for chance."""
PROBE = 4096
"""Bytes of a tensor by which the same one under another name is looked for."""


class Alignment(NamedTuple):
    """Which tensor of the first model belongs to each of the second, and which layer to each layer.

    `layers` has None for a layer that the first model does not have; it is empty where layers are not clear.
    """

    names: Mapping[str, str]
    layers: tuple[int | None, ...]

    @property
    def identity(self) -> bool:
        """Whether layers stand where they stood, as far as the second model has them."""
        return self.layers == tuple(range(len(self.layers)))


def align(one: Checkpoint, other: Checkpoint) -> Alignment:
    """Return how the tensors of two models, as plain numbers where they can be decoded, belong together."""
    stacks = [_stack(it) for it in (one, other)]
    first, second = stacks
    layers: tuple[int | None, ...] = ()
    if first and second:
        layers = _layers(_samples(one, first), _samples(other, second))
    names = {}
    for name in other:
        layer = second.layer_of(name) if first and second else None
        origin: str | None = name
        if first and second and layer is not None:
            found = layers[layer] if layer < len(layers) else first.count + layer - second.count
            at = layer_name(name)
            origin = f"{first.prefix}{found}.{at.rest}" if at and found is not None else None
        if origin is not None and origin in one:
            names[name] = origin
    return Alignment(names, layers)


def renamed(one: Checkpoint, other: Checkpoint, gone: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Return which new tensors may be ones that are gone, under another name: of one dtype and shape, alike in part."""
    known: dict[tuple[Any, ...], str] = {}
    for name in gone:
        known.setdefault(_probe(one[name]), name)
    pairs = {name: known.get(_probe(other[name])) for name in new}
    return {name: origin for name, origin in pairs.items() if origin is not None}


def _stack(ckpt: Checkpoint) -> LayerStack | None:
    try:
        return ckpt.layers
    except CheckpointError:
        return None


def _probe(tensor: LazyTensor) -> tuple[Any, ...]:
    rows = max(1, PROBE // max(1, tensor.row_bytes))
    start = max(0, min(tensor.rows // 2, tensor.rows - rows))
    return tensor.dtype, tensor.shape, bytes(tensor.read(start, min(start + rows, tensor.rows)).data)


def _samples(ckpt: Checkpoint, stack: LayerStack) -> list[dict[str, Any]]:
    """Return some numbers of every matrix of each layer, by the rest of its name, each set of length 1."""
    found: list[dict[str, Any]] = [{} for _ in range(stack.count)]
    for name, tensor in ckpt.tensors.items():
        at = layer_name(name)
        known = at and at.prefix == stack.prefix and at.index < stack.count
        if at and known and tensor.dtype in PLAIN and len(tensor.shape) > 1 and tensor.nbytes:
            rows = max(1, SAMPLE // prod(tensor.shape[1:]))
            start = max(0, min(tensor.rows // 2, tensor.rows - rows))
            numbers = as_numbers(tensor.read(start, min(start + rows, tensor.rows))).reshape(-1)[:SAMPLE]
            numbers = np.nan_to_num(numbers, posinf=0, neginf=0)
            size = float(np.linalg.norm(numbers))
            found[at.index][at.rest] = numbers / size if size else numbers
    return found


def _layers(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> tuple[int | None, ...]:
    """Return the layer of the first model that each of the second is most like."""
    layers: list[int | None] = []
    for place, sample in enumerate(other):
        likeness = [_likeness(known, sample) for known in one]
        best = max(range(len(one)), key=lambda layer: (round(likeness[layer], 9), layer == place))
        layers.append(best if likeness[best] >= KIN else None)
    if not any(layer is not None for layer in layers):
        # Nothing is alike: what bears the same name is compared.
        return tuple(range(min(len(one), len(other)))) + (None,) * (len(other) - len(one))
    for place, layer in enumerate(layers):
        # A layer that is like none was changed beyond likeness, where there is one left in its place.
        before = layers[place - 1] if place else -1
        expected = place if before is None else before + 1
        if layer is None and expected < len(one) and expected not in layers:
            layers[place] = expected
    return tuple(layers)


def _likeness(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the mean cosine of the samples that both layers have in the same shape."""
    shared = [rest for rest in one.keys() & other.keys() if one[rest].shape == other[rest].shape]
    return sum(float(one[rest] @ other[rest]) for rest in sorted(shared)) / len(shared) if shared else 0.0
