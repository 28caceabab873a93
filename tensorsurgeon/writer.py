"""Stream a plan to disk, so that DEST exists only when it is whole.

    DEST.partial/plan.json          the plan's digest, written first
    DEST.partial/done/SHARD.json    the SHA-256 of a finished shard
    DEST.partial/checkpoint/        what becomes DEST: shards, then index, config and side files, the receipt last

Each file is written under a temporary name, checked for its length, flushed to the disk, and renamed. When all
is there, `checkpoint` is renamed to DEST. An interrupted run leaves DEST.partial, from which the same plan
goes on; another plan is refused.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorsurgeon._version import __version__
from tensorsurgeon.checkpoint import RECEIPT, Checkpoint, SideFile
from tensorsurgeon.document import render
from tensorsurgeon.errors import CheckpointError, DestinationError, SurgeonError, UsageError
from tensorsurgeon.format import Span
from tensorsurgeon.plan import MEMORY, Piece, Plan, ShardPlan, file_size, make_plan
from tensorsurgeon.progress import Advance, progress_bar
from tensorsurgeon.sizes import format_size, parse_size
from tensorsurgeon.tensor import Buffer, read_span

READ_BACK = 2**20
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def write(
    ckpt: Checkpoint,
    dest: str | os.PathLike[str],
    *,
    max_shard_size: str | int | None = None,
    memory: str | int = MEMORY,
    threads: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint to the directory `dest` and return its receipt.

    Raises:
        DestinationError: where `dest` exists, overlaps a source, or cannot be written.
    """
    plan = make_plan(ckpt, parse_size(max_shard_size) if max_shard_size else None, parse_size(memory), threads)
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
        chosen = plan.shards[part[0] - 1 :: part[1]]
        _write_shards(plan, chosen, partial, advance)
        if part != (1, 1):
            return None
        digests = {shard.file: _digest_of(partial, shard) for shard in plan.shards}
        for name, file in plan.files.items():
            digests[name] = _write_side_file(tree / name, file)
            advance(file_size(file))
    _check_sources(plan)
    receipt = _receipt(plan, {name: digest for name, digest in digests.items() if digest})
    _write_side_file(tree / RECEIPT, (render(receipt) + "\n").encode())
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


def seal(receipt: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a receipt without its own seal, which tells whether the receipt was changed."""
    content = {key: value for key, value in receipt.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _receipt(plan: Plan, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return what was done to what, and the SHA-256 of every file; nothing in it depends on when or where."""
    sizes = {shard.file: shard.size for shard in plan.shards}
    receipt = {
        "tensorsurgeon": __version__,
        "sources": [{"name": source.name, "fingerprint": source.fingerprint()} for source in plan.checkpoint.sources],
        "steps": [{step.name: dict(step.parameters)} for step in plan.checkpoint.steps],
        "warnings": list(plan.checkpoint.warnings),
        "files": {
            name: {"bytes": sizes[name] if name in sizes else file_size(plan.files[name]), "sha256": digest}
            for name, digest in sorted(digests.items())
        },
    }
    return {**receipt, "seal": seal(receipt)}


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
    partial.mkdir(parents=True, exist_ok=True)
    _require_space(plan, partial)
    _write_side_file(note, json.dumps({"tensorsurgeon": __version__, "digest": plan.digest}).encode())
    (partial / "checkpoint").mkdir(exist_ok=True)
    (partial / "done").mkdir(exist_ok=True)


def _require_space(plan: Plan, partial: Path) -> None:
    written = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(partial).free + written
    if plan.size > free:
        raise DestinationError(
            f"{partial.parent}: {format_size(plan.size)} are to be written, but {format_size(free)} are free; "
            "make room, or choose another disk."
        )


def _write_shards(plan: Plan, shards: tuple[ShardPlan, ...], partial: Path, advance: Advance) -> None:
    """Write what is missing of `shards`; while one is flushed to the disk, the next is already written."""
    with ThreadPoolExecutor(plan.threads) as pool, ThreadPoolExecutor(1) as finisher:
        finishing: list[Future[None]] = []
        for shard in shards:
            if _digest_of(partial, shard):
                advance(shard.size)
                continue
            temporary = partial / "checkpoint" / f".{shard.file}"
            file = _open_exclusively(temporary)
            try:
                digest = _stream(plan, shard, file, pool, advance)
            except BaseException as problem:
                os.close(file)
                raise _explained(problem, temporary) from problem
            for earlier in finishing:
                earlier.result()
            finishing = [finisher.submit(_finish_shard, file, temporary, partial, shard, digest)]
        for last in finishing:
            last.result()


def _explained(problem: BaseException, path: Path) -> BaseException:
    if isinstance(problem, OSError) and not isinstance(problem, SurgeonError):
        return DestinationError(
            f"{path.parent.parent}: {problem.strerror or problem}; finished shards are kept, "
            "and the same command goes on from there."
        )
    return problem


def _open_exclusively(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise DestinationError(f"{path}: another process is writing it; wait for it, or end it.") from None
    return file


def _stream(plan: Plan, shard: ShardPlan, file: int, pool: ThreadPoolExecutor, advance: Advance) -> str:
    """Write one shard and return its SHA-256: pieces are made by the pool and hashed here, in file order."""
    os.ftruncate(file, 0)
    os.posix_fallocate(file, 0, shard.size)
    _write_at(file, shard.header, 0)
    digest = hashlib.sha256(shard.header)
    advance(len(shard.header))
    in_hand: deque[tuple[Piece, Future[Buffer | None]]] = deque()
    try:
        for piece in shard.pieces(plan.block_memory):
            in_hand.append((piece, pool.submit(_write_piece, file, piece)))
            if len(in_hand) >= plan.window:
                _retire(*in_hand.popleft(), file, digest, advance)
        while in_hand:
            _retire(*in_hand.popleft(), file, digest, advance)
    except BaseException:
        for _, future in in_hand:
            future.cancel()
        for _, future in in_hand:
            if not future.cancelled():
                future.exception()
        raise
    return digest.hexdigest()


def _retire(piece: Piece, future: Future[Buffer | None], file: int, digest: Any, advance: Advance) -> None:
    data = future.result()
    if data is None:
        for chunk in _read_back(file, piece.offset, piece.nbytes):
            digest.update(chunk)
    else:
        digest.update(data)
    # Starts the writing to disk now rather than in the final fsync.
    os.posix_fadvise(file, piece.offset, piece.nbytes, os.POSIX_FADV_DONTNEED)
    advance(piece.nbytes)


def _write_piece(file: int, piece: Piece) -> Buffer | None:
    """Write one piece; return its bytes if they passed through memory."""
    if piece.span:
        return _copy(piece.span, file, piece.offset)
    assert piece.tensor
    try:
        data = piece.tensor.read(*piece.rows).data
    except SurgeonError as problem:
        raise type(problem)(*(f"{piece.name}: {text}" for text in problem.problems)) from None
    if len(data) != piece.nbytes:
        raise AssertionError(f"{piece.name}: {piece.tensor.history} gave {len(data)} bytes, not {piece.nbytes}.")
    _write_at(file, data, piece.offset)
    return data


def _copy(span: Span, file: int, offset: int) -> Buffer | None:
    """Copy a span inside the kernel; return its bytes where the kernel cannot and they passed through memory."""
    done = 0
    with open(span.path, "rb", buffering=0) as source:
        while done < span.nbytes:
            try:
                count = os.copy_file_range(source.fileno(), file, span.nbytes - done, span.offset + done, offset + done)
            except OSError as problem:
                if done or problem.errno not in _NO_KERNEL_COPY:
                    raise
                data = read_span(span)
                _write_at(file, data, offset)
                return data
            if count == 0:
                raise CheckpointError(f"{span.path}: ended while it was read; it was changed meanwhile.")
            done += count
    return None


def _read_back(file: int, offset: int, size: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(READ_BACK, size)))
    while size:
        count = os.preadv(file, [buffer[: min(len(buffer), size)]], offset)
        if not count:
            raise DestinationError("the file being written was cut short by somebody else.")
        yield buffer[:count]
        offset, size = offset + count, size - count


def _write_at(file: int, data: Buffer, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


def _finish_shard(file: int, temporary: Path, partial: Path, shard: ShardPlan, digest: str) -> None:
    """Flush a shard to the disk, give it its name, and only then note that it is done."""
    try:
        os.fsync(file)
        length = os.fstat(file).st_size
        if length != shard.size:
            raise DestinationError(f"{temporary}: has {length} bytes instead of {shard.size}; who else writes it?")
        os.rename(temporary, temporary.with_name(shard.file))
    finally:
        os.close(file)
    _fsync_directory(temporary.parent)
    _write_side_file(partial / "done" / f"{shard.file}.json", json.dumps({"sha256": digest}).encode())


def _digest_of(partial: Path, shard: ShardPlan) -> str | None:
    """Return the SHA-256 of a finished shard, or None for one that is not finished."""
    try:
        if (partial / "checkpoint" / shard.file).stat().st_size != shard.size:
            return None
        return str(json.loads((partial / "done" / f"{shard.file}.json").read_bytes())["sha256"])
    except FileNotFoundError:
        return None


def _write_side_file(path: Path, content: SideFile) -> str:
    """Write a small file whole, flushed and renamed; return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    digest = hashlib.sha256()
    with _explaining(path), open(temporary, "wb") as file:
        for chunk in [content] if isinstance(content, bytes) else _chunks(content):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    _fsync_directory(path.parent)
    return digest.hexdigest()


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DestinationError(f"{path}: {problem.strerror or problem}.") from None


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(READ_BACK):
            yield chunk


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
    _fsync_directory(dest.parent)
    shutil.rmtree(partial)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_part(text: str) -> tuple[int, int]:
    """Parse which shards a worker writes: `3/16` is the third of sixteen workers.

    Raises:
        UsageError: for anything else.
    """
    numbers = text.split("/")
    if len(numbers) == 2 and all(number.isdecimal() for number in numbers) and 1 <= int(numbers[0]) <= int(numbers[1]):
        return int(numbers[0]), int(numbers[1])
    raise UsageError(f"--shards {text!r}: write it as 3/16, the third of sixteen workers.")
