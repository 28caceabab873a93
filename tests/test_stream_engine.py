"""The engine that streams a model: the same records as transformers makes with the model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MANNEQUIN
from PIL import Image
from test_forward import large  # noqa: F401  # a fixture
from test_one_pass_sweep import QUESTIONS, SUITE

import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import EngineError, UsageError
from tensorsurgeon.evaluate import choosing
from tensorsurgeon.evaluate.engine import Picture, Pictured, Sampling, Settings
from tensorsurgeon.evaluate.engines.stream import StreamEngine
from tensorsurgeon.evaluate.engines.transformers import TransformersEngine
from tensorsurgeon.forward.one_pass import OnePass

PROMPTS = [list(range(5, 30)), list(range(40, 52)), [7, 9, 8]]


def asked(tmp_path: Path, model: Path, engine: str, **settings: Any) -> list[dict[str, Any]]:
    """Return the records of a model, without what differs between any two runs."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({**SUITE, "questions": QUESTIONS}))
    ts.exams.evaluate(str(model), engine=engine, suite=str(suite), records=str(tmp_path / engine), **settings)
    rows = map(json.loads, (tmp_path / engine).read_text().splitlines())
    return [{key: it for key, it in row.items() if key not in ("timestamp", "duration", "engine")} for row in rows]


def test_records_are_those_of_transformers_to_the_bit_in_few_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = asked(tmp_path, MANNEQUIN / "bf16", "transformers")
    run, runs = OnePass.run, []

    def counted(self: OnePass, *given: Any) -> None:
        runs.append(self.costs)
        run(self, *given)

    monkeypatch.setattr(OnePass, "run", counted)
    monkeypatch.setattr(TransformersEngine, "load", lambda *_: pytest.fail("the model was loaded whole"))
    assert asked(tmp_path, MANNEQUIN / "bf16", "stream") == expected
    # One for probes and texts, one for spellings that matter, and one for each token of the answer with its end.
    answer = next(it for it in expected if it["record"] == "question")
    assert len(runs) == 2 + answer["tokens"] + answer["ended"]
    assert all((it.passes, it.layers) == (1, 6) for it in runs)


def test_half_precision_has_a_head_in_float32(tmp_path: Path) -> None:
    given = [asked(tmp_path, MANNEQUIN / "bf16", it, dtype="bfloat16") for it in ("transformers", "stream")]
    assert given[0] == given[1]


def test_quantised_weights_are_decoded_to_the_dtype_of_the_computation(tmp_path: Path) -> None:
    ts.write(ts.ops.dequantize(ts.open(MANNEQUIN / "fp8"), "float32"), tmp_path / "plain")
    whole, streamed = TransformersEngine(Settings()), StreamEngine(Settings())
    whole.load(tmp_path / "plain", 64)
    streamed.load(MANNEQUIN / "fp8", 64)
    for one, other in zip(whole.next_logits(PROMPTS), streamed.next_logits(PROMPTS), strict=True):
        assert (one == other).all()
    for one, other in zip(whole.score(PROMPTS), streamed.score(PROMPTS), strict=True):
        assert (one.logprobs == other.logprobs).all()
        assert (one.greedy == other.greedy).all()


def test_a_batch_moves_only_the_last_digits() -> None:
    alone, together = StreamEngine(Settings()), StreamEngine(Settings(batch=3))
    for engine in (alone, together):
        engine.load(MANNEQUIN / "bf16", 64)
    for one, other in zip(alone.next_logits(PROMPTS), together.next_logits(PROMPTS), strict=True):
        assert other == pytest.approx(one, abs=1e-4)
    made = [engine.generate(PROMPTS, Sampling(6), ends=[1, 2]) for engine in (alone, together)]
    assert [it.tokens for it in made[0]] == [it.tokens for it in made[1]]
    assert (alone.describe()["batch"], together.describe()["batch"]) == (1, 3)


def test_what_it_does_not_do_is_refused(tmp_path: Path) -> None:
    engine = StreamEngine(Settings())
    with pytest.raises(EngineError, match="are streamed without adapters"):
        engine.load(MANNEQUIN / "bf16", 64, tmp_path)
    engine.load(MANNEQUIN / "bf16", 64)
    with pytest.raises(EngineError, match="no answers by chance"):
        engine.generate(PROMPTS, Sampling(temperature=1.0), [])
    with pytest.raises(EngineError, match="takes no other weights"):
        engine.reload([])
    shown = Pictured([5], [5], "", [], {}, Picture("cat.png", "", Image.new("RGB", (2, 2))))
    with pytest.raises(EngineError, match=r"shows no pictures \(cat\.png\)"):
        engine.next_logits([shown])
    with pytest.raises(EngineError, match="shows no pictures"):
        engine.generate([shown], Sampling(), [])
    with pytest.raises(UsageError, match=r"token 100000 is beyond"):
        engine.score([[5, 100000]])


def test_answers_by_chance_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnePass, "run", lambda *_: pytest.fail("layers were run"))
    suite = tmp_path / "suite.yaml"
    dreams = [{"group": "dreams", "texts": ["Amina had"], "temperature": 1.0}]
    suite.write_text(yaml.safe_dump({**SUITE, "prompts": dreams}))
    with pytest.raises(EngineError, match="no answers by chance"):
        ts.exams.evaluate(str(MANNEQUIN / "bf16"), engine="stream", suite=str(suite))


def test_it_is_never_taken_unasked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(choosing, "find_spec", lambda name: None if name == "vllm" else name)
    assert choosing.default_kind() == "transformers"
    monkeypatch.setattr(choosing, "find_spec", lambda name: "there" if name == "stream" else None)
    with pytest.raises(UsageError, match="an engine is needed"):
        choosing.default_kind()
    with pytest.raises(UsageError, match="transformers is not installed"):
        choosing.make_engine("stream")
    monkeypatch.undo()
    assert main(["evaluate", "--help"]) == 0
    assert "stream" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.alone
def test_a_model_larger_than_the_memory_is_evaluated(large: Path) -> None:  # noqa: F811
    worker = str(Path(__file__).parent / "streaming.py")
    words = [sys.executable, worker, "engine", str(large), "900"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["means"] == [0.0, 0.0]
