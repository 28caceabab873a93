"""Which tensors of a checkpoint make up which part of the model, and how a part comes into memory and goes again.

transformers renames and joins tensors as it loads them (experts become one stack, for example). Its own conversion
does so here, for the tensors of one part at a time; before the first, once for all of them on the meta device, so that
whatever is missing or has another shape is known at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import CheckpointError, raise_all
from tensorsurgeon.forward.mapping import map_span
from tensorsurgeon.forward.silence import silence
from tensorsurgeon.forward.skeleton import Skeleton
from tensorsurgeon.tensor import Block, LazyTensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
HALVES = ("F16", "BF16")
SHOWN = 5
CACHE_LINE = 64

Part = int | str
"""A layer by its number; `decoder`, what its owner has beside the layers; `outer`, beside the head; `unused`."""


def as_tensor(block: Block) -> torch.Tensor:
    """Return a block as a tensor over the same memory."""
    data = block.data if not memoryview(block.data).readonly else bytearray(block.data)
    if not len(data):
        return torch.empty(block.shape, dtype=DTYPES[block.dtype])
    return torch.frombuffer(data, dtype=DTYPES[block.dtype]).reshape(block.shape)


def read_rows(tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
    """Return rows of a tensor; where it lies in a file as it is, over the file's pages, which cannot be written.

    torch warns of such memory, so that this is called under `silence`.
    """
    if not tensor.span or not tensor.row_bytes or start == stop:
        return as_tensor(tensor.read(start, stop))
    size = tensor.row_bytes
    span = tensor.span._replace(offset=tensor.span.offset + start * size, nbytes=(stop - start) * size)
    return torch.frombuffer(map_span(span), dtype=DTYPES[tensor.dtype]).reshape(-1, *tensor.shape[1:])


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that begins at a cache line, as torch's own do: products may be summed in another order else."""
    return tensor if tensor.data_ptr() % CACHE_LINE == 0 else tensor.clone()


class _Unread:
    """What transformers takes for a slice of a safetensors file: it is read when it is indexed."""

    def __init__(self, tensor: LazyTensor, dtype: torch.dtype) -> None:
        self.tensor = tensor
        # Halves that are computed in float32 are cast, whatever module they are for, and so get memory of their own.
        self.is_cast = dtype == torch.float32 and tensor.dtype in HALVES

    def __getitem__(self, _: Any) -> torch.Tensor:
        read = read_rows(self.tensor, 0, self.tensor.rows).reshape(self.tensor.shape)
        return read if self.is_cast else aligned(read)


class Parts:
    """The parts of a model, and the tensors of the checkpoint that each is made of.

    Raises:
        CheckpointError: with every weight that the model's class misses, or has in another shape.
    """

    def __init__(self, ckpt: Checkpoint, skeleton: Skeleton) -> None:
        self.ckpt, self.skeleton = ckpt, skeleton
        model = skeleton.model
        with silence():
            self.mapping = get_model_conversion_mapping(model)
        self.targets = dict(self._targets())
        self._check()
        self.empty = {name: dict(module._parameters) for name, module in model.named_modules()}
        self.sources: dict[Part, list[str]] = defaultdict(list)
        for source, (target, _) in self.targets.items():
            self.sources[self._part(target)].append(source)

    def of(self, ckpt: Checkpoint) -> Parts:
        """Return the parts of another checkpoint, of the same names, dtypes and shapes, in the same model."""
        other = copy(self)
        other.ckpt = ckpt
        return other

    def plain(self, target: str) -> LazyTensor | None:
        """Return the tensor that a parameter is as it lies, or nothing where it is made of several or reordered."""
        found = [source for source, it in self.targets.items() if it == (target, None)]
        return self.ckpt[found[0]] if len(found) == 1 else None

    def memory(self, part: Part) -> int:
        """Return how many bytes the weights of a part take in the dtype of the computation."""
        size = self.skeleton.dtype.itemsize
        return sum(torch.Size(self.ckpt[name].shape).numel() * size for name in self.sources[part])

    def foresee(self, part: Part) -> None:
        """Tell the system that a part will be read soon."""
        for name in self.sources.get(part, ()):
            tensor = self.ckpt[name]
            tensor.foresee(0, tensor.rows)

    @contextmanager
    def loaded(self, part: Part) -> Iterator[None]:
        """Hold the weights of a part in memory for the time of a block."""
        self.load(part)
        try:
            yield
        finally:
            self.drop(part)

    def load(self, part: Part) -> None:
        """Read the weights of a part into the model."""
        self.put({name: _Unread(self.ckpt[name], self.skeleton.dtype) for name in self.sources[part]})

    def drop(self, part: Part) -> None:
        """Let go of the weights of a part."""
        for name, module in self.skeleton.model.named_modules():
            if self._part(f"{name}.") == part:
                module._parameters.update(self.empty[name])

    def put(self, tensors: Mapping[str, Any], device: str = "cpu") -> Any:
        """Put tensors into the model under the names that they have in the checkpoint, as transformers does it."""
        model = self.skeleton.model
        settings = LoadStateDictConfig(
            weight_mapping=self.mapping,
            dtype=self.skeleton.dtype,
            dtype_plan=model._get_dtype_plan(self.skeleton.dtype),
            device_map={"": device},
        )
        with silence():
            told, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings)
        errors = [f"{name}: {text}" for name, text in getattr(told, "conversion_errors", {}).items()]
        raise_all(CheckpointError, errors)
        return told

    def not_finite(self, part: Part) -> list[str]:
        """Return the parameters of a loaded part that hold NaN or infinity."""
        return [
            name
            for name, parameter in self.skeleton.model.named_parameters()
            if self._part(name) == part and not parameter.is_meta and not bool(torch.isfinite(parameter).all())
        ]

    def _targets(self) -> Iterator[tuple[str, tuple[str, str | None]]]:
        """Yield for each tensor the parameter that it goes into, and the pattern by which it is converted, if any."""
        model = self.skeleton.model
        known, prefix = model.state_dict(), model.base_model_prefix
        renamings = [it for it in self.mapping if isinstance(it, WeightRenaming)]
        converters = [it for it in self.mapping if isinstance(it, WeightConverter)]
        for source in self.ckpt:
            target, pattern = rename_source_key(source, renamings, converters, prefix, known)
            if target not in known and source in known:
                target, pattern = rename_source_key(source, [], [], base_model_prefix=prefix, meta_state_dict=known)
            if target in known:
                yield source, (target, pattern)

    def _check(self) -> None:
        model, described = self.skeleton.model, {}
        for name in self.targets:
            tensor = self.ckpt[name]
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"{name}: is {tensor.dtype}, no dtype of plain weights; dequantize it.")
            described[name] = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        told = self.put(described, "meta")
        model._adjust_missing_and_unexpected_keys(told)
        kind, used = type(model).__name__, {name for name in told.missing_keys if self._part(name) != "unused"}
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        problems = [*_listed(used - tied, f"{kind} misses")]
        problems += [
            f"{name}: is {list(found)}, and {kind} has {list(wanted)}."
            for name, found, wanted in sorted(told.mismatched_keys)[:SHOWN]
        ]
        raise_all(CheckpointError, problems)

    def _part(self, target: str) -> Part:
        """Return the part that a parameter, or a module with a dot behind its name, belongs to."""
        skeleton = self.skeleton
        within = target.removeprefix(f"{skeleton.stack}.")
        if within != target:
            number = within.split(".")[0]
            return int(number) if number else "decoder"
        if target.startswith(f"{skeleton.embedding}."):
            return "embedding"
        if target.startswith(f"{skeleton.head}."):
            return "head"
        if target.startswith(f"{skeleton.decoder}."):
            return "decoder"
        return "unused" if target.startswith(f"{skeleton.path[0]}.") else "outer"


def _listed(names: Collection[str], what: str) -> Sequence[str]:
    found = sorted(names)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [f"{what} {', '.join(found[:SHOWN])}{more}; 'verify' tells all."] if found else []


def set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a module's parameter, of whatever shape."""
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
