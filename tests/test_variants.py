"""Variants: one recipe for each combination of values, and levels between two numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import UsageError


def test_levels_are_those_of_numpy() -> None:
    assert ts.levels(0, 1.4, 5) == (0, 0.35, 0.7, 1.05, 1.4)
    assert ts.levels(0.1, 7, 9) == pytest.approx(np.linspace(0.1, 7, 9), rel=1e-12)
    assert ts.levels(1024, 4, 5, "geometric") == (1024, 256, 64, 16, 4)
    assert ts.levels(2, 256, 5, "geometric") == pytest.approx(np.geomspace(2, 256, 5), rel=1e-11)
    assert ts.levels(2, 256, 5, "geometric", whole=True) == (2, 7, 23, 76, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "steps is 1; two or more"),
        ((0, 1, True), "steps is True"),
        ((0, 1, 3, "cubic"), "spacing is 'cubic'"),
        ((0, 1, 3, "geometric"), "both have to be above 0"),
        ((1, 2, 4, "linear", True), "are not all different"),
    ],
)
def test_levels_that_there_are_not_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ts.levels(*arguments)


def recipe(tmp_path: Path, source: Path, variants: str, dest: str = "{layers}-{size}", step: str = "{layers}") -> Path:
    text = f"""
source: {source}
dest: {tmp_path}/{dest}
variants: {variants}
steps:
  - select-layers: {{layers: "{step}"}}
  - reshard: {{max_shard_size: "{{size}}"}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_every_combination_is_a_recipe(tmp_path: Path, plain: Path) -> None:
    path = recipe(tmp_path, plain, "[{layers: ['0-1', 3], size: [1MB, 2MB]}, {layers: '0,2', size: 3MB}]")
    found = ts.load_recipes(path)
    assert [Path(it.dest).name for it in found] == ["0-1-1MB", "0-1-2MB", "3-1MB", "3-2MB", "0,2-3MB"]
    # A text that is nothing but a place becomes the value itself.
    assert [it.steps[0].parameters["layers"] for it in found] == ["0-1", "0-1", 3, 3, "0,2"]
    with pytest.raises(UsageError, match="stands for 5 variants"):
        ts.load_recipe(path)


def test_levels_and_repeats_are_counted_off(tmp_path: Path, plain: Path) -> None:
    path = recipe(tmp_path, plain, "[{layers: {from: 0, repeats: 3}, size: {from: 10, to: 1000, steps: 3, "
                  "spacing: geometric, whole: true}}]")  # fmt: skip
    found = [Path(it.dest).name for it in ts.load_recipes(path)]
    assert found == [f"{layer}-{size}" for layer in range(3) for size in (10, 100, 1000)]


def test_the_variants_are_written_one_after_the_other(
    tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, plain, "[{layers: ['0-1', '2-3'], size: 1MB}]")
    assert main(["run", str(path), "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert not (tmp_path / "0-1-1MB").exists()
    assert main(["run", str(path), "-q", "--set", "variants.0.size=2MB"]) == 0
    for name in ("0-1-2MB", "2-3-2MB"):
        assert ts.open(tmp_path / name).layers.count == 2


def test_all_variants_are_planned_before_the_first_is_written(tmp_path: Path, plain: Path) -> None:
    path = recipe(tmp_path, plain, "[{layers: ['0-1', '7-9'], size: 1MB}]")
    assert main(["run", str(path), "-q"]) == 2
    assert not (tmp_path / "0-1-1MB").exists()


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("7", "variants: are a list of mappings"),
        ("[]", "variants: are a list of mappings"),
        ("[3]", "variants: are a list of mappings"),
        ("[{layers: 0}]", "there is no value 'size' among the variants"),
        ("[{layer: 0, size: 1MB}]", "there is no value 'layers' among the variants. Did you mean 'layer'?"),
        ("[{layers: [0, 0], size: 1MB}]", "2 variants would be written to"),
        ("[{layers: {from: 0, until: 3}, size: 1MB}]", "is neither {from, to, steps"),
        ("[{layers: {from: a, repeats: 3}, size: 1MB}]", "variants: layers: "),
        ("[{layers: {from: 0, to: 3, steps: 1}, size: 1MB}]", "two or more are needed"),
        ("[{layers: [x, y], size: [1MB, nothing]}]", "expected a layer number at character 1"),
    ],
)
def test_wrong_variants_are_refused(tmp_path: Path, plain: Path, variants: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        ts.load_recipes(recipe(tmp_path, plain, variants))
    assert message in str(caught.value)
    assert len(set(caught.value.problems)) == len(caught.value.problems)
