"""Measure what quantising takes from weights, several at a time, and put it in tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.progress import Advance, progress_bar
from tensorsurgeon.quantized.decoding import BlockSize
from tensorsurgeon.roles import Role
from tensorsurgeon.running import Budget, running
from tensorsurgeon.tensor import Block, LazyTensor

BLOCK_MEMORY = 12 * 2**20
"""Most memory that rows take while they are measured: so little is had again and again without a page fault."""
FIGURES = 7
"""What is found of each row of blocks; see `kernels.fp8_errors`."""

Figures = Mapping[str, float]


class Quantized(NamedTuple):
    """A weight and how it is quantised."""

    name: str
    role: Role
    weight: LazyTensor
    block: BlockSize
    powers: bool

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.weight.shape)

    def figures(self) -> LazyTensor:
        """Return what quantising does to each row of blocks."""

        def measure(numbers: Block) -> Block:
            from tensorsurgeon.kernels.fp8_encoding import Recipe
            from tensorsurgeon.kernels.fp8_errors import measure_errors

            return measure_errors(numbers, Recipe(*self.block, powers=self.powers))

        return self.weight.by_groups(measure, self.block[0], dtype="F64", row_shape=(FIGURES,), history="measure FP8")


def report_tables(ckpt: Checkpoint, quantized: Sequence[Quantized]) -> dict[str, Any]:
    """Return tables of roles, of weights, and of what stays plain; what is only planned has no figures.

    Raises:
        RefusedError: for weights that hold NaN or infinity, each by name.
    """
    found = {} if running().planned else _measured(quantized)
    roles: dict[str, list[Quantized]] = {}
    for it in quantized:
        roles.setdefault(_label(it.role), []).append(it)
    rows = [
        {"role": label, "tensors": len(each), **_columns([(it, found[it.name]) for it in each if found], each)}
        for label, each in roles.items()
    ]
    names = {it.name for it in quantized}
    tables: dict[str, Any] = {"quantised roles": rows}
    if found:
        tables["quantised"] = [{"tensor": it.name, **_columns([(it, found[it.name])], [it])} for it in quantized]
    return tables | {"left plain": _left(ckpt, names)}


def _measured(quantized: Sequence[Quantized]) -> dict[str, Figures]:
    """Return the figures of all weights by name, each weight read once."""
    settings = running()
    budget = Budget(settings.memory)
    total = sum(_disk(it.weight) for it in quantized)
    problems: list[str] = []
    with progress_bar(total, "quantize", settings.quiet) as advance:

        def measure(it: Quantized) -> Figures:
            try:
                return _figures_of(it, budget, advance)
            except RefusedError as problem:
                problems.extend(f"{it.name}: {text}" for text in problem.problems)
                return {}

        with ThreadPoolExecutor(settings.workers) as pool:
            found = dict(zip((it.name for it in quantized), pool.map(measure, quantized), strict=True))
    raise_all(RefusedError, sorted(problems))
    for name, figures in found.items():
        assert figures["of the bound"] <= 1, name
    return found


def _figures_of(it: Quantized, budget: Budget, advance: Advance) -> Figures:
    from tensorsurgeon.kernels.fp8_errors import combined

    figures = it.figures()
    limit = min(BLOCK_MEMORY, budget.limit // running().workers)
    rows = []
    share = _disk(it.weight) / max(1, figures.rows)
    for start, stop in figures.blocks(limit):
        with budget.reserve(figures.fixed_memory + (stop - start) * figures.row_memory):
            rows.append(figures.read(start, stop))
        advance(round(share * (stop - start)))
    return combined(rows)


def _columns(measured: Sequence[tuple[Quantized, Figures]], each: Sequence[Quantized]) -> dict[str, Any]:
    """Return the figures of some weights together."""
    elements = sum(it.elements for it in each)
    if not measured:
        return {"elements": elements}

    def total(figure: str) -> float:
        return math.fsum(figures[figure] for _, figures in measured)

    def most(figure: str) -> float:
        return _short(max(figures[figure] for _, figures in measured))

    errors, squares = total("squares of errors"), total("squares")
    return {
        "elements": elements,
        "absmax": most("absmax"),
        "largest error": most("largest error"),
        "bound": most("bound"),
        "of the bound": most("of the bound"),
        "rms error": _short(math.sqrt(errors / elements)),
        "relative error": _short(math.sqrt(errors / squares)) if squares else None,
        "zeros": _short(total("zeros") / elements),
    }


def _left(ckpt: Checkpoint, quantized: Iterable[str]) -> list[dict[str, Any]]:
    """Return how many tensors of each role stay plain."""
    counts: dict[str, list[int]] = {}
    for name in ckpt.tensors.keys() - set(quantized):
        count = counts.setdefault(_label(ckpt.roles[name]), [0, 0])
        count[0] += 1
        count[1] += math.prod(ckpt[name].shape)
    return [{"role": label, "tensors": tensors, "elements": size} for label, (tensors, size) in sorted(counts.items())]


def _label(role: Role) -> str:
    return " ".join(filter(None, (role.group, role.mark, role.part, role.kind * (role.kind == "bias"))))


def _disk(tensor: LazyTensor) -> int:
    return sum(span.nbytes for span in tensor.spans())


def _short(number: float) -> float:
    return float(f"{number:.6g}")
