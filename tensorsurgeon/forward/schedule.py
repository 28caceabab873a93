"""In which order the layers of many models are held, so that as few as can be are read twice.

A layer is held once for all nodes that want it and whose states before it are there. Layers are gone through by their
numbers, up or down as more of them can be run, until all nodes are done: what is deleted, skipped or repeated takes one
pass, a reversal another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tensorsurgeon.forward.paths import Node, Paths


class Hold(NamedTuple):
    """A layer that is held, and the nodes that it is run for, one after the other."""

    identity: str
    nodes: list[Node]


class Schedule(NamedTuple):
    """All that is held, by passes, and the most bytes that states take, those that are kept at the ends included."""

    passes: list[list[Hold]]
    peak: int

    @property
    def holds(self) -> list[Hold]:
        """All that is held, in order."""
        return [hold for each in self.passes for hold in each]

    @property
    def calls(self) -> int:
        """How often a layer is run on a batch."""
        return sum(len(node.needed) for hold in self.holds for node in hold.nodes)


def make_schedule(paths: Paths, ends: Mapping[int, int]) -> Schedule:
    """Return the order for some paths; `ends` are the bytes that are kept of each model."""
    waiting: dict[str, set[Node]] = defaultdict(set)
    for node in paths.nodes:
        waiting[node.identity].add(node)
    order = sorted(paths.layers, key=lambda it: paths.order[it])
    done: set[Node] = set(paths.roots.values())
    passes: list[list[Hold]] = []
    while waiting:
        tried = [_pass(way, waiting, done) for way in (order, order[::-1])]
        best = max(tried, key=lambda holds: sum(len(it.nodes) for it in holds))
        for hold in best:
            done.update(hold.nodes)
            waiting[hold.identity].difference_update(hold.nodes)
        waiting = defaultdict(set, {identity: nodes for identity, nodes in waiting.items() if nodes})
        passes.append(best)
    return Schedule(passes, _peak(paths, [hold for each in passes for hold in each], ends))


def _pass(order: Iterable[str], waiting: Mapping[str, set[Node]], before: set[Node]) -> list[Hold]:
    """Return what can be held in one pass."""
    done, holds = set(before), []
    for identity in order:
        ready = [it for it in waiting.get(identity, ()) if it.parent in done]
        run: list[Node] = []
        while ready:
            node = ready.pop()
            run.append(node)
            done.add(node)
            # A layer that is doubled is run again while it is held.
            ready += [it for it in node.children.values() if it.identity == identity]
        if run:
            holds.append(Hold(identity, run))
    return holds


def _peak(paths: Paths, holds: Sequence[Hold], ends: Mapping[int, int]) -> int:
    """Return the most bytes that states take when each is dropped with its last child, and what is kept at the ends.

    Each batch counts by itself, as what one has left in a file is only used again for states of the same size.
    """
    left = {node: len(node.children) for node in (*paths.roots.values(), *paths.nodes)}
    taken: Counter[int] = Counter()
    for root in paths.roots.values():
        taken.update(dict(enumerate(root.sizes)))
    most = Counter(taken)
    for hold in holds:
        for node in hold.nodes:
            if node.children:
                taken.update({place: node.sizes[place] for place in node.needed})
                most |= taken
            assert node.parent
            left[node.parent] -= 1
            if not left[node.parent]:
                taken.subtract({place: node.sizes[place] for place in node.parent.needed})
    return most.total() + sum(ends.values())
