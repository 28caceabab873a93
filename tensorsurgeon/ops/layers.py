"""Delete, repeat, reverse and re-order decoder layers: every one a layer sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tensorsurgeon.arrangement import Arrangement, Origin
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import CheckpointError, RefusedError, UsageError
from tensorsurgeon.families import REFUSED
from tensorsurgeon.names import LayerStack
from tensorsurgeon.ops.arranging import arranged
from tensorsurgeon.parameters import Count, Layers
from tensorsurgeon.registry import operation


@operation
def select_layers(ckpt: Checkpoint, layers: Layers, assume_uniform: bool = False) -> Checkpoint:
    """Make a model of the given layers, in the given order, numbered anew.

    Every per-layer field of the config follows. Multi-token prediction layers keep their place behind the stack.

    Args:
        layers: Source layers in output order, such as 0-7,12,51-36,0-63/2,32*5,(8-15)*2.
        assume_uniform: Leave settings alone that may be per layer but are not known, as of models with own code.

    Raises:
        UsageError: for a layer that the model does not have.
        RefusedError: for a config that cannot say what the layers would be in their new order.
    """
    return _reordered(ckpt, assume_uniform, layers)


@operation
def drop_layers(ckpt: Checkpoint, layers: Layers, assume_uniform: bool = False) -> Checkpoint:
    """Remove decoder layers and renumber those that stay.

    Args:
        layers: Layers to remove, such as 3,8-11.
        assume_uniform: Leave settings alone that may be per layer but are not known, as of models with own code.
    """
    return _reordered(ckpt, assume_uniform, _stack(ckpt).without(layers))


@operation
def repeat_layers(
    ckpt: Checkpoint, layers: Layers, times: Count = 2, each: bool = False, assume_uniform: bool = False
) -> Checkpoint:
    """Repeat a block of neighbouring layers, or each of several layers, where they stand.

    Args:
        layers: Layers to repeat, such as 8-15.
        times: How often they occur in the result.
        each: Repeat every layer by itself (8,8,9,9) rather than the block (8,9,8,9).
        assume_uniform: Leave settings alone that may be per layer but are not known, as of models with own code.

    Raises:
        UsageError: for a block whose layers are not neighbours in ascending order.
    """
    _stack(ckpt).check(layers)
    everything = range(_stack(ckpt).count)
    if each:
        return _reordered(
            ckpt, assume_uniform, [layer for layer in everything for _ in range(times if layer in layers else 1)]
        )
    first, last = min(layers), max(layers)
    if tuple(layers) != tuple(range(first, last + 1)):
        raise UsageError("layers: a block to repeat is a range such as 8-15; use --each to repeat single layers.")
    return _reordered(ckpt, assume_uniform, [*everything[:first], *list(layers) * times, *everything[last + 1 :]])


@operation
def reverse_layers(ckpt: Checkpoint, layers: Layers | None = None, assume_uniform: bool = False) -> Checkpoint:
    """Reverse the order of all layers, or of some among themselves.

    Args:
        layers: Layers that change places, such as 8-15; all where not given.
        assume_uniform: Leave settings alone that may be per layer but are not known, as of models with own code.
    """
    sequence = list(range(_stack(ckpt).count))
    chosen = sorted(set(sequence if layers is None else layers))
    _stack(ckpt).check(chosen)
    for place, layer in zip(chosen, reversed(chosen), strict=True):
        sequence[place] = layer
    return _reordered(ckpt, assume_uniform, sequence)


@operation
def keep_layers(
    ckpt: Checkpoint,
    every: Count | None = None,
    first: Count | None = None,
    last: Count | None = None,
    middle: Count | None = None,
    parity: Literal["even", "odd"] | None = None,
    assume_uniform: bool = False,
) -> Checkpoint:
    """Keep layers by one rule and remove the others.

    Args:
        every: Keep layers 0, N, 2N and so on.
        first: Keep the first N layers.
        last: Keep the last N layers.
        middle: Keep the middle N layers; of an odd rest, the larger half is cut at the end.
        parity: Keep the layers with even or with odd numbers.
        assume_uniform: Leave settings alone that may be per layer but are not known, as of models with own code.

    Raises:
        UsageError: for no rule or several, and for more layers than there are.
    """
    rules = {"every": every, "first": first, "last": last, "middle": middle, "parity": parity}
    given = {key: value for key, value in rules.items() if value is not None}
    if len(given) != 1:
        raise UsageError("keep-layers: give just one of every, first, last, middle and parity.")
    count = _stack(ckpt).count
    wanted = first or last or middle or 0
    if wanted > count:
        raise UsageError(f"keep-layers: {wanted} layers are asked for, but the model has {count}.")
    start = (count - wanted) // 2
    kept = {
        "every": range(0, count, every or 1),
        "first": range(wanted),
        "last": range(count - wanted, count),
        "middle": range(start, start + wanted),
        "parity": range(parity == "odd", count, 2),
    }
    return _reordered(ckpt, assume_uniform, kept[next(iter(given))])


def _stack(ckpt: Checkpoint) -> LayerStack:
    """Return the layers, or say why a model whose tensors do not show them has none to re-order."""
    try:
        return ckpt.layers
    except CheckpointError:
        if ckpt.model_type in REFUSED:
            raise RefusedError(f"model_type {ckpt.model_type!r}: {REFUSED[ckpt.model_type]}.") from None
        raise


def _reordered(ckpt: Checkpoint, assume_uniform: bool, layers: Iterable[int]) -> Checkpoint:
    sequence = tuple(layers)
    _stack(ckpt).check(sequence)
    return arranged(Arrangement((ckpt,), tuple(Origin(0, layer) for layer in sequence), assume_uniform))
