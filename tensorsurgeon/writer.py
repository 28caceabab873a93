"""Stream a plan to disk, so that DEST exists only when it is whole.

    DEST.partial/plan.json          the plan's digest, written first
    DEST.partial/done/SHARD.json    the SHA-256 of a finished shard
    DEST.partial/checkpoint/        what becomes DEST: shards, then index, config and side files, the receipt last

Each file is written under a temporary name, checked for its length, flushed to the disk, and renamed. When all
is there, `checkpoint` is renamed to DEST. An interrupted run leaves DEST.partial, from which the same plan
goes on; another plan is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial as bind
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tensorsurgeon._version import __version__
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.document import render
from tensorsurgeon.durable import explaining, fsync_directory, write_small
from tensorsurgeon.engines import Engine
from tensorsurgeon.errors import CheckpointError, DestinationError
from tensorsurgeon.plan import Plan, ShardPlan, file_size, make_plan
from tensorsurgeon.progress import Advance, progress_bar
from tensorsurgeon.receipt import make_receipt
from tensorsurgeon.running import MEMORY
from tensorsurgeon.sharing import find_clones, shareable
from tensorsurgeon.sizes import format_size, parse_size
from tensorsurgeon.source import RECEIPT
from tensorsurgeon.stream import stream_shard


def write(
    ckpt: Checkpoint,
    dest: str | os.PathLike[str],
    *,
    max_shard_size: str | int | None = None,
    memory: str | int = MEMORY,
    threads: int | None = None,
    target: Engine | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint to the directory `dest` and return its receipt.

    Raises:
        DestinationError: where `dest` exists, overlaps a source, or cannot be written.
        RefusedError: for what the engine that is the `target` would read otherwise than it is meant.
    """
    size = parse_size(max_shard_size) if max_shard_size else None
    plan = make_plan(ckpt, size, parse_size(memory), threads, target)
    receipt = write_plan(plan, Path(dest), overwrite=overwrite, quiet=quiet)
    assert receipt
    return receipt


def write_plan(
    plan: Plan, dest: Path, *, overwrite: bool = False, part: tuple[int, int] = (1, 1), quiet: bool = False
) -> dict[str, Any] | None:
    """Write a plan to `dest`, or with `part` (i, n) only every n-th shard from the i-th on.

    A part leaves DEST.partial for the run without `part` that completes it, and returns None.
    """
    check_destination(plan, dest, overwrite)
    partial = dest.with_name(dest.name + ".partial")
    _prepare(plan, partial, overwrite)
    tree = partial / "checkpoint"
    with progress_bar(plan.size, dest.name, quiet) as advance:
        digests = _write_shards(plan, plan.shards[part[0] - 1 :: part[1]], partial, advance)
        if part != (1, 1):
            return None
        for name, file in plan.files.items():
            digests[name] = write_small(tree / name, file)
            advance(file_size(file))
    _check_sources(plan)
    receipt = make_receipt(plan, digests)
    write_small(tree / RECEIPT, (render(receipt) + "\n").encode())
    _remove_strangers(tree, {*digests, RECEIPT})
    _publish(tree, dest, partial)
    return receipt


def check_destination(plan: Plan, dest: Path, overwrite: bool) -> None:
    """Raise DestinationError where writing to `dest` would touch a source or something that is in the way."""
    target = dest.resolve()
    for source in plan.checkpoint.sources:
        origin = source.directory.resolve()
        if target == origin or target in origin.parents or origin in target.parents:
            raise DestinationError(f"{dest}: is, holds or lies in the source {origin}; sources are never written to.")
    if not os.path.lexists(dest):
        return
    if not overwrite:
        raise DestinationError(f"{dest}: exists already; choose another place, or replace it with --overwrite.")
    if not dest.is_dir() or dest.is_symlink() or (any(dest.iterdir()) and not (dest / RECEIPT).exists()):
        raise DestinationError(f"{dest}: --overwrite only replaces what tensorsurgeon wrote; remove it yourself.")


def _prepare(plan: Plan, partial: Path, overwrite: bool) -> None:
    """Make DEST.partial, or go on with one that belongs to the same plan."""
    note = partial / "plan.json"
    begun = json.loads(note.read_bytes())["digest"] if note.exists() else None
    if begun != plan.digest and partial.exists():
        unmarked = begun is None and all(path.name.startswith(".plan.json") for path in partial.iterdir())
        if not overwrite and not unmarked:
            raise DestinationError(
                f"{partial}: is unfinished work of another plan; finish it with the command that began it, "
                "remove it, or start anew with --overwrite."
            )
        shutil.rmtree(partial)
    _require_space(plan, partial)
    with explaining(partial):
        partial.mkdir(parents=True, exist_ok=True)
    if not note.exists():
        write_small(note, json.dumps({"tensorsurgeon": __version__, "digest": plan.digest}).encode())
    (partial / "checkpoint").mkdir(exist_ok=True)
    (partial / "done").mkdir(exist_ok=True)


def _require_space(plan: Plan, partial: Path) -> None:
    written = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
    place = next(parent for parent in partial.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free + written
    # Asked only where it matters: to learn what can be shared takes a file.
    if plan.size > free and (needed := plan.size - _shared(plan, place)) > free:
        raise DestinationError(
            f"{partial.parent}: {format_size(needed)} are to be written, but {format_size(free)} are free; "
            "make room, or choose another disk."
        )


def _shared(plan: Plan, place: Path) -> int:
    """Return how many bytes of a plan take no room of their own at `place`."""
    with explaining(place), TemporaryFile(dir=place) as file:

        def open_twin(path: Path) -> int:
            return os.open(path, os.O_RDONLY) if path.is_absolute() else os.dup(file.fileno())

        clones = [clone for found in find_clones(plan).values() for clone in found]
        return sum(clone.twin.nbytes for clone in shareable(clones, file.fileno(), open_twin))


def _write_shards(plan: Plan, shards: tuple[ShardPlan, ...], partial: Path, advance: Advance) -> dict[str, str]:
    """Write what is missing of `shards` and return the SHA-256 of each.

    While one shard is flushed to the disk, the next is already written.
    """
    digests = {shard.file: _digest_of(partial, shard) for shard in shards}
    clones = find_clones(plan)
    begun: set[Path] = set()
    open_twin = bind(_open_twin, partial / "checkpoint", begun)
    with ThreadPoolExecutor(plan.threads) as pool, ThreadPoolExecutor(1) as finisher:
        finishing: Future[None] | None = None
        for shard in shards:
            if digests[shard.file]:
                advance(shard.size)
                continue
            temporary = partial / "checkpoint" / f".{shard.file}"
            with explaining(temporary):
                file = _open_exclusively(temporary)
                begun.add(Path(shard.file))
                try:
                    digest = digests[shard.file] = stream_shard(
                        plan, shard, clones[shard.file], file, pool, advance, open_twin
                    )
                    if finishing:
                        finishing.result()
                except BaseException:
                    os.close(file)
                    raise
            finishing = finisher.submit(_finish_shard, file, temporary, partial, shard, digest)
        if finishing:
            finishing.result()
    return {file: digest for file, digest in digests.items() if digest}


def _open_twin(tree: Path, begun: Container[Path], path: Path) -> int:
    """Open a source, or a shard that this process has `begun` or that is finished: another's is not to be read yet."""
    if path in begun:
        with suppress(FileNotFoundError):
            return os.open(tree / f".{path}", os.O_RDONLY)
    return os.open(tree / path, os.O_RDONLY)


def _open_exclusively(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise DestinationError(f"{path}: another process is writing it; wait for it, or end it.") from None
    return file


def _finish_shard(file: int, temporary: Path, partial: Path, shard: ShardPlan, digest: str) -> None:
    """Flush a shard to the disk, give it its name, and only then note that it is done."""
    with explaining(temporary):
        try:
            os.fsync(file)
            length = os.fstat(file).st_size
            if length != shard.size:
                raise DestinationError(f"{temporary}: has {length} bytes instead of {shard.size}; who else writes it?")
            os.rename(temporary, temporary.with_name(shard.file))
        finally:
            os.close(file)
        fsync_directory(temporary.parent)
    write_small(partial / "done" / f"{shard.file}.json", json.dumps({"sha256": digest}).encode())


def _digest_of(partial: Path, shard: ShardPlan) -> str | None:
    """Return the SHA-256 of a finished shard, or None for one that is not finished."""
    try:
        if (partial / "checkpoint" / shard.file).stat().st_size != shard.size:
            return None
        return str(json.loads((partial / "done" / f"{shard.file}.json").read_bytes())["sha256"])
    except FileNotFoundError:
        return None


def _check_sources(plan: Plan) -> None:
    for source, stamp in zip(plan.checkpoint.sources, plan.stamps, strict=True):
        changed = [file for file, was in source.stamp().items() if was != stamp[file]]
        if changed:
            raise CheckpointError(
                f"{source.directory}: {', '.join(changed)} changed while being read; the result would mix two models."
            )


def _remove_strangers(tree: Path, known: set[str]) -> None:
    """Remove what an interrupted run left in the tree, temporary files above all."""
    for path in tree.rglob("*"):
        if path.is_file() and path.relative_to(tree).as_posix() not in known:
            path.unlink()


def _publish(tree: Path, dest: Path, partial: Path) -> None:
    """Make the finished tree DEST in one rename."""
    if dest.exists():
        os.rename(dest, partial / "replaced")
    os.rename(tree, dest)
    fsync_directory(dest.parent)
    shutil.rmtree(partial)
