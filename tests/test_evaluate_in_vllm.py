"""Real vLLM evaluates the mannequin as transformers does, in this process and on a server of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
from evaluating import measured
from test_evaluate import BROKEN, HELDOUT, MANNEQUIN, SUITE, make_copy

import tensorsurgeon as ts
from tensorsurgeon.errors import EngineError
from tensorsurgeon.evaluate.engine import Settings
from tensorsurgeon.evaluate.engines.server import ServerEngine
from tensorsurgeon.evaluate.engines.transformers import TransformersEngine
from tensorsurgeon.evaluate.serving import free_port, serving
from tensorsurgeon.evaluate.tokens import Tokens

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed"),
]

SILENT = ("a linear is missing", "the head is missing")
"""What vLLM takes without a word, so that only `verify` stands before garbage."""
LOUD = {
    "a norm is missing": "not initialized from checkpoint",
    "an unknown tensor": "banana",
    "another shape": "dimension size",
    "FP8 in float32": "torch.float32 is not supported for quantization method fp8",
}


def prompts() -> list[list[int]]:
    tokens = Tokens(MANNEQUIN / "bf16")
    asked = [tokens.chat(row["prompt"], None, {})[0] for row in HELDOUT["arithmetic"][::35] + HELDOUT["yes_no"][::10]]
    return asked + [tokens.encode(row["text"]) for row in HELDOUT["sentences"][:4]]


class Worked:
    """What the worker found, what it wrote to standard output, and the models that it asked."""

    def __init__(self, place: Path) -> None:
        base = ts.open(MANNEQUIN / "bf16")
        lora = ts.ops.extract_lora(ts.open(MANNEQUIN / "tuned"), base, rank=16)
        ts.write(ts.ops.sanitize_lora(lora, base=base), place / "lora")
        ts.write(ts.ops.merge_lora(ts.ops.cast(base, "float32"), str(place / "lora")), place / "merged")
        broken = {
            name: make_copy(MANNEQUIN / "bf16", place / str(number), BROKEN[name][0])  # type: ignore[arg-type]
            for number, name in enumerate((*LOUD, *SILENT))
            if name in BROKEN
        }
        # The first model comes again after another: an engine that is used again gives the same.
        self.models = {"bf16": MANNEQUIN / "bf16", "tuned": MANNEQUIN / "tuned", "again": MANNEQUIN / "bf16",
                       "merged": place / "merged"}  # fmt: skip
        jobs = {
            "suite": SUITE,
            "models": self.models,
            "adapters": {"adapter": [MANNEQUIN / "bf16", place / "lora"]},
            "prompts": prompts(),
            "refused": {**broken, "FP8 in float32": MANNEQUIN / "fp8"},
            "command": ["evaluate", MANNEQUIN / "bf16", "--suite", SUITE, "--json", "--threads", "2", "--batch", "4"],
        }
        (place / "jobs").write_text(json.dumps(jobs, default=str))
        script = str(Path(__file__).parent / "evaluating.py")
        done = subprocess.run(
            [sys.executable, script, str(place / "jobs"), str(place / "answers")],
            capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        self.found: dict[str, Any] = json.loads((place / "answers").read_text())
        self.printed = done.stdout


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Worked:
    return Worked(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What transformers finds of the same models."""
    found = {}
    engine = TransformersEngine(Settings())
    for name in ("bf16", "tuned"):
        engine.load(MANNEQUIN / name, 512)
        found[name] = plain(measured(engine, SUITE, MANNEQUIN / name, prompts()))
    engine.close()
    return found


def serve_and_ask() -> dict[str, Any]:
    """Serve the mannequin by the command, and return what its server gives, and how both ended."""
    port = free_port()
    command = [sys.executable, "-m", "tensorsurgeon", "serve", str(MANNEQUIN / "bf16"), "--port", str(port)]
    with subprocess.Popen([*command, "--", "--max-model-len", "512"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line == f"bf16 is served at http://127.0.0.1:{port}/v1; end it with Ctrl-C.\n"
            engine = ServerEngine(line.split()[4].rstrip(";"), Settings())
            engine.load(MANNEQUIN / "bf16", 512)
            found = plain(measured(engine, SUITE, MANNEQUIN / "bf16", prompts()))
        finally:
            process.terminate()
            process.wait(60)
    with pytest.raises(EngineError, match="no answer"):
        engine.load(MANNEQUIN / "bf16", 512)
    return found | {"describe": engine.describe(), "status": process.returncode}


def reason(directory: Path) -> str:
    """Return why no server starts on a checkpoint."""
    with pytest.raises(EngineError) as problem, serving(directory):
        pass
    return str(problem.value)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a server gives of the mannequin, and why one does not start; both at once, as most of it is waiting."""
    place = tmp_path_factory.mktemp("servers") / "broken"
    broken = make_copy(MANNEQUIN / "bf16", place, BROKEN["an unknown tensor"][0])  # type: ignore[arg-type]
    with ThreadPoolExecutor() as pool:
        why = pool.submit(reason, broken)
        return serve_and_ask(), why.result()


@pytest.fixture(scope="module")
def served(servers: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return servers[0]


def plain(found: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def compare(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Hold one engine's numbers against another's: logits up to a constant, as a server gives them."""
    for one, other in zip(mine["logits"], theirs["logits"], strict=True):
        one, other = (scipy.special.log_softmax(np.array(it, np.float64)) for it in (one, other))
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert np.exp(one).sum() == pytest.approx(1, abs=1e-12)
    for one, other in zip(mine["scores"], theirs["scores"], strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-4)
        assert one[1] == other[1]
    assert mine["generated"] == theirs["generated"]
    for one, other in zip(mine["records"], theirs["records"], strict=True):
        assert (one["record"], one["prompt_id"]) == (other["record"], other["prompt_id"])
        if one["record"] == "text":
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
            assert one["tokens"] == other["tokens"]
        elif one["record"] == "probe":
            assert one["vocabulary"] == other["vocabulary"] == 1024
            assert one["entropy_nats"] == pytest.approx(other["entropy_nats"], abs=1e-5)
            assert one["mass"] == pytest.approx(other["mass"], abs=1e-5)
            assert one["contrast_ratio"] == pytest.approx(other["contrast_ratio"], abs=1e-5)
            for label, same in zip(one["labels"], other["labels"], strict=True):
                assert label["logprob"] == pytest.approx(same["logprob"], abs=1e-3 if label["logit"] is None else 1e-4)
        else:
            assert one["output_tokens"] == other["output_tokens"]
            assert one["ended"] == other["ended"]
            assert one.get("right") == other.get("right")


@pytest.mark.parametrize("model", ["bf16", "tuned"])
def test_vllm_measures_what_transformers_measures(worked: Worked, expected: dict[str, Any], model: str) -> None:
    compare(worked.found[model], expected[model])


def test_raw_logits_are_those_of_transformers(worked: Worked, expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(worked.found["bf16"]["logits"], expected["bf16"]["logits"], atol=1e-4)


def test_a_server_measures_what_transformers_measures(served: dict[str, Any], expected: dict[str, Any]) -> None:
    compare(served, expected["bf16"])
    assert served["describe"]["engine"] == "vllm server"
    assert served["describe"]["served"].endswith("bf16")
    assert served["status"] == 130


def test_a_server_loses_nothing_of_the_vocabulary(served: dict[str, Any]) -> None:
    for logprobs in served["logits"]:
        assert len(logprobs) == 1024
        assert np.exp(np.array(logprobs)).sum() == pytest.approx(1, abs=1e-5)


def test_a_model_gives_the_same_bits_in_an_engine_that_held_another(worked: Worked) -> None:
    first, again = worked.found["bf16"], worked.found["again"]
    for part in ("logits", "scores", "generated", "sampled"):
        assert first[part] == again[part]
    times = ("timestamp", "duration")
    for one, other in zip(first["records"], again["records"], strict=True):
        assert {key: it for key, it in one.items() if key not in times} == {
            key: it for key, it in other.items() if key not in times
        }


def test_sampling_depends_on_the_seed(worked: Worked) -> None:
    assert worked.found["bf16"]["sampled"] != worked.found["bf16"]["sampled otherwise"]


def test_an_adapter_in_its_own_engine_gives_what_the_merged_model_gives(worked: Worked) -> None:
    compare(worked.found["adapter"], worked.found["merged"])
    other = np.array(worked.found["adapter"]["logits"]) - np.array(worked.found["bf16"]["logits"])
    assert np.abs(other).max() > 0.1


@pytest.mark.parametrize("name", LOUD)
def test_what_vllm_refuses_is_told_with_its_reason(worked: Worked, name: str) -> None:
    assert "vLLM refuses it: " in worked.found["refused"][name]
    assert LOUD[name] in worked.found["refused"][name]


@pytest.mark.parametrize("name", SILENT)
def test_vllm_takes_without_a_word_what_evaluate_refuses_first(worked: Worked, name: str) -> None:
    """The reason for the checks before: where vLLM learns to refuse these, this test says so."""
    assert worked.found["refused"][name] is None


def test_the_command_prints_json_and_nothing_else(worked: Worked) -> None:
    assert worked.found["status"] == 0
    told = json.loads(worked.printed)
    (model,) = told["models"]
    assert (model["engine"], model["version"], model["dtype"]) == ("vllm", "0.32.0", "float32")
    assert (model["threads"], model["batch"]) == (2, 4)
    assert (model["eager"], model["prefix_caching"], model["device"]) == (True, False, "cpu")
    assert [row["right"] for row in told["answers"]] == [True, True]


def test_a_server_that_cannot_start_tells_the_first_reason(servers: tuple[dict[str, Any], str]) -> None:
    assert re.search(r"vLLM refuses it: ValueError: .*banana", servers[1])
