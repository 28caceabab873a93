"""The benchmark works, and what needs no disk to be measured stays within its limits."""

from __future__ import annotations

import json
from pathlib import Path

import bench
import pytest
from bench import Figure, Setup
from synthetic import Qwen3

TINY = Qwen3(4, 256, 768, 4, 1, 1024)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """Return a setup of a few megabytes and one run."""
    return Setup(tmp_path, 1, TINY, TINY, shard_size=4_000_000, large_rows=256, pair=TINY, whole=TINY, run=TINY)


def within_limits(figures: list[Figure]) -> None:
    """Fail for a figure of which not even the least of the runs is within its limit."""
    assert figures
    assert [figure for figure in figures if figure.limit and min(figure.judged) > figure.limit] == []


@pytest.mark.parametrize(
    "measurement",
    [
        "select-layers",
        "mergekit",
        "extract-lora",
        "dequantize",
        "quantize",
        "perturb",
        "autopsy",
        "diff",
        "memory",
        "forward",
    ],
)
def test_measurement_runs(measurement: str, setup: Setup) -> None:
    figures = bench.MEASUREMENTS[measurement](setup)
    assert figures
    assert all(figure.ours and len(figure.row()) == len(bench.HEADINGS) for figure in figures)
    assert list(setup.scratch.iterdir()) == []


def test_a_wrong_output_is_noticed(setup: Setup) -> None:
    source = bench.synthetic.write(setup.scratch / "source", TINY.shapes(), TINY.config(), setup.shard_size)
    bench.check_reordered(source, source, [0, 1, 2, 3])
    with pytest.raises(AssertionError, match="not what the reference gives"):
        bench.check_reordered(source, source, [0, 1, 3, 2])


def test_a_failing_command_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit status 1"):
        bench.run(bench.surgeon("inspect", tmp_path))


def test_raw_numbers_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MEASUREMENTS, "headers", lambda setup: [Figure("f", "s", [1.0], [2.0], 0.4)])
    status = bench.main(["headers", "--scratch", str(tmp_path), "--json", str(tmp_path / "raw.json")])
    assert status == 1
    assert json.loads((tmp_path / "raw.json").read_text())[0]["ours"] == [1.0]


@pytest.mark.alone
@pytest.mark.slow
def test_headers_of_the_largest_model_are_read_quickly_in_little_memory(tmp_path: Path) -> None:
    """Best of three runs, as other work on the machine only ever makes them longer."""
    within_limits(bench.measure_headers(Setup(tmp_path, runs=3)))


@pytest.mark.alone
@pytest.mark.slow
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path) -> None:
    """A tensor of 2 GiB; the source is all holes, but up to 4 GiB of output are written."""
    within_limits(bench.measure_memory(Setup(tmp_path, runs=1)))
