"""Tell what lies between two checkpoints: tensors, numbers, layers, config, side files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.exams.documents import unequal_files, unequal_keys
from tensorsurgeon.exams.selection import layer_number, role_label, select
from tensorsurgeon.exams.streaming import Reader, Work, each
from tensorsurgeon.names import companions
from tensorsurgeon.notation import format_layers
from tensorsurgeon.ops.dequantization import as_plain
from tensorsurgeon.parameters import Glob, Layers, Model, Words
from tensorsurgeon.quantized import PLAIN, format_name
from tensorsurgeon.registry import Findings, exam, open_model
from tensorsurgeon.running import Budget, running
from tensorsurgeon.tensor import LazyTensor

if TYPE_CHECKING:
    from tensorsurgeon.kernels.comparison import Difference

SHOWN = ("name", "change", "relative error", "cosine", "SNR dB", "largest difference", "delta stable rank")


class Side(NamedTuple):
    """One of two models: as it lies on disk, as plain numbers where it can be decoded, and what describes modules."""

    raw: Checkpoint
    plain: Checkpoint
    described: Mapping[str, Sequence[str]]

    def parts(self, name: str) -> list[LazyTensor]:
        """Return what a tensor consists of on disk: itself and, of a quantised weight, what describes it."""
        companions_of = self.described.get(name.removesuffix(".weight"), ())
        return [self.raw[part] for part in (name, *companions_of) if part in self.raw]


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
    gone = [] if names or roles or layers else [name for name in one.plain if name not in taken]
    moved = renamed(one.plain, two.plain, gone, new)
    found = _compare(one, two, pairs | moved)
    lost = {name for name in moved if not found[name].equal}
    pairs |= {name: origin for name, origin in moved.items() if name not in lost}
    new = [name for name in new if name not in pairs]
    gone = [name for name in gone if name not in set(pairs.values())]
    rows = [_row(one, two, pairs[name], name, found[name]) for name in pairs]
    rows.sort(key=lambda row: -(row["relative error"] or 0))
    absent = [{"tensor": name, "change": "removed", **_described(one.raw, name)} for name in gone]
    absent += [{"tensor": name, "change": "added", **_described(two.raw, name)} for name in new]
    config = list(unequal_keys(one.raw.config.value, two.raw.config.value))
    files = list(unequal_files(one.raw, two.raw))
    layer_text, layer_rows = _layers(one, alignment.layers, rows)
    summary = _summary(one, two, rows, absent, config, files) | {"layers": layer_text}
    tables = {"model": [summary], "absent": absent, "config": config, "files": files}
    if any(row["change"] != "equal" for row in rows):
        tables |= {"roles": _by_role(rows), "layers": layer_rows, "tensors by change": rows}
    problems = tuple(
        f"{name}: {it.difference.broken:,} elements are NaN or infinite in one of the two models only."
        for name, it in found.items()
        if name in pairs and it.difference and it.difference.broken
    )
    return Findings({title: it for title, it in tables.items() if it}, problems, (), {"tensors by change": SHOWN})


def _side(ckpt: Checkpoint) -> Side:
    described: dict[str, list[str]] = defaultdict(list)
    for name, module in companions(ckpt.tensors).items():
        described[module].append(name)
    try:
        return Side(ckpt, as_plain(ckpt, "float32"), described)
    except RefusedError:
        # What cannot be decoded is compared by its bytes.
        return Side(ckpt, ckpt, {})


def _compare(one: Side, two: Side, pairs: Mapping[str, str]) -> dict[str, Compared]:
    from tensorsurgeon.kernels.comparison import compare_blocks, same_bytes, sum_differences
    from tensorsurgeon.kernels.deltas import one_thread_each

    budget = Budget(running().memory)

    def same(first: LazyTensor, second: LazyTensor, reader: Reader) -> bool:
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        if first.span and first.span == second.span:
            return True
        blocks = reader.pieces(first, second, counted=False)
        return all(same_bytes(x.data, y.data) for _, (x, y) in blocks)

    def compare(name: str, reader: Reader) -> Compared:
        parts, others = one.parts(pairs[name]), two.parts(name)
        if len(parts) == len(others) and all(same(*both, reader) for both in zip(parts, others, strict=True)):
            reader.advance(work[name].nbytes)
            return Compared(True)
        first, second = one.plain[pairs[name]], two.plain[name]
        if first.shape != second.shape or not {first.dtype, second.dtype} <= set(PLAIN):
            reader.advance(work[name].nbytes)
            return Compared(False)
        pieces = reader.pieces(first, second)
        difference = sum_differences([sums for _, blocks in pieces for sums in compare_blocks(*blocks)])
        return Compared(False, difference, _stable_rank(first, second, difference, budget))

    work = {name: Work([*one.parts(origin), *two.parts(name)]) for name, origin in pairs.items()}
    with one_thread_each():
        return dict(each(work, "diff", compare))


def _stable_rank(first: LazyTensor, second: LazyTensor, difference: Difference, budget: Budget) -> float | None:
    """Return `|D|_F^2 / s_1^2` of the difference D of two matrices."""
    from tensorsurgeon.kernels.deltas import Delta, Goal, Wish, explore

    if len(first.shape) != 2 or not difference.squares or difference.broken:
        return None
    wish = Wish(Goal("rank", 1), (), "F32", 0, "cpu")
    pair = explore(Delta(second, first, first.rows), wish, budget, lambda count: None).pair
    return difference.squares / pair.captured if pair else None


def _row(one: Side, two: Side, origin: str, name: str, compared: Compared) -> dict[str, Any]:
    before, after = one.raw[origin], two.raw[name]
    changes = []
    if origin != name:
        layers = layer_number(one.plain, origin), layer_number(two.plain, name)
        changes.append(f"from layer {layers[0]}" if None not in layers and layers[0] != layers[1] else "renamed")
    if before.dtype != after.dtype:
        changes.append(f"{before.dtype} to {after.dtype}")
    if before.shape != after.shape:
        changes.append(f"{_size(before)} to {_size(after)}")
    if before.span and after.span and before.span.path.name != after.span.path.name:
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
        "dtype": after.dtype,
        "shape": list(after.shape),
        "change": ", ".join(changes) or "equal",
        "unequal share": statistics.get("unequal share", unchanged),
        "largest difference": statistics.get("largest difference", unchanged),
        "mean difference": statistics.get("mean difference", unchanged),
        "relative error": statistics.get("relative error", unchanged),
        "cosine": statistics.get("cosine"),
        "SNR dB": statistics.get("SNR dB"),
        "delta stable rank": compared.stable_rank,
    }


def _summary(
    one: Side, two: Side, rows: Sequence[Mapping[str, Any]], absent: Sequence[Any], config: Any, files: Any
) -> dict[str, Any]:
    changes = [str(row["change"]).split(", ") for row in rows]
    same_bytes = sum(not {"values", "bytes", "same numbers"} & set(it) for it in changes)
    same_numbers = sum("same numbers" in it for it in changes)
    equal = "every byte of every tensor" if same_bytes == len(rows) and not absent else "no"
    if equal == "no" and same_bytes + same_numbers == len(rows) and not absent:
        equal = "every number"
    return {
        "first": one.raw.sources[0].name,
        "second": two.raw.sources[0].name,
        "equal": equal,
        "tensors compared": len(rows),
        "of the same bytes": same_bytes,
        "of the same numbers": same_numbers,
        "changed": len(rows) - same_bytes - same_numbers,
        "renamed or moved": sum(it[0] == "renamed" or it[0].startswith("from layer") for it in changes),
        "of another dtype": sum(row["dtype"] != one.raw[row["from"]].dtype for row in rows),
        "of another shape": sum(row["shape"] != list(one.raw[row["from"]].shape) for row in rows),
        "in another shard": sum("shard" in it for it in changes),
        "removed": sum(row["change"] == "removed" for row in absent),
        "added": sum(row["change"] == "added" for row in absent),
        "layout": " to ".join(dict.fromkeys(format_name(it.raw.tensors) or "plain" for it in (one, two))),
        "config keys": len(config),
        "other files": len(files),
    }


def _layers(
    one: Side, layers: Sequence[int | None], rows: Sequence[Mapping[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """Return in words which layers the second model has, and a row for each, those that changed most first."""
    if not layers:
        return "not clear in one of the two models", []
    count = one.plain.layers.count
    known = [layer for layer in layers if layer is not None]
    gone = sorted(set(range(count)) - set(known))
    text = f"the same {count}" if tuple(layers) == tuple(range(count)) else f"{format_layers(known)} of {count}"
    text += f"; {format_layers(gone)} are gone" if gone else ""
    text += f"; {len(layers) - len(known)} are new" if len(known) < len(layers) else ""
    made = []
    for layer, origin in enumerate(layers):
        held = [row for row in rows if row["layer"] == layer]
        if held:
            made.append({"layer of the second": layer, "of the first": origin, **_most(held)})
    return text, sorted(made, key=lambda row: -(row["largest relative error"] or 0))


def _by_role(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["role"] or "other"].append(row)
    made = [{"tensors of": role, **_most(held)} for role, held in groups.items()]
    return sorted(made, key=lambda row: -(row["largest relative error"] or 0))


def _most(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [row["relative error"] for row in rows if row["relative error"] is not None]
    return {
        "number": len(rows),
        "changed": sum(row["unequal share"] != 0 for row in rows),
        "largest relative error": max(errors, default=None),
        "rms relative error": sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None,
    }


def _described(ckpt: Checkpoint, name: str) -> dict[str, Any]:
    tensor = ckpt[name]
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "elements": prod(tensor.shape)}


def _size(tensor: LazyTensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
