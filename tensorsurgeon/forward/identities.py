"""What decides what a layer does: its weights, its module, and what the model's own code calls it with.

Layers of two models for which all three are the same are one layer, whatever their numbers: on the same states they
leave the same states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorsurgeon.checkpoint import Checkpoint, all_sources
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.forward.parts import Parts
from tensorsurgeon.forward.shell import Shell
from tensorsurgeon.names import layer_name

NUMBERS = ("layer_idx", "layer_id")
"""Attributes by which a module finds its place in a cache, which is not used: not what it computes."""


def shell_identity(ckpt: Checkpoint) -> str:
    """Return what models have in common that differ in nothing but the weights of their layers."""
    places = _places(ckpt)
    try:
        stack = ckpt.layers
    except CheckpointError:
        stack = None
    told = [json.dumps(ckpt.config.value, sort_keys=True)]
    for name, tensor in sorted(ckpt.tensors.items()):
        outer = stack is None or stack.layer_of(name) is None
        told.append(f"{name} {tensor.dtype} {tensor.shape} {tensor.describe(places) if outer else ''}")
    return _digest(*told)


def weights_identity(parts: Parts, number: int) -> str:
    """Return what stands for the weights of a layer, under whatever number."""
    places = _places(parts.ckpt)
    told = []
    for name in sorted(parts.sources[number]):
        tensor, found = parts.ckpt[name], layer_name(name)
        told.append(f"{found.rest if found else name} {tensor.dtype} {tensor.shape} {tensor.describe(places)}")
    return _digest(*told)


def module_identities(layers: Sequence[nn.Module]) -> list[str]:
    """Return for each layer what stands for its classes, their settings, and what they compute for themselves."""
    return [_module_identity(layer, number, len(layers)) for number, layer in enumerate(layers)]


def _module_identity(layer: nn.Module, number: int, depth: int) -> str:
    told = []
    for name, module in layer.named_modules():
        settings = {key: it for key, it in vars(module).items() if key not in NUMBERS and _is_plain(it)}
        # Of a list with an entry for each layer, which a class may keep whole, only the own entry is the layer's.
        settings |= {key: it[number] for key, it in settings.items() if isinstance(it, list) and len(it) == depth}
        told.append(f"{name} {type(module)} {sorted(settings.items(), key=repr)}")
        told += [f"{key} {_of(it, {})}" for key, it in module._buffers.items() if it is not None and not it.is_meta]
    return _digest(*told)


def call_identities(shell: Shell) -> list[str]:
    """Return for each layer what stands for its calls on all batches."""
    known: dict[int, str] = {}
    calls = zip(*(it.calls for it in shell.recordings), strict=True)
    return [_digest(*(_of((it.args, it.kwargs, it.placed), known) for it in each)) for each in calls]


def embedded_identity(shell: Shell) -> str:
    """Return what stands for the states before the first layer, and for the batches that they are of."""
    told = [(batch.ids, batch.mask, it.embedded) for batch, it in zip(shell.batches, shell.recordings, strict=True)]
    return _of(told, {})


def layer_numbers(ckpts: Sequence[Checkpoint]) -> dict[tuple[Path, int], int]:
    """Return for each place in a file where a tensor of a layer begins, as the sources lie, the number of the layer."""
    found = {}
    for source in all_sources(*ckpts):
        for file, header in source.headers.items():
            for name, entry in header.entries.items():
                if at := layer_name(name):
                    found[source.directory / file, header.data_offset + entry.begin] = at.index
    return found


def _places(ckpt: Checkpoint) -> dict[Path, str]:
    return {source.directory: str(source.directory) for source in all_sources(ckpt)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _of(value: Any, known: dict[int, str]) -> str:
    """Return a digest of data with tensors in it; one tensor that is given many times is looked at once."""
    if isinstance(value, torch.Tensor):
        if id(value) not in known:
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            known[id(value)] = _digest(f"{value.dtype} {tuple(value.shape)}", data)
        return known[id(value)]
    if isinstance(value, Mapping):
        return _digest(*(f"{key}={_of(it, known)}" for key, it in sorted(value.items())))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _digest(*(_of(it, known) for it in value))
    return repr(value)


def _digest(*told: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for it in told:
        digest.update(it.encode() + b"\n" if isinstance(it, str) else memoryview(it))
    return digest.hexdigest()
