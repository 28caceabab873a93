"""Stream one shard to an open file: pieces are copied or computed by a pool of threads, and hashed in file order."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tensorsurgeon.errors import CheckpointError, DestinationError, SurgeonError
from tensorsurgeon.format import Span
from tensorsurgeon.plan import Piece, Plan, ShardPlan
from tensorsurgeon.progress import Advance
from tensorsurgeon.tensor import Buffer, read_span

READ_BACK = 2**20
"""Bytes read at once to hash what the kernel copied; they are still in the page cache."""

_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
"""What copy_file_range says where file systems or kernels cannot do it."""


def stream_shard(plan: Plan, shard: ShardPlan, file: int, pool: ThreadPoolExecutor, advance: Advance) -> str:
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
