"""Stream one shard to disk: a pool of threads reads and computes pieces, which are hashed and written in order.

The bytes go past the page cache, from aligned buffers straight to the disk, where the file system can do that:
filling the cache with output that nobody reads soon costs several times the processor time of everything else
here, and pushes out what other programs need.
What shares its extents with what lies on the disk already is hashed, but not written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.plan import PAGE, Piece, Plan, ShardPlan
from tensorsurgeon.progress import Advance
from tensorsurgeon.reading import Buffer, read_span
from tensorsurgeon.sharing import Clone, OpenTwin, between, share, shareable

BUFFER = 4 * 2**20
"""Bytes written at once; a multiple of any disk's block."""


def stream_shard(
    plan: Plan,
    shard: ShardPlan,
    clones: Sequence[Clone],
    file: int,
    pool: ThreadPoolExecutor,
    advance: Advance,
    open_twin: OpenTwin,
) -> str:
    """Write one shard to an open file and return its SHA-256."""
    clones = shareable(clones, file, open_twin)
    for begin, end in between(clones, shard.size):
        # Not all of the file: Btrfs keeps an allocated extent for as long as any part of it is in use.
        os.posix_fallocate(file, begin, end - begin)
    digest = hashlib.sha256()
    begins = {clone.offset: clone for clone in clones}
    position = shared = 0
    with ThreadPoolExecutor(1) as writing:
        output = _Output(file, writing)
        for data in _in_order(plan, shard, begins.keys() | {clone.end for clone in clones}, pool):
            if position in begins and output.share(begins[position], open_twin):
                shared = begins[position].end
            # Bit by bit, so that the disk writes one buffer while the next is hashed.
            for start in range(0, len(data), BUFFER):
                part = memoryview(data)[start : start + BUFFER]
                digest.update(part)
                if position >= shared:
                    output.write(part)
                advance(len(part))
            position += len(data)
        output.finish(shard.size)
    return digest.hexdigest()


def _in_order(plan: Plan, shard: ShardPlan, edges: Container[int], pool: ThreadPoolExecutor) -> Iterator[Buffer]:
    """Yield the shard's bytes from the first to the last, with as many pieces in hand as the plan allows."""
    yield shard.header
    in_hand: deque[Future[Buffer]] = deque()
    try:
        for piece in shard.pieces(plan.block_memory, edges):
            in_hand.append(pool.submit(_make, piece))
            if len(in_hand) >= plan.window:
                yield in_hand.popleft().result()
        while in_hand:
            yield in_hand.popleft().result()
    finally:
        for future in in_hand:
            future.cancel()


def _make(piece: Piece) -> Buffer:
    """Read or compute a piece."""
    if piece.span:
        return read_span(piece.span)
    assert piece.tensor
    try:
        data = memoryview(piece.tensor.read(*piece.rows).data).cast("B")
    except SurgeonError as problem:
        raise type(problem)(*(f"{piece.name}: {text}" for text in problem.problems)) from None
    if len(data) != piece.nbytes:
        raise AssertionError(f"{piece.name}: {piece.tensor.history} gave {len(data)} bytes, not {piece.nbytes}.")
    return data


class _Output:
    """Collects bytes in two aligned buffers: while one is written to the file, the other is filled."""

    def __init__(self, file: int, writing: ThreadPoolExecutor) -> None:
        self.file = file
        self.writing = writing
        self.buffers = [memoryview(mmap.mmap(-1, BUFFER)) for _ in range(2)]
        self.filled = 0
        self.offset = 0
        self.pending: Future[None] | None = None
        _set_direct(file, True)

    def write(self, data: Buffer) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            count = min(len(view), BUFFER - self.filled)
            self.buffers[0][self.filled : self.filled + count] = view[:count]
            self.filled += count
            view = view[count:]
            if self.filled == BUFFER:
                self._flush(BUFFER)

    def share(self, clone: Clone, open_twin: OpenTwin) -> bool:
        """Append what a clone holds without writing it, and tell whether that went."""
        self._flush(self.filled)
        # The twin may be what was just written.
        self._wait()
        if not share(self.file, clone, open_twin):
            return False
        self.offset = clone.end
        return True

    def finish(self, size: int) -> None:
        """Write what is left, padded to a whole page, and cut the padding off."""
        self._flush(-(-self.filled // PAGE) * PAGE)
        self._wait()
        os.ftruncate(self.file, size)

    def _flush(self, count: int) -> None:
        self._wait()
        self.pending = self.writing.submit(_write_at, self.file, self.buffers[0][:count], self.offset)
        self.buffers.reverse()
        self.offset += count
        self.filled = 0

    def _wait(self) -> None:
        if self.pending:
            self.pending.result()


def _write_at(file: int, view: memoryview, offset: int) -> None:
    """Write all of `view`; where the file system refuses a direct write, go through the page cache."""
    while view:
        try:
            count = os.pwrite(file, view, offset)
        except OSError as problem:
            if problem.errno != errno.EINVAL or not _set_direct(file, False):
                raise
            continue
        view, offset = view[count:], offset + count


def _set_direct(file: int, direct: bool) -> bool:
    """Turn direct writes of a file on or off; tell whether that changed anything."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return wanted != flags
