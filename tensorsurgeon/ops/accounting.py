"""Make the adapter of the factors that were found, with an account of what they capture and what is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorsurgeon import document
from tensorsurgeon.checkpoint import Checkpoint, all_sources
from tensorsurgeon.lora import PREFIX, lora_config, pair_names, served_rank, target_names
from tensorsurgeon.ops.extracting import Extracted, Module
from tensorsurgeon.source import ADAPTER
from tensorsurgeon.tensor import Block, LazyTensor

if TYPE_CHECKING:
    from tensorsurgeon.kernels.deltas import Sums


class Made(NamedTuple):
    """The models as they were given and as plain numbers, the modules, and the norms that are kept as a whole.

    `base_name` is where the base is to be found.
    """

    given: Checkpoint
    base: Checkpoint
    tuned: Checkpoint
    plain: Checkpoint
    modules: list[Module]
    norms: list[str]
    base_name: str


def planned_adapter(made: Made, dtype: str, pad_rank: bool) -> Checkpoint:
    """Return the adapter as it will be if no delta is zero, of which nothing can be read."""
    tensors: dict[str, LazyTensor] = {}
    ranks = {}
    for module in made.modules:
        rank = (served_rank(int(module.value)) if pad_rank else None) or int(module.value)
        names, shapes = pair_names(module.path, module.embedding), module.shapes(rank)
        ranks[module.path] = rank
        tensors |= {
            name: LazyTensor(dtype, shape, function=_unread, history="extract-lora")
            for name, shape in zip(names, shapes, strict=True)
        }
    ckpt = _checkpoint(made, tensors, ranks)
    return ckpt.warn("pairs of deltas that turn out to be zero will be left out.")


def _unread(*blocks: Block) -> Block:
    raise AssertionError("an adapter that is only planned was read")


def made_adapter(made: Made, sums: Mapping[str, Sums], pairs: Mapping[str, Extracted]) -> Checkpoint:
    """Return the adapter of the pairs that were found, with the account of what they capture."""
    tensors: dict[str, LazyTensor] = {}
    ranks: dict[str, int] = {}
    rows = []
    by_name = {module.name: module for module in made.modules}
    for name, pair in pairs.items():
        module = by_name[name]
        ranks[module.path] = pair.stored
        tensors |= dict(zip(pair_names(module.path, module.embedding), (pair.a, pair.b), strict=True))
        rows.append(_row(module, pair, sums[name]))
    report = {"captured": rows, "left out": _left_out(made, sums), "total": [_total(made, sums, pairs)]}
    same = [module.path for module in made.modules if module.name not in pairs]
    ckpt = _checkpoint(made, tensors, ranks).replace(report=report)
    return ckpt.warn(f"{len(same)} deltas are zero and have no pair: {', '.join(same[:3])}…") if same else ckpt


def _checkpoint(made: Made, tensors: dict[str, LazyTensor], ranks: Mapping[str, int]) -> Checkpoint:
    whole = {f"{PREFIX}{name}": made.given[name] for name in made.norms}
    every = [name.removesuffix(".weight") for name, it in made.base.tensors.items() if len(it.shape) > 1]
    transposed = any(module.transposed and not module.embedding for module in made.modules)
    config = lora_config(
        made.base_name,
        ranks,
        target_names(ranks, every),
        _task(made.base),
        sorted({name.rpartition(".")[0] for name in made.norms}),
        transposed,
    )
    return Checkpoint(
        {**tensors, **whole},
        document.parse(json.dumps(config, indent=2)),
        {},
        {"format": "pt"},
        all_sources(made.given, made.base),
        steps=made.given.steps,
        layout=ADAPTER,
    )


def _task(ckpt: Checkpoint) -> str | None:
    """Return what PEFT calls the task of a model that generates text; an encoder has none here."""
    named = str((ckpt.config.value.get("architectures") or [""])[0])
    return "CAUSAL_LM" if named.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) else None


def _row(module: Module, pair: Extracted, sums: Sums) -> dict[str, Any]:
    return {
        "module": module.path,
        "rank": pair.rank,
        "delta": _short(math.sqrt(sums.delta / sums.base)) if sums.base else None,
        "energy": _short(pair.captured / sums.delta),
        "error": _short(math.sqrt(pair.error / sums.delta)),
        "least error": _short(math.sqrt(pair.least / sums.delta)),
    }


def _left_out(made: Made, sums: Mapping[str, Sums]) -> list[dict[str, Any]]:
    """Return, by role, how much of the whole delta lies in tensors that the adapter does not hold."""
    held = {module.name for module in made.modules} | set(made.norms)
    total = _whole(made, sums)
    groups: dict[str, list[str]] = {}
    for name, role in made.plain.roles.items():
        if name not in held:
            kind = "bias" if role.kind == "bias" else role.group
            groups.setdefault(kind, []).append(name)
    rows = []
    for group, names in sorted(groups.items()):
        compared = [sums[name] for name in names if name in sums]
        delta, base = (sum(getattr(it, part) for it in compared) for part in ("delta", "base"))
        rows.append(
            {
                "tensors": group,
                "number": len(names),
                "changed": sum(it.delta > 0 for it in compared),
                "not compared": len(names) - len(compared),
                "delta": _short(math.sqrt(delta / base)) if base else None,
                "share of the delta": _short(delta / total),
            }
        )
    added = [name for name in made.tuned if name not in made.plain]
    return [*rows, {"tensors": "only in the tuned model", "number": len(added)}] if added else rows


def _total(made: Made, sums: Mapping[str, Sums], pairs: Mapping[str, Extracted]) -> dict[str, Any]:
    whole = _whole(made, sums)
    inside = sum(sums[name].delta for name in pairs)
    return {
        "pairs": len(pairs),
        "energy": _short(sum(it.captured for it in pairs.values()) / inside),
        "error": _short(math.sqrt(sum(it.error for it in pairs.values()) / inside)),
        "least error": _short(math.sqrt(sum(it.least for it in pairs.values()) / inside)),
        "share of the whole delta": _short(sum(it.captured for it in pairs.values()) / whole),
    }


def _whole(made: Made, sums: Mapping[str, Sums]) -> float:
    """Return the sum of squares of the whole delta, in which a tied head counts once."""
    return sum(it.delta for name, it in sums.items() if name in made.plain)


def _short(number: float) -> float:
    return float(f"{number:.6g}")
