"""Tell whether the noise of two quantised models is the same and cancels, or what the noise of one is like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, UsageError, nearest, raise_all
from tensorsurgeon.exams.claims import overall, verdict_of, weighted_median
from tensorsurgeon.exams.selection import layer_number, role_label, select
from tensorsurgeon.exams.streaming import Reader, each
from tensorsurgeon.names import matching
from tensorsurgeon.ops.dequantization import as_plain
from tensorsurgeon.parameters import Count, Glob, Layers, Model, Words
from tensorsurgeon.quantized import PLAIN
from tensorsurgeon.registry import Findings, exam, open_model
from tensorsurgeon.running import running

if TYPE_CHECKING:
    from tensorsurgeon.exams.residuals import Residual

RANK = 16
"""Rank of the subspaces of modules that are looked at in depth, where none is given."""
MODELS = ("MODEL", "quantized", "other", "other-quantized")
JOINT = ("cancelled", "cosine", "sign z", "norm ratio", "KS", "delta ratio", "delta SNR", "delta cosine", "SNR B")
OWN = ("SNR", "relative noise", "cosine to weights", "size correlation", "kurtosis", "zero share")
"""Statistics whose medians are shown of roles and of all."""
SHOWN_JOINT = ("cancelled", "cosine", "sign z", "delta SNR", "SNR", "SNR B")
"""Statistics of two pairs that a terminal has room for; those of one pair it can show all."""


class Subject(NamedTuple):
    """Models that are compared, as plain numbers, and the matrices of them that were chosen."""

    models: tuple[Checkpoint, ...]
    chosen: tuple[str, ...]
    others: int


@exam
def noise(
    ckpt: Checkpoint,
    quantized: Model,
    other: Model | None = None,
    other_quantized: Model | None = None,
    names: Glob | None = None,
    roles: Words | None = None,
    layers: Layers | None = None,
    module: Glob | None = None,
    rank: Count | None = None,
) -> Findings:
    """Tell what quantisation takes from each matrix, and whether it takes the same from another model and cancels.

    Of a model A and its quantised form A', the noise A - A' is held against the weights. With a second pair, B and
    B', both noises are held against each other: their cosine, how much of them cancels in B' - A', whether they are
    distributed alike, and what is left of the change B - A. The noise of a matrix cancels (0.9 of it or more), partly
    (0.1 or more), is independent (less, or no more than chance), or adds up (-0.1 or less).

    One pass over all matrices; those that quantisation left as they are do not count. Singular subspaces take six
    further passes over what is kept in memory, or read again, and three times as long in all.

    Args:
        quantized: The quantised form of the model, or what was decoded from it.
        other: A second model, such as one that was trained from the first.
        other_quantized: The quantised form of the second model.
        names: Look at tensors whose names match this pattern.
        roles: Look at these roles, such as attention or mlp.down, with commas between them.
        layers: Look at these decoder layers.
        module: Look in depth at modules that match this pattern, and at nothing else: subspaces, angles, histograms.
        rank: Compare singular subspaces of so many dimensions; 16 for modules in depth, else none unless given.

    Raises:
        UsageError: for half a pair, and where nothing is selected.
        RefusedError: for matrices that a model lacks or has in another shape.
    """
    if (other is None) != (other_quantized is None):
        raise UsageError("noise: other and other-quantized are a pair; give both or neither.")
    given = [it for it in (quantized, other, other_quantized) if it is not None]
    models = [ckpt, *map(open_model, given)]
    adapters = [f"{MODELS[place]}: is an adapter; merge it first." for place, it in enumerate(models) if it.is_adapter]
    raise_all(RefusedError, adapters)
    plain = tuple(map(as_plain, models))
    subject = _subject(plain, _selected(plain[0], names, roles, layers, module))
    found = _residuals(subject, rank or (RANK if module else 0), module is not None)
    rows, problems = [], []
    silent = [0] * (len(subject.models) // 2)
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, it in found.items():
        problems += [
            f"{name}: holds NaN, infinity or numbers too large to sum in {_label(subject, place)}."
            for place in it.broken
        ]
        for pair in it.silent:
            silent[pair] += 1
        if it.row:
            rows.append(_row(subject, name, it))
        for title in ("subspaces", "energy", "spectra", "angles"):
            tables[title] += [{"name": name, **row} for row in getattr(it, title)]
    model = _model_row(subject, rows, silent, sum(bool(it.broken) for it in found.values()))
    tables = {"model": [model], "roles": _role_rows(rows), "statistics": rows, **tables}
    details = [{"name": name, **it.detail} for name, it in found.items() if it.detail]
    columns = OWN if other is None else SHOWN_JOINT
    shown = {"roles": ("matrices of", "number", *columns), "statistics": ("name", "verdict", *columns)}
    return Findings({title: it for title, it in tables.items() if it}, tuple(problems), details, shown)


def _selected(
    ckpt: Checkpoint, names: str | None, roles: Sequence[str] | None, layers: Any, module: str | None
) -> list[str]:
    """Return the tensors that are chosen, only those of modules that a pattern matches where there is one.

    Raises:
        UsageError: where there are none.
    """
    chosen = select(ckpt, names, roles, layers)
    if module is None:
        return chosen
    modules = {name.removesuffix(".weight"): name for name in chosen}
    found = set(matching(module, modules))
    if not found:
        raise UsageError(f"module: nothing matches {module!r}.{nearest(module, modules)}")
    return [name for short, name in modules.items() if short in found]


def _subject(models: tuple[Checkpoint, ...], chosen: Sequence[str]) -> Subject:
    """Return the matrices among what was chosen, in all models.

    Raises:
        RefusedError: for those that a model lacks or has in another shape.
    """
    matrices = tuple(name for name in chosen if _is_matrix(models[0], name))
    if not matrices:
        raise UsageError("nothing is selected: none of the tensors is a matrix of weights.")
    raise_all(RefusedError, (text for name in matrices for text in _mismatches(models, name)))
    return Subject(models, matrices, len(chosen) - len(matrices))


def _is_matrix(ckpt: Checkpoint, name: str) -> bool:
    tensor = ckpt[name]
    kind = ckpt.roles[name].kind == "weight"
    return kind and len(tensor.shape) == 2 and tensor.dtype in PLAIN and tensor.nbytes > 0


def _mismatches(models: Sequence[Checkpoint], name: str) -> Iterator[str]:
    shape = models[0][name].shape
    for label, it in zip(MODELS[1:], models[1:], strict=False):
        if name not in it:
            yield f"{name}: is missing in {label}, {it.sources[0].name}."
        elif it[name].shape != shape:
            yield f"{name}: has shape {list(it[name].shape)} in {label}, and {list(shape)} in MODEL."
        elif it[name].dtype not in PLAIN:
            yield f"{name}: is {it[name].dtype} in {label}; those are no numbers to compute with."


def _residuals(subject: Subject, rank: int, in_depth: bool) -> dict[str, Residual]:
    """Return what is found of each matrix, in order."""
    from tensorsurgeon.exams.residuals import Question, look_at_noise, work_for
    from tensorsurgeon.kernels.deltas import one_thread_each

    first = subject.models[0]
    tensors = {name: [it[name] for it in subject.models] for name in subject.chosen}
    questions = {
        name: Question(running().memory, rank, in_depth, first.roles[name].layout == "in,out") for name in tensors
    }
    work = {name: work_for(them, questions[name]) for name, them in tensors.items()}

    def look(name: str, reader: Reader) -> Residual:
        return look_at_noise(name, tensors[name], reader, questions[name])

    with one_thread_each():
        found = dict(each(work, "noise", look))
    return {name: found[name] for name in tensors}


def _label(subject: Subject, place: int) -> str:
    return f"{MODELS[place]}, {subject.models[place].sources[0].name}"


def _row(subject: Subject, name: str, found: Residual) -> dict[str, Any]:
    first = subject.models[0]
    row = {
        "name": name,
        "layer": layer_number(first, name),
        "role": role_label(first.roles[name]),
        "shape": list(first[name].shape),
        "elements": prod(first[name].shape),
    }
    if "cancelled" in found.row:
        verdict, reason = verdict_of(found.row)
        return {**row, "verdict": verdict, "because": reason, **found.row}
    return row | found.row


def _model_row(
    subject: Subject, rows: Sequence[Mapping[str, Any]], silent: Sequence[int], broken: int
) -> dict[str, Any]:
    told = {label: it.sources[0].name for label, it in zip(MODELS, subject.models, strict=False)}
    equal = " and ".join(f"{count} in {pair}" for count, pair in zip(silent, ("MODEL", "other"), strict=False))
    row = {
        **told,
        "matrices": len(rows),
        "elements": sum(row["elements"] for row in rows),
        "left out": f"{subject.others} tensors that are no matrices; matrices without noise: {equal}",
    }
    if broken:
        row["matrices not looked at"] = broken
    if not rows:
        return row | {"verdict": "no matrix has any noise to look at"}
    joint = overall(rows) if len(subject.models) > 2 else {}
    return row | joint | {f"median {key}": value for key, value in _medians(rows).items()}


def _role_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what matrices of each role have in common."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["role"]].append(row)
    return [
        {"matrices of": role, "number": len(held), "elements": sum(row["elements"] for row in held), **_medians(held)}
        for role, held in groups.items()
    ]


def _medians(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the medians of statistics, each matrix weighed by its elements."""
    return {key: weighted_median(rows, key) for key in (*JOINT, *OWN) if any(key in row for row in rows)}
