"""Measure tensorsurgeon against the plainest way to get the same bytes.

    python tests/benchmarks/bench.py all
    python tests/benchmarks/bench.py select-layers --runs 7 --json figures.json

Where there is something to compare with, runs alternate, ours and the other, and the ratio is taken pair by pair:
what else the machine does then weighs on both. Every run is a process of its own, start and imports included.
Only files under --scratch are written; they take up to 20 GB and are removed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import synthetic
from synthetic import Qwen3
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin"
"""Where `bin/setup peers` puts mergekit."""

MIB = 2**20
COMMAND = [sys.executable, "-m", "tensorsurgeon"]
IMPORTS = {
    "select-layers": "import tensorsurgeon.cli",
    "dequantize": "import tensorsurgeon.cli, tensorsurgeon.kernels.tables",
    "autopsy": "import tensorsurgeon.cli, tensorsurgeon.exams.vitals",
    "perturb": "import tensorsurgeon.cli, tensorsurgeon.kernels.perturbing",
    "quantize": "import tensorsurgeon.cli, tensorsurgeon.kernels.fp8_errors",
}
"""What each command imports: the floor under its peak memory."""

NOISE = 0.05
"""Level of the noise that is measured."""

LAUNCHER = """
import json, os, sys, time
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
begin = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, used = os.wait4(child, 0)
wall = time.perf_counter() - begin
code = os.waitstatus_to_exitcode(status)
print(json.dumps([code, wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""
"""Starts a child from a small process: Linux counts the memory of the process it was forked from as the child's."""


class Run(NamedTuple):
    """What a process took: seconds of wall time, seconds of CPU time (user and system), peak resident bytes."""

    wall: float
    cpu: float
    peak: int


class Figure(NamedTuple):
    """One thing measured in several runs, beside something else where `theirs` is given.

    `limit` is the most that the median may be: of the ratios ours/theirs, or of ours.
    """

    name: str
    unit: str
    ours: list[float]
    theirs: list[float]
    limit: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours by theirs, pair by pair."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=False)]

    @property
    def judged(self) -> list[float]:
        """The numbers that the limit is for."""
        return self.ratios if self.theirs else self.ours

    @property
    def met(self) -> bool:
        """Whether the median is within the limit, where there is one."""
        return self.limit is None or statistics.median(self.judged) <= self.limit

    def row(self) -> list[str]:
        """Return the cells of the figure's line in a table."""
        cells = [self.name, self.unit, spread(self.ours), spread(self.theirs)]
        if self.limit is None:
            return [*cells, spread(self.ratios), "", ""]
        return [*cells, spread(self.ratios), f"<= {self.limit:g}", "yes" if self.met else "**no**"]


HEADINGS = ["measured", "unit", "tensorsurgeon", "other", "ratio", "target", "met"]


class Setup(NamedTuple):
    """Where and how often to measure, and the models: BF16, FP8, the sizes of one large tensor, of a pair, of one
    that is looked at, and of one that is run."""

    scratch: Path
    runs: int = 5
    plain: Qwen3 = Qwen3(layers=18)
    fp8: Qwen3 = Qwen3(layers=24)
    shard_size: int = 1_500_000_000
    large_rows: int = 262144
    pair: Qwen3 = Qwen3(4, 2048, 8192, 32, 4, 32000)
    whole: Qwen3 = Qwen3(layers=36)
    run: Qwen3 = Qwen3(20, 1024, 4096, 16, 8, 32000)


def spread(values: list[float]) -> str:
    """Return the median and, of several, the least and the largest."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{statistics.median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


def run(command: list[str]) -> Run:
    """Run a command, its output thrown away, and return what it took.

    Raises:
        RuntimeError: where it fails, with what it said.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=True)
    code, wall, cpu, peak = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit status {code}\n{done.stderr}")
    return Run(wall, cpu, peak)


def alternate(runs: int, *tasks: Callable[[], Any]) -> tuple[list[Any], ...]:
    """Do the first task, the second and so on, then all again, `runs` times; return the results of each."""
    rounds = [[task() for task in tasks] for _ in range(runs)]
    return tuple(map(list, zip(*rounds, strict=True)))


def surgeon(*arguments: object) -> list[str]:
    """Return a command line of tensorsurgeon."""
    return [*COMMAND, *map(str, arguments)]


def prepare(dest: Path, source: Path, size: int) -> None:
    """Remove what the last run wrote, let the disk come to rest, and bring memory into one state for every run.

    The source is read into the page cache. Then memory for `size` bytes of output is touched and given back: a
    virtual machine returns free memory to its host, and getting it again costs several times what a copy does.
    """
    shutil.rmtree(dest, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    buffer = bytearray(8 * MIB)
    for path in source.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    run([sys.executable, "-S", "-c", f"b'x' * {min(size, available_memory() // 2)}"])


def available_memory() -> int:
    """Return the bytes of memory that are free or quickly freed."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


@contextmanager
def workplace(setup: Setup) -> Iterator[Path]:
    """Yield an empty directory that is removed in the end."""
    with tempfile.TemporaryDirectory(dir=setup.scratch, prefix="bench-") as directory:
        yield Path(directory)


def measure_select_layers(setup: Setup) -> list[Figure]:
    """Compare the re-indexing of a BF16 model with `cp -r` and `sync` of the files that come of it."""
    half = setup.plain.layers // 2
    sequence = [*range(half), *range(setup.plain.layers - 1, half - 1, -1)]
    layers = f"0-{half - 1},{setup.plain.layers - 1}-{half}"
    with workplace(setup) as place:
        source, output, dest = place / "source", place / "output", place / "dest"
        synthetic.write(source, setup.plain.shapes(), setup.plain.config(), setup.shard_size)
        options = ["--layers", layers, "--max-shard-size", setup.shard_size, "--quiet"]
        run(surgeon("select-layers", source, output, *options))
        check_reordered(source, output, sequence)
        size = directory_size(output)
        copying = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(output), str(dest)]

        def ours() -> Run:
            prepare(dest, source, size)
            return run(surgeon("select-layers", source, dest, *options))

        def theirs() -> Run:
            prepare(dest, output, size)
            return run(copying)

        mine, other = alternate(setup.runs, ours, theirs)
    title = f"select-layers, {size / 1e9:.2f} GB, with cp -r and sync"
    return [
        Figure(f"{title}: wall", "s", [it.wall for it in mine], [it.wall for it in other], 1.15),
        Figure(f"{title}: CPU", "s", [it.cpu for it in mine], [it.cpu for it in other]),
    ]


def measure_mergekit(setup: Setup) -> list[Figure]:
    """Compare a mergekit YAML, run by us and by mergekit with `sync`: a Llama stacked on itself."""
    middle = setup.plain.layers // 3
    with workplace(setup) as place:
        source, dest, recipe = place / "source", place / "dest", place / "stack.yml"
        synthetic.write(source, *synthetic.as_llama(setup.plain), setup.shard_size)
        ranges = ([0, 2 * middle], [middle, setup.plain.layers])
        slices = [{"sources": [{"model": str(source), "layer_range": layers}]} for layers in ranges]
        recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
        merge = [str(PEERS / "mergekit-yaml"), "$0", "$1", "--no-copy-tokenizer", "--quiet"]
        merging = ["sh", "-c", f"{' '.join(merge)} && sync $1/*", str(recipe), str(dest)]
        run(surgeon("run", recipe, dest, "--quiet"))
        size = directory_size(dest)
        other = place / "other"
        run([*merging[:-1], str(other)])
        mine, theirs = open_tensors(dest), open_tensors(other)
        if set(mine) != set(theirs):
            raise AssertionError("mergekit: writes other tensors.")
        for name in list(mine)[:: max(1, len(mine) // 20)]:
            require_equal(name, mine[name].get_tensor(name), theirs[name].get_tensor(name))
        shutil.rmtree(other)

        def timed(command: list[str]) -> Run:
            prepare(dest, source, size)
            return run(command)

        ours, merged = alternate(
            setup.runs, lambda: timed(surgeon("run", recipe, dest, "--quiet")), lambda: timed(merging)
        )
    title = f"passthrough, {size / 1e9:.2f} GB, with mergekit"
    return [
        Figure(f"{title}: wall", "s", [it.wall for it in ours], [it.wall for it in merged], 1),
        Figure(f"{title}: CPU", "s", [it.cpu for it in ours], [it.cpu for it in merged]),
        Figure(f"{title}: peak memory", "MB", [it.peak / 1e6 for it in ours], [it.peak / 1e6 for it in merged], 1),
    ]


def measure_extract_lora(setup: Setup) -> list[Figure]:
    """Compare the extraction of an adapter of rank 32 with mergekit's, on a Llama of 28 matrices."""
    with workplace(setup) as place:
        base, tuned, dest, other = place / "base", place / "tuned", place / "dest", place / "other"
        write_pair(base, tuned, setup.pair)
        ours = surgeon("extract-lora", tuned, dest, "--base", base, "--rank", 32, "--quiet")
        theirs = [str(PEERS / "mergekit-extract-lora"), "--model", str(tuned), "--base-model", str(base), "--out-path"]
        theirs += [str(other), "--max-rank", "32", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]

        def timed(command: list[str], written: Path) -> Run:
            prepare(written, base, directory_size(base))
            return run(command)

        mine, peers = alternate(setup.runs, lambda: timed(ours, dest), lambda: timed(theirs, other))
        errors = [relative_error(base, tuned, it) for it in (dest, other)]
        sizes = [(it / "adapter_model.safetensors").stat().st_size / 1e6 for it in (dest, other)]
    title = "extract-lora, rank 32, 28 matrices, with mergekit-extract-lora"
    return [
        Figure(f"{title}: wall", "s", [it.wall for it in mine], [it.wall for it in peers], 1 / 5),
        Figure(f"{title}: peak memory", "MB", [it.peak / 1e6 for it in mine], [it.peak / 1e6 for it in peers], 1),
        Figure(f"{title}: relative error", "", errors[:1], errors[1:], 1.001),
        Figure(f"{title}: size of the adapter", "MB", sizes[:1], sizes[1:], 0.1),
    ]


def write_pair(base: Path, tuned: Path, model: Qwen3) -> None:
    """Write a Llama of random numbers, and one that differs from it by a part of low rank and by noise."""
    import torch
    from safetensors.torch import save_file

    shapes, config = synthetic.as_llama(model)
    generator = torch.Generator().manual_seed(0)
    before, after = {}, {}
    for name, (_, shape) in shapes.items():
        weight = torch.randn(*shape, generator=generator) * 0.02
        before[name] = after[name] = weight.bfloat16()
        if len(shape) == 2:
            factors = (torch.randn(size, 64, generator=generator) * 0.02 for size in shape)
            delta = torch.mm(next(factors), next(factors).T) / 2
            after[name] = (weight + delta + 5e-4 * torch.randn(*shape, generator=generator)).bfloat16()
    for directory, tensors in ((base, before), (tuned, after)):
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))


def relative_error(base: Path, tuned: Path, adapter: Path) -> float:
    """Return what an adapter leaves of the deltas that it has pairs for, relative to them."""
    before, after, pairs = open_tensors(base), open_tensors(tuned), open_shard(adapter / "adapter_model.safetensors")
    left = whole = 0.0
    for name in pairs.keys():  # noqa: SIM118
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name.endswith("lora_A.weight"):
            weights = (it[f"{module}.weight"].get_tensor(f"{module}.weight").double() for it in (after, before))
            delta = next(weights) - next(weights)
            a, b = (pairs.get_tensor(name.replace("lora_A", f"lora_{side}")).double() for side in "AB")
            left += float((delta - b @ a).square().sum())
            whole += float(delta.square().sum())
    return float((left / whole) ** 0.5)


def measure_dequantize(setup: Setup) -> list[Figure]:
    """Compare the decoding of block FP8 with the formula in torch, and with its own phases one after the other."""
    with workplace(setup) as place:
        source, dest = place / "source", place / "dest"
        shapes = synthetic.in_fp8(setup.fp8.shapes())
        synthetic.write(source, shapes, synthetic.fp8_config(setup.fp8.config()), setup.shard_size)
        reference, converter = (helper(name, source, dest) for name in ("reference", "convert"))
        size = check_decoded(source, place)

        def ours() -> Run:
            prepare(dest, source, size)
            return run(surgeon("dequantize", source, dest, "--quiet"))

        def theirs() -> Run:
            prepare(dest, source, size)
            return run(reference)

        def peers() -> Run:
            prepare(dest, source, size)
            return run(converter)

        mine, other, peer, serial = alternate(setup.runs, ours, theirs, peers, lambda: phases(source, dest, size))
        codes = sum(synthetic.nbytes(*it) for it in shapes.values() if it[0] == "F8_E4M3") / 1e9
    walls, cpus = [it.wall for it in mine], [it.cpu for it in mine]
    title = f"dequantize, {codes:.2f} GB of codes"
    return [
        Figure(f"{title}, with torch: CPU", "s", cpus, [it.cpu for it in other], 0.5),
        Figure(f"{title}, with torch: wall", "s", walls, [it.wall for it in other]),
        Figure(f"{title}, with compressed-tensors: CPU", "s", cpus, [it.cpu for it in peer]),
        Figure(f"{title}, with compressed-tensors: wall", "s", walls, [it.wall for it in peer]),
        Figure(
            f"{title}, with compressed-tensors: memory",
            "MiB",
            [it.peak / MIB for it in mine],
            [it.peak / MIB for it in peer],
        ),
        Figure(f"{title}: cores in use", "", [it.cpu / it.wall for it in mine], []),
        Figure(f"{title}, with its phases in turn: wall", "s", walls, [sum(it.values()) for it in serial], 1),
        *(Figure(f"{title}, phase by itself: {name}", "s", [it[name] for it in serial], []) for name in serial[0]),
    ]


def measure_quantize(setup: Setup) -> list[Figure]:
    """Compare block FP8 of a BF16 model, with its table of errors, with transformers' formula in torch."""
    with workplace(setup) as place:
        source, dest = place / "source", place / "dest"
        synthetic.write(source, setup.plain.shapes(), setup.plain.config(), setup.shard_size, normal=True)
        reference = helper("quantized", source, dest)
        quantizing = surgeon("quantize", source, dest, "--format", "fp8-block", "--quiet")
        ours_dest, theirs_dest = place / "ours", place / "theirs"
        run(surgeon("quantize", source, ours_dest, "--format", "fp8-block", "--quiet"))
        run(helper("quantized", source, theirs_dest))
        mine, other = open_tensors(ours_dest), open_tensors(theirs_dest)
        if set(mine) != set(other):
            raise AssertionError("quantize: does not write the tensors that the reference writes.")
        for name in list(mine)[:: max(1, len(mine) // 20)]:
            require_equal(name, mine[name].get_tensor(name), other[name].get_tensor(name))
        size, before = directory_size(ours_dest), directory_size(source)
        for written in (ours_dest, theirs_dest):
            shutil.rmtree(written)

        def timed(command: list[str]) -> Run:
            prepare(dest, source, size)
            return run(command)

        floor = run([sys.executable, "-c", IMPORTS["quantize"]])
        done, peers = alternate(setup.runs, lambda: timed(quantizing), lambda: timed(reference))
    title = f"quantize, {before / 1e9:.2f} GB of BF16, with torch"
    return [
        Figure(f"{title}: CPU", "s", [it.cpu for it in done], [it.cpu for it in peers], 0.5),
        Figure(f"{title}: wall", "s", [it.wall for it in done], [it.wall for it in peers], 0.5),
        Figure(f"{title}: memory beyond imports", "MiB", [(it.peak - floor.peak) / MIB for it in done],
               [(it.peak - floor.peak) / MIB for it in peers], 1),
    ]  # fmt: skip


def measure_project(setup: Setup) -> list[Figure]:
    """Compare the projection of all that layers add to the residual stream with a `cast` of the same weights."""
    with workplace(setup) as place:
        source, dest, directions = place / "source", place / "dest", place / "directions.npz"
        synthetic.write(source, setup.plain.shapes(), setup.plain.config(), setup.shard_size, normal=True)
        synthetic.write_directions(directions, setup.plain, 10)
        options = ["--directions", directions, "--weights", "mlp.down,attention.o", "--quiet"]
        projecting = surgeon("project", source, dest, *options)
        casting = ["--dtype", "float16", "--tensors", "*.down_proj.weight,*.o_proj.weight", "--quiet"]
        size = directory_size(source)

        def timed(command: list[str]) -> Run:
            prepare(dest, source, size)
            return run(command)

        mine, other = alternate(
            setup.runs, lambda: timed(projecting), lambda: timed(surgeon("cast", source, dest, *casting))
        )
    title = f"project, {2 * setup.plain.layers} weights in {size / 1e9:.2f} GB, with a cast of the same"
    return [
        Figure(f"{title}: wall", "s", [it.wall for it in mine], [it.wall for it in other], 1.5),
        Figure(f"{title}: CPU", "s", [it.cpu for it in mine], [it.cpu for it in other]),
        Figure(f"{title}: peak memory", "MB", [it.peak / 1e6 for it in mine], [it.peak / 1e6 for it in other]),
    ]


def measure_forward(setup: Setup) -> list[Figure]:
    """Compare the streamed forward pass with accelerate's offload to the disk: the logits of a model in float32."""
    figures = []
    with workplace(setup) as place:
        source, dest = place / "source", place / "dest"
        synthetic.write(place / "half", setup.run.shapes(), setup.run.config(), setup.shard_size, normal=True)
        run(surgeon("cast", place / "half", source, "--dtype", "float32", "--quiet"))
        title = f"logits of 4 x 64 tokens a batch, {directory_size(source) / 1e9:.2f} GB in float32"
        for count in (1, 4, 16):

            def timed(name: str, count: int = count) -> dict[str, Any]:
                prepare(dest, source, 0)
                dest.mkdir()
                run([*helper(name, source, dest), str(count)])
                return dict(json.loads((dest / "told.json").read_text()))

            mine, other = alternate(setup.runs, partial(timed, "streamed"), partial(timed, "offloaded"))
            assert len({told["digest"] for told in (*mine, *other)}) == 1, "the logits are not the same"
            what = f"{title}, {count} batch{'es' * (count > 1)}, imports not counted"
            for name, key, scale, limit in (("wall", "seconds", 1, 1.0), ("CPU", "cpu", 1, None),
                                            ("peak memory that no file backs", "peak", 1e6, None)):  # fmt: skip
                values = [[told[key] / scale for told in runs] for runs in (mine, other)]
                figures.append(Figure(f"{what}: {name}", "MB" if scale > 1 else "s", *values, limit))
    return figures


def phases(source: Path, dest: Path, size: int) -> dict[str, float]:
    """Return the seconds that each phase of `dequantize` takes when the next only begins after it."""
    prepare(dest, source, size)
    done = subprocess.run(helper("phases", source, dest), capture_output=True, check=True)
    return {name: float(seconds) for name, seconds in json.loads(done.stdout).items()}


def measure_perturb(setup: Setup) -> list[Figure]:
    """Compare multiplicative noise on every tensor with the plain way in torch."""
    with workplace(setup) as place:
        source, dest = place / "source", place / "dest"
        shapes = setup.plain.shapes()
        synthetic.write(source, shapes, setup.plain.config(), setup.shard_size, normal=True)
        size, weights = directory_size(source), sum(prod(shape) for _, shape in shapes.values())
        options = ["--method", "mult-gauss", "--level", NOISE, "--group", "*", "--quiet"]

        def ours() -> Run:
            prepare(dest, source, size)
            return run(surgeon("perturb", source, dest, *options))

        def theirs() -> Run:
            prepare(dest, source, size)
            return run(helper("noise", source, dest))

        floor = run([sys.executable, "-c", IMPORTS["perturb"]])
        mine, other = alternate(setup.runs, ours, theirs)
    title = f"perturb, mult-gauss on {size / 1e9:.2f} GB of BF16, with torch"
    per_weight = [[(it.cpu - floor.cpu) / weights * 1e9 for it in runs] for runs in (mine, other)]
    return [
        Figure(f"{title}: wall", "s", [it.wall for it in mine], [it.wall for it in other], 1 / 3),
        Figure(f"{title}: CPU for each weight, start not counted", "ns", *per_weight),
        Figure(f"{title}: memory beyond imports", "MiB", [(it.peak - floor.peak) / MIB for it in mine],
               [(it.peak - floor.peak) / MIB for it in other], 1),
    ]  # fmt: skip


def measure_autopsy(setup: Setup) -> list[Figure]:
    """Compare autopsy with four statistics in torch; block FP8 with BF16; and measure a tensor of gigabytes."""
    with workplace(setup) as place:
        plain, fp8, large, dest = place / "plain", place / "fp8", place / "large", place / "dest"
        shapes, config = setup.whole.shapes(), setup.whole.config()
        synthetic.write(plain, shapes, config, setup.shard_size, normal=True)
        coded = synthetic.in_fp8(shapes)
        synthetic.write(fp8, coded, synthetic.fp8_config(config), setup.shard_size, normal=True)
        table = {"model.embed_tokens.weight": ("BF16", (2 * setup.large_rows, 4096))}
        synthetic.write(large, table, config, setup.shard_size, sparse=True)
        weights = sum(prod(shape) for _, shape in shapes.values())

        def ours(source: Path) -> Run:
            prepare(dest, source, 0)
            return run(surgeon("autopsy", source, "--quiet"))

        def theirs() -> Run:
            prepare(dest, plain, 0)
            return run(helper("statistics", plain, dest))

        floor = run([sys.executable, "-c", IMPORTS["autopsy"]])
        mine, coded_runs, other = alternate(setup.runs, lambda: ours(plain), lambda: ours(fp8), theirs)
        one_tensor = [run([*surgeon("autopsy", large, "--quiet", "--thresholds"), str(_no_rules(place))])]
    per_weight = [[(it.cpu - floor.cpu) / weights * 1e9 for it in runs] for runs in (mine, coded_runs)]
    title = f"autopsy, {weights / 1e9:.2f} billion weights in BF16"
    return [
        Figure(f"{title}, with four statistics in torch: wall", "s", [it.wall for it in mine],
               [it.wall for it in other], 0.2),
        Figure(f"{title}, with four statistics in torch: CPU", "s", [it.cpu for it in mine],
               [it.cpu for it in other], 0.2),
        Figure(f"{title}: CPU for each weight, start not counted", "ns", per_weight[0], []),
        Figure("autopsy, block FP8 with BF16: CPU for each weight", "ns", per_weight[1], per_weight[0], 2),
        Figure("autopsy, a tensor of 4 GiB: memory", "MiB", [(it.peak - floor.peak) / MIB for it in one_tensor], [],
               600e6 / MIB),
    ]  # fmt: skip


def _no_rules(place: Path) -> Path:
    """Write limits under which a tensor of zeros is healthy."""
    (place / "limits.yaml").write_text("all-zero: off\n")
    return place / "limits.yaml"


def measure_diff(setup: Setup) -> list[Figure]:
    """Compare `diff` of two checkpoints of the same bytes with `cmp` of their files."""
    with workplace(setup) as place:
        one, other = place / "one", place / "other"
        synthetic.write(one, setup.plain.shapes(), setup.plain.config(), setup.shard_size, normal=True)
        shutil.copytree(one, other)
        size = directory_size(one)
        comparing = ["sh", "-c", 'for file in "$0"/*; do cmp "$file" "$1/${file##*/}" || exit 1; done', one, other]

        def bring_near() -> None:
            for source in (one, other):
                prepare(place / "dest", source, 0)

        def ours() -> Run:
            bring_near()
            return run(surgeon("diff", one, other, "--quiet"))

        def theirs() -> Run:
            bring_near()
            return run([str(word) for word in comparing])

        floor = run([sys.executable, "-c", IMPORTS["autopsy"]]).wall
        mine, cmp = alternate(setup.runs, ours, theirs)
    title = f"diff, twice {size / 1e9:.2f} GB of the same bytes, with cmp"
    walls = [it.wall for it in mine]
    return [
        Figure(f"{title}: wall", "s", walls, [it.wall for it in cmp]),
        Figure(f"{title}: wall without start and imports", "s", [wall - floor for wall in walls],
               [it.wall for it in cmp], 1),
    ]  # fmt: skip


def measure_memory(setup: Setup) -> list[Figure]:
    """Measure the peak memory above that of the imports, on models that hold one large tensor."""
    plain, fp8 = Qwen3(4, 512, 1024, 4, 1, 1024), Qwen3(4, 512, 1024, 4, 1, 1024)
    large = {"model.embed_tokens.weight": ("BF16", (setup.large_rows, 4096))}
    coded = synthetic.fp8_linear("model.layers.0.mlp.gate_proj", setup.large_rows, 8192)
    figures = []
    with workplace(setup) as place:
        source, dest = place / "source", place / "dest"
        for command, shapes, config, options in (
            ("select-layers", {**plain.shapes(), **large}, plain.config(), ("--layers", "0,1,3,2")),
            ("dequantize", synthetic.in_fp8(fp8.shapes()) | coded, synthetic.fp8_config(fp8.config()), ()),
        ):
            shutil.rmtree(source, ignore_errors=True)
            synthetic.write(source, shapes, config, setup.shard_size, sparse=True)
            peaks = []
            for _ in range(setup.runs):
                shutil.rmtree(dest, ignore_errors=True)
                floor = run([sys.executable, "-c", IMPORTS[command]]).peak
                peaks.append((run(surgeon(command, source, dest, *options, "--quiet")).peak - floor) / MIB)
            largest = max(synthetic.nbytes(*it) for it in shapes.values()) / MIB
            figures.append(Figure(f"{command}, a tensor of {largest:.0f} MiB: memory", "MiB", peaks, [], 1024))
    return figures


PARSE_HEADERS = """
import json, sys
from pathlib import Path

names = {}
for path in Path(sys.argv[1]).glob("*.safetensors"):
    with path.open("rb") as file:
        names |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
sorted(names)
"""
"""The least that can be done with headers, by the standard library."""
START = "import click, pydantic, yaml"
"""What a command line imports before it does anything."""
PARSED, STARTED = 15.0, 6.0
"""How many times as long as these two may be taken."""


def measure_headers(setup: Setup) -> list[Figure]:
    """Measure what only reads headers, on a model as large as DeepSeek-V3 and on a small one.

    Time is that of the processor, beside that of a process that parses the same headers and no more, or that only
    starts: seconds alone would tell of the machine.
    """
    figures = []
    with workplace(setup) as place:
        source, small, dest = place / "deepseek", place / "small", place / "dest"
        write_deepseek_v3(source)
        for arguments in (
            ("inspect", source),
            ("dequantize", source, dest, "--dry-run"),
            ("drop-layers", source, dest, "--layers", "10-19", "--dry-run"),
        ):
            parse = [sys.executable, "-c", PARSE_HEADERS, str(source)]
            done, parsed = alternate(setup.runs, partial(run, surgeon(*arguments)), partial(run, parse))
            title = f"{arguments[0]}{' --dry-run' * ('--dry-run' in arguments)}, DeepSeek-V3"
            figures.append(Figure(f"{title}: wall", "s", [it.wall for it in done], []))
            figures.append(Figure(f"{title}: CPU", "s", [it.cpu for it in done], [it.cpu for it in parsed], PARSED))
            figures.append(Figure(f"{title}: peak memory", "MB", [it.peak / 1e6 for it in done], [], 400))
        tiny = Qwen3(4, 256, 768, 4, 1, 1024)
        synthetic.write(small, tiny.shapes(), tiny.config(), setup.shard_size)
        start = [sys.executable, "-c", START]
        done, started = alternate(setup.runs, partial(run, surgeon("inspect", small)), partial(run, start))
        cpu, least = ([it.cpu for it in side] for side in (done, started))
        figures.append(Figure("inspect, a small model: CPU", "s", cpu, least, STARTED))
    return figures


def write_deepseek_v3(directory: Path) -> Path:
    """Write a checkpoint with the names, shapes and number of shards of DeepSeek-V3, all holes."""
    config = synthetic.fp8_config(synthetic.DEEPSEEK_V3)
    return synthetic.write(directory, synthetic.deepseek_v3(), config, 4_250_000_000, sparse=True)


def directory_size(directory: Path) -> int:
    """Return the bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.iterdir())


def sample(source: Path) -> list[str]:
    """Return about twenty names of tensors, spread over the checkpoint."""
    names = list(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])
    return names[:: max(1, len(names) // 20)]


def open_tensors(directory: Path) -> dict[str, Any]:
    """Return for each tensor name of a checkpoint the open safetensors file that holds it."""
    opened = [open_shard(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: shard for shard in opened for name in shard.keys()}  # noqa: SIM118


def open_shard(path: Path) -> Any:
    """Open a safetensors file for torch."""
    from safetensors import safe_open

    return safe_open(path, "pt")


def require_equal(name: str, ours: Any, theirs: Any) -> None:
    """Raise AssertionError unless two tensors are the same dtype, shape and bits."""
    import torch

    same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if not same or not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
        raise AssertionError(f"{name}: is not what the reference gives.")


def check_reordered(source: Path, output: Path, sequence: list[int]) -> None:
    """Check on a sample that each layer of the output is the source's layer that the sequence says."""
    before, after = open_tensors(source), open_tensors(output)
    for name in sample(output):
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(sequence[int(parts[2])])
        original = ".".join(parts)
        require_equal(name, after[name].get_tensor(name), before[original].get_tensor(original))


def check_decoded(source: Path, place: Path) -> int:
    """Check on a sample that ours and the reference decode to the same bits; return the bytes of ours.

    What was written is removed again.
    """
    ours, theirs = place / "ours", place / "theirs"
    run(surgeon("dequantize", source, ours, "--quiet"))
    run(helper("reference", source, theirs))
    mine, other = open_tensors(ours), open_tensors(theirs)
    if set(mine) != set(other):
        raise AssertionError("dequantize: does not write the tensors that the reference writes.")
    for name in set(sample(source)) & set(mine):
        require_equal(name, mine[name].get_tensor(name), other[name].get_tensor(name))
    size = directory_size(ours)
    shutil.rmtree(ours)
    shutil.rmtree(theirs)
    return size


def helper(name: str, source: Path, dest: Path) -> list[str]:
    """Return the command line that runs one of HELPERS in a process of its own."""
    return [sys.executable, __file__, name, str(source), str(dest)]


def decode_in_torch(source: Path, dest: Path) -> None:
    """Decode a block-FP8 checkpoint in the plain way: shard by shard, tensor by tensor, as the formula says."""
    import torch
    from safetensors.torch import save_file

    tensors = open_tensors(source)
    dest.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        decoded = {}
        for name in open_shard(path).keys():  # noqa: SIM118
            weight = tensors[name].get_tensor(name)
            if weight.dtype == torch.float8_e4m3fn:
                scale = tensors[f"{name}_scale_inv"].get_tensor(f"{name}_scale_inv")
                grid = scale.repeat_interleave(synthetic.BLOCK, 0).repeat_interleave(synthetic.BLOCK, 1)
                decoded[name] = (weight.to(torch.float32) * grid[: weight.shape[0], : weight.shape[1]]).bfloat16()
            elif not name.endswith("_scale_inv"):
                decoded[name] = weight
        save_file(decoded, dest / path.name)
        with open(dest / path.name, "rb") as file:
            os.fsync(file.fileno())


def convert_with_compressed_tensors(source: Path, dest: Path) -> None:
    """Decode a block-FP8 checkpoint with compressed-tensors, on as many threads as there are cores."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint

    convert_checkpoint(source, dest, FP8BlockDequantizer(targets=["re:.*_proj$"]), max_workers=os.cpu_count() or 1)
    for path in dest.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def quantize_in_torch(source: Path, dest: Path) -> None:
    """Quantise the linear layers of a BF16 checkpoint in the plain way, by transformers' formula, shard by shard."""
    import torch
    from safetensors.torch import load_file, save_file

    dest.mkdir()
    block = synthetic.BLOCK
    for path in sorted(source.glob("*.safetensors")):
        made = {}
        for name, weight in load_file(path).items():
            made[name] = weight
            if name.endswith("_proj.weight"):
                rows, columns = weight.shape
                grid = weight.float().reshape(rows // block, block, columns // block, block)
                amax = grid.abs().amax(dim=(1, 3))
                scales = torch.where(amax > 0, 448 / amax, torch.ones_like(amax))
                codes = (grid * scales[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
                made |= {name: codes.reshape(rows, columns), f"{name}_scale_inv": 1 / scales}
        save_file(made, dest / path.name)
        with open(dest / path.name, "rb") as file:
            os.fsync(file.fileno())


def batches_of(source: Path, count: int) -> list[Any]:
    """Return tokens as so many batches of four rows."""
    import torch

    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(vocabulary, (count, 4, 64), generator=generator))


def tell(dest: Path, compute: Callable[[], Iterator[Any]]) -> None:
    """Take the time of a computation, its highest memory, and a digest of the tensors that it yields."""
    lowest, peak, ended = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    digest, begin, used = hashlib.sha256(), time.perf_counter(), time.process_time()
    for tensor in compute():
        digest.update(tensor.contiguous().numpy().data)
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    ended.set()
    watcher.join()
    told = {"seconds": seconds, "cpu": used, "peak": peak[0] - lowest, "digest": digest.hexdigest()}
    (dest / "told.json").write_text(json.dumps(told))


def anonymous_memory() -> int:
    """Return the resident memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def model_class(source: Path) -> tuple[Any, Any]:
    """Return a model's config and class, imported, so that no computation is charged for that."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    return config, getattr(transformers, config.architectures[0])


def logits_streamed(source: Path, dest: Path, count: int) -> None:
    """Take the logits of batches by the streamed forward pass."""
    sys.path.insert(0, str(ROOT))
    import torch

    import tensorsurgeon
    from tensorsurgeon.forward.batches import Batch
    from tensorsurgeon.forward.head import Head
    from tensorsurgeon.forward.stream import Stream

    model_class(source)

    def compute() -> Iterator[Any]:
        stream = Stream(
            tensorsurgeon.open(source), [Batch(it, torch.ones_like(it)) for it in batches_of(source, count)]
        )
        for _, left in stream.walk():
            states = left
        with (head := Head(stream)).held():
            yield from (head.logits(head.normed(it)) for it in states)

    tell(dest, compute)


def logits_offloaded(source: Path, dest: Path, count: int) -> None:
    """Take the logits of batches by transformers and accelerate, which read each layer from the disk as it is run."""
    import accelerate  # noqa: F401
    import torch

    config, kind = model_class(source)
    places = {f"model.layers.{layer}": "disk" for layer in range(config.num_hidden_layers)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")

    def compute() -> Iterator[Any]:
        model = kind.from_pretrained(
            source, dtype=torch.float32, device_map=places, offload_folder=str(dest / "offloaded")
        )
        with torch.inference_mode():
            yield from (model(input_ids=it, use_cache=False).logits for it in batches_of(source, count))

    tell(dest, compute)


def dequantize_in_turn(source: Path, dest: Path) -> None:
    """Do what `dequantize` does on one thread, each phase by itself, and print the seconds of each as JSON."""
    sys.path.insert(0, str(ROOT))
    import tensorsurgeon
    from tensorsurgeon.plan import make_plan
    from tensorsurgeon.reading import read_span

    seconds: dict[str, float] = {}

    def timed(phase: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments)
        seconds[phase] = seconds.get(phase, 0) + time.perf_counter() - begin
        return result

    plan = make_plan(tensorsurgeon.ops.dequantize(tensorsurgeon.open(source)))
    dest.mkdir()
    digest = hashlib.sha256()
    for shard in plan.shards:
        for piece in shard.pieces(plan.block_memory):
            if piece.tensor:
                inputs = [timed("read", it.read, *piece.rows) for it in piece.tensor.inputs]
                data = timed("compute", piece.tensor.function, piece.rows[0], *inputs).data
            else:
                data = timed("read", read_span, piece.span)
            timed("hash", digest.update, data)
        timed("write", write_directly, dest / shard.file, shard.size)
    print(json.dumps(seconds))


def write_directly(path: Path, size: int) -> None:
    """Write a file of `size` bytes, rounded up to whole blocks, past the page cache."""
    buffer = memoryview(mmap.mmap(-1, 4 * MIB))
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    try:
        os.posix_fallocate(file, 0, size)
        for begin in range(0, size, len(buffer)):
            os.write(file, buffer[: -(-(size - begin) // 4096) * 4096])
        os.fsync(file)
    finally:
        os.close(file)


def statistics_in_torch(source: Path, dest: Path) -> None:
    """Take four statistics of every tensor in the plain way."""
    for path in sorted(source.glob("*.safetensors")):
        with open_shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118
                numbers = shard.get_tensor(name).float()
                print(name, numbers.mean().item(), numbers.std().item(), numbers.min().item(), numbers.max().item())


def perturb_in_torch(source: Path, dest: Path) -> None:
    """Multiply every tensor by noise in the plain way, and flush what is written to the disk."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    dest.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            tensors[name] = tensor * (1 + NOISE * torch.randn_like(tensor))
        save_file(tensors, dest / path.name)
        with open(dest / path.name, "rb") as file:
            os.fsync(file.fileno())


HELPERS = {
    "noise": perturb_in_torch,
    "reference": decode_in_torch,
    "convert": convert_with_compressed_tensors,
    "phases": dequantize_in_turn,
    "quantized": quantize_in_torch,
    "statistics": statistics_in_torch,
}
RUNNERS = {"streamed": logits_streamed, "offloaded": logits_offloaded}
"""What this script runs in processes of their own, to be measured; runners on some number of batches."""

MEASUREMENTS = {
    "select-layers": measure_select_layers,
    "mergekit": measure_mergekit,
    "extract-lora": measure_extract_lora,
    "dequantize": measure_dequantize,
    "quantize": measure_quantize,
    "perturb": measure_perturb,
    "project": measure_project,
    "autopsy": measure_autopsy,
    "diff": measure_diff,
    "memory": measure_memory,
    "headers": measure_headers,
    "forward": measure_forward,
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in {**HELPERS, **RUNNERS}.items():
        command = commands.add_parser(name, help=f"internal: {function.__doc__}")
        command.add_argument("source", type=Path)
        command.add_argument("dest", type=Path)
        if name in RUNNERS:
            command.add_argument("count", type=int)
    for name in ("all", *MEASUREMENTS):
        command = commands.add_parser(name, help=MEASUREMENTS[name].__doc__ if name != "all" else "Measure everything.")
        command.add_argument("--runs", type=int, default=5, help="pairs of runs; default 5")
        command.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for; return 1 where a target is missed."""
    given = parse_arguments(arguments)
    if given.command in HELPERS:
        HELPERS[given.command](given.source, given.dest)
        return 0
    if given.command in RUNNERS:
        RUNNERS[given.command](given.source, given.dest, given.count)
        return 0
    setup = Setup(given.scratch, given.runs)
    chosen = MEASUREMENTS if given.command == "all" else [given.command]
    figures = [figure for name in chosen for figure in MEASUREMENTS[name](setup)]
    print(machine(given.scratch), "\n")
    print(tabulate([figure.row() for figure in figures], HEADINGS, tablefmt="pipe"))
    if given.json:
        given.json.write_text(json.dumps([figure._asdict() for figure in figures], indent=2) + "\n")
    return 0 if all(figure.met for figure in figures) else 1


def machine(scratch: Path) -> str:
    """Return what the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = subprocess.run(["findmnt", "-no", "SOURCE,FSTYPE", "-T", scratch], capture_output=True, text=True)
    disk = " ".join(found.stdout.split()) or "unknown"
    return f"{models[0]}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, disk {disk}, Linux {os.uname().release}"


if __name__ == "__main__":
    sys.exit(main())
