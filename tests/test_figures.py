"""Findings as figures and CSV, and what both page and figures are drawn from: grids, outliers, outlines."""

from __future__ import annotations

import csv
import json
import sys
from math import inf, nan
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy.stats import median_abs_deviation

import made_up
from tensorsurgeon.errors import DestinationError, UsageError
from tensorsurgeon.registry import Findings
from tensorsurgeon.report.destination import file_stem
from tensorsurgeon.report.figures import write_figures
from tensorsurgeon.report.grids import Grid, find_grids
from tensorsurgeon.report.histograms import edge, floor_of, outline
from tensorsurgeon.report.rows import write_csv


def few(findings: Findings, *words: str) -> Findings:
    """Return findings with the details of few tensors: each role is a figure, and a figure takes time."""
    return findings._replace(details=[it for it in findings.details if any(word in it["name"] for word in words)])


def grid_of(values: list[object], **columns: object) -> Grid:
    """Return the grid of one role, a layer for each value."""
    rows = [{"name": f"t{n}", "layer": n, "role": "mlp up", "size": value, **columns} for n, value in enumerate(values)]
    (grid,) = find_grids({"tensors": rows})
    return grid


def test_figures_are_images_of_their_kind(tmp_path: Path) -> None:
    paths = write_figures(few(made_up.autopsy(4), "o_proj", "input_layernorm"), tmp_path / "figures")
    statistics = ("mean", "deviation", "largest", "kurtosis", "zeros", "non-finite")
    drawn = ("histogram-attention-o", "spectrum-attention-o", "histogram-norm-attention")
    stems = {*(f"tensors-{statistic}" for statistic in statistics), *drawn}
    assert {path.name for path in paths} == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "figures").iterdir()}
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            with Image.open(path) as image:
                assert image.format == "PNG"
                assert round(image.info["dpi"][0]) == 200
                assert min(image.size) > 300
                assert len(set(image.convert("L").tobytes())) > 20


def test_the_same_findings_are_the_same_figures(tmp_path: Path) -> None:
    first, second = (write_figures(few(made_up.noise(2), "0.mlp.up"), tmp_path / name) for name in ("one", "other"))
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert "histograms-mlp-up-base.svg" in {path.name for path in first}


def test_dollars_and_tags_in_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    name = "$\\frac{x$ <b>&amp;"
    row = {"name": name, "role": name, name: 1.0}
    detail = {"name": name, "spectrum": {"values": [2.0, 1.0], "step": 1}}
    rows = [{**row, "layer": 0}, {**row, "layer": 1, name: nan}, {**row, "layer": 2, name: 3.0}]
    paths = write_figures(Findings({name: rows}, (), [detail]), tmp_path)
    assert [path.name for path in paths] == [
        f"{stem}.{kind}" for stem in ("frac-x-b-amp-frac-x-b-amp", "spectrum-frac-x-b-amp") for kind in ("png", "svg")
    ]


def test_figures_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r'--plot needs matplotlib: pip install "tensorsurgeon\[report\]"'):
        write_figures(made_up.autopsy(1), tmp_path)


def test_csv_is_read_back(tmp_path: Path) -> None:
    rows = [{"name": 'a "quoted", name\nof two lines', "shape": [2, 3]}, {"name": None, "largest": 0.1, "shape": [4]}]
    paths = write_csv(Findings({"tensors": rows, "problems": []}, ("a: b",)), tmp_path / "out")
    assert [path.name for path in paths] == ["tensors.csv", "problems-2.csv", "problems.csv"]
    with open(paths[0], newline="", encoding="utf-8") as file:
        head, first, second = csv.reader(file)
    assert head == ["name", "shape", "largest"]
    assert [first[0], json.loads(first[1]), first[2]] == [rows[0]["name"], [2, 3], ""]
    assert [second[0], float(second[2])] == ["", 0.1]
    assert paths[2].read_bytes() == b"problem\r\na: b\r\n"


def test_directories_that_cannot_be_made_are_told(tmp_path: Path) -> None:
    for write in (write_csv, write_figures):
        with pytest.raises(DestinationError, match="No such file or directory"):
            write(made_up.autopsy(1), tmp_path / "nowhere" / "out")


def test_file_names_are_plain_and_differ() -> None:
    taken: set[str] = set()
    assert [file_stem(text, taken) for text in ("max |x|", "Max X", "../é", "", "?")] == [
        "max-x", "max-x-2", "unnamed", "unnamed-2", "unnamed-3",
    ]  # fmt: skip


def test_a_table_without_layer_role_or_numbers_is_no_grid() -> None:
    rows = {"layer": 0, "role": "mlp up", "dtype": "BF16"}
    assert find_grids({"a": [], "b": [rows], "c": [{"role": "x", "n": 1}], "d": [{**rows, "layer": "-", "n": 1}]}) == []
    assert find_grids({"e": [{**rows, "n": 1}, {**rows, "n": "high"}]}) == []


def test_a_grid_holds_each_tensor_where_it_belongs() -> None:
    rows = [
        {"layer": None, "role": "head", "n": 1.0},
        {"layer": 2, "role": "expert", "n": 1.0},
        {"layer": 2, "role": "expert", "n": -9.0},
        {"layer": 0, "role": "expert", "n": 1.5},
        {"layer": 0, "role": "expert", "n": nan},
    ]
    (grid,) = find_grids({"tensors": rows})
    assert (grid.models, grid.roles, grid.layers) == ([""], ["head", "expert"], [None, 0, 2])
    assert grid.counts == [[[1, 0, 0], [0, 2, 2]]]
    assert grid.statistics[0].cells == [[[0, None, None], [None, 4, 2]]]
    assert grid.statistics[0].signed


@pytest.mark.parametrize(
    ("values", "log"), [([1, 2, 9], False), ([1, 2, 10], True), ([0, 0, 1], False), ([-1, 50], True), ([inf, 2], False)]
)
def test_a_wide_range_is_drawn_on_a_logarithmic_scale(values: list[object], log: bool) -> None:
    assert grid_of(values).statistics[0].log == log


def test_the_first_statistic_differs_within_a_role() -> None:
    assert grid_of([1, 2]).default == 0
    rows = [{"layer": n, "role": "a", "elements": 8, "mean": n - 1.0, "largest": n + 1.0} for n in range(3)]
    assert find_grids({"tensors": rows})[0].default == 2


def test_outliers_are_measured_in_robust_standard_deviations() -> None:
    values = np.random.default_rng(3).normal(5, 2, 101)
    values[17], values[40] = 60, -30
    (statistic,) = grid_of([nan, None, *values.tolist()]).statistics
    scores = np.abs(values - np.median(values)) / median_abs_deviation(values, scale="normal")
    assert [it.row - 2 for it in statistic.outliers] == [17, 40]
    assert [it.score for it in statistic.outliers] == pytest.approx(scores[[17, 40]], rel=1e-4)
    assert {it.median for it in statistic.outliers} == {np.median(values)}


def test_one_that_differs_among_equals_is_an_outlier() -> None:
    assert [it.row for it in grid_of([*[0] * 9, 7]).statistics[0].outliers] == [9]
    assert grid_of([3, 3, 3]).statistics[0].outliers == []


def test_an_outline_keeps_every_element() -> None:
    values = np.random.default_rng(1).standard_t(3, 10_000)
    values[:50] = 0
    edges = [edge({"octave": -30}, number) for number in range(200)]
    histogram = {
        "octave": -30,
        "negative": np.histogram(-values[values < 0], edges)[0].tolist(),
        "zero": 50,
        "positive": np.histogram(values[values > 0], edges)[0].tolist(),
    }
    floor = floor_of(histogram)
    magnitudes = np.abs(values[values != 0])
    assert np.mean(magnitudes < floor) <= 0.002 < np.mean(magnitudes < 1.25 * floor)
    densities, drawn = outline(histogram, floor)
    assert np.all(np.diff(drawn) > 0)
    widths = np.abs(np.diff(np.log2(np.abs(drawn))))
    middle = drawn.index(-floor)
    widths[middle] = 1
    counts = np.array(densities) * widths
    assert counts.sum() == pytest.approx(10_000)
    assert counts[middle] == pytest.approx(np.sum(np.abs(values) < floor))
    assert counts == pytest.approx(np.histogram(values, drawn)[0])
