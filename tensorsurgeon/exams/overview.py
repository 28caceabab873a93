"""Tell what a checkpoint is, from its headers and its config."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.lora import Lora, read_lora, served_rank
from tensorsurgeon.parameters import Glob
from tensorsurgeon.quantized import Found, find_modules
from tensorsurgeon.quantized.settings import find_settings
from tensorsurgeon.registry import Findings, exam
from tensorsurgeon.roles import find_role
from tensorsurgeon.sizes import format_size


@exam
def inspect(ckpt: Checkpoint, tensors: Glob | None = None) -> Findings:
    """Tell what a checkpoint is: architecture, parameters, dtypes, quantisation, layers, roles, shards, bytes.

    Only headers and JSON are read.

    Args:
        tensors: List the tensors whose names match this pattern instead.
    """
    if tensors is not None:
        return Findings({"tensors": [_tensor_row(ckpt, name) for name in ckpt.names(tensors)]})
    by_dtype: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in ckpt.tensors.values():
        totals = by_dtype[tensor.dtype]
        totals[0] += 1
        totals[1] += prod(tensor.shape)
        totals[2] += tensor.nbytes
    dtypes = [
        {
            "dtype": dtype,
            "tensors": count,
            "elements": elements,
            "bytes": size,
            "share": f"{size / total:.1%}",
        }
        for total in [sum(totals[2] for totals in by_dtype.values()) or 1]
        for dtype, (count, elements, size) in sorted(by_dtype.items(), key=lambda item: -item[1][2])
    ]
    if ckpt.is_adapter:
        lora = read_lora(ckpt)
        tables = {"model": [_adapter_row(ckpt, lora)], "dtypes": dtypes, "pairs": _pair_rows(lora)}
        return Findings({**tables, "shards": _shard_rows(ckpt)})
    found = find_modules(ckpt)
    formats = _format_rows(found)
    model = _model_row(ckpt, found, formats)
    tables = {"model": [model], "dtypes": dtypes, "formats": formats, "roles": _role_rows(ckpt)}
    return Findings({name: rows for name, rows in tables.items() if rows} | {"shards": _shard_rows(ckpt)})


def _adapter_row(ckpt: Checkpoint, lora: Lora) -> dict[str, Any]:
    """Return what kind of adapter it is, for which model, and what vLLM needs to serve it."""
    config = ckpt.config.value
    ranks = [held.rank for held in lora.modules.values()] or [0]
    variants = [word for key, word in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
    return {
        "name": ckpt.sources[0].name,
        "adapter": " ".join([str(config.get("peft_type")), *variants]),
        "base": config.get("base_model_name_or_path") or "-",
        "pairs": len(lora.modules),
        "ranks": ", ".join(map(str, sorted(set(ranks)))),
        "scales": ", ".join(sorted({f"{held.scale:g}" for held in lora.modules.values()})) or "-",
        "whole tensors": len(lora.whole),
        "max-lora-rank": served_rank(max(ranks)) or "none is high enough",
        "parameters": sum(prod(tensor.shape) for tensor in ckpt.tensors.values()),
        "warnings": "; ".join(ckpt.warnings) or "none",
    }


def _pair_rows(lora: Lora) -> list[dict[str, Any]]:
    """Return how many pairs there are for each kind of module, by rank."""
    found: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for module, held in lora.modules.items():
        sizes = [tensor.shape for tensor in (held.b, held.a) if tensor]
        shape = (sizes[0][0], sizes[-1][-1]) if len(sizes) == 2 else (0, 0)
        role = "embedding token" if held.embedding else " ".join(find_role(f"{module}.weight", shape)[:2])
        count = found[role.strip(), str(held.rank), f"{held.scale:g}"]
        count[0] += 1
        count[1] += sum(prod(size) for size in sizes)
    return [
        {"role": role, "rank": int(rank), "scale": scale, "pairs": pairs, "elements": elements}
        for (role, rank, scale), (pairs, elements) in sorted(found.items())
    ]


def _role_rows(ckpt: Checkpoint) -> list[dict[str, Any]]:
    """Return what the matrices do, how they lie, and how many there are; vectors and scales are left out."""
    found: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for name, role in ckpt.roles.items():
        if role.kind == "weight" and len(ckpt[name].shape) > 1:
            key = (role.group, " ".join(filter(None, (role.mark, role.part))), role.layout or "-", role.fused or "-")
            found[key][0] += 1
            found[key][1] += prod(ckpt[name].shape)
    return [
        {"role": group, "part": part or "-", "layout": layout, "fused": fused, "tensors": count, "elements": elements}
        for (group, part, layout, fused), (count, elements) in found.items()
    ]


def _format_rows(found: Found) -> list[dict[str, Any]]:
    """Return how many modules are in each quantised format, and how many weights they hold."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for plain in found.modules.values():
        totals[plain.label][0] += 1
        totals[plain.label][1] += prod(plain.shape)
    return [{"format": label, "modules": count, "elements": elements} for label, (count, elements) in totals.items()]


def _model_row(ckpt: Checkpoint, found: Found, formats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    config = ckpt.config.value
    architectures = config.get("architectures") or ["-"]
    total = sum(tensor.nbytes for tensor in ckpt.tensors.values())
    method = find_settings(ckpt).method
    labels = "; ".join(row["format"] for row in formats)
    quantization = ": ".join(filter(None, [method, labels])) or "none"
    return {
        "name": ckpt.sources[0].name,
        "architecture": ", ".join(map(str, architectures)) if isinstance(architectures, list) else architectures,
        "model type": config.get("model_type") or "-",
        "parameters": _parameters(ckpt, found),
        "dtype": ckpt.text_config.get("dtype") or ckpt.text_config.get("torch_dtype") or "-",
        "quantisation": quantization,
        "layers": _layers(ckpt),
        "tensors": len(ckpt),
        "shards": len(ckpt.sources[0].headers),
        "bytes": total,
        "size": format_size(total),
        "warnings": "; ".join(ckpt.warnings) or "none",
    }


def _parameters(ckpt: Checkpoint, found: Found) -> int | str:
    """Return the number of weights; those of modules in an unknown format cannot be counted."""
    if found.problems:
        return "not counted, as not all weights can be decoded"
    coded = found.tensors.keys() | found.idle
    plain = sum(prod(tensor.shape) for name, tensor in ckpt.tensors.items() if name not in coded)
    return plain + sum(prod(module.shape) for module in found.modules.values())


def _layers(ckpt: Checkpoint) -> str:
    try:
        stack = ckpt.layers
    except CheckpointError as problem:
        return f"unclear: {problem}"
    extra = f", and {stack.extra} for multi-token prediction" if stack.extra else ""
    return f"{stack.count} ({stack.prefix}N){extra}"


def _shard_rows(ckpt: Checkpoint) -> list[dict[str, Any]]:
    return [
        {"file": file, "tensors": len(header.entries), "bytes": header.file_size}
        for source in ckpt.sources
        for file, header in source.headers.items()
    ]


def _tensor_row(ckpt: Checkpoint, name: str) -> dict[str, Any]:
    tensor = ckpt[name]
    shard = tensor.span.path.name if tensor.span else tensor.history
    return {
        "name": name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "role": " ".join(filter(None, ckpt.roles[name][:2])),
        "kind": ckpt.roles[name].kind,
        "layout": ckpt.roles[name].layout or "-",
        "shard": shard,
    }
