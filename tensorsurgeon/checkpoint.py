"""Checkpoint: an immutable, ordered mapping from tensor name to LazyTensor, with its config and side files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from tensorsurgeon.config import extra_layers, layer_count, text_config_path
from tensorsurgeon.document import Document
from tensorsurgeon.errors import CheckpointError, UsageError
from tensorsurgeon.names import LayerStack, find_stack, matching
from tensorsurgeon.roles import Role, find_roles
from tensorsurgeon.source import ADAPTER, MODEL, Layout, SideFile, Source, read_source
from tensorsurgeon.tensor import LazyTensor


class Step(NamedTuple):
    """One operation that was applied: its name and its parameters as they stand in a recipe."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A model as a mapping of lazy tensors; every change makes a new one.

    `steps` records the operations that led here, `warnings` what a user should know before writing, `report` tables
    of what an operation measured, `shard_size` the largest shard in bytes where an operation chose one, and `layout`
    what its files are called.
    """

    tensors: Mapping[str, LazyTensor]
    config: Document
    files: Mapping[str, SideFile]
    metadata: Mapping[str, str]
    sources: tuple[Source, ...]
    steps: tuple[Step, ...] = ()
    warnings: tuple[str, ...] = ()
    shard_size: int | None = None
    layout: Layout = MODEL
    report: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def names(self, pattern: str = "*") -> list[str]:
        """Return the names that a glob matches, in order.

        Raises:
            UsageError: where it matches none.
        """
        found = matching(pattern, self.tensors)
        if not found:
            raise UsageError(f"tensors: nothing matches {pattern!r}; 'inspect --tensors \"*\"' lists the names.")
        return found

    def replace(self, **changes: Any) -> Checkpoint:
        """Return a checkpoint with other fields; `config` may be given as a plain mapping."""
        config = changes.get("config")
        if isinstance(config, Mapping):
            changes["config"] = self.config.replace(config)
        return replace(self, **changes)

    def map(self, function: Callable[[LazyTensor], LazyTensor], pattern: str = "*") -> Checkpoint:
        """Return a checkpoint in which `function` was applied to the tensors that a glob matches."""
        chosen = set(self.names(pattern))
        return self.replace(tensors={name: function(it) if name in chosen else it for name, it in self.tensors.items()})

    def warn(self, *texts: str) -> Checkpoint:
        """Return the checkpoint with more warnings."""
        return self.replace(warnings=(*self.warnings, *texts))

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter rather than a model."""
        return self.layout is ADAPTER

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model: a nested one, or all of it."""
        part: Any = self.config.value
        for key in self.text_config_path:
            part = part[key]
        return part  # type: ignore[no-any-return]

    @property
    def text_config_path(self) -> tuple[str, ...]:
        """The keys that lead to the language model's config; empty where it is not nested."""
        return text_config_path(self.config.value)

    @property
    def model_type(self) -> str:
        """The model type of the language model; a nested config without one is of the outer one's text type."""
        nested = "_text" if self.text_config_path else ""
        return str(self.text_config.get("model_type") or f"{self.config.value.get('model_type')}{nested}")

    @cached_property
    def layers(self) -> LayerStack:
        """The stack of decoder layers; of an adapter, up to the last that it holds anything for.

        Raises:
            CheckpointError: where the tensor names and the config do not agree on one.
        """
        if self.is_adapter:
            return find_stack(self.tensors, gaps=True)
        return find_stack(self.tensors, layer_count(self.text_config), extra_layers(self.text_config))

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """The role of every tensor, in order."""
        try:
            stack = self.layers
        except CheckpointError:
            stack = None
        return find_roles({name: tensor.shape for name, tensor in self.tensors.items()}, self.config.value, stack)


def all_sources(*ckpts: Checkpoint) -> tuple[Source, ...]:
    """Return the directories that checkpoints read from, each once."""
    return tuple({source.directory: source for ckpt in ckpts for source in ckpt.sources}.values())


def open_checkpoint(location: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint: a directory, or a hub id such as `Qwen/Qwen3-8B-FP8` or `org/name@revision`.

    Only headers and JSON are read. A hub id is fetched through huggingface_hub, into and from its cache, with
    its offline mode; only files that are needed are fetched.

    Raises:
        UsageError: for a location that is neither.
        CheckpointError: for a directory that holds no sound safetensors checkpoint, with all that is wrong.
    """
    source, tensors, files, metadata, warnings = read_source(location)
    return Checkpoint(tensors, source.config, files, metadata, (source,), warnings=warnings, layout=source.layout)
