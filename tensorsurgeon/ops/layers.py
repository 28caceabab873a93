"""Delete, repeat, reverse and re-order decoder layers: every one a layer sequence."""

from __future__ import annotations

from typing import Literal

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import UsageError
from tensorsurgeon.names import LayerSequence
from tensorsurgeon.registry import Count, Layers, operation
from tensorsurgeon.sequence import config_under_sequence
from tensorsurgeon.tensor import LazyTensor


@operation
def select_layers(ckpt: Checkpoint, layers: Layers) -> Checkpoint:
    """Make a model of the given layers, in the given order, numbered anew.

    Multi-token prediction layers that follow the stack keep their place behind it.

    Args:
        layers: Source layers in output order, such as 0-7,12,51-36,0-63/2,32*5,(8-15)*2.

    Raises:
        UsageError: for a layer that the model does not have.
        RefusedError: for a config with a per-layer field that the sequence does not leave as it is.
    """
    return _with_sequence(ckpt, layers)


@operation
def drop_layers(ckpt: Checkpoint, layers: Layers) -> Checkpoint:
    """Remove decoder layers and renumber those that stay.

    Args:
        layers: Layers to remove, such as 3,8-11.
    """
    return _with_sequence(ckpt, ckpt.layers.without(layers))


@operation
def repeat_layers(ckpt: Checkpoint, layers: Layers, times: Count = 2, each: bool = False) -> Checkpoint:
    """Repeat a block of neighbouring layers, or each of several layers, where they stand.

    Args:
        layers: Layers to repeat, such as 8-15.
        times: How often they occur in the result.
        each: Repeat every layer by itself (8,8,9,9) rather than the block (8,9,8,9).

    Raises:
        UsageError: for a block whose layers are not neighbours in ascending order.
    """
    ckpt.layers.check(layers)
    everything = range(ckpt.layers.count)
    if each:
        return _with_sequence(ckpt, [layer for layer in everything for _ in range(times if layer in layers else 1)])
    first, last = min(layers), max(layers)
    if tuple(layers) != tuple(range(first, last + 1)):
        raise UsageError("layers: a block to repeat is a range such as 8-15; use --each to repeat single layers.")
    return _with_sequence(ckpt, [*everything[:first], *list(layers) * times, *everything[last + 1 :]])


@operation
def reverse_layers(ckpt: Checkpoint, layers: Layers | None = None) -> Checkpoint:
    """Reverse the order of all layers, or of some among themselves.

    Args:
        layers: Layers that change places, such as 8-15; all where not given.
    """
    sequence = list(range(ckpt.layers.count))
    chosen = sorted(set(sequence if layers is None else layers))
    ckpt.layers.check(chosen)
    for place, layer in zip(chosen, reversed(chosen), strict=True):
        sequence[place] = layer
    return _with_sequence(ckpt, sequence)


@operation
def keep_layers(
    ckpt: Checkpoint,
    every: Count | None = None,
    first: Count | None = None,
    last: Count | None = None,
    middle: Count | None = None,
    parity: Literal["even", "odd"] | None = None,
) -> Checkpoint:
    """Keep layers by one rule and remove the others.

    Args:
        every: Keep layers 0, N, 2N and so on.
        first: Keep the first N layers.
        last: Keep the last N layers.
        middle: Keep the middle N layers; of an odd rest, the larger half is cut at the end.
        parity: Keep the layers with even or with odd numbers.

    Raises:
        UsageError: for no rule or several, and for more layers than there are.
    """
    given = {key: value for key, value in locals().items() if key != "ckpt" and value is not None}
    if len(given) != 1:
        raise UsageError("keep-layers: give just one of every, first, last, middle and parity.")
    count = ckpt.layers.count
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
    return _with_sequence(ckpt, kept[next(iter(given))])


def _with_sequence(ckpt: Checkpoint, layers: object) -> Checkpoint:
    sequence: LayerSequence = tuple(layers)  # type: ignore[arg-type]
    stack = ckpt.layers
    stack.check(sequence)
    config = config_under_sequence(ckpt, stack, sequence)
    by_layer: dict[int, dict[str, LazyTensor]] = {}
    before: dict[str, LazyTensor] = {}
    after: dict[str, LazyTensor] = {}
    for name, tensor in ckpt.tensors.items():
        index = stack.layer_of(name)
        if index is not None:
            by_layer.setdefault(index, {})[name] = tensor
        else:
            (after if by_layer else before)[name] = tensor
    extra = range(stack.count, stack.count + stack.extra)
    moved = {
        stack.renamed(name, place): tensor
        for place, layer in enumerate((*sequence, *extra))
        for name, tensor in by_layer[layer].items()
    }
    return ckpt.replace(tensors={**before, **moved, **after}, config=config)
