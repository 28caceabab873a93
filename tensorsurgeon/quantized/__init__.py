"""Quantised formats on disk: what tells them from plain numbers, and one module for each that can be decoded.

The tensors decide: a module is quantised where its companion tensors (scales, zero points, packed codes) lie
beside its weight; the config only says what the tensors cannot. A format is one module here and one entry of `FORMATS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.format import BITS
from tensorsurgeon.quantized import (
    awq,
    bitsandbytes,
    compressed_tensors,
    compressed_tensors_packed,
    compressed_tensors_sparse,
    fbgemm_fp8,
    fp8,
    fp8_split_experts,
    gptq,
    mlx,
    modelopt,
    mxfp4_experts,
    torchao,
)
from tensorsurgeon.quantized.parts import IDLE, Format, Parts, Plain, Settings, coded, group, leftover
from tensorsurgeon.quantized.parts import PLAIN as PLAIN
from tensorsurgeon.quantized.refused import refusal
from tensorsurgeon.quantized.settings import find_settings
from tensorsurgeon.tensor import LazyTensor

FORMATS: tuple[Format, ...] = (
    fp8_split_experts.FORMAT,
    fp8.FORMAT,
    bitsandbytes.FORMAT,
    mlx.FORMAT,
    torchao.FORMAT,
    modelopt.FORMAT,
    compressed_tensors_packed.FORMAT,
    compressed_tensors_sparse.FORMAT,
    compressed_tensors.FORMAT,
    mxfp4_experts.FORMAT,
    fbgemm_fp8.FORMAT,
    awq.FORMAT,
    gptq.FORMAT,
)
"""The formats that can be decoded, in the order in which they are asked whether a module is theirs."""

DENSE = ("position_ids", "relative_position_index", ".attn.bias", ".attention.bias", "token_type_ids")
"""How integers end that are tables and masks, not weights."""


class Found(NamedTuple):
    """What is quantised: modules by the name of the plain tensor, tensors without a meaning for them, and faults.

    `tensors` maps each tensor of a module to the name of its plain tensor; `coded` are all that are not plain numbers
    or describe such, whether they can be decoded or not.
    """

    modules: Mapping[str, Plain]
    tensors: Mapping[str, str]
    idle: frozenset[str]
    problems: tuple[str, ...]
    coded: frozenset[str]


def find_modules(ckpt: Checkpoint) -> Found:
    """Return every quantised module; only headers and settings are read."""
    settings = find_settings(ckpt)
    groups = group(ckpt.tensors).values()
    idle = frozenset(f"{parts.module}{part}" for parts in groups for part in parts.tensors if part in IDLE)
    modules: dict[str, Plain] = {}
    tensors: dict[str, str] = {}
    faults: list[tuple[set[str], str]] = []
    for parts in filter(coded, groups):
        try:
            plain = _read(parts, settings)
        except RefusedError as problem:
            names = {f"{parts.module}{part}" for part in parts.tensors}
            faults += [(names, text) for text in problem.problems]
            continue
        faults += [
            ({f"{parts.module}{part}"}, f"{parts.module}{part}: is no part of a module in the format {plain.label}.")
            for part in leftover(parts, plain.parts)
        ]
        modules[plain.name] = plain
        tensors |= {f"{parts.module}{part}": plain.name for part in plain.parts}
    # What modules share may lie under a name that looks like one more module.
    shared = frozenset(name for plain in modules.values() for name in plain.shared)
    problems = dict.fromkeys(text for names, text in faults if not names <= shared | idle)
    described = idle.union(tensors, *(names for names, _ in faults))
    return Found(modules, tensors, idle | shared, tuple(problems), described)


def quantized_tensors(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Return the names of all tensors that are not plain numbers, and of those that describe them.

    Integers that are no weight (`position_ids`, token tables) count as plain.
    """
    found = {
        f"{parts.module}{part}"
        for parts in group(tensors).values()
        for part in parts.tensors
        if coded(parts) or part in IDLE
    }
    return [name for name in tensors if name in found]


def format_name(ckpt: Checkpoint, found: Found) -> str | None:
    """Return the quantised formats that the modules of a checkpoint are in, or None for plain ones."""
    labels = Counter(plain.label for plain in found.modules.values())
    if labels:
        return "; ".join(label for label, _ in labels.most_common())
    first = next((tensor for name, tensor in ckpt.tensors.items() if name in found.coded), None)
    return f"{first.dtype} that cannot be decoded" if first else None


def stored_as(ckpt: Checkpoint, modules: Mapping[str, Plain], name: str) -> str:
    """Return the dtype that a plain tensor has on disk, or the format of one with another name or shape there."""
    plain = modules.get(name)
    if plain is None or (name in ckpt and ckpt[name].shape == plain.shape):
        return ckpt[name].dtype
    return plain.label


def residue(tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    """Yield the names of tensors that are codes, or may be, in what should be plain."""
    for name, tensor in tensors.items():
        narrow = tensor.dtype.startswith("F") and BITS[tensor.dtype] < 16
        whole = tensor.dtype in ("U8", "I8", "I32", "U32") and len(tensor.shape) > 1 and not name.endswith(DENSE)
        if narrow or whole:
            yield name


def require_plain(ckpt: Checkpoint, names: Iterable[str], operation: str) -> None:
    """Raise RefusedError where an operation on numbers would read quantised tensors as numbers."""
    quantized = set(quantized_tensors(ckpt.tensors)).intersection(names)
    if quantized:
        first, known = min(quantized), format_name(ckpt, find_modules(ckpt))
        raise RefusedError(
            f"{operation}: {len(quantized)} tensors are quantised ({known}), for example "
            f"{first!r} in {ckpt[first].dtype}; their codes are not numbers to compute with. Run 'dequantize' first."
        )


def _read(parts: Parts, settings: Settings) -> Plain:
    refused = refusal(settings, parts)
    if refused:
        raise RefusedError(refused)
    for each in FORMATS:
        if each.claims(parts, settings):
            return each.read(parts, settings)
    what = ", ".join(f"{part or 'the weight'} in {tensor.dtype}" for part, tensor in parts.tensors.items())
    raise RefusedError(f"{parts.module}: is in no format that is known here: {what}.")
