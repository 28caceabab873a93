"""Bytes that lie on the disk already are shared, not written once more, where the file system can do that."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import make
import tensorsurgeon as ts
from tensorsurgeon import sharing
from tensorsurgeon.plan import PAGE, Plan, make_plan
from tensorsurgeon.sharing import find_clones
from tensorsurgeon.writer import write_plan

OPERATIONS: dict[str, Callable[[ts.Checkpoint], ts.Checkpoint]] = {
    "repeat": lambda ckpt: ts.ops.repeat_layers(ckpt, "1-2", 3),
    "repeat each": lambda ckpt: ts.ops.repeat_layers(ckpt, "1-2", 3, each=True),
    "select": lambda ckpt: ts.ops.select_layers(ckpt, "3,0*2,2-0,3"),
    "repeat computed": lambda ckpt: ts.ops.repeat_layers(ts.ops.dequantize(ckpt), "1-2"),
    "compute repeated": lambda ckpt: ts.ops.dequantize(ts.ops.repeat_layers(ckpt, "1-2")),
    "nothing": lambda ckpt: ckpt,
}


class Call(NamedTuple):
    """A request to share, with the names of the files."""

    source: str
    begin: int
    length: int
    file: str
    offset: int


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Let a copy stand for sharing, under the same rules, and record what is asked."""
    made: list[Call] = []

    def copy(source: int, begin: int, length: int, file: int, offset: int) -> None:
        places = [os.readlink(f"/proc/self/fd/{each}") for each in (source, file)]
        made.append(Call(Path(places[0]).name, begin, length, Path(places[1]).name, offset))
        with open(f"/proc/self/fd/{source}", "rb") as origin, open(f"/proc/self/fd/{file}", "r+b") as target:
            if length:
                assert begin % PAGE == length % PAGE == offset % PAGE == 0
                assert begin + length <= os.fstat(source).st_size
                assert places[0] != places[1] or begin + length <= offset
            origin.seek(begin)
            target.seek(offset)
            target.write(origin.read(length))

    monkeypatch.setattr(sharing, "clone_range", copy)
    return made


def never(*_: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def clones_of(plan: Plan) -> list[tuple[str, sharing.Clone]]:
    return [(file, clone) for file, clones in find_clones(plan).items() for clone in clones]


@pytest.mark.parametrize("size", ["5GB", "500kB"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_shared_is_the_same_bytes(name: str, size: str, fp8: Path, tmp_path: Path) -> None:
    ckpt = ts.ops.reshard(OPERATIONS[name](ts.open(fp8)), size)
    plan = make_plan(ckpt)
    write_plan(plan, tmp_path / "dest")
    for file, (offset, twin) in clones_of(plan):
        assert offset % PAGE == twin.offset % PAGE == twin.nbytes % PAGE == 0 < twin.nbytes
        assert not twin.path.is_absolute()
        copy = (tmp_path / "dest" / file).read_bytes()[offset:][: twin.nbytes]
        assert copy == (tmp_path / "dest" / twin.path).read_bytes()[twin.offset :][: twin.nbytes]
        assert (str(twin.path), twin.offset + twin.nbytes) <= (file, offset)


@pytest.mark.parametrize("size", ["5GB", "500kB"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_bytes_are_the_same_with_and_without_sharing(
    name: str, size: str, fp8: Path, tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = ts.ops.reshard(OPERATIONS[name](ts.open(fp8)), size)
    ts.write(ckpt, tmp_path / "shared", threads=3, memory="2MB")
    assert any(call.length for call in calls) == (name not in ("nothing", "compute repeated"))
    assert sum(call.length for call in calls) == sum(clone.twin.nbytes for _, clone in clones_of(make_plan(ckpt)))
    monkeypatch.setattr(sharing, "clone_range", never)
    ts.write(ckpt, tmp_path / "written")
    assert make.contents(tmp_path / "shared") == make.contents(tmp_path / "written")
    assert not ts.exams.verify(str(tmp_path / "shared")).problems


def test_a_repeated_block_is_shared_in_one_piece(plain: Path, tmp_path: Path) -> None:
    plan = make_plan(ts.ops.repeat_layers(ts.open(plain), "1-2", 3))
    layer = sum(
        tensor.nbytes for tensor in make.tensors(1).values() if tensor.nbytes % PAGE == 0 and tensor.shape != (304, 192)
    )
    (_, first), (_, second) = clones_of(plan)
    assert first.twin == second.twin
    assert first.twin.nbytes == 2 * layer
    assert (first.offset, second.offset) == (first.twin.offset + 2 * layer, first.twin.offset + 4 * layer)


def test_what_was_written_here_is_shared_with_what_comes_of_it(plain: Path, tmp_path: Path, calls: list[Call]) -> None:
    ts.write(ts.open(plain), tmp_path / "first")
    assert not calls
    ts.write(ts.ops.drop_layers(ts.open(tmp_path / "first"), "2"), tmp_path / "second")
    shared = [call for call in calls if call.length]
    assert {(call.source, call.file) for call in shared} == {("model.safetensors", ".model.safetensors")}
    # What lies before the layer, and what lies behind it.
    assert len(shared) == 2
    whole = sum(tensor.nbytes for tensor in make.tensors(3).values() if tensor.nbytes % PAGE == 0)
    assert sum(call.length for call in shared) == whole


@pytest.mark.parametrize("number", ["EOPNOTSUPP", "EXDEV", "EINVAL", "ENOTTY", "EPERM", "ETXTBSY", "EIO"])
@pytest.mark.parametrize("when", ["when asked", "when done"])
def test_what_cannot_be_shared_is_written(
    when: str, number: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = ts.ops.reshard(OPERATIONS["repeat"](ts.open(plain)), "1MB")
    plan = make_plan(ckpt)
    monkeypatch.setattr(sharing, "clone_range", never)
    ts.write(ckpt, tmp_path / "wanted")
    attempts: list[int] = []

    def fail(source: int, begin: int, length: int, file: int, offset: int) -> None:
        attempts.append(length)
        if length or when == "when asked":
            raise OSError(getattr(errno, number), "no")

    monkeypatch.setattr(sharing, "clone_range", fail)
    write_plan(plan, tmp_path / "dest")
    assert make.contents(tmp_path / "dest") == make.contents(tmp_path / "wanted")
    pairs = {(file, clone.twin.path) for file, clone in clones_of(plan)}
    assert attempts.count(0) == len(pairs) > 1
    assert len(attempts) - len(pairs) == (when == "when done") * len(clones_of(plan))


@pytest.mark.parametrize("parts", [("1/3", "2/3", "3/3"), ("3/3", "2/3", "1/3")])
def test_workers_share_only_with_shards_that_are_whole(
    parts: tuple[str, ...], plain: Path, tmp_path: Path, calls: list[Call]
) -> None:
    plan = make_plan(OPERATIONS["repeat"](ts.open(plain)), 700_000)
    names = [shard.file for shard in plan.shards]
    write_plan(plan, tmp_path / "wanted")
    calls.clear()
    tree = tmp_path / "dest.partial/checkpoint"
    for part in parts:
        number, count = map(int, part.split("/"))
        # Others are at work on theirs, under the names of unfinished ones.
        if tree.exists():
            for name in set(names) - set(names[number - 1 :: count]):
                (tree / f".{name}").write_bytes(b"unfinished" * 100_000)
        write_plan(plan, tmp_path / "dest", part=(number, count))
    write_plan(plan, tmp_path / "dest")
    assert make.contents(tmp_path / "dest") == make.contents(tmp_path / "wanted")
    assert any(call.length for call in calls)


SIZE = 400 * 2**20


@pytest.fixture(params=["btrfs", "xfs"])
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that can share extents, in a file; for root, where its tools are installed."""
    make_it = f"mkfs.{request.param}"
    if os.geteuid() or not shutil.which(make_it):
        pytest.skip(f"takes root and {make_it}")
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(SIZE)
    subprocess.run([make_it, "-q", image], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=False, text=True)
    if mounted.returncode:
        pytest.skip(f"{request.param} cannot be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)
    image.unlink()


def taken(disk: Path) -> int:
    """Return the bytes in use on a disk."""
    subprocess.run(["sync", "-f", disk], check=True)
    return shutil.disk_usage(disk).used


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


@pytest.mark.parametrize("size", ["5GB", "13MB"])
def test_a_repeated_layer_takes_no_disk(size: str, sharing_disk: Path, tmp_path: Path) -> None:
    source = make.plain(tmp_path / "source", layers=60)
    ckpt = ts.ops.repeat_layers(ts.open(source), "0-59", 3)
    before = taken(sharing_disk)
    ts.write(ckpt, sharing_disk / "dest", max_shard_size=size)
    once = size_of(source)
    assert size_of(sharing_disk / "dest") > 2.9 * once
    assert taken(sharing_disk) - before < 1.2 * once
    ts.write(ckpt, tmp_path / "dest", max_shard_size=size)
    assert make.contents(sharing_disk / "dest") == make.contents(tmp_path / "dest")
    assert not ts.exams.verify(str(sharing_disk / "dest")).problems


def test_a_model_takes_little_disk_beside_the_one_it_was_made_of(sharing_disk: Path, tmp_path: Path) -> None:
    source = sharing_disk / "source"
    ts.write(ts.open(make.plain(tmp_path / "plain", layers=60)), source, max_shard_size="13MB")
    files = make.contents(source)
    stamps = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in source.iterdir()}
    before = taken(sharing_disk)
    ckpt = ts.ops.drop_layers(ts.open(source), "20-29")
    ts.write(ckpt, sharing_disk / "dest", max_shard_size="5GB")
    assert taken(sharing_disk) - before < 0.1 * size_of(sharing_disk / "dest")
    assert make.contents(source) == files
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in source.iterdir()} == stamps
    ts.write(ckpt, tmp_path / "dest", max_shard_size="5GB")
    assert make.contents(sharing_disk / "dest") == make.contents(tmp_path / "dest")


def test_a_model_that_fits_only_when_shared_is_written(sharing_disk: Path, tmp_path: Path) -> None:
    ckpt = ts.ops.repeat_layers(ts.open(make.plain(tmp_path / "source", layers=60)), "0-59", 12)
    assert make_plan(ckpt).size > SIZE
    ts.write(ckpt, sharing_disk / "dest", max_shard_size="5GB")
    assert not ts.exams.verify(str(sharing_disk / "dest")).problems
    assert list(sharing_disk.iterdir()) == [sharing_disk / "dest"]
