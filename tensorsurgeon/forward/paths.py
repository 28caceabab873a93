"""The ways of many models through their layers, as a tree: models that begin with the same layers share the states.

A node is what a layer leaves on the states of the node before it. Where two models go through the same layers from the
same states, they go through the same nodes; where one of them turns off, the tree branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.forward.batches import Batch, make_batches
from tensorsurgeon.forward.head import Head
from tensorsurgeon.forward.identities import (
    call_identities,
    embedded_identity,
    layer_numbers,
    module_identities,
    shell_identity,
    weights_identity,
)
from tensorsurgeon.forward.parts import Parts
from tensorsurgeon.forward.shelf import Shelf
from tensorsurgeon.forward.shell import Shell
from tensorsurgeon.forward.skeleton import Dtype
from tensorsurgeon.ops.dequantization import as_plain

Prompt = tuple[int, ...]


class Wanted(NamedTuple):
    """A model, of which prompts the logits after the `last` token are wanted, and of which those at the `whole`."""

    ckpt: Checkpoint
    last: frozenset[Prompt] = frozenset()
    whole: frozenset[Prompt] = frozenset()

    @property
    def prompts(self) -> frozenset[Prompt]:
        """All prompts that it is asked."""
        return self.last | self.whole


class Layer(NamedTuple):
    """A layer to be held: of which model's shell and weights, and under which number there."""

    shell: Shell
    parts: Parts
    number: int


@dataclass(eq=False)
class Node:
    """States: those that the layer of an `identity` leaves on the parent's, for the batches that are `needed`.

    The root has no parent: its states are the embedded prompts. `sizes` are the bytes of each batch, and `ends` the
    models whose last layer it is.
    """

    identity: str
    parent: Node | None
    sizes: list[int]
    needed: set[int] = field(default_factory=set)
    children: dict[str, Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)


class Kin:
    """Models of one shell: the head of all of them, and where they begin."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.calls = call_identities(shell)
        self.modules = module_identities(shell.skeleton.layers)
        self.head = Head(shell)
        self.begins = embedded_identity(shell)
        self.models: list[int] = []

    def take(self) -> list[torch.Tensor]:
        """Return the embedded states, and let go of them."""
        states = [it.embedded for it in self.shell.recordings]
        bare = states[0][:0]
        self.shell.recordings = [it._replace(embedded=bare, tail=bare) for it in self.shell.recordings]
        return states


class Paths:
    """The tree of some models on all the prompts that any of them is asked.

    `layers` tells by whom the layer of an identity is held, and `order` where it stands among others: by its number in
    the checkpoint that it comes from, a plain one before those that are computed from it. `naive` is the number of
    layer calls that the models take one by one.
    """

    def __init__(self, wanted: Sequence[Wanted], dtype: Dtype, size: int, shelf: Shelf) -> None:
        self.wanted = list(wanted)
        asked = frozenset[Prompt]().union(*(it.prompts for it in self.wanted))
        self.prompts = sorted(asked, key=lambda it: (len(it), it))
        self.places = {prompt: divmod(number, size) for number, prompt in enumerate(self.prompts)}
        self.batches: list[Batch] = make_batches(self.prompts, size)
        self.roots: dict[str, Node] = {}
        self.kin: dict[str, Kin] = {}
        self.layers: dict[str, Layer] = {}
        self.order: dict[str, tuple[int, int]] = {}
        self.naive = 0
        self._numbers = layer_numbers([it.ckpt for it in self.wanted])
        for model, it in enumerate(self.wanted):
            plain = as_plain(it.ckpt, dtype)
            name = shell_identity(plain)
            if name not in self.kin:
                self.kin[name] = self._begin(Shell(plain, self.batches, dtype), shelf)
            self._add(model, self.kin[name], plain)

    @property
    def nodes(self) -> Iterator[Node]:
        """All nodes that are computed, parents before their children."""
        waiting = [child for root in self.roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def _begin(self, shell: Shell, shelf: Shelf) -> Kin:
        kin = Kin(shell)
        states = kin.take()
        if kin.begins not in self.roots:
            root = self.roots[kin.begins] = Node("", None, [it.nbytes for it in states])
            for place, it in enumerate(states):
                shelf.put((root, place), it)
        return kin

    def _add(self, model: int, kin: Kin, plain: Checkpoint) -> None:
        needed = {self.places[it][0] for it in self.wanted[model].prompts}
        kin.models.append(model)
        if not needed:
            return
        shell, parts = kin.shell, kin.shell.parts.of(plain)
        node = self.roots[kin.begins]
        node.needed |= needed
        for number in range(shell.depth):
            identity = f"{weights_identity(parts, number)} {kin.modules[number]} {kin.calls[number]}"
            if identity not in self.layers:
                self.layers[identity] = Layer(shell, parts, number)
                self.order[identity] = (self._number(parts, number), len(self.order))
            node = node.children.setdefault(identity, Node(identity, node, node.sizes))
            node.needed |= needed
        node.ends.append(model)
        self.naive += shell.depth * len(needed)

    def _number(self, parts: Parts, number: int) -> int:
        """Return the number that a layer had in the checkpoint that its weights come from."""
        spans = (span for name in parts.sources[number] for span in parts.ckpt[name].spans())
        known = (self._numbers.get((it.path, it.offset)) for it in spans)
        return next((it for it in known if it is not None), number)
