"""The studies among the recipes: each is planned on the mannequin, and those of layers on the original's 64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import MANNEQUIN
from safetensors.numpy import save_file

import make
import tensorsurgeon as ts
from tensorsurgeon.checkpoint import open_checkpoint
from tensorsurgeon.evaluate.described import layers_of
from tensorsurgeon.evaluate.study import load_study
from tensorsurgeon.evaluate.suite import load_suite

TOP = Path(__file__).parent.parent
FOLDER = TOP / "recipes" / "studies"
STUDIES = {
    "layers": 37,
    "deletion": 7,
    "doubling": 7,
    "deletion-windows": 13,
    "stitches": 10,
    "dreams": 16,
    "iq": 46,
    "methods": 8,
    "kernel-surgery": 7,
    "one-pass": 79,
}
"""Studies that run on the mannequin, and how many variants each has there."""
NEEDS_IMAGES = {"picture"}
DIRECTIONS = ["as-strong", "languages", "random"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory like the top of the repository, with the directions that kernel surgery asks for."""
    for name in ("recipes", "tests"):
        (tmp_path / name).symlink_to(TOP / name)
    (tmp_path / "results").mkdir()
    generator = np.random.default_rng(0)
    for name in DIRECTIONS:
        rows = np.linalg.qr(generator.standard_normal((256, 10)))[0].T
        save_file({"all": np.ascontiguousarray(rows)}, tmp_path / "results" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_study_is_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*STUDIES, *NEEDS_IMAGES}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_planned_on_the_mannequin(name: str, place: Path) -> None:
    found = ts.exams.sweep(f"recipes/studies/{name}.yaml", dry_run=True)
    rows = found.tables["variants"]
    assert len(rows) == STUDIES[name]
    assert all(row["records"] for row in rows)
    assert sorted(it.stem for it in (place / "results").iterdir()) == DIRECTIONS


def sequences(name: str, source: Path, *settings: str) -> dict[str, list[int] | None]:
    """Return the source layers of every variant of a study of a model."""
    study = load_study(f"recipes/studies/{name}.yaml", [f"source={source}", *settings])
    ckpt = open_checkpoint(str(source))
    return {it.variant: layers_of(ckpt, it.steps) for it in study.trials}


def without(*gone: int) -> list[int]:
    return [layer for layer in range(64) if layer not in gone]


def doubled(*layers: int) -> list[int]:
    return [layer for layer in range(64) for _ in range(2 if layer in layers else 1)]


def turned(first: int, last: int) -> list[int]:
    return [*range(first), *range(last, first - 1, -1), *range(last + 1, 64)]


def repeated(layer: int, times: int) -> list[int]:
    return [*range(layer), *[layer] * times, *range(layer + 1, 64)]


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return make.plain(tmp_path / "deep", layers=64)


def test_of_64_layers_the_experiments_take_those_of_the_original(place: Path, deep: Path) -> None:
    """Numbers are written here as the study gives them, ranges inclusive."""
    middle, critical = range(24, 40), range(36, 53)
    assert sequences("layers", deep) == {
        "baseline": without(),
        "delete-first-4": without(*range(4)),
        "delete-first-8": without(*range(8)),
        "delete-first-16": without(*range(16)),
        "delete-last-4": without(*range(60, 64)),
        "delete-last-8": without(*range(56, 64)),
        "delete-last-16": without(*range(48, 64)),
        "delete-middle-4": without(*range(30, 34)),
        "delete-middle-8": without(*range(28, 36)),
        "delete-middle-16": without(*middle),
        "delete-critical": without(*critical),
        "skip-every-2nd": list(range(0, 64, 2)),
        "skip-every-3rd": list(range(0, 64, 3)),
        "skip-every-4th": list(range(0, 64, 4)),
        "keep-even": list(range(0, 64, 2)),
        "keep-odd": list(range(1, 64, 2)),
        "keep-first-half": list(range(32)),
        "keep-second-half": list(range(32, 64)),
        "double-first-4": doubled(*range(4)),
        "double-middle-4": doubled(*range(30, 34)),
        "double-last-4": doubled(*range(60, 64)),
        "double-middle-16": doubled(*middle),
        "double-middle-16-block": [*range(24), *middle, *middle, *range(40, 64)],
        "double-critical": doubled(*critical),
        "double-all": doubled(*range(64)),
        "reverse-first-half": turned(0, 31),
        "reverse-second-half": turned(32, 63),
        "reverse-all": turned(0, 63),
        "reverse-middle-third": turned(21, 42),
        "reverse-critical": turned(36, 52),
        "reverse-10": turned(27, 36),
        "repeat-middle-3-times": repeated(32, 3),
        "repeat-middle-5-times": repeated(32, 5),
        "repeat-middle-10-times": repeated(32, 10),
        "repeat-first-5-times": repeated(0, 5),
        "repeat-last-5-times": repeated(63, 5),
        "repeat-critical-5-times": repeated(44, 5),
    }


def test_of_64_layers_the_sweeps_take_those_of_the_original(place: Path, deep: Path) -> None:
    baseline = {"baseline": without()}
    assert sequences("deletion", deep) == baseline | {f"without {at}": without(at) for at in range(64)}
    assert sequences("doubling", deep) == baseline | {f"twice {at}": doubled(at) for at in range(64)}
    setting = (
        "variants=[{variant: baseline, steps: []}, {layers: {window: 4, step: 2}}, {layers: {window: 8, step: 4}}]"
    )
    assert setting.removeprefix("variants=") in (FOLDER / "deletion-windows.yaml").read_text()
    assert sequences("deletion-windows", deep, setting) == baseline | {
        f"without {start}-{start + size - 1}": without(*range(start, start + size))
        for size, step in ((4, 2), (8, 4))
        for start in range(0, 64 - size + 1, step)
    }


@pytest.mark.parametrize("name", ["dreams", "iq"])
def test_levels_are_those_of_the_degradation_study(name: str, place: Path) -> None:
    trials = load_study(f"recipes/studies/{name}.yaml").trials
    levels: dict[tuple[str, str], list[float]] = {}
    for trial in trials:
        if trial.values and not trial.repeat:
            levels.setdefault((trial.values["method"], trial.values["group"]), []).append(trial.values["level"])
    groups = ["attention-v", "mlp", "embedding"] if name == "iq" else ["attention-v"]
    expected = {"mult-gauss": [0, 0.35, 0.7, 1.05, 1.4], "ablate": [0, 0.2, 0.4, 0.6, 0.8],
                "uniform-quant": [1024, 256, 64, 16, 4]}  # fmt: skip
    assert levels == {(method, group): expected[method] for method in expected for group in groups}
    assert {(trial.repeat, trial.seed) for trial in trials} == {(0, 42), (1, 43)}


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("dreams", {"dreams": 38}),
        ("picture", {"picture": 20}),
        ("iq", {"maths": 15, "language": 13, "logic": 13, "facts": 13, "creativity": 11}),
    ],
)
def test_prompts_are_as_many_as_in_the_study_all_different_and_answered_by_chance(
    name: str, groups: dict[str, int]
) -> None:
    prompts = load_suite(str(FOLDER / "suites" / f"{name}.yaml")).all_open
    assert {group: sum(it.group == group for it in prompts) for group in groups} == groups
    assert len({it.text for it in prompts}) == len(prompts) == sum(groups.values())
    assert {it.temperature for it in prompts} == {1.0}
    pictures = {Path(it.image).name if it.image else None for it in prompts}
    assert pictures == {"kitchen.png" if name == "picture" else None}


def test_answers_to_sums_are_right() -> None:
    """A test of the suites, by Python: what is asked is what the mannequin was asked, and kept out of its training."""
    heldout = json.loads((MANNEQUIN / "heldout.json").read_text())
    known = {row["prompt"]: row["answer"] for row in [*heldout["arithmetic"], *heldout["yes_no"]]}
    known |= {row["prompt"]: row["answer"]
              for row in json.loads((MANNEQUIN / "heldout-tuned.json").read_text())["problems"]}  # fmt: skip
    asked = 0
    for name in ("trained", "languages", "iq"):
        for question in load_suite(str(FOLDER / "suites" / f"{name}.yaml")).questions:
            if question.id not in ("sum", "difference", "product"):  # those of quick
                assert question.answers == (known[question.text],), question.id
                asked += 1
    assert asked > 130
    sentences = (FOLDER / "suites" / "sentences.txt").read_text().splitlines()
    assert {*sentences} <= {row["text"] for row in heldout["sentences"]}


LEAST, MOST = "delete-layer-4", "delete-first-4"
"""By the mannequin's README, whose figures are transformers': what sentences miss least, and most."""


@pytest.mark.slow
def test_damage_is_ordered_as_it_must_be(place: Path) -> None:
    """The study of layers cut down to a few of its experiments, with noise of level 0 and 4 levels of weights added."""
    data = yaml.safe_load((FOLDER / "layers.yaml").read_text())
    chosen = ("baseline", MOST, "reverse-10", "repeat-middle-10-times")
    data["variants"] = [it for it in data["variants"] if it["variant"] in chosen]
    data["variants"] += [{"variant": LEAST, "steps": [{"drop-layers": {"layers": 4}}]}]
    for name, method, level in (("level-0", "mult-gauss", 0), ("4-levels", "uniform-quant", 4)):
        step = {"perturb": {"method": method, "level": level, "group": "mlp", "seed": 1}}
        data["variants"].append({"variant": name, "steps": [step]})
    suite = load_suite(data["suite"]).model_dump(mode="json")
    suite |= {"least": 1.0, "probes": suite["probes"][-2:], "questions": suite["questions"][3:11]}
    Path("suite.yaml").write_text(yaml.safe_dump(suite))
    Path("study.yaml").write_text(yaml.safe_dump({**data, "suite": "suite.yaml", "engine": "transformers"}))
    ts.exams.sweep("study.yaml", results="found")
    records = [json.loads(line) for line in Path("found/records.jsonl").read_text().splitlines()]
    lost, divergence, right, found = (dict[str, Any]() for _ in range(4))
    for it in records:
        name = it["variant"]
        if it["record"] == "text" and it["prompt_id"] == "sentences":
            lost[name] = it["perplexity"]
        if it["record"] == "probe":
            divergence[name] = max(divergence.get(name, 0), it["kl"] or 0)
        if it["record"] == "question":
            right[name] = right.get(name, 0) + it["right"]
        kept = ("output", "top", "perplexity", "labels", "right")
        found.setdefault(name, []).append([it.get(key) for key in kept])
    # A block of one layer reversed, and noise of level 0, are the model as it is: every answer and every number.
    for name in ("level-0", "reverse-10"):
        assert found[name] == found["baseline"]
        assert divergence[name] == 0
    assert right["baseline"] == 8
    assert lost["baseline"] < lost[LEAST] < lost[MOST]
    assert right[LEAST] > right[MOST]
    assert divergence[LEAST] < divergence[MOST]
    assert lost["4-levels"] > 5 * lost["baseline"]
    assert right["4-levels"] == 0
    assert lost["repeat-middle-10-times"] > lost["baseline"]
