"""A sweep in real vLLM: models go into the living engine, and answer as transformers has them answer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml
from conftest import MANNEQUIN
from test_sweep import SUITE, records

import tensorsurgeon as ts

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed"),
]

NOISE = [{"perturb": {"method": "mult-gauss", "level": "{level}", "group": "mlp", "seed": 1}}]
STUDY: dict[str, Any] = {
    "source": str(MANNEQUIN / "bf16"),
    "variants": [
        {"variant": "baseline", "steps": []},
        {"variant": "noise {level}", "level": [0.0, 0.2, 0.4], "steps": NOISE},
        {"variant": "without {layers}", "layers": ["0", "2", "5"]},
        {"variant": "tuned", "source": str(MANNEQUIN / "tuned"), "steps": []},
        {"variant": "adapter", "source": str(MANNEQUIN / "tuned"), "base": str(MANNEQUIN / "bf16"),
         "steps": [{"extract-lora": {"base": str(MANNEQUIN / "bf16"), "rank": 64}}]},
        {"variant": "last", "steps": []},
    ],
    "steps": [{"drop-layers": {"layers": "{layers}"}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the records of one study by vLLM, in one process, and by transformers."""
    place = tmp_path_factory.mktemp("sweep")
    greedy = [{**group, "temperature": 0.0} for group in SUITE["prompts"]]  # type: ignore[union-attr]
    (place / "suite.yaml").write_text(yaml.safe_dump({**SUITE, "prompts": greedy}))
    (place / "study.yaml").write_text(yaml.safe_dump({**STUDY, "suite": str(place / "suite.yaml")}))
    command = [sys.executable, "-m", "tensorsurgeon", "sweep", place / "study.yaml", "--results", place / "vllm",
               "--set", "engine=vllm", "--json", "--threads", "1"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "notes" not in json.loads(done.stdout)
    study, other = str(place / "study.yaml"), str(place / "transformers")
    ts.exams.sweep(study, set_=("engine=transformers",), results=other)
    return {engine: records(place / engine) for engine in ("vllm", "transformers")}


def test_models_of_one_shape_are_reloaded_after_one_that_was_proved(results: dict[str, list[dict[str, Any]]]) -> None:
    built = {it["variant"]: it["built"] for it in results["vllm"]}
    assert built == {
        "baseline": "source", "noise 0.0": "source", "noise 0.2": "written", "noise 0.4": "reloaded",
        "without 0": "written", "without 2": "written", "without 5": "reloaded",
        "tuned": "source", "adapter": "written", "last": "source",
    }  # fmt: skip


def test_vllm_measures_what_transformers_measures(results: dict[str, list[dict[str, Any]]]) -> None:
    ours, theirs = (
        {(it["variant"], it["record"], it["prompt_id"]): it for it in results[engine]} for engine in results
    )
    assert ours.keys() == theirs.keys()
    same = 0
    for key, one in ours.items():
        other = theirs[key]
        if one["record"] == "probe":
            logits = [[label["logit"] for label in it["labels"]] for it in (one, other)]
            assert logits[0] == pytest.approx(logits[1], abs=1e-4)
        elif one["record"] == "text":
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
        else:
            same += one["output_tokens"] == other["output_tokens"]
    # Of two tokens that are as likely each engine may take its own, in a model that was ruined.
    answers = sum(it["record"] in ("question", "open") for it in ours.values())
    assert same >= answers - 2


def test_the_base_after_an_adapter_is_the_base(results: dict[str, list[dict[str, Any]]]) -> None:
    held = {(it["variant"], it["record"]): it for it in results["vllm"] if it["record"] in ("probe", "text")}
    for kind, key in (("probe", "top"), ("text", "perplexity")):
        assert held["last", kind][key] == held["baseline", kind][key]
        assert held["adapter", kind][key] != held["baseline", kind][key]
    assert held["noise 0.0", "probe"]["kl"] == 0.0
