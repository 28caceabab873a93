"""The promises of the README, one by one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import CheckpointError, DestinationError, SurgeonError
from tensorsurgeon.plan import make_plan
from tensorsurgeon.source import RECEIPT
from tensorsurgeon.writer import write_plan

OPERATIONS: dict[str, Callable[[ts.Checkpoint], ts.Checkpoint]] = {
    "dequantize": ts.ops.dequantize,
    "select": lambda ckpt: ts.ops.select_layers(ckpt, "3,0*2"),
    "drop": lambda ckpt: ts.ops.drop_layers(ckpt, "1"),
    "repeat": lambda ckpt: ts.ops.repeat_layers(ckpt, "1-2"),
    "reverse": ts.ops.reverse_layers,
    "keep": lambda ckpt: ts.ops.keep_layers(ckpt, every=2),
    "cast": lambda ckpt: ts.ops.cast(ckpt, "float32", "*norm*"),
    "reshard": lambda ckpt: ts.ops.reshard(ckpt, "500kB"),
}


def stamps(directory: Path) -> dict[str, tuple[int, int, int]]:
    found = {path: path.stat() for path in [directory, *directory.rglob("*")]}
    return {str(path): (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in found.items()}


@pytest.mark.parametrize("name", OPERATIONS)
def test_1_the_source_is_never_written_to(name: str, fp8: Path, tmp_path: Path) -> None:
    before = make.contents(fp8), stamps(fp8)
    ts.write(OPERATIONS[name](ts.open(fp8)), tmp_path / "dest")
    assert (make.contents(fp8), stamps(fp8)) == before


@pytest.mark.parametrize("place", ["", ".", "inside", "inside/deeper", ".."])
def test_1_the_source_is_never_a_destination(place: str, fp8: Path) -> None:
    before = stamps(fp8)
    for overwrite in (False, True):
        with pytest.raises(DestinationError, match="sources are never written to"):
            ts.write(ts.open(fp8), fp8 / place, overwrite=overwrite)
    assert stamps(fp8) == before


def test_1_a_link_to_the_source_is_the_source(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(fp8)
    with pytest.raises(DestinationError, match="sources are never written to"):
        ts.write(ts.open(fp8), tmp_path / "link" / "dest")


DURABLE = ("pwrite", "fsync", "rename", "posix_fallocate", "ftruncate", "mkdir", "preadv", "open")


def die_at(call: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that kills itself, as `kill -9` would, before its n-th system call that matters.

    Return whether it came to that.
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return counted

        for name in DURABLE:
            setattr(os, name, dying(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("name", ["dequantize", "reverse"])
def test_2_and_5_killed_anywhere_dest_is_whole_or_absent_and_the_work_resumes_to_the_same_bytes(
    name: str, fp8: Path, tmp_path: Path
) -> None:
    ckpt = OPERATIONS[name](ts.open(fp8))
    plan = make_plan(ckpt, 700_000, threads=2)
    write_plan(plan, tmp_path / "wanted")
    wanted = make.contents(tmp_path / "wanted")
    call, deaths, seen = 1, 0, set()
    while True:
        dest = tmp_path / f"dest-{call}"
        died = die_at(call, lambda dest=dest: write_plan(plan, dest))  # type: ignore[misc]
        whole = dest.exists()
        seen.add(whole)
        if whole:
            assert make.contents(dest) == wanted
        else:
            write_plan(plan, dest)
            assert make.contents(dest) == wanted
            assert not dest.with_name(dest.name + ".partial").exists()
        if not died:
            break
        deaths += 1
        call += 1 + deaths // 12
    assert seen == {True, False}
    assert deaths > 20


def test_2_a_failure_leaves_no_dest(fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(DestinationError, match="No space left on device"):
        ts.write(ts.open(fp8), tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_2_overwriting_keeps_the_old_dest_until_the_new_is_whole(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "dest"
    ts.write(ts.open(plain), dest)
    old = make.contents(dest)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ts.write(ts.ops.drop_layers(ts.open(plain), "1"), dest, overwrite=True)
        assert make.contents(dest) == old
    ts.write(ts.ops.drop_layers(ts.open(plain), "1"), dest, overwrite=True)
    assert make.contents(dest) != old
    assert not list(tmp_path.glob("*.partial"))


EVERY_DTYPE = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"dequantize"}))
def test_3_a_tensor_that_no_operation_names_keeps_its_bits(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    odd = {
        f"odd.{dtype}": torch.randint(
            0, 2 if dtype == torch.bool else 256, (3, 16), generator=generator, dtype=torch.uint8
        ).view(dtype)
        for dtype in EVERY_DTYPE
    }
    odd |= {
        "odd.scalar": torch.tensor(float("nan")),
        "odd.empty": torch.empty(0, 7),
        "vision_tower.layers.0.w": torch.ones(2),
    }
    source = make.save(tmp_path / "source", {**make.tensors(), **odd}, make.config(), shards=3)
    ts.write(OPERATIONS[name](ts.open(source)), tmp_path / "dest")
    written = make.read(tmp_path / "dest")
    assert make.same(odd, {tensor: written[tensor] for tensor in odd})


def test_3_dequantize_keeps_the_bits_of_plain_tensors(fp8: Path, tmp_path: Path) -> None:
    ts.write(ts.ops.dequantize(ts.open(fp8), "float32"), tmp_path / "dest")
    source, written = make.read(fp8), make.read(tmp_path / "dest")
    untouched = [name for name, tensor in source.items() if tensor.dtype == torch.bfloat16]
    assert len(untouched) == 19
    assert make.same({name: source[name] for name in untouched}, {name: written[name] for name in untouched})


@pytest.mark.parametrize("name", ["dequantize", "reverse", "cast"])
def test_4_the_same_bytes_whatever_the_threads_and_the_memory(name: str, fp8: Path, tmp_path: Path) -> None:
    written = []
    for number, (threads, memory) in enumerate([(1, "1GiB"), (2, "600kB"), (8, "2MB"), (3, "64MiB")]):
        ts.write(OPERATIONS[name](ts.open(fp8)), tmp_path / str(number), threads=threads, memory=memory)
        written.append(make.contents(tmp_path / str(number)))
    assert all(each == written[0] for each in written)


@pytest.mark.parametrize("name", ["dequantize", "repeat"])
def test_4_the_same_tensors_whatever_the_shards(name: str, fp8: Path, tmp_path: Path) -> None:
    sizes = ["100kB", "1MB", "5GB"]
    for size in sizes:
        ts.write(OPERATIONS[name](ts.open(fp8)), tmp_path / size, max_shard_size=size)
    counts = [len(list((tmp_path / size).glob("*.safetensors"))) for size in sizes]
    assert counts[0] > counts[1] > counts[2] == 1
    wanted = make.read(tmp_path / "5GB")
    assert all(make.same(make.read(tmp_path / size), wanted) for size in sizes)


def test_4_nothing_in_the_output_depends_on_where_and_when(fp8: Path, tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        copy = tmp_path / place / fp8.name
        make.fp8(copy)
        ts.write(ts.ops.dequantize(ts.open(copy)), tmp_path / place / "dest")
    assert make.contents(tmp_path / "here" / "dest") == make.contents(tmp_path / "there/deeper" / "dest")


def interrupted(ckpt: ts.Checkpoint, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write all shards but the last."""
    written = 0

    def stop(*args: Any) -> Any:
        nonlocal written
        written += 1
        if written == 3:
            raise KeyboardInterrupt
        return allocate(*args)

    allocate = os.posix_fallocate
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", stop)
        with pytest.raises(KeyboardInterrupt):
            ts.write(ckpt, dest, max_shard_size="700kB")


def test_5_interrupted_work_resumes_where_it_stopped(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = ts.ops.dequantize(ts.open(fp8))
    dest = tmp_path / "dest"
    interrupted(ckpt, dest, monkeypatch)
    done = sorted((tmp_path / "dest.partial/checkpoint").glob("model-*"))
    before = {path.name: path.stat().st_ino for path in done}
    assert len(before) >= 1
    ts.write(ckpt, dest, max_shard_size="700kB")
    assert before == {name: (dest / name).stat().st_ino for name in before}
    ts.write(ckpt, tmp_path / "whole", max_shard_size="700kB")
    assert make.contents(dest) == make.contents(tmp_path / "whole")


def test_5_a_partial_of_another_plan_is_refused(fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt, dest = ts.open(fp8), tmp_path / "dest"
    interrupted(ts.ops.select_layers(ckpt, "0,1,2,3"), dest, monkeypatch)
    # Of the same size to the byte: only the order of the layers differs.
    with pytest.raises(DestinationError, match="unfinished work of another plan"):
        ts.write(ts.ops.select_layers(ckpt, "0,2,1,3"), dest, max_shard_size="700kB")
    ts.write(ts.ops.select_layers(ckpt, "0,2,1,3"), dest, max_shard_size="700kB", overwrite=True)
    ts.write(ts.ops.select_layers(ckpt, "0,2,1,3"), tmp_path / "whole", max_shard_size="700kB")
    assert make.contents(dest) == make.contents(tmp_path / "whole")


def test_5_a_partial_of_a_source_that_changed_is_refused(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(ts.ops.dequantize(ts.open(fp8)), tmp_path / "dest", monkeypatch)
    shard = next(fp8.glob("model-*.safetensors"))
    flip(shard, shard.stat().st_size - 1)
    with pytest.raises(DestinationError, match="unfinished work of another plan"):
        ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "dest", max_shard_size="700kB")


def test_5_parts_written_by_several_workers_make_the_same_checkpoint(fp8: Path, tmp_path: Path) -> None:
    command = ["dequantize", str(fp8), str(tmp_path / "parts"), "--max-shard-size", "500kB", "-q"]
    for part in ("2/3", "1/3", "3/3"):
        assert main([*command, "--shards", part]) == 0
        assert not (tmp_path / "parts").exists()
    assert main(command) == 0
    ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "whole", max_shard_size="500kB")
    assert make.contents(tmp_path / "parts") == make.contents(tmp_path / "whole")


@pytest.mark.parametrize("name", OPERATIONS)
def test_6_what_the_dry_run_prints_is_what_is_written(
    name: str, fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    steps = [{step.name: dict(step.parameters)} for step in OPERATIONS[name](ts.open(fp8)).steps]
    recipe.write_text(json.dumps({"source": str(fp8), "dest": str(tmp_path / "dest"), "steps": steps}))
    assert main(["run", str(recipe), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "dest").exists()
    assert main(["run", str(recipe), "-q"]) == 0
    written = make.contents(tmp_path / "dest")
    promised = {shard["file"]: shard["bytes"] for shard in plan["shards"]} | plan["files"]
    assert {file: len(data) for file, data in written.items() if file != RECEIPT} == promised
    tensors = make.read(tmp_path / "dest")
    assert (plan["tensors"], plan["copied"] + plan["computed"]) == (len(tensors), len(tensors))
    assert plan["elements"] == sum(tensor.numel() for tensor in tensors.values())
    assert plan["bytes_to_write"] == sum(map(len, written.values())) - len(written[RECEIPT])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_7_verify_finds_any_changed_byte(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the model class, which would find some of them on its own.
    monkeypatch.setattr(sys.modules["tensorsurgeon.exams.integrity"], "find_spec", lambda name: None)
    dest = tmp_path / "dest"
    (plain / "tokenizer.json").write_text('{"model": {}}')
    ts.write(ts.ops.drop_layers(ts.open(plain), "1"), dest, max_shard_size="1MB")
    assert not ts.exams.verify(str(dest)).problems
    chance = random.Random(0)
    for path in sorted(dest.iterdir()):
        size = path.stat().st_size
        for position in {0, 9, size - 1, *(chance.randrange(size) for _ in range(4))}:
            original = path.read_bytes()
            flip(path, position)
            assert ts.exams.verify(str(dest)).problems, f"{path.name}, byte {position}"
            path.write_bytes(original)
    assert not ts.exams.verify(str(dest)).problems


def test_8_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    source = make.plain(tmp_path / "source", auto_map={"AutoModelForCausalLM": "modeling_trap.Qwen3ForCausalLM"})
    (source / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w')\n")
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(trap).encode())
    (source / "recipe.yaml").write_text(f"!!python/object/apply:os.system ['touch {trap}']\n")
    dest = tmp_path / "dest"
    for arguments in (
        ["inspect", str(source)],
        ["verify", str(source), "--deep"],
        ["cast", str(source), str(dest), "--dtype", "float32"],
        ["verify", str(dest)],
        ["run", str(source / "recipe.yaml")],
    ):
        subprocess.run([sys.executable, "-m", "tensorsurgeon", *arguments], capture_output=True, check=False)
    assert dest.exists()
    assert not trap.exists()
    assert not (dest / "pytorch_model.bin").exists()


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/b.safetensors", "..", "x\\..\\y", "sub/../../e"])
def test_8_a_name_in_the_index_cannot_reach_outside(name: str, tmp_path: Path) -> None:
    source = make.plain(tmp_path / "source", shards=2)
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", name.replace("\\", "\\\\")))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        ts.open(source)


def test_8_tensor_names_name_no_files(tmp_path: Path) -> None:
    odd = {"../../escaped": torch.ones(2), "/tmp/escaped": torch.ones(3)}
    source = make.save(tmp_path / "source", {**make.tensors(), **odd}, make.config())
    ts.write(ts.open(source), tmp_path / "deep/er/dest", max_shard_size="1MB")
    assert make.same(make.read(tmp_path / "deep/er/dest"), {**make.tensors(), **odd})
    assert {path.name for path in tmp_path.iterdir()} == {"source", "deep"}


MEASURE = """
import resource, sys
import tensorsurgeon as ts, tensorsurgeon.kernels.casting, tensorsurgeon.kernels.tables
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ckpt = ts.open(sys.argv[1])
{operation}
ts.write(ckpt, sys.argv[2], memory="96MiB")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


LARGE: dict[str, tuple[dict[str, tuple[str, list[int]]], dict[str, Any]]] = {
    "plain": ({"big.weight": ("BF16", [65536, 4096])}, {}),
    "block FP8": (
        {"big.weight": ("F8_E4M3", [65536, 8192]), "big.weight_scale_inv": ("F32", [512, 64])},
        make.fp8_settings(),
    ),
    "GPTQ": (
        {
            "big.qweight": ("I32", [1024, 65536]),
            "big.qzeros": ("I32", [64, 8192]),
            "big.scales": ("F16", [64, 65536]),
            "big.g_idx": ("I32", [8192]),
        },
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
    ),
    "AWQ": (
        {
            "big.qweight": ("I32", [8192, 8192]),
            "big.qzeros": ("I32", [64, 8192]),
            "big.scales": ("F16", [64, 65536]),
        },
        {"quant_method": "awq", "bits": 4, "group_size": 128},
    ),
    "experts of gpt-oss": (
        {"experts.up_blocks": ("U8", [32, 5760, 90, 16]), "experts.up_scales": ("U8", [32, 5760, 90])},
        {"quant_method": "mxfp4"},
    ),
    "fused experts in FP8": (
        {"experts.up": ("F8_E4M3", [4, 16384, 8192]), "experts.up_scale_inv": ("F32", [4, 128, 64])},
        make.fp8_settings(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "held"),
    [
        ("", "plain"),
        ("ckpt = ts.ops.cast(ckpt, 'float32')", "plain"),
        ("ckpt = ts.ops.dequantize(ckpt)", "block FP8"),
        ("ckpt = ts.ops.dequantize(ckpt)", "GPTQ"),
        ("ckpt = ts.ops.dequantize(ckpt)", "AWQ"),
        ("ckpt = ts.ops.dequantize(ckpt)", "experts of gpt-oss"),
        ("ckpt = ts.ops.dequantize(ckpt)", "fused experts in FP8"),
    ],
)
def test_9_memory_stays_under_the_limit_whatever_the_largest_tensor(operation: str, held: str, tmp_path: Path) -> None:
    tensors, settings = LARGE[held]
    described = {f"model.layers.0.{name}": it for name, it in tensors.items()}
    config = make.config(1, **({"quantization_config": settings} if settings else {}))
    source = make.sparse(tmp_path / "source", described, config)
    program = MEASURE.format(operation=operation)
    run = [sys.executable, "-c", program, str(source), str(tmp_path / "dest")]
    grown = int(subprocess.run(run, capture_output=True, check=True, text=True).stdout)
    assert grown < 96 * 2**20 + 32 * 2**20
    assert (tmp_path / "dest" / "model.safetensors").stat().st_size > 2**29


def test_9_a_row_that_needs_more_than_the_limit_is_refused_first(fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match="--memory allows 10 kB"):
        ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "dest", memory="10kB")
    assert not list(tmp_path.glob("dest*"))
