"""The plan: a checkpoint cut into shards, with exact names, dtypes, offsets and sizes, before a byte is read.

The plan is what `--dry-run` prints and what the writer takes: the same object. A worker that rebuilds it from
the recipe can write any one shard alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon._version import __version__
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.format import BITS, Span, header_bytes
from tensorsurgeon.sizes import format_size
from tensorsurgeon.source import CONFIG, INDEX, SINGLE, SideFile
from tensorsurgeon.tensor import LazyTensor

SHARD_SIZE = 5_000_000_000
MEMORY = 2**30
COPY_BYTES = 32 * 2**20
"""Bytes that one task copies at once."""
BLOCK_MEMORY = 48 * 2**20
"""Most memory that one block takes while it is computed; more does not make it faster."""


class Piece(NamedTuple):
    """A range of a shard that one task writes: bytes of `span` copied, or rows of `tensor` computed."""

    offset: int
    nbytes: int
    span: Span | None = None
    tensor: LazyTensor | None = None
    rows: tuple[int, int] = (0, 0)
    name: str = ""


class ShardPlan(NamedTuple):
    """One file: its name, its header's bytes, and its tensors in file order."""

    file: str
    header: bytes
    tensors: Mapping[str, LazyTensor]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def copied(self) -> int:
        """Number of tensors whose bytes are copied as they are."""
        return sum(tensor.span is not None for tensor in self.tensors.values())

    def pieces(self, block_memory: int) -> Iterator[Piece]:
        """Yield the file's ranges in order, behind the header; neighbours in the source are copied as one."""
        offset = len(self.header)
        run: Span | None = None
        for name, tensor in self.tensors.items():
            span = tensor.span
            if run and span and span.path == run.path and span.offset == run.offset + run.nbytes:
                run = Span(run.path, run.offset, run.nbytes + span.nbytes)
                continue
            if run:
                yield from _copies(offset, run)
                offset += run.nbytes
            run = span
            if not span:
                for start, stop in tensor.blocks(block_memory):
                    size = (stop - start) * tensor.row_bytes
                    yield Piece(offset, size, tensor=tensor, rows=(start, stop), name=name)
                    offset += size
        if run:
            yield from _copies(offset, run)


class Plan(NamedTuple):
    """A checkpoint as it will lie on disk, and what writing it takes.

    `files` are all files but the shards; `window` is how many blocks of at most `block_memory` bytes are in
    memory at once; `digest` stands for everything that decides the output's bytes.
    """

    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    files: Mapping[str, SideFile]
    threads: int
    block_memory: int
    memory: int
    stamps: tuple[Mapping[str, tuple[int, int]], ...]
    digest: str

    @property
    def window(self) -> int:
        """Number of tasks that are in hand at once."""
        return in_hand(self.threads)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(shard.size for shard in self.shards) + sum(file_size(file) for file in self.files.values())

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain data, for a table or for JSON."""
        tensors = [tensor for shard in self.shards for tensor in shard.tensors.values()]
        copied = [tensor for tensor in tensors if tensor.span]
        return {
            "steps": [{step.name: dict(step.parameters)} for step in self.checkpoint.steps],
            "shards": [
                {
                    "file": shard.file,
                    "bytes": shard.size,
                    "tensors": len(shard.tensors),
                    "copied": shard.copied,
                    "computed": len(shard.tensors) - shard.copied,
                }
                for shard in self.shards
            ],
            "files": {name: file_size(file) for name, file in self.files.items()},
            "tensors": len(tensors),
            "elements": sum(prod(tensor.shape) for tensor in tensors),
            "copied": len(copied),
            "computed": len(tensors) - len(copied),
            "bytes_to_read": sum(span.nbytes for tensor in tensors for span in tensor.spans())
            + sum(file_size(file) for file in self.files.values() if isinstance(file, Path)),
            "bytes_to_write": self.size,
            "memory": self.memory,
            "threads": self.threads,
            "warnings": list(self.checkpoint.warnings),
        }


def make_plan(
    ckpt: Checkpoint, max_shard_size: int | None = None, memory: int = MEMORY, threads: int | None = None
) -> Plan:
    """Cut a checkpoint into shards of at most `max_shard_size` bytes of tensors, and fix how it is written.

    A tensor larger than that has a shard of its own. Neither `memory`, the most bytes that blocks may take
    together, nor `threads` changes what is written.

    Raises:
        RefusedError: where one row of a tensor takes more than `memory`.
    """
    threads = threads or len(os.sched_getaffinity(0))
    block_memory = min(BLOCK_MEMORY, memory // in_hand(threads))
    computed = {name: tensor for name, tensor in ckpt.tensors.items() if not tensor.span}
    largest = max((tensor.row_memory * min(tensor.grain, tensor.rows) for tensor in computed.values()), default=0)
    raise_all(
        RefusedError,
        (f"{name}: {format_size(tensor.row_memory * tensor.grain)} of memory are needed to compute its rows, "
         f"{tensor.grain} at a time, and --memory allows {format_size(memory)}."
         for name, tensor in computed.items() if tensor.row_memory * min(tensor.grain, tensor.rows) > memory),
    )  # fmt: skip
    if largest > block_memory:
        threads = max(1, min(threads, memory // largest - 1))
    shards = tuple(_shards(ckpt, max_shard_size or ckpt.shard_size or SHARD_SIZE))
    files = {CONFIG: ckpt.config.encode(), **ckpt.files}
    if len(shards) > 1:
        files[INDEX] = _index(shards)
    stamps = tuple(source.stamp() for source in ckpt.sources)
    used = in_hand(threads) * max(min(block_memory, sum(it.row_memory * it.rows for it in computed.values())), largest)
    digest = _digest(ckpt, shards, files, stamps)
    return Plan(ckpt, shards, dict(sorted(files.items())), threads, block_memory, used, stamps, digest)


def in_hand(threads: int) -> int:
    """Return how many tasks are in hand at once: one a thread, and as many waiting to be hashed."""
    return 2 * threads + 1


def file_size(file: SideFile) -> int:
    """Return the bytes of a file that travels along."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _copies(offset: int, span: Span) -> Iterator[Piece]:
    for begin in range(0, span.nbytes, COPY_BYTES):
        size = min(COPY_BYTES, span.nbytes - begin)
        yield Piece(offset + begin, size, span=Span(span.path, span.offset + begin, size))


def _shards(ckpt: Checkpoint, limit: int) -> Iterator[ShardPlan]:
    groups: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in ckpt.tensors.items():
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        # Wide dtypes first, otherwise in order: every tensor is then aligned to its own width.
        tensors = dict(sorted(group.items(), key=lambda item: -BITS[item[1].dtype]))
        described = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        yield ShardPlan(file, header_bytes(described, ckpt.metadata), tensors)


def _index(shards: tuple[ShardPlan, ...]) -> bytes:
    tensors = [tensor for shard in shards for tensor in shard.tensors.values()]
    index = {
        "metadata": {
            "total_parameters": sum(prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": dict(sorted((name, shard.file) for shard in shards for name in shard.tensors)),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _digest(
    ckpt: Checkpoint,
    shards: tuple[ShardPlan, ...],
    files: Mapping[str, SideFile],
    stamps: tuple[Mapping[str, tuple[int, int]], ...],
) -> str:
    digest = hashlib.sha256(repr((__version__, ckpt.steps, stamps)).encode())
    for shard in shards:
        digest.update(shard.header)
        for tensor in shard.tensors.values():
            digest.update(tensor.describe().encode())
    for name, file in files.items():
        known = file if isinstance(file, bytes) else repr((file_size(file), file.stat().st_mtime_ns)).encode()
        digest.update(name.encode() + known)
    return digest.hexdigest()
