"""What statistics of healthy weights are like, as rules: a name, limits that may be overridden, and a reason.

A rule is broken by tensors that are `wrong`, or no more than unusual. Tensors are compared within a role, as norms and
projections differ. Ranges of healthy matrices are those of published models in BF16.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from tensorsurgeon.errors import UsageError, nearest, raise_all
from tensorsurgeon.roles import Role

PROJECTIONS = ("in", "o", "q", "k", "v", "z", "qkv", "qkvz", "x", "y", "gate")
"""Parts of what mixes tokens without softmax whose numbers are like those of other projections."""
Limits = Mapping[str, float]
Found = Iterator[tuple[str, str]]
"""What a rule finds: a tensor or layers, and what is the matter with it."""


class Subject(NamedTuple):
    """A tensor, as rules see it: its role, its row of statistics, and what probes for FP8 found."""

    name: str
    role: Role
    row: Mapping[str, Any]
    lattice: Sequence[Any] = ()

    @property
    def is_projection(self) -> bool:
        """Whether it is a matrix that is multiplied with what a layer computes: of those the size says something."""
        group, part = self.role.group, self.role.part
        known = group in ("attention", "mlp", "expert", "head") or (group == "mixer" and part in PROJECTIONS)
        return known and self.role.kind == "weight" and len(self.row["shape"]) > 1 and self.row["std"] is not None


class Rule(NamedTuple):
    """A rule: what breaks it is `wrong`, or unusual; `reason` says why it matters."""

    name: str
    wrong: bool
    limits: Limits
    reason: str
    find: Callable[[Sequence[Subject], Limits], Found]


def _nan(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if it.row["NaN"]:
            yield it.name, f"holds {it.row['NaN']:,} NaN of {it.row['elements']:,} elements."


def _infinity(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if it.row["Inf"]:
            yield it.name, f"holds {it.row['Inf']:,} infinite of {it.row['elements']:,} elements."


def _all_zero(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if it.role.kind == "weight" and it.row["absmax"] == 0 and not it.name.endswith("lora_B.weight"):
            yield it.name, "everything that was read is zero."


def _raw_codes(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        reach = it.row["absmax"] or 0
        if it.lattice and all(seen.unscaled for seen in it.lattice) and limits["absmax"] <= reach <= 448:
            yield it.name, f"every element is an E4M3 code read as a number; they reach {reach:g}, std is {_std(it)}."


def _one_scale(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        beyond = max(abs(it.row["mean"] or 0), it.row["std"] or 0)
        seen = it.lattice
        if (it.is_projection or seen) and beyond > limits["beyond"]:
            yield it.name, f"mean {it.row['mean']:.4g} and std {_std(it)}; no code of E4M3 is beyond 448."
        elif _shares(seen, limits) and min(one.least for one in seen) == max(one.largest for one in seen):
            yield it.name, "one scale was laid over codes of blocks that had their own: all reach the same magnitude."


def _wrong_block(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        block = min((seen.block for seen in it.lattice), default=0)
        if _shares(it.lattice, limits):
            yield it.name, f"scales were laid over blocks of {block}, but codes are of smaller ones."
        elif any(seen.bounded for seen in it.lattice) and _part(it.lattice, "top", "tiles") < limits["top"]:
            yield it.name, f"scales were laid over blocks of {block}, but codes are of larger ones."


def _wrong_scale(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if not it.lattice:
            continue
        jump = sum(one.jump for one in it.lattice) / len(it.lattice)
        if jump > limits["jump"]:
            yield it.name, f"codes and scales do not belong together: sizes jump across blocks by a factor {jump:.3g}."
        elif abs(it.row["mean"]) > limits["mean"] or it.row["std"] > limits["std"]:
            yield it.name, f"codes were scaled wrongly: mean {it.row['mean']:.4g}, std {_std(it)}."


def _exploded(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if it.is_projection and (abs(it.row["mean"]) > limits["mean"] or it.row["std"] > limits["std"]):
            yield it.name, f"mean {it.row['mean']:.4g}, std {_std(it)}."


def _giant(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        reach, low, high = (it.row[key] for key in ("absmax", "0.1%", "99.9%"))
        usual = max(abs(low), abs(high)) if low is not None else 0
        if (reach or 0) > limits["any"]:
            yield it.name, f"one element is {reach:.4g}; no weight of a trained model is that large."
        elif it.is_projection and usual and reach > max(limits["ratio"] * usual, limits["absmax"]):
            yield it.name, f"one element is {reach:.4g}; 99.9% are within {usual:.4g}."


def _departing(subjects: Sequence[Subject], limits: Limits) -> Found:
    reach = int(limits["neighbours"])
    for at in _layers_by_kind(subjects).values():
        logs = [math.log(std) for _, std in at]
        if len(logs) < max(2, limits["layers"]):
            continue
        offs = []
        for place, log in enumerate(logs):
            near = logs[max(0, place - reach) : place] + logs[place + 1 : place + 1 + reach]
            offs.append(log - median(near))
        spread = max(median(map(abs, offs)) / 0.6745, 0.02)
        for (name, std), off in zip(at, offs, strict=True):
            if abs(off) > math.log(limits["factor"]) and abs(off) / spread > limits["z"]:
                beside = f"{math.exp(off):.3g} times what it is in the layers beside it"
                yield name, f"std {std:.4g} is {beside} (robust z {off / spread:.3g})."


def _biased(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if it.is_projection and abs(it.row["mean"]) > max(limits["mean"], limits["stds"] * it.row["std"]):
            yield it.name, f"mean {it.row['mean']:.4g} beside a std of {_std(it)}."


def _dead_channels(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if not it.is_projection or it.role.group == "head":
            continue
        # Stacked experts are counted as the rows of all of them.
        for side, count in (("rows", math.prod(it.row["shape"][:-1])), ("columns", it.row["shape"][-1])):
            dead = it.row[f"dead {side}"] or 0
            if limits["share"] * count < dead < count:
                yield it.name, f"{dead:,} of {count:,} {side} are all zero."


def _untrained(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if it.role.group == "embedding" and it.role.part == "token" and it.row["std"] is not None:
            faults = {
                "all zero": it.row["dead rows"],
                "far smaller than the others": it.row["faint rows"],
                "copies of each other, as far as their first 64 bytes tell": it.row["equal rows"],
            }
            for fault, count in faults.items():
                if (count or 0) > limits["rows"]:
                    yield it.name, f"{count:,} of {it.row['shape'][0]:,} rows are {fault}."


def _unusual_size(subjects: Sequence[Subject], limits: Limits) -> Found:
    for it in subjects:
        if it.is_projection:
            std, reach = it.row["std"], it.row["absmax"]
            if not limits["least"] <= std <= limits["most"] or reach > limits["absmax"]:
                yield it.name, f"std {_std(it)}, absmax {reach:.4g}."


RULES = (
    Rule("nan", True, {}, "One NaN makes every logit NaN.", _nan),
    Rule("infinity", True, {}, "An infinite weight makes logits NaN; float16 overflows beyond 65504.", _infinity),
    Rule("all-zero", True, {}, "A weight that was never filled, or was lost on the way.", _all_zero),
    Rule("raw-fp8-codes", True, {"absmax": 256}, "FP8 codes were taken for numbers: std near 100, up to 448.",
         _raw_codes),
    Rule("fp8-per-tensor-scale", True, {"beyond": 448, "equal": 0.9, "parts": 12},
         "A block format was decoded with one scale for the tensor, or by dividing.", _one_scale),
    Rule("fp8-wrong-block", True, {"equal": 0.9, "parts": 12, "top": 0.7},
         "A block format was decoded with blocks of another size.", _wrong_block),
    Rule("fp8-wrong-scale", True, {"jump": 4, "mean": 0.01, "std": 10},
         "A block format was decoded with scales of other blocks: the weights are biased.", _wrong_scale),
    Rule("exploded", True, {"mean": 1, "std": 10}, "Matrices of trained models have a mean near 0, a std below 1.",
         _exploded),
    Rule("giant", True, {"ratio": 300, "absmax": 1, "any": 10000},
         "A flipped bit of an exponent, or a broken write.", _giant),
    Rule("departing-std", True, {"factor": 2.5, "z": 4, "neighbours": 3, "layers": 5},
         "Neighbouring layers of a trained model have weights of like size.", _departing),
    Rule("dead-channels", True, {"share": 0.01}, "Rows or columns were lost, or never written.", _dead_channels),
    Rule("biased", False, {"mean": 0.01, "stds": 0.25}, "Matrices of trained models have a mean near 0.", _biased),
    Rule("untrained-rows", False, {"rows": 1}, "Tokens that training never met answer with noise.", _untrained),
    Rule("unusual-size", False, {"least": 0.005, "most": 0.2, "absmax": 20},
         "Matrices of most published models have a std from 0.005 to 0.2.", _unusual_size),
)  # fmt: skip
"""The rules, the most telling first: a tensor that breaks several is named by the first alone."""

DUPLICATED = Rule(
    "duplicated-layers", True, {}, "Layers of the same bytes: a model was stacked, or shards were mixed up.",
    lambda subjects, limits: iter(()),
)  # fmt: skip


def with_limits(overrides: Mapping[str, Any]) -> list[Rule]:
    """Return the rules under other limits, without those that are `off`.

    Raises:
        UsageError: for rules and limits that there are not, and limits that are no numbers.
    """
    known = {rule.name: rule for rule in (*RULES, DUPLICATED)}
    problems = [f"thresholds: there is no rule {name!r}.{nearest(str(name), known)}" for name in overrides
                if name not in known]  # fmt: skip
    kept = []
    for name, rule in known.items():
        given = overrides.get(name, {})
        if given is False:
            continue
        if not isinstance(given, Mapping):
            problems.append(f"thresholds: {name} is {given!r}, neither limits nor 'off'.")
            continue
        for key, value in given.items():
            if key not in rule.limits:
                problems.append(f"thresholds: {name} has no limit {key!r}; it has {', '.join(rule.limits) or 'none'}.")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                problems.append(f"thresholds: {name}: {key} is {value!r}, not a number from 0.")
            elif key in ("neighbours", "factor") and value < 1:
                problems.append(f"thresholds: {name}: {key} is {value!r}; it is at least 1.")
        kept.append(rule._replace(limits={**rule.limits, **given}))
    raise_all(UsageError, problems)
    return kept


def judge(subjects: Sequence[Subject], rules: Sequence[Rule]) -> list[tuple[Rule, str, str]]:
    """Return which rule is broken by what, and how; by each tensor only the first of those that are wrong."""
    named: set[str] = set()
    found = []
    for rule in rules:
        for name, what in rule.find(subjects, rule.limits):
            if name not in named:
                found.append((rule, name, what))
        named |= {name for broken, name, _ in found if broken is rule and rule.wrong}
    return found


def _std(subject: Subject) -> str:
    return f"{subject.row['std']:.4g}"


def _part(lattice: Sequence[Any], some: str, every: str) -> float:
    return float(sum(getattr(one, some) for one in lattice) / sum(getattr(one, every) for one in lattice))


def _shares(lattice: Sequence[Any], limits: Limits) -> bool:
    """Tell whether parts of the tiles with one scale all reach the same magnitude, as blocks of codes do.

    Few parts may do so by chance.
    """
    enough = sum(one.halves for one in lattice) >= limits["parts"]
    return enough and _part(lattice, "equal", "halves") >= limits["equal"]


def _layers_by_kind(subjects: Sequence[Subject]) -> Mapping[str, list[tuple[str, float]]]:
    """Return the median std of each kind of matrix in each layer, in their order, with the name of the middle one.

    Tensors are of one kind whose names differ in numbers only, as those of layers and experts do; the layers of
    multi-token prediction are left out.
    """
    found: dict[str, dict[int, list[tuple[float, str]]]] = defaultdict(lambda: defaultdict(list))
    for it in subjects:
        weight = it.role.kind == "weight" and len(it.row["shape"]) > 1 and it.role.part != "mtp"
        if weight and it.row["std"] and it.row["layer"] is not None:
            found[re.sub(r"\d+", "N", it.name)][it.row["layer"]].append((it.row["std"], it.name))
    made: dict[str, list[tuple[str, float]]] = {}
    for kind, layers in found.items():
        middles = [sorted(layers[layer])[len(layers[layer]) // 2] for layer in sorted(layers)]
        made[kind] = [(name, std) for std, name in middles]
    return made
