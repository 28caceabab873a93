"""Tell what lies between two checkpoints: tensors, numbers, layers, config, side files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.exams.change_tables import by_layer, by_role, summary
from tensorsurgeon.exams.documents import unequal_files, unequal_keys
from tensorsurgeon.exams.selection import layer_number, role_label, select
from tensorsurgeon.exams.streaming import Reader, Work, each, same_bytes
from tensorsurgeon.ops.dequantization import decoded
from tensorsurgeon.parameters import Glob, Layers, Model, Words
from tensorsurgeon.quantized import PLAIN, find_modules, format_name, stored_as
from tensorsurgeon.quantized.parts import Plain
from tensorsurgeon.registry import Findings, exam, open_model
from tensorsurgeon.running import Budget, running
from tensorsurgeon.tensor import LazyTensor

if TYPE_CHECKING:
    from tensorsurgeon.kernels.comparison import Difference

SHOWN = ("name", "change", "relative error", "cosine", "SNR", "largest difference", "delta stable rank")


class Side(NamedTuple):
    """One of two models: as it lies on disk, as plain numbers where it can be decoded, and of what weights are made.

    `layout` names the quantised formats that it is in, or says that it is plain.
    """

    raw: Checkpoint
    plain: Checkpoint
    layout: str
    modules: Mapping[str, Plain]
    made_of: Mapping[str, Sequence[str]]

    def parts(self, name: str) -> list[LazyTensor]:
        """Return what a tensor consists of on disk: itself or, of a quantised weight, codes and scales."""
        return [self.raw[part] for part in self.made_of.get(name, (name,))]

    def kind(self, name: str) -> str:
        """Return the dtype on disk or, of a weight that lies there under other names or shapes, its format."""
        return stored_as(self.raw, self.modules, name)

    def file(self, name: str) -> str | None:
        """Return the file that a tensor, or the first part of it, lies in."""
        span = self.parts(name)[0].span
        return span.path.name if span else None


class Compared(NamedTuple):
    """What was found of a pair: whether all bytes are the same, and what lies between the numbers otherwise."""

    equal: bool
    difference: Difference | None = None
    stable_rank: float | None = None


@exam
def diff(
    ckpt: Checkpoint,
    other: Model,
    names: Glob | None = None,
    roles: Words | None = None,
    layers: Layers | None = None,
) -> Findings:
    """Tell what changed between two checkpoints, also across dtypes, and between quantised and plain weights.

    Layers are recognised by what they hold: a layer that was deleted, repeated or moved is shown as that, and its
    tensors are compared with those they come from. Tensors of the same bytes are not read as numbers.

    Args:
        other: The second checkpoint.
        names: Compare tensors of the second whose names match this pattern.
        roles: Compare these roles, such as attention or mlp.down, with commas between them.
        layers: Compare these decoder layers of the second.
    """
    from tensorsurgeon.exams.alignment import align, renamed

    one, two = _side(ckpt), _side(open_model(other))
    alignment = align(one.plain, two.plain)
    chosen = select(two.plain, names, roles, layers)
    pairs = {name: alignment.names[name] for name in chosen if name in alignment.names}
    new = [name for name in chosen if name not in pairs]
    taken = set(alignment.names.values())
    whole = not names and not roles and layers is None
    gone = [name for name in one.plain if name not in taken] if whole else []
    moved = renamed(one.plain, two.plain, gone, new)
    found = _compare(one, two, pairs | moved)
    lost = {name for name in moved if not found[name].equal}
    pairs |= {name: origin for name, origin in moved.items() if name not in lost}
    new = [name for name in new if name not in pairs]
    gone = [name for name in gone if name not in set(pairs.values())]
    rows = [_row(one, two, pairs[name], name, found[name]) for name in pairs]
    rows.sort(key=lambda row: -(row["relative error"] or 0))
    absent = [{"tensor": name, "change": "removed", **_described(one, name)} for name in gone]
    absent += [{"tensor": name, "change": "added", **_described(two, name)} for name in new]
    config = list(unequal_keys(one.raw.config.value, two.raw.config.value))
    files = list(unequal_files(one.raw, two.raw))
    layer_text, layer_rows = by_layer(one.plain, alignment.layers, rows)
    others = {
        "of another dtype": sum(row["dtype"] != one.kind(row["from"]) for row in rows),
        "of another shape": sum(row["shape"] != list(one.plain[row["from"]].shape) for row in rows),
    }
    facts = summary(one.raw, two.raw, rows, absent, others, whole) | {
        "layout": " to ".join(dict.fromkeys((one.layout, two.layout))),
        "config keys": len(config),
        "other files": len(files),
        "layers": layer_text,
    }
    tables = {"model": [facts], "absent": absent, "config": config, "files": files}
    if any(row["change"] != "equal" for row in rows):
        tables |= {"roles": by_role(rows), "layers": layer_rows, "tensors by change": rows}
    problems = tuple(
        f"{name}: {difference.broken:,} elements are NaN or infinite in one of the two models only."
        for name in pairs
        if (difference := found[name].difference) and difference.broken
    )
    return Findings({title: it for title, it in tables.items() if it}, problems, (), {"tensors by change": SHOWN})


def _side(ckpt: Checkpoint) -> Side:
    found = find_modules(ckpt)
    layout = format_name(ckpt, found) or "plain"
    if found.problems:
        # What cannot be decoded is compared by its bytes.
        return Side(ckpt, ckpt, layout, {}, {})
    made_of: dict[str, list[str]] = defaultdict(list)
    for part, name in found.tensors.items():
        made_of[name].append(part)
    for name, module in found.modules.items():
        made_of[name] += module.shared
    return Side(ckpt, decoded(ckpt, found), layout, found.modules, made_of)


def _compare(one: Side, two: Side, pairs: Mapping[str, str]) -> dict[str, Compared]:
    def same(first: LazyTensor, second: LazyTensor) -> bool:
        return (first.dtype, first.shape) == (second.dtype, second.shape) and same_bytes(first, second)

    def compare(name: str, reader: Reader) -> Compared:
        parts, others = one.parts(pairs[name]), two.parts(name)
        if len(parts) == len(others) and all(map(same, parts, others)):
            reader.advance(work[name].nbytes)
            return Compared(True)
        first, second = one.plain[pairs[name]], two.plain[name]
        if first.shape != second.shape or not {first.dtype, second.dtype} <= set(PLAIN):
            reader.advance(work[name].nbytes)
            return Compared(False)
        from tensorsurgeon.kernels.comparison import compare_blocks, sum_differences

        pieces = reader.pieces(first, second)
        return Compared(False, sum_differences([sums for _, blocks in pieces for sums in compare_blocks(*blocks)]))

    work = {name: Work([*one.parts(origin), *two.parts(name)]) for name, origin in pairs.items()}
    found = dict(each(work, "diff", compare))
    matrices = [name for name, it in found.items() if _has_rank(two.plain[name], it.difference)]
    ranks = _stable_ranks({name: (one.plain[pairs[name]], two.plain[name]) for name in matrices}) if matrices else {}
    return {name: it._replace(stable_rank=ranks.get(name)) for name, it in found.items()}


def _has_rank(tensor: LazyTensor, difference: Difference | None) -> bool:
    return difference is not None and len(tensor.shape) == 2 and difference.squares > 0 and not difference.broken


def _stable_ranks(pairs: Mapping[str, tuple[LazyTensor, LazyTensor]]) -> dict[str, float]:
    """Return `|D|_F^2 / s_1^2` of the difference D of two matrices each, s_1 being its largest singular value."""
    from tensorsurgeon.kernels.deltas import Delta, Goal, Wish, explore, one_thread_each

    budget = Budget(running().memory)
    wish = Wish(Goal("rank", 1), (), "F32", 0, "cpu")

    def rank(name: str, reader: Reader) -> float | None:
        first, second = pairs[name]
        found = explore(Delta(second, first, first.rows), wish, budget, reader.advance)
        return found.sums.delta / found.pair.captured if found.pair else None

    with one_thread_each():
        made = dict(each({name: Work(them) for name, them in pairs.items()}, "diff: stable ranks", rank))
    return {name: it for name, it in made.items() if it is not None}


def _row(one: Side, two: Side, origin: str, name: str, compared: Compared) -> dict[str, Any]:
    before, after = one.plain[origin], two.plain[name]
    kinds = one.kind(origin), two.kind(name)
    changes = []
    if origin != name:
        layers = layer_number(one.plain, origin), layer_number(two.plain, name)
        changes.append(f"from layer {layers[0]}" if None not in layers and layers[0] != layers[1] else "renamed")
    if kinds[0] != kinds[1]:
        changes.append(" to ".join(kinds))
    if before.shape != after.shape:
        changes.append(f"{_size(before)} to {_size(after)}")
    if None not in (files := (one.file(origin), two.file(name))) and files[0] != files[1]:
        changes.append("shard")
    difference = compared.difference
    if not compared.equal:
        same = difference is not None and not difference.unequal
        changes.append("same numbers" if same else "values" if difference else "bytes")
    statistics = difference.statistics() if difference else {}
    unchanged = 0.0 if compared.equal else None
    return {
        "name": name,
        "from": origin,
        "layer": layer_number(two.plain, name),
        "role": role_label(two.plain.roles[name]),
        "dtype": kinds[1],
        "shape": list(after.shape),
        "change": ", ".join(changes) or "equal",
        "relative error": statistics.get("relative error", unchanged),
        "unequal share": statistics.get("unequal share", unchanged),
        "largest difference": statistics.get("largest difference", unchanged),
        "mean difference": statistics.get("mean difference", unchanged),
        "cosine": statistics.get("cosine"),
        "SNR": statistics.get("SNR"),
        "delta stable rank": compared.stable_rank,
    }


def _described(side: Side, name: str) -> dict[str, Any]:
    tensor = side.plain[name]
    return {"dtype": side.kind(name), "shape": list(tensor.shape), "elements": prod(tensor.shape)}


def _size(tensor: LazyTensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
