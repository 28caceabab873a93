"""Project weights: what is computed when they are written, and the sums that are taken before, several at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.ops.residual import Target
from tensorsurgeon.progress import Advance, progress_bar
from tensorsurgeon.running import Budget, running
from tensorsurgeon.scratch import Scratch
from tensorsurgeon.tensor import Block, LazyTensor, Pieces

if TYPE_CHECKING:
    from tensorsurgeon.kernels.projecting import Change, Sums

LAYERS_TABLE, STEP = "projected layers", "projection"
TABLES = (LAYERS_TABLE, "projected", "bases farthest apart")
"""What is told of projections."""
AHEAD = 4
"""Pieces that the system is told of before they are needed."""


class Projection(NamedTuple):
    """A tensor, how it changes, and `known`, a text that tells that change from any other.

    `reduced` is U'W, and squared lengths, of one whose outputs are its rows.
    """

    target: Target
    source: LazyTensor
    change: Change
    known: str
    reduced: LazyTensor | None = None

    @property
    def memory(self) -> int:
        """Bytes that taking the sums needs: a piece as it is read, in float32 and squared, and what comes of it."""
        source = self.source
        piece = min(source.piece_rows, source.rows)
        numbers = 4 * math.prod(source.shape[1:]) * piece
        reduced = 3 * self.reduced.nbytes if self.reduced else 0
        return source.fixed_memory + piece * source.row_memory + numbers + reduced

    def tensor(self, dtype: str) -> LazyTensor:
        """Return the changed tensor."""
        change, side = self.change, self.target.side
        history = f"project {side} {self.known} to {dtype}"
        if self.reduced:

            def outputs(start: int, rows: Block, reduced: Block) -> Block:
                from tensorsurgeon.kernels.projecting import project_outputs

                return project_outputs(start, rows, reduced, change, dtype)

            grain = _tile_rows(self.source)
            whole = (self.reduced,)
            return self.source.rowwise(outputs, dtype=dtype, history=history, grain=grain, whole=whole, placed=True)

        def vectors(rows: Block) -> Block:
            from tensorsurgeon.kernels.projecting import project_experts, project_rows

            return (project_experts if side == "experts" else project_rows)(rows, change, dtype)

        vector = len(self.source.shape) == 1
        grain = self.source.rows if vector else 1 if len(self.source.shape) > 2 else _tile_rows(self.source)
        return self.source.rowwise(vectors, dtype=dtype, history=history, grain=grain)

    def sums(self, advance: Advance) -> Sums:
        """Read the tensor once and return its sums; what writing it needs is kept."""
        from tensorsurgeon.kernels.projecting import sums_of_experts, sums_of_outputs, sums_of_rows

        pieces = _counted(self.source, advance)
        if self.reduced:
            assert self.reduced.function
            return sums_of_outputs(self.reduced.function(pieces), self.change)
        return (sums_of_experts if self.target.side == "experts" else sums_of_rows)(pieces, self.change)


def make_projection(target: Target, source: LazyTensor, change: Change, known: str, scratch: Scratch) -> Projection:
    """Return how a tensor is projected; of thousands of experts U'W would fill the memory, and goes to a file."""
    if target.side != "outputs":
        return Projection(target, source, change, known)

    def reduce(pieces: Pieces) -> Block:
        from tensorsurgeon.kernels.projecting import reduce_outputs

        return reduce_outputs(pieces, change)

    shape = (len(change.vectors) + 1, source.shape[1])
    reduced = source.reduced(reduce, dtype="F32", shape=shape, history=f"U'W, squares {known}")
    return Projection(target, source, change, known, replace(reduced, function=scratch.keep(reduce)))


def measured(projections: Sequence[Projection]) -> dict[str, Sums]:
    """Return the sums of all tensors, by name, each read once.

    Raises:
        RefusedError: for NaN or infinity in a weight.
    """
    settings = running()
    budget = Budget(settings.memory)
    total = sum(_disk(it.source) for it in projections)
    with progress_bar(total, "project", settings.quiet) as advance:

        def measure(it: Projection) -> Sums:
            with budget.reserve(it.memory):
                return it.sums(advance)

        with ThreadPoolExecutor(settings.workers) as pool:
            found = dict(zip((it.target.name for it in projections), pool.map(measure, projections), strict=True))
    broken = (name for name, sums in found.items() if not math.isfinite(sum(sums)))
    raise_all(RefusedError, (f"{name}: holds NaN or infinity, or numbers too large to be squared." for name in broken))
    return found


def report_rows(projections: Sequence[Projection], sums: Mapping[str, Sums]) -> list[dict[str, Any]]:
    """Return for each tensor what share of its squares lay in the subspace, and its norms."""
    return [
        {
            "tensor": it.target.name,
            "layer": it.target.layer,
            "directions": len(it.change.vectors),
            **energies([sums[it.target.name]]),
        }
        for it in projections
    ]


def energies(sums: Sequence[Sums]) -> dict[str, Any]:
    """Return what share of the squares of some tensors lay in the subspace, what was removed, and norms."""
    before, inside, after = (sum(column) for column in zip(*sums, strict=True))
    return {
        "in the subspace": _short(inside / before) if before else None,
        "energy removed": _short(1 - after / before) if before else None,
        "norm before": _short(math.sqrt(before)),
        "norm after": _short(math.sqrt(after)),
    }


def joined(earlier: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with the rows of earlier projections before their own, and which projection each row is of.

    There are no numbers where there is only one.
    """
    if LAYERS_TABLE not in earlier:
        return dict(tables)
    number = 1 + max(row.get(STEP, 1) for row in earlier[LAYERS_TABLE])
    return {
        name: [
            *({STEP: 1, **row} for row in earlier.get(name, ())),
            *({STEP: number, **row} for row in tables.get(name, ())),
        ]
        for name in TABLES
        if name in earlier or name in tables
    }


def _counted(tensor: LazyTensor, advance: Advance) -> Pieces:
    """Yield the pieces of a tensor, the system told of the next ones ahead."""
    places = list(tensor.pieces())
    share = _disk(tensor) / max(1, tensor.rows)
    for place, (start, stop) in enumerate(places):
        for soon in places[:AHEAD] if place == 0 else places[place + AHEAD - 1 : place + AHEAD]:
            tensor.foresee(*soon)
        yield start, tensor.read(start, stop)
        advance(round(share * (stop - start)))


def _disk(tensor: LazyTensor) -> int:
    return sum(span.nbytes for span in tensor.spans())


def _tile_rows(tensor: LazyTensor) -> int:
    from tensorsurgeon.kernels.projecting import tile_rows

    return tile_rows(tensor.shape[-1])


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def by_layer(projections: Sequence[Projection]) -> Iterator[tuple[int | None, list[Projection]]]:
    """Yield the tensors of each layer together, what lies outside of layers first."""
    layers = sorted({it.target.layer for it in projections}, key=lambda layer: -1 if layer is None else layer)
    for layer in layers:
        yield layer, [it for it in projections if it.target.layer == layer]
