"""Sharing of extents: what already lies on the disk need not be written once more, where the file system can share.

Btrfs and XFS can let two files hold the same pages. A layer that is repeated then takes no more room, and a copy of
a whole shard next to none. Sharing changes no byte, and whatever cannot be shared is written.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tensorsurgeon.format import Span, join
from tensorsurgeon.plan import PAGE, Plan

FICLONERANGE = 0x4020940D
"""The request to share extents, of `struct file_clone_range`; see ioctl_ficlonerange(2)."""


class Clone(NamedTuple):
    """Whole pages of a shard, from `offset` on, that hold the same bytes as those of `twin`.

    A relative path is that of a shard of the same plan: this one, where the twin comes first, or an earlier one.
    """

    offset: int
    twin: Span

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.offset + self.twin.nbytes


OpenTwin = Callable[[Path], int]
"""Opens the file that a clone's twin lies in, for reading."""


def find_clones(plan: Plan) -> dict[str, list[Clone]]:
    """Find, in each shard, the pages that come earlier in the plan, or that are pages of a source already.

    Neighbours that are neighbours there as well become one: a repeated layer, or a whole shard of the source.
    """
    found: dict[str, list[Clone]] = {}
    placed: dict[Span | int, Span] = {}
    for shard in plan.shards:
        clones = found[shard.file] = []
        offset = len(shard.header)
        for tensor in shard.tensors.values():
            if tensor.nbytes % PAGE:
                break
            here = Span(Path(shard.file), offset, tensor.nbytes)
            # One and the same object is computed to the same bytes; that two different ones are, nobody knows.
            twin = placed.setdefault(tensor.span or id(tensor), here)
            if twin is here and tensor.span and tensor.span.offset % PAGE == 0:
                twin = tensor.span._replace(path=tensor.span.path.absolute())
            if twin is not here and tensor.nbytes:
                joined = join(clones[-1].twin, twin) if clones and clones[-1].end == offset else None
                if joined:
                    clones[-1] = Clone(clones[-1].offset, joined)
                else:
                    clones.append(Clone(offset, twin))
            offset += tensor.nbytes
    return found


def shareable(clones: Sequence[Clone], file: int, open_twin: OpenTwin) -> list[Clone]:
    """Return the clones whose twins lie where `file` can share extents with them."""
    paths = {clone.twin.path for clone in clones}
    # To share nothing changes nothing, but fails where sharing would.
    able = {path for path in paths if share(file, Clone(0, Span(path, 0, 0)), open_twin)}
    return [clone for clone in clones if clone.twin.path in able]


def between(clones: Sequence[Clone], size: int) -> Iterator[tuple[int, int]]:
    """Yield where what is to be written begins and ends."""
    ends = (0, *(clone.end for clone in clones))
    begins = (*(clone.offset for clone in clones), size)
    return ((begin, end) for begin, end in zip(ends, begins, strict=True) if begin < end)


def share(file: int, clone: Clone, open_twin: OpenTwin) -> bool:
    """Let a file share its twin's extents; tell whether it does. What the system has against it is no error."""
    try:
        source = open_twin(clone.twin.path)
    except OSError:
        return False
    try:
        # A length of 0 stands for all that follows, so that nothing is what follows the end.
        begin = clone.twin.offset if clone.twin.nbytes else os.fstat(source).st_size
        clone_range(source, begin, clone.twin.nbytes, file, clone.offset)
    except OSError:
        return False
    finally:
        os.close(source)
    return True


def clone_range(source: int, begin: int, length: int, file: int, offset: int) -> None:
    """Let `file` share the extents that hold a range of `source`, both at whole pages."""
    fcntl.ioctl(file, FICLONERANGE, struct.pack("=qQQQ", source, begin, length, offset))
