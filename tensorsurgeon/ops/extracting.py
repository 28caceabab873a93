"""Compute what lies between two models: sums of squares of all tensors, and factors of some, several at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.quantized import PLAIN
from tensorsurgeon.roles import Role
from tensorsurgeon.running import Budget, running
from tensorsurgeon.scratch import Scratch
from tensorsurgeon.tensor import LazyTensor

if TYPE_CHECKING:
    from tensorsurgeon.kernels.deltas import Delta, Pair, Sums


class Module(NamedTuple):
    """A module that gets a pair of factors: its weight in both models, and how much of their difference is wanted."""

    name: str
    role: Role
    tuned: LazyTensor
    base: LazyTensor
    kind: Any
    value: float

    @property
    def path(self) -> str:
        """Name of the module."""
        return self.name.removesuffix(".weight")

    @property
    def embedding(self) -> bool:
        """Whether it is a table of rows rather than a Linear."""
        return self.role.group == "embedding"

    @property
    def transposed(self) -> bool:
        """Whether the weight lies the other way round than the product B A."""
        return self.embedding or self.role.layout == "in,out"

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B."""
        rows, columns = self.base.shape
        out, width = (columns, rows) if self.transposed else (rows, columns)
        return (rank, width), (out, rank)


class Extracted(NamedTuple):
    """A module's factors on disk, and what they hold: sums of squares, as `kernels.deltas.Pair` has them.

    `rank` is what was found, `stored` with the zeros that fill it up.
    """

    a: LazyTensor
    b: LazyTensor
    rank: int
    stored: int
    captured: float
    error: float
    least: float


def extracted(
    tuned: Checkpoint, base: Checkpoint, modules: Sequence[Module], steps: Sequence[int], dtype: str, device: str
) -> tuple[dict[str, Sums], dict[str, Extracted]]:
    """Return the sums of squares of every tensor that both models have, and the factors of modules that differ.

    Raises:
        RefusedError: for NaN or infinity, and for models that do not differ.
    """
    from tensorsurgeon.kernels.deltas import Found, Goal, Wish, explore, one_thread_each, require_device

    require_device(device)
    budget = Budget(running().memory)
    deltas = dict(_deltas(tuned, base, modules))
    wishes = {
        module.name: Wish(
            Goal(module.kind, module.value), tuple(steps), dtype, zlib.crc32(module.name.encode()), device
        )
        for module in modules
    }
    total = sum(delta.nbytes for delta in deltas.values())
    with (
        one_thread_each(),
        progress_bar(total, "extract-lora", running().quiet) as advance,
        ThreadPoolExecutor(running().workers) as pool,
    ):

        def find(name: str) -> Found:
            return explore(deltas[name], wishes.get(name), budget, advance)

        sums: dict[str, Sums] = {}
        made: dict[str, Extracted] = {}
        scratch = Scratch()
        by_name = {module.name: module for module in modules}
        for name, found in zip(deltas, pool.map(find, deltas), strict=True):
            sums[name] = found.sums
            if found.pair:
                made[name] = _spilled(found.pair, by_name[name].transposed, scratch)
    broken = ((name, it.broken) for name, it in sums.items() if it.broken)
    raise_all(RefusedError, (f"{name}: holds NaN or infinity in the {model} model." for name, model in broken))
    if not made:
        raise RefusedError("extract-lora: the models are the same in every matrix; there is nothing to extract.")
    return sums, {module.name: made[module.name] for module in modules if module.name in made}


def _spilled(pair: Pair, transposed: bool, scratch: Scratch) -> Extracted:
    """Write factors to a file, and return where they are."""
    a, b = (LazyTensor(it.dtype, it.shape, scratch.put(it.data)) for it in pair.blocks(transposed))
    return Extracted(a, b, pair.rank, pair.stored, pair.captured, pair.error, pair.least)


def _deltas(tuned: Checkpoint, base: Checkpoint, modules: Sequence[Module]) -> Iterator[tuple[str, Delta]]:
    """Yield what is compared: tensors of numbers in both models, of one shape, or cut to the rows that both have."""
    from tensorsurgeon.kernels.deltas import Delta

    chosen = {module.name: (module.base, module.tuned) for module in modules}
    pairs = {name: (it, tuned.tensors.get(name)) for name, it in base.tensors.items()}
    for name, (original, other) in (pairs | chosen).items():
        if other is None or other.dtype not in PLAIN or original.dtype not in PLAIN or not original.nbytes:
            continue
        if other.shape == original.shape or (name in chosen and other.shape[1:] == original.shape[1:]):
            rows = min(other.rows, original.rows)
            yield name, Delta(other, original, rows, original.rows - rows)
