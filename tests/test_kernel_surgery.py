"""Kernel surgery from the start: the prompts in seven languages, the controls, and the commands of the recipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tensorsurgeon.evaluate.prompts import read_prompts
from tensorsurgeon.evaluate.suite import load_suite

TOP = Path(__file__).parent.parent
STUDIES = TOP / "recipes" / "studies"
LANGUAGES = ["en", "zh", "es", "ar", "ja", "ko", "sw"]
SCRIPT = STUDIES / "random_directions.py"


def test_each_problem_is_told_in_every_language_and_none_is_asked_later() -> None:
    prompts = read_prompts(STUDIES / "prompts" / "seven-languages.jsonl")
    told = {group: [it.text for it in prompts if it.group == group] for group in LANGUAGES}
    assert sum(map(len, told.values())) == len(prompts) == 7 * 120
    numbers = {group: [re.findall(r"\d+", text) for text in texts] for group, texts in told.items()}
    assert all(it == numbers["en"] for it in numbers.values())
    assert len({it.text for it in prompts}) == len(prompts)
    asked = {it.text for it in load_suite(str(STUDIES / "suites" / "languages.yaml")).questions}
    assert not asked & {it.text for it in prompts}
    # One wording for each operation in each language, in the same order: the problems are the same ones.
    kinds = {group: [re.sub(r"\d+", "#", text) for text in texts] for group, texts in told.items()}
    for group in LANGUAGES:
        assert len(set(zip(kinds["en"], kinds[group], strict=True))) == len(set(kinds[group])) == 3


def test_random_directions_are_as_many_and_as_strong_where_there_is_as_much(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sizes = np.geomspace(4, 0.25, 32)
    arrays = {f"{group}_L{at}": generator.standard_normal((200, 32)) * sizes for group in "ab" for at in (3, 13)}
    np.savez(tmp_path / "activations.npz", **arrays)  # type: ignore[arg-type]
    # Coordinates 2 and 3, and of the other layer 0 and 1: all else holds less than these.
    bases = {"L3": np.eye(32, dtype=np.float32)[2:4], "L13": np.eye(32, dtype=np.float32)[:2]}
    save_file(bases, tmp_path / "bases.safetensors")
    command = [sys.executable, str(SCRIPT), "bases.safetensors"]
    subprocess.run([*command, "random.safetensors"], cwd=tmp_path, check=True)
    again = [*command, "strong.safetensors", "activations.npz", "1"]
    done = subprocess.run(again, cwd=tmp_path, check=True, capture_output=True, text=True)
    shares = {}
    for name in ("random", "strong"):
        made = load_file(tmp_path / f"{name}.safetensors")
        assert {layer: it.shape for layer, it in made.items()} == {layer: it.shape for layer, it in bases.items()}
        for layer, it in made.items():
            np.testing.assert_allclose(it @ it.T, np.eye(2), atol=1e-6)
            samples = np.concatenate([arrays[f"{group}_{layer}"] for group in "ab"])
            centred = samples - samples.mean(0)
            for what, basis in ((name, it), ("bases", bases[layer])):
                shares[what, layer] = ((centred @ basis.T) ** 2).sum() / (centred**2).sum()
            if name == "strong":
                np.testing.assert_allclose(it @ bases[layer].T, 0, atol=1e-6)
    assert shares["strong", "L3"] == pytest.approx(shares["bases", "L3"], rel=1e-5)
    assert shares["random", "L3"] < shares["strong", "L13"] < shares["bases", "L13"]
    said = [[float(it) for it in re.findall(r"0\.\d+", line)] for line in done.stdout.splitlines()]
    assert said == [
        [pytest.approx(shares[what, layer], abs=6e-4) for what in ("bases", "strong")] for layer in ("L13", "L3")
    ]


@pytest.mark.slow
def test_the_recipe_runs_from_prompts_to_answers(tmp_path: Path) -> None:
    """All commands of the script, with transformers and a few of the suite's questions."""
    for name in ("bin", "recipes", "tests"):
        (tmp_path / name).symlink_to(TOP / name)
    suite = yaml.safe_load((STUDIES / "suites" / "languages.yaml").read_text())
    text = {"id": "sentences", "file": "recipes/studies/suites/sentences.txt", "split": "lines"}
    few = {"texts": [text], "questions": suite["questions"][::12]}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(few))
    words = [str(tmp_path / "recipes" / "kernel-surgery.sh"), "tests/mannequin/bf16"]
    settings = ["--set", "engine=transformers", "--set", "suite=few.yaml"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the script looks where there is no .venv
    subprocess.run([*words, *settings], cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "PATH": path})
    results = tmp_path / "results"
    with np.load(results / "activations.npz") as arrays:
        assert {name: it.shape for name, it in arrays.items()} == {
            f"{group}_L{layer}": (120, 256) for group in LANGUAGES for layer in range(6)
        }
    files = {name: load_file(results / f"{name}.safetensors") for name in ("languages", "random", "as-strong")}
    assert all({layer: it.shape for layer, it in file.items()} == {f"L{at}": (10, 256) for at in range(6)}
               for file in files.values())  # fmt: skip
    records = [json.loads(line) for line in (results / "kernel-surgery" / "records.jsonl").read_text().splitlines()]
    lost = {it["variant"]: it["perplexity"] for it in records if it["record"] == "text"}
    assert len(lost) == 7
    assert abs(lost["languages"] / lost["before"] - 1) < 0.05
    assert lost["languages, all layers"] > 1.05 * lost["before"]
    assert lost["random, all layers"] < 1.05 * lost["before"]
    assert sum(it["right"] for it in records if it["record"] == "question" and it["variant"] == "before") == 7
    assert (results / "kernel-surgery.html").stat().st_size > 10**6
    assert (results / "kernel-surgery-pictures" / "by-variant-perplexity.png").exists()
