"""The plan: a checkpoint cut into shards, with exact names, dtypes, offsets and sizes, before a byte is read.

The plan is what `--dry-run` prints and what the writer takes: the same object. A worker that rebuilds it from
the recipe can write any one shard alone.

In each shard the tensors of whole pages come first, in the checkpoint's order, and the header is padded to a whole
page: every large tensor then begins a page, for whoever maps the file and for file systems that share extents.
The others follow, wide dtypes first, so that each is aligned to its own width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon._version import __version__
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.engines import Engine, with_engine_warnings
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.format import BITS, Span, header_bytes, join
from tensorsurgeon.running import MEMORY, cores
from tensorsurgeon.sizes import format_size
from tensorsurgeon.source import SideFile
from tensorsurgeon.tensor import LazyTensor

PAGE = 4096
"""Bytes of a page of memory, which is what file systems share extents in multiples of, and write directly in."""

SHARD_SIZE = 5_000_000_000
COPY_BYTES = 4 * 2**20
"""Most bytes that one task copies at once: so few are still in the processor's cache when they are hashed."""
BLOCK_MEMORY = 24 * 2**20
"""Most memory that one block takes while it is computed: glibc gives what is beyond 32 MiB back to the system at once,
and having it anew costs more than what is done with it."""


class Piece(NamedTuple):
    """Bytes of a shard that one task makes: a `span` that is copied, or `rows` of a `tensor` that are computed."""

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

    def pieces(self, block_memory: int, edges: Container[int] = ()) -> Iterator[Piece]:
        """Yield what follows the header, in order; neighbours in the source are copied as one.

        No piece lies across any of `edges`, which are offsets in the file where a tensor begins.
        """
        run: Span | None = None
        offset = len(self.header)
        for name, tensor in self.tensors.items():
            span = tensor.span
            joined = join(run, span) if run and span and offset not in edges else None
            offset += tensor.nbytes
            if joined:
                run = joined
                continue
            if run:
                yield from _copies(run, block_memory)
            run = span
            if not span:
                flat = tensor.flat
                for start, stop in flat.blocks(block_memory):
                    yield Piece((stop - start) * flat.row_bytes, tensor=flat, rows=(start, stop), name=name)
        if run:
            yield from _copies(run, block_memory)


class Plan(NamedTuple):
    """A checkpoint as it will lie on disk, and what writing it takes.

    `files` are all files but the shards; `window` is how many pieces are in hand at once, each made in at most
    `block_memory` bytes where its rows allow that, and `memory` what they take together; `digest` stands for
    everything that decides the output's bytes.
    """

    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    files: Mapping[str, SideFile]
    threads: int
    block_memory: int
    window: int
    memory: int
    stamps: tuple[Mapping[str, tuple[int, int]], ...]
    digest: str

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
            "report": dict(self.checkpoint.report),
        }


def make_plan(
    ckpt: Checkpoint,
    max_shard_size: int | None = None,
    memory: int = MEMORY,
    threads: int | None = None,
    target: Engine | None = None,
) -> Plan:
    """Cut a checkpoint into shards of at most `max_shard_size` bytes of tensors, and fix how it is written.

    A tensor larger than that has a shard of its own. Neither `memory`, the most bytes that blocks may take
    together, nor `threads` changes what is written.

    What engines would make of the config is added to the checkpoint's warnings.

    Raises:
        RefusedError: where one row of a tensor takes more than `memory`, and for what the engine that is the
            `target` reads otherwise than it is meant.
    """
    ckpt = with_engine_warnings(ckpt, target)
    threads = threads or cores()
    shards = tuple(_shards(ckpt, max_shard_size or ckpt.shard_size or SHARD_SIZE))
    files = {ckpt.layout.config: ckpt.config.encode(), **ckpt.files}
    if len(shards) > 1:
        files[ckpt.layout.shards] = _index(shards)
    # One piece a thread, as many that wait for their turn to be hashed, and the one that is.
    in_hand = 2 * threads + 1
    block_memory = min(BLOCK_MEMORY, memory // in_hand)
    largest = _largest_piece(ckpt, block_memory, memory)
    window = max(1, min(in_hand, memory // max(1, largest)))
    stamps = tuple(source.stamp() for source in ckpt.sources)
    digest = _digest(ckpt, shards, files, stamps)
    files = dict(sorted(files.items()))
    return Plan(ckpt, shards, files, threads, block_memory, window, window * largest, stamps, digest)


def _largest_piece(ckpt: Checkpoint, block_memory: int, memory: int) -> int:
    """Return the most memory that one piece takes; refuse a tensor whose rows need more than there may be."""
    largest, problems = 0, []
    for name, tensor in ckpt.tensors.items():
        if tensor.span:
            largest = max(largest, min(tensor.nbytes, COPY_BYTES, block_memory))
            continue
        tensor = tensor.flat
        fixed = tensor.fixed_memory
        least = fixed + tensor.row_memory * min(tensor.grain, tensor.rows)
        largest = max(largest, least, min(fixed + tensor.row_memory * tensor.rows, block_memory))
        if least > memory:
            problems.append(
                f"{name}: {format_size(least)} of memory are needed to compute its rows, {tensor.grain} at a time, "
                f"and --memory allows {format_size(memory)}."
            )
    raise_all(RefusedError, problems)
    return largest


def file_size(file: SideFile) -> int:
    """Return the bytes of a file that travels along."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _copies(span: Span, memory: int) -> Iterator[Piece]:
    step = max(1, min(COPY_BYTES, memory))
    for begin in range(0, span.nbytes, step):
        size = min(step, span.nbytes - begin)
        yield Piece(size, span=Span(span.path, span.offset + begin, size))


def _shards(ckpt: Checkpoint, limit: int) -> Iterator[ShardPlan]:
    groups: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in ckpt.tensors.items():
        if groups[-1] and filled + tensor.nbytes > limit and not ckpt.is_adapter:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    for number, group in enumerate(groups, 1):
        file = ckpt.layout.weights if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        # Whole pages stay in order, and what follows them is aligned to its width.
        tensors = dict(sorted(group.items(), key=lambda item: 1 / BITS[item[1].dtype] if item[1].nbytes % PAGE else 0))
        described = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        yield ShardPlan(file, header_bytes(described, ckpt.metadata, PAGE), tensors)


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
    # Two sources may have shards of one name: each directory is known by its place among the sources.
    places = {source.directory: str(place) for place, source in enumerate(ckpt.sources)}
    for shard in shards:
        digest.update(shard.header)
        for tensor in shard.tensors.values():
            digest.update(tensor.describe(places).encode())
    for name, file in files.items():
        known = file if isinstance(file, bytes) else repr((file_size(file), file.stat().st_mtime_ns)).encode()
        digest.update(name.encode() + known)
    return digest.hexdigest()
