"""Tell whether the weights of a checkpoint are healthy, without loading the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, UsageError, raise_all
from tensorsurgeon.exams.duplicates import same_layers
from tensorsurgeon.exams.lines import Lines
from tensorsurgeon.exams.selection import layer_number, role_label, select
from tensorsurgeon.exams.streaming import Reader, Work, each
from tensorsurgeon.exams.verdict import Rule, Subject, judge, with_limits
from tensorsurgeon.ops.dequantization import decoded
from tensorsurgeon.parameters import File, Glob, Layers, Model, Share, Thresholds, Words
from tensorsurgeon.quantized import PLAIN, find_modules, stored_as
from tensorsurgeon.quantized.parts import Plain
from tensorsurgeon.registry import Findings, exam, open_model
from tensorsurgeon.running import running
from tensorsurgeon.sizes import format_size

if TYPE_CHECKING:
    from tensorsurgeon.exams.vitals import Vitals

MANY, POINTS, FEWER = 2000, 256, 32
"""Of so many tensors at most, 256 groups of rows and of columns are kept for pictures, and else 32."""
SHOWN = ("name", "mean", "std", "absmax", "kurtosis", "outlier share", "row ratio", "column ratio")


class Patient(NamedTuple):
    """A model that is looked at: the tensors of it that were chosen, as plain numbers, and its quantised modules."""

    ckpt: Checkpoint
    plain: Checkpoint
    modules: Mapping[str, Plain]
    chosen: tuple[str, ...]
    skipped: int

    @property
    def elements(self) -> int:
        """Number of numbers to look at."""
        return sum(prod(self.plain[name].shape) for name in self.chosen)


@exam
def autopsy(
    ckpt: Checkpoint,
    names: Glob | None = None,
    roles: Words | None = None,
    layers: Layers | None = None,
    sample: Share = 1.0,
    spectrum: bool = False,
    thresholds: Thresholds | None = None,
    lines: File | None = None,
    beside: Model | None = None,
) -> Findings:
    """Tell whether the weights are healthy, from one pass over every tensor; quantised ones are decoded as read.

    Each tensor's moments, extremes, quantiles, histogram, outliers, channels and range are compared with what
    weights of trained models are like, and with the same role in other layers. What is wrong is a problem (exit
    status 3), by the name of a rule; what is only unusual is listed.

    Args:
        names: Look at tensors whose names match this pattern.
        roles: Look at these roles, such as attention or mlp.down, with commas between them.
        layers: Look at these decoder layers.
        sample: Read this share of each large tensor, in evenly spread pieces.
        spectrum: Compute singular values, stable and effective rank, and the exponent of their power law.
        thresholds: A YAML file with other limits for rules, such as `exploded: {std: 20}` or `giant: off`.
        lines: A file that gets a line of JSON for each tensor that is done; a later run goes on from it.
        beside: A second model, shown side by side.
    """
    rules = with_limits(thresholds or {})
    models = [ckpt] if beside is None else [ckpt, open_model(beside)]
    patients = [_patient(it, names, roles, layers) for it in models]
    if spectrum:
        raise_all(RefusedError, (text for it in patients for text in _too_wide(it)))
    with Lines(lines, models, {"sample": sample, "spectrum": spectrum}) as kept:
        found = [_vitals(it, kept, place, sample, spectrum) for place, it in enumerate(patients)]
    whole = not names and not roles
    labels = _labels(models)
    rows, details, problems, unusual = [], [], [], []
    verdict: dict[str, int] = defaultdict(int)
    for label, patient, vitals in zip(labels, patients, found, strict=True):
        subjects = [_subject(patient, name, it) for name, it in vitals.items()]
        faults = judge(subjects, rules)
        # Layers can only be called the same where all of them was read.
        if whole and sample == 1:
            faults += same_layers(patient.plain, {name: it.fingerprint for name, it in vitals.items()}, rules)
        for rule, name, what in faults:
            verdict[rule.name] += 1
            text = f"{label}: {name}" if beside is not None else name
            if rule.wrong:
                problems.append(f"{text}: {rule.name}: {what}")
            else:
                unusual.append({"rule": rule.name, "name": text, "finding": what})
        mark = {"model": label} if beside is not None else {}
        rows += [{**mark, **subject.row} for subject in subjects]
        details += [{"name": name, **mark, **it.detail} for name, it in vitals.items()]
    broken = [
        {"rule": rule.name, "found": verdict[rule.name], "reason": rule.reason, **_limits(rule)}
        for rule in rules
        if verdict[rule.name]
    ]
    tables = {"model": [_model_row(models, patients, sample, problems)], "rules": broken, "unusual": unusual}
    tables |= {"roles": _role_rows(rows), "statistics": rows}
    return Findings(
        {title: held for title, held in tables.items() if held}, tuple(problems), details, {"statistics": SHOWN}
    )


def _patient(ckpt: Checkpoint, names: str | None, roles: Sequence[str] | None, layers: Any) -> Patient:
    found = find_modules(ckpt)
    # Where some cannot be decoded, what is plain can be looked at all the same.
    plain = ckpt if found.problems else decoded(ckpt, found, "bfloat16")
    if found.problems and found.coded.intersection(select(ckpt, names, roles, layers)):
        raise RefusedError(*found.problems)
    modules = {} if found.problems else found.modules
    chosen = select(plain, names, roles, layers)
    numbers = tuple(name for name in chosen if plain[name].dtype in PLAIN and plain[name].nbytes)
    if not numbers:
        raise UsageError("nothing is selected: there are no numbers in what was chosen.")
    return Patient(ckpt, plain, modules, numbers, len(chosen) - len(numbers))


def _too_wide(patient: Patient) -> Iterator[str]:
    """Yield the matrices whose singular values take more memory than there is."""
    from tensorsurgeon.exams.vitals import spectral_memory

    for name in patient.chosen:
        needed = spectral_memory(patient.plain[name].shape)
        if needed > running().memory:
            yield f"{name}: its singular values take {format_size(needed)}; give --memory that, or choose others."


def _vitals(patient: Patient, kept: Lines, place: int, sample: float, spectrum: bool) -> dict[str, Vitals]:
    """Return what is found of each tensor, in order; what a file of lines holds is not looked at again."""
    from tensorsurgeon.exams.vitals import look_at, spectral_memory, with_spectrum

    plain = patient.plain
    done = {name: held for name in patient.chosen if (held := kept.get(place, name))}
    work = {
        name: Work([plain[name]], sample, spectral_memory(plain[name].shape) if spectrum else 0)
        for name in patient.chosen
        if name not in done
    }

    def look(name: str, reader: Reader) -> Vitals:
        role = plain.roles[name]
        table = role.kind == "weight" and role.group == "embedding"
        vitals = look_at(plain[name], reader, sample, table, POINTS if len(work) <= MANY else FEWER)
        return with_spectrum(vitals, plain[name]) if spectrum else vitals

    with _single_threads() if spectrum else nullcontext():
        for name, vitals in each(work, "autopsy", look):
            done[name] = vitals
            kept.put(place, name, vitals)
    return {name: done[name] for name in patient.chosen}


def _single_threads() -> AbstractContextManager[None]:
    from tensorsurgeon.kernels.deltas import one_thread_each

    return one_thread_each()


def _subject(patient: Patient, name: str, vitals: Vitals) -> Subject:
    role, tensor = patient.plain.roles[name], patient.plain[name]
    row = {
        "name": name,
        "layer": layer_number(patient.plain, name),
        "role": role_label(role),
        "dtype": stored_as(patient.ckpt, patient.modules, name),
        "shape": list(tensor.shape),
        "elements": prod(tensor.shape),
        **vitals.row,
    }
    return Subject(name, role, row, vitals.lattice)


def _labels(models: Sequence[Checkpoint]) -> list[str]:
    """Return what models are called: their directories, or as much of the paths as tells them apart."""
    paths = [it.sources[0].directory.resolve().parts for it in models]
    length = next(
        (n for n in range(1, max(map(len, paths)) + 1) if len({path[-n:] for path in paths}) == len(paths)), 1
    )
    named = ["/".join(path[-length:]) for path in paths]
    return named if len(set(named)) == len(named) else [f"{name} ({place})" for place, name in enumerate(named, 1)]


def _model_row(
    models: Sequence[Checkpoint], patients: Sequence[Patient], sample: float, problems: Sequence[str]
) -> dict[str, Any]:
    return {
        "name": " and ".join(it.sources[0].name for it in models),
        "tensors": sum(len(it.chosen) for it in patients),
        "elements": sum(it.elements for it in patients),
        "not looked at": f"{sum(it.skipped for it in patients)} tensors of integers, or of nothing",
        "sample": "every element" if sample == 1 else f"{sample:g} of each large tensor: a quick look, no proof",
        "verdict": f"{len(problems)} problems" if problems else "healthy",
    }


def _role_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what tensors of each role have in common."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[(row["model"], row["role"]) if "model" in row else (row["role"],)].append(row)
    return [
        {
            **({"model": key[0]} if len(key) > 1 else {}),
            "tensors of": key[-1],
            "number": len(held),
            "elements": sum(row["elements"] for row in held),
            "mean": _middle(held, "mean"),
            "least std": min(_known(held, "std"), default=None),
            "median std": _middle(held, "std"),
            "largest std": max(_known(held, "std"), default=None),
            "absmax": max(_known(held, "absmax"), default=None),
            "outlier share": _middle(held, "outlier share"),
        }
        for key, held in groups.items()
    ]


def _known(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]


def _middle(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = _known(rows, key)
    return median(known) if known else None


def _limits(rule: Rule) -> dict[str, Any]:
    return {"limits": ", ".join(f"{key} {value:g}" for key, value in rule.limits.items()) or "-"}
