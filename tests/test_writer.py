"""What lands on the disk, and what happens when the disk, the source or another process does not play along."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import CheckpointError, DestinationError
from tensorsurgeon.format import BITS, read_header
from tensorsurgeon.plan import make_plan
from tensorsurgeon.writer import write_plan


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 2 MB, for root; elsewhere the tests that need one cannot run."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up_in_mid_write_loses_nothing(
    fp8: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dequantize", str(fp8), str(small_disk / "dest"), "--max-shard-size", "700kB", "-q"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))  # type: ignore[attr-defined]
        assert main(command) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (small_disk / "dest").exists()
    done = list((small_disk / "dest.partial/checkpoint").glob("model-*"))
    assert done
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert main(command) == 0
    ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "whole", max_shard_size="700kB")
    assert make.contents(small_disk / "dest") == make.contents(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    fp8: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dequantize", str(fp8), str(small_disk / "dest")]) == 1
    assert "2.9 MB are to be written, but 2.1 MB are free" in capsys.readouterr().err
    assert not list(small_disk.iterdir())


def test_from_one_file_system_to_another(fp8: Path, small_disk: Path) -> None:
    ts.write(ts.open(fp8), small_disk / "dest")
    assert make.same(make.read(small_disk / "dest"), make.read(fp8))


@pytest.mark.parametrize("where", ["when asked for", "when written"])
def test_where_writes_cannot_go_past_the_page_cache_they_go_through_it(
    where: str, fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "wanted")
    control, write = fcntl.fcntl, os.pwrite

    def without_direct(file: int, command: int, flags: int = 0) -> int:
        if where == "when asked for" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writes")
        return control(file, command, flags)

    def picky(file: int, data: memoryview, offset: int) -> int:
        if control(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writes")
        return write(file, data, offset)

    monkeypatch.setattr(fcntl, "fcntl", without_direct)
    monkeypatch.setattr(os, "pwrite", picky)
    ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "dest")
    assert make.contents(tmp_path / "dest") == make.contents(tmp_path / "wanted")


def test_reads_and_writes_that_stop_short_go_on(fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "wanted")
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][: max(1, len(views[0]) // 2)]], at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[: max(1, len(data) // 3)], at))
    ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "dest")
    assert make.contents(tmp_path / "dest") == make.contents(tmp_path / "wanted")


def test_an_error_of_the_disk_is_not_taken_for_a_lack_of_direct_writes(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(DestinationError, match="Input/output error"):
        ts.write(ts.open(fp8), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_users_umask(umask: int, mode: int, fp8: Path, tmp_path: Path) -> None:
    for path in fp8.iterdir():
        path.chmod(0o600)
    before = os.umask(umask)
    try:
        ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "dest", max_shard_size="1MB")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "dest").iterdir()} == {mode}


def test_everything_else_travels_along(plain: Path, tmp_path: Path) -> None:
    others = {
        "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "modeling_odd.py": b"raise SystemExit\n",
        "preprocessor_config.json": b"{}",
        "LICENSE": b"as is\n",
        "README.md": "# naïve\n".encode(),
        "1_Pooling/config.json": b"{}",
        "odd name.txt": b"\x00\xff",
    }
    for name, content in others.items():
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_bytes(content)
    ts.write(ts.ops.drop_layers(ts.open(plain), "0"), tmp_path / "dest")
    written = make.contents(tmp_path / "dest")
    assert {name: written[name] for name in others} == others
    assert written["generation_config.json"] == (plain / "generation_config.json").read_bytes()


def test_stale_weights_and_indexes_stay_behind(plain: Path, tmp_path: Path) -> None:
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "params.json",
        "model.gguf",
        "model.onnx",
        ".gitattributes",
    ):
        (plain / name).write_bytes(b"stale")
    (plain / "pytorch_model.bin.index.json").write_text("{}")
    ckpt = ts.open(plain)
    ts.write(ckpt, tmp_path / "dest")
    left = {
        "pytorch_model.bin",
        "consolidated.safetensors",
        "params.json",
        "model.gguf",
        "model.onnx",
        "pytorch_model.bin.index.json",
    }
    assert not left & {path.name for path in (tmp_path / "dest").iterdir()}
    assert all(name in ckpt.warnings[0] for name in left)


def test_metadata_travels_along(tmp_path: Path) -> None:
    metadata = {"format": "pt", "made by": "någon"}
    source = make.save(tmp_path / "source", make.tensors(), make.config(), metadata=metadata)
    ts.write(ts.open(source), tmp_path / "dest", max_shard_size="500kB")
    for shard in (tmp_path / "dest").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert file.metadata() == metadata


def test_the_index_lists_every_tensor_and_adds_up(plain: Path, tmp_path: Path) -> None:
    ts.write(ts.open(plain), tmp_path / "dest", max_shard_size="500kB")
    index = json.loads((tmp_path / "dest/model.safetensors.index.json").read_text())
    tensors = make.tensors()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    homes = {}
    for shard in (tmp_path / "dest").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            homes |= dict.fromkeys(file.keys(), shard.name)
    assert index["weight_map"] == homes


def test_a_shard_holds_at_most_what_was_asked(plain: Path, tmp_path: Path) -> None:
    ts.write(ts.open(plain), tmp_path / "dest", max_shard_size=300_000)
    sizes = [
        sum(tensor.nbytes for tensor in make.read_file(shard).values())
        for shard in (tmp_path / "dest").glob("*.safetensors")
    ]
    assert max(sizes) <= 300_000
    assert len(sizes) > 5


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(plain: Path, tmp_path: Path) -> None:
    ts.write(ts.ops.reshard(ts.open(plain), "100kB"), tmp_path / "dest")
    homes = json.loads((tmp_path / "dest/model.safetensors.index.json").read_text())["weight_map"]
    largest = homes["model.embed_tokens.weight"]
    assert [name for name, home in homes.items() if home == largest] == ["model.embed_tokens.weight"]
    assert make.same(make.read(tmp_path / "dest"), make.tensors())


def test_every_tensor_is_aligned_to_its_own_width(tmp_path: Path) -> None:
    odd = {
        f"a{size}": torch.ones(size, dtype=dtype)
        for size, dtype in [(3, torch.uint8), (5, torch.float64), (7, torch.bfloat16), (9, torch.int32)]
    }
    ts.write(ts.open(make.save(tmp_path / "source", odd, make.config())), tmp_path / "dest")
    ckpt = ts.open(tmp_path / "dest")
    for name, tensor in odd.items():
        span = ckpt[name].span
        assert span
        assert span.offset % tensor.element_size() == 0


def test_tensors_of_whole_pages_come_first_in_order_and_begin_pages(tmp_path: Path) -> None:
    odd = {"odd.bool": torch.ones(5, dtype=torch.bool), "odd.page": torch.ones(4096, dtype=torch.bool)}
    odd |= {"odd.empty": torch.ones(0, 3), "odd.double": torch.ones(3, dtype=torch.float64)}
    source = make.save(tmp_path / "source", {**odd, **make.tensors()}, make.config())
    for size in ("5GB", "600kB"):
        ts.write(ts.open(source), tmp_path / size, max_shard_size=size)
        assert make.same(make.read(tmp_path / size), make.read(source))
        for shard in (tmp_path / size).glob("*.safetensors"):
            header = read_header(shard)
            assert header.data_offset % 4096 == 0
            names = list(header.entries)
            pages = [name for name, entry in header.entries.items() if (entry.end - entry.begin) % 4096 == 0]
            assert pages == [name for name in ts.open(source).tensors if name in pages]
            assert pages == names[: len(pages)]
            widths = [BITS[header.entries[name].dtype] for name in names[len(pages) :]]
            assert widths == sorted(widths, reverse=True)


def test_a_source_that_changes_while_it_is_read_is_noticed(fp8: Path, tmp_path: Path) -> None:
    plan = make_plan(ts.ops.dequantize(ts.open(fp8)))
    shard = next(fp8.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while being read"):
        write_plan(plan, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize("name", ["dequantize", "copy"])
def test_a_source_cut_short_after_it_was_opened_is_noticed(name: str, fp8: Path, tmp_path: Path) -> None:
    ckpt = ts.open(fp8)
    plan = make_plan(ts.ops.dequantize(ckpt) if name == "dequantize" else ckpt)
    for shard in fp8.glob("*.safetensors"):
        os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="changed (while|meanwhile)|was changed"):
        write_plan(plan, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_two_writers_do_not_share_a_shard(fp8: Path, tmp_path: Path) -> None:
    plan = make_plan(ts.open(fp8))
    shard = tmp_path / "dest.partial/checkpoint/.model.safetensors"
    shard.parent.mkdir(parents=True)
    (tmp_path / "dest.partial/plan.json").write_text(json.dumps({"digest": plan.digest}))
    with open(shard, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DestinationError, match="another process is writing it"):
            write_plan(plan, tmp_path / "dest")
    write_plan(plan, tmp_path / "dest")
    assert make.same(make.read(tmp_path / "dest"), make.read(fp8))


def test_a_folder_that_is_not_ours_is_never_replaced(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(DestinationError, match="exists already"):
        ts.write(ts.open(plain), tmp_path / "home")
    with pytest.raises(DestinationError, match="only replaces what tensorsurgeon wrote"):
        ts.write(ts.open(plain), tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("dear")
    with pytest.raises(DestinationError, match="only replaces what tensorsurgeon wrote"):
        ts.write(ts.open(plain), tmp_path / "file", overwrite=True)
    assert make.contents(tmp_path / "home") == {"letter.txt": b"dear"}


def test_a_partial_that_is_not_ours_is_never_removed(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "dest.partial").mkdir()
    (tmp_path / "dest.partial/letter.txt").write_text("dear")
    with pytest.raises(DestinationError, match="unfinished work of another plan"):
        ts.write(ts.open(plain), tmp_path / "dest")
    assert make.contents(tmp_path / "dest.partial") == {"letter.txt": b"dear"}


def test_a_place_that_cannot_be_written_is_an_error_and_no_traceback(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["reshard", str(plain), str(tmp_path / "file/dest"), "-q"]) == 1
    assert "file" in capsys.readouterr().err


def test_the_receipt_tells_what_was_done(fp8: Path, tmp_path: Path) -> None:
    ckpt = ts.ops.drop_layers(ts.ops.dequantize(ts.open(fp8)), [2, 1])
    receipt = ts.write(ckpt, tmp_path / "dest")
    assert receipt == json.loads((tmp_path / "dest/tensorsurgeon.json").read_text())
    assert receipt["steps"] == [{"dequantize": {"dtype": "bfloat16"}}, {"drop-layers": {"layers": "2-1"}}]
    assert receipt["sources"][0]["name"] == "fp8"
    assert set(receipt["files"]) == set(make.contents(tmp_path / "dest")) - {"tensorsurgeon.json"}
