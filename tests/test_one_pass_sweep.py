"""Studies carried out in one pass on the mannequin: the same records as an ordinary sweep by transformers makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from architectures import ARCHITECTURES
from architectures import make as make_architecture
from conftest import MANNEQUIN
from test_sweep import SENTENCES, Killed

import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import DestinationError, RefusedError, UsageError
from tensorsurgeon.evaluate import streaming
from tensorsurgeon.evaluate.engines.transformers import TransformersEngine
from tensorsurgeon.evaluate.ledger import Ledger
from tensorsurgeon.forward.one_pass import OnePass
from tensorsurgeon.running import Running, run_under

SUITE: dict[str, Any] = {
    "least": 1e-4,
    "labels": {"affirm": ["yes", "indeed"], "deny": ["no", "nope"]},
    "probes": [
        {"id": "larger", "group": "control", "text": "Is 38 greater than 18?"},
        {"id": "text", "group": "blind", "form": "completion", "text": "Amina had 54 coins and found"},
    ],
    "texts": [{"id": "sentences", "texts": SENTENCES}],
}
QUESTIONS = [{"id": "sum", "group": "math", "text": "What is 14 plus 50?", "answers": ["64"], "tokens": 8}]
STUDY: dict[str, Any] = {
    "source": str(MANNEQUIN / "bf16"),
    "variants": [
        {"variant": "baseline", "steps": []},
        {"variant": "without {layers}", "layers": {"window": 1}, "steps": [{"drop-layers": {"layers": "{layers}"}}]},
        {"variant": "reversed", "steps": [{"reverse-layers": {"layers": "1-4"}}]},
        {"variant": "noise {level}", "level": [0.1, 0.4],
         "steps": [{"perturb": {"method": "mult-gauss", "level": "{level}", "group": "mlp", "seed": "{seed}"}}]},
    ],
    "repeats": 2,
    "engine": "transformers",
}  # fmt: skip
VARIANTS = 1 + 6 + 1 + 2
EACH = 3


def write(tmp_path: Path, suite: dict[str, Any] | None = None, **changes: Any) -> str:
    """Write a study and its suite."""
    asked, path = tmp_path / "suite.yaml", tmp_path / "study.yaml"
    asked.write_text(yaml.safe_dump(suite or SUITE))
    given = {**STUDY, "suite": str(asked), "results": str(tmp_path / "results"), **changes}
    path.write_text(yaml.safe_dump(given))
    return str(path)


def records(results: Path, *without: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the records of a sweep by what they answer, without what differs between any two runs."""
    found = {}
    for row in map(json.loads, (results / "records.jsonl").read_text().splitlines()):
        key = (row["variant"], row["repeat_index"], row["record"], row["prompt_id"])
        assert key not in found
        found[key] = {name: it for name, it in row.items() if name not in ("timestamp", "duration", *without)}
    return found


@pytest.mark.parametrize(
    ("least", "passes"), [(1e-4, 2), pytest.param(0.0, 1, marks=pytest.mark.slow)]
)  # of spellings that matter only by what the first pass finds there is a second
def test_records_are_those_of_an_ordinary_sweep_to_the_bit(tmp_path: Path, least: float, passes: int) -> None:
    study = write(tmp_path, {**SUITE, "least": least})
    ts.exams.sweep(study, results=str(tmp_path / "ordinary"))
    found = ts.exams.sweep(study, one_pass=True)
    streamed, ordinary = (records(tmp_path / it, "engine", "built") for it in ("results", "ordinary"))
    assert len(streamed) == VARIANTS * 2 * EACH
    assert streamed == ordinary
    told = records(tmp_path / "results")["baseline", 0, "probe", "larger"]
    assert told["built"] == "streamed"
    assert (told["engine"]["engine"], told["engine"]["batch"], told["engine"]["dtype"]) == ("stream", 1, "float32")
    # The report tells of it as of any sweep, and what it took.
    assert len(found.tables["variants, the least damaged first"]) == VARIANTS
    costs = found.tables["one pass"]
    assert len(costs) == passes
    assert costs[0]["models"] == 2 * VARIANTS
    for row in costs:
        assert row["layer runs"] < 0.7 * row["runs one by one"]


def test_answers_in_words_are_left_out_where_that_is_asked(tmp_path: Path) -> None:
    study = write(tmp_path, {**SUITE, "questions": QUESTIONS})
    with pytest.raises(
        UsageError, match=r"asks for answers.*: questions \(1\)\. Leave them out with --without-answers"
    ):
        ts.exams.sweep(study, one_pass=True)
    assert not (tmp_path / "results").exists()
    ts.exams.sweep(study, one_pass=True, without_answers=True)
    assert len(records(tmp_path / "results")) == VARIANTS * 2 * EACH
    # They are not the records of the whole study.
    with pytest.raises(DestinationError, match=r"asked\.questions"):
        ts.exams.sweep(study)


def test_interrupted_and_resumed_the_records_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write(tmp_path)
    ts.exams.sweep(study, one_pass=True)
    whole = records(tmp_path / "results")
    kept = Ledger.keep
    for last in (0, 1, EACH, 3 * EACH + 2):
        place = tmp_path / f"stopped-{last}"

        def keep(self: Ledger, record: Any, last: int = last) -> None:
            if len(self.held) == last:
                raise Killed
            kept(self, record)

        monkeypatch.setattr(Ledger, "keep", keep)
        with pytest.raises(Killed):
            ts.exams.sweep(study, one_pass=True, results=str(place))
        monkeypatch.undo()
        found = ts.exams.sweep(study, one_pass=True, results=str(place))
        assert records(place) == whole
        # Only what is missing is run, and the baseline, from which divergences are measured.
        left = 2 * VARIANTS - last // EACH
        assert found.tables["one pass"][0]["models"] == left + (1 if last >= EACH else 0)
    monkeypatch.setattr(OnePass, "__init__", lambda *_: pytest.fail("layers were run"))
    assert "one pass" not in ts.exams.sweep(study, one_pass=True).tables


def test_the_least_damaged_are_confirmed_by_the_engine_of_the_study(tmp_path: Path) -> None:
    study = write(tmp_path, {**SUITE, "questions": QUESTIONS}, repeats=1)
    found = ts.exams.sweep(study, one_pass=True, without_answers=True, confirm=2)
    order = [row["variant"] for row in found.tables["variants, the least damaged first"]]
    confirmed = records(tmp_path / "results" / "confirmed")
    chosen = ["baseline", *[it for it in order if it != "baseline"][:2]]
    assert {key[0] for key in confirmed} == set(chosen)
    assert len(confirmed) == 3 * (EACH + 1)
    assert all(it["engine"]["engine"] == "transformers" for it in confirmed.values())
    rows = found.tables["confirmed"]
    assert {(it["variant"], it["measure"]) for it in rows} >= {
        (variant, measure) for variant in chosen for measure in ("damage", "perplexity")
    }
    assert all(row["difference"] == 0 == row["confirmed"] - row["one pass"] for row in rows)
    # More of them are added to those that there are.
    ts.exams.sweep(study, one_pass=True, without_answers=True, confirm=3)
    again = records(tmp_path / "results" / "confirmed")
    assert len(again) == 4 * (EACH + 1)
    assert again.items() >= confirmed.items()
    assert all(it["kl"] is not None for it in again.values() if it["record"] == "probe" and it["variant"] != "baseline")


def test_a_dry_run_tells_what_it_takes_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnePass, "run", lambda *_: pytest.fail("layers were run"))
    study = write(tmp_path)
    found = ts.exams.sweep(study, one_pass=True, dry_run=True)
    assert not (tmp_path / "results").exists()
    assert len(found.tables["variants"]) == VARIANTS
    (row,) = found.tables["one pass"]
    # Layers 1-4 reversed take a pass down, and layer 5 after them one up.
    assert (row["passes"], row["one by one"]) == (3, 2 * (6 + 6 * 5 + 6 + 2 * 6))
    assert row["states"] > 0 == row["of them on disk"]
    with run_under(Running(memory=2**16)):
        (small,) = ts.exams.sweep(study, one_pass=True, dry_run=True).tables["one pass"]
    assert small["of them on disk"] == small["states"] - 2**14


def test_states_that_do_not_fit_on_the_disk_are_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: Usage)
    monkeypatch.setattr(OnePass, "run", lambda *_: pytest.fail("layers were run"))
    with run_under(Running(memory=2**16)), pytest.raises(DestinationError, match="do not fit into --memory"):
        ts.exams.sweep(write(tmp_path), one_pass=True)


@pytest.mark.parametrize(
    ("suite", "changes", "message"),
    [
        ({"questions": QUESTIONS}, {}, "one pass measures nothing else"),
        ({**SUITE, "bilingual": {}, "extends": "bilingual"}, {}, "asks for answers"),
        ({**SUITE, "tasks": [{"task": "small-sums"}]}, {}, r"tasks \(1\)"),
        (SUITE, {"base": str(MANNEQUIN / "bf16")}, "are streamed without adapters"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_the_work(
    tmp_path: Path, suite: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ts.exams.sweep(write(tmp_path, suite, **changes), one_pass=True)
    assert not (tmp_path / "results").exists()


def test_a_family_whose_layers_share_is_refused_by_name(tmp_path: Path) -> None:
    source = make_architecture(
        ARCHITECTURES["gemma3n_text"],
        tmp_path / "source",
        num_kv_shared_layers=0,
        vocab_size=1024,
        vocab_size_per_layer_input=1024,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_bytes((MANNEQUIN / "bf16" / name).read_bytes())
    study = write(tmp_path, source=str(source), variants=[{"variant": "baseline", "steps": []}])
    with pytest.raises(RefusedError, match="cannot be run layer by layer"):
        ts.exams.sweep(study, one_pass=True)


def test_options_of_one_pass_go_with_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write(tmp_path)
    assert main(["sweep", study, "--confirm", "2"]) == 2
    assert "confirm: goes with --one-pass only" in capsys.readouterr().err
    assert main(["sweep", study, "--without-answers"]) == 2
    assert "without-answers: goes with --one-pass only" in capsys.readouterr().err


def test_a_study_may_name_the_streamed_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its variants are made one by one, and their answers in words are asked too."""
    variants = [STUDY["variants"][0], {"variant": "less", "steps": [{"drop-layers": {"layers": "3"}}]}]
    study = write(tmp_path, {**SUITE, "questions": QUESTIONS}, variants=variants, repeats=1)
    ts.exams.sweep(study, results=str(tmp_path / "ordinary"))
    monkeypatch.setattr(TransformersEngine, "load", lambda *_: pytest.fail("the model was loaded whole"))
    ts.exams.sweep(study, set_=["engine=stream"])
    assert records(tmp_path / "results", "engine") == records(tmp_path / "ordinary", "engine")
