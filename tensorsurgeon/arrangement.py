"""Layers of one or several models in a new order, and what layers are made of."""

from __future__ import annotations

from typing import NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.names import LayerStack, companions, layer_name
from tensorsurgeon.notation import NamedLayer, format_named_layers
from tensorsurgeon.renaming import Renaming, make_renaming


class Origin(NamedTuple):
    """Where an output layer comes from: the place of a model among the models, and a layer of it."""

    model: int
    layer: int


Shapes = frozenset[tuple[str, tuple[int, ...]]]


class Arrangement(NamedTuple):
    """Layers of one or several models in a new order: output layer k is `origins[k]`.

    The config is the first model's, edited. `assume_uniform` leaves alone what might be per layer but is not known.
    """

    models: tuple[Checkpoint, ...]
    origins: tuple[Origin, ...]
    assume_uniform: bool = False
    names: tuple[str, ...] = ("",)

    @property
    def is_identity(self) -> bool:
        """Whether the first model's layers stay as they are."""
        return self.origins == tuple(Origin(0, layer) for layer in range(self.models[0].layers.count))

    def places(self, model: int) -> dict[int, list[int]]:
        """Return where each layer of a model goes; layers behind the first model's stack stay behind it."""
        stack = self.models[model].layers
        places: dict[int, list[int]] = {layer: [] for layer in range(stack.count)}
        for place, origin in enumerate(self.origins):
            if origin.model == model:
                places[origin.layer].append(place)
        extra = range(stack.extra if model == 0 else 0)
        return places | {stack.count + behind: [len(self.origins) + behind] for behind in extra}

    def renamings(self) -> list[Renaming]:
        """Return how the modules of each model are renamed."""
        return [make_renaming(it, it.layers, self.places(model)) for model, it in enumerate(self.models)]

    def text(self) -> str:
        """Return the sequence in its notation."""
        return format_named_layers(NamedLayer(self.names[model], layer) for model, layer in self.origins)


def layer_shapes(ckpt: Checkpoint, stack: LayerStack) -> list[Shapes]:
    """Return what each layer is made of: the names and shapes of its weights, quantised or not.

    Tensors that describe a quantised weight do not count, nor does the shape of one that is packed in any layer.
    """
    described = companions(ckpt.tensors)
    packed = {_rest(module) for module in described.values() if f"{module}.weight" not in ckpt.tensors}
    shapes: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(stack.count + stack.extra)]
    for name, tensor in ckpt.tensors.items():
        found = layer_name(name)
        if not found or found.prefix != stack.prefix:
            continue
        module = _rest(described.get(name, name.removesuffix(".weight")))
        if module in packed:
            shapes[found.index].add((f"{module}.weight", ()))
        elif name not in described:
            shapes[found.index].add((found.rest, tensor.shape))
    # Layers that are alike are one object, which makes them quick to compare.
    interned: dict[Shapes, Shapes] = {}
    return [interned.setdefault(it, it) for it in map(frozenset, shapes)]


def _rest(module: str) -> str:
    found = layer_name(module)
    return found.rest if found else module
