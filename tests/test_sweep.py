"""Sweeps on the mannequin, by transformers: what is made, recorded, interrupted, resumed and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import MANNEQUIN
from scipy.special import log_softmax

import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import DestinationError, OutOfMemoryError, RefusedError, UsageError
from tensorsurgeon.evaluate import asking, questionnaire, sweeping
from tensorsurgeon.evaluate.digest import checkpoint_digest
from tensorsurgeon.evaluate.engine import Generation, Prompt, Sampling
from tensorsurgeon.evaluate.engines.transformers import TransformersEngine
from tensorsurgeon.evaluate.installing import Subject
from tensorsurgeon.evaluate.ledger import Ledger
from tensorsurgeon.evaluate.study import load_study

SENTENCES = [
    "Amina had 54 coins and found 65 more, so now she has 119.",
    "Carlos had 9 coins and found 61 more, so now he has 70.",
]
SUITE = {
    "labels": {"affirm": ["yes"], "deny": ["no"]},
    "probes": [{"id": "larger", "group": "control", "text": "Is 38 greater than 18?"}],
    "texts": [{"id": "sentences", "texts": SENTENCES}],
    "questions": [{"id": "sum", "group": "math", "text": "What is 14 plus 50?", "answers": ["64"], "tokens": 8}],
    "prompts": [
        {"group": "coins", "form": "completion", "texts": ["Amina had", "Carlos had"], "tokens": 6, "temperature": 1.0}
    ],
}
EACH = 5
"""Records of one model."""
DAMAGE = [{"perturb": {"method": "{method}", "level": "{level}", "group": "mlp", "seed": "{seed}"}}]
STUDY = {
    "about": "Noise in the MLPs.",
    "source": str(MANNEQUIN / "bf16"),
    "variants": [{"variant": "baseline", "steps": []}, {"method": "mult-gauss", "level": [0.0, 0.5]}],
    "steps": DAMAGE,
    "variant": "{method}-{level}",
    "seed": 42,
    "engine": "transformers",
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    return path


@pytest.fixture
def study(tmp_path: Path, suite: Path) -> Path:
    return write(tmp_path, suite)


def write(tmp_path: Path, suite: Path, /, **changes: Any) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "suite": str(suite), "results": str(tmp_path / "results"), **changes}))
    return path


def records(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / "records.jsonl").read_text().splitlines()]


def lasting(results: Path) -> list[dict[str, Any]]:
    """Return the records without what differs between any two runs."""
    return [{key: it for key, it in row.items() if key not in ("timestamp", "duration")} for row in records(results)]


def logits_after(weights: Path, prompt: list[int]) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(weights), dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, -1].double().numpy()


def test_every_model_is_made_and_asked(tmp_path: Path, suite: Path) -> None:
    path = write(tmp_path, suite, repeats=2)
    found = ts.exams.sweep(str(path))
    # What the report tells: the least damaged first.
    assert [row["variant"] for row in found.tables["variants, the least damaged first"]] == [
        "baseline",
        "mult-gauss-0.0",
        "mult-gauss-0.5",
    ]
    rows = records(tmp_path / "results")
    assert len(rows) == 3 * 2 * EACH
    probes = {(it["variant"], it["repeat_index"]): it for it in rows if it["record"] == "probe"}
    # Level 0 is the baseline, exactly; each repetition has noise of its own, from its own seed.
    for repeat in (0, 1):
        assert probes["mult-gauss-0.0", repeat]["kl"] == 0.0
        assert probes["mult-gauss-0.0", repeat]["top"] == probes["baseline", 0]["top"]
    assert probes["baseline", 0]["kl"] is None
    assert len({probes["mult-gauss-0.5", repeat]["kl"] for repeat in (0, 1)}) == 2
    assert [probes["mult-gauss-0.5", repeat]["seed"] for repeat in (0, 1)] == [42, 43]
    # The divergence is that of the model as 'perturb' writes it, by transformers and in float64.
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(MANNEQUIN / "bf16"))
    chat = [{"role": "user", "content": "Is 38 greater than 18?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    damaged = ts.ops.perturb(ts.open(MANNEQUIN / "bf16"), method="mult-gauss", level=0.5, group="mlp", seed=43)
    ts.write(damaged, tmp_path / "damaged")
    base, other = (log_softmax(logits_after(it, prompt)) for it in (MANNEQUIN / "bf16", tmp_path / "damaged"))
    expected = float((np.exp(base) * (base - other)).sum())
    assert probes["mult-gauss-0.5", 1]["kl"] == pytest.approx(expected, rel=1e-4)
    # A notebook of the degradation study finds its fields.
    spoken = [it for it in rows if it["record"] == "open"]
    names = ("timestamp", "model_name", "degradation_method", "level_value", "std_dev", "param_group_name",
             "repeat_index", "prompt_group", "prompt_id", "prompt_text", "output", "duration", "tokens", "temperature",
             "do_sample", "seed", "batch_size", "perplexity", "max_new_tokens")  # fmt: skip
    assert all(name in row for row in spoken for name in names)
    last = spoken[-1]
    assert (last["degradation_method"], last["level_value"], last["param_group_name"]) == (
        "mult_gauss",
        0.5,
        "mlp_only",
    )
    assert (last["prompt_id"], last["seed"], last["do_sample"]) == ("coins-2", 43, True)
    texts = {(it["variant"], it["repeat_index"]): it["perplexity"] for it in rows if it["record"] == "text"}
    assert all(it["perplexity"] == texts[it["variant"], it["repeat_index"]] for it in spoken)
    assert texts["mult-gauss-0.5", 0] > texts["baseline", 0]


class Killed(BaseException):
    """As a process dies: nobody catches it."""


@pytest.mark.slow
def test_interrupted_anywhere_and_resumed_the_records_are_those_of_an_undisturbed_sweep(
    tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ts.exams.sweep(str(study))
    whole = lasting(tmp_path / "results")
    kept = Ledger.keep
    for last in (0, 3, 6, 7, 13):
        place = tmp_path / f"stopped-{last}"

        def keep(self: Ledger, record: Any, last: int = last) -> None:
            if len(self.held) == last:
                self._file.write(json.dumps(record).encode()[: 7 * last])  # what was under way is cut off somewhere
                self._file.flush()
                raise Killed
            kept(self, record)

        monkeypatch.setattr(Ledger, "keep", keep)
        with pytest.raises(Killed):
            ts.exams.sweep(str(study), results=str(place))
        monkeypatch.undo()
        asked = count_calls(monkeypatch)
        ts.exams.sweep(str(study), results=str(place))
        assert lasting(place) == whole
        assert len(asked) == sum(it["record"] in ("question", "open") for it in whole[last:])
        monkeypatch.undo()


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note every continuation that is asked for."""
    asked: list[Any] = []
    generate = TransformersEngine.generate

    def noted(self: TransformersEngine, prompts: Sequence[Prompt], *more: Any) -> list[Generation]:
        asked.extend(prompts)
        return generate(self, prompts, *more)

    monkeypatch.setattr(TransformersEngine, "generate", noted)
    return asked


@pytest.mark.slow
def test_a_killed_process_leaves_records_that_another_goes_on_with(tmp_path: Path, study: Path) -> None:
    command = [sys.executable, "-m", "tensorsurgeon", "sweep", str(study), "-q"]
    process = subprocess.Popen(command, start_new_session=True)
    file = tmp_path / "results" / "records.jsonl"
    until = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") > EACH):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(file.read_bytes().splitlines()) < 3 * EACH
    assert subprocess.run(command, check=False).returncode == 0
    resumed = lasting(tmp_path / "results")
    assert len(resumed) == 3 * EACH
    ts.exams.sweep(str(study), results=str(tmp_path / "undisturbed"))
    assert resumed == lasting(tmp_path / "undisturbed")


def test_what_is_done_is_not_done_again(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ts.exams.sweep(str(study))
    before = (tmp_path / "results" / "records.jsonl").read_bytes()
    monkeypatch.setattr(TransformersEngine, "load", lambda *_: pytest.fail("a model was loaded"))
    ts.exams.sweep(str(study))
    assert (tmp_path / "results" / "records.jsonl").read_bytes() == before
    monkeypatch.undo()
    ts.exams.sweep(str(study), force=True)
    assert (tmp_path / "results" / "records.jsonl").read_bytes() != before
    assert len(records(tmp_path / "results")) == 3 * EACH


def test_a_changed_study_is_refused_with_the_differences(
    tmp_path: Path, suite: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ts.exams.sweep(str(study))
    before = (tmp_path / "results" / "records.jsonl").read_bytes()
    assert main(["sweep", str(study), "--set", "variants.1.level=[0.0, 0.7]", "--set", "seed=7"]) == 1
    said = capsys.readouterr().err
    assert "seed: 42 then, 7 now" in said
    assert 'variants.2.name: "mult-gauss-0.5" then, "mult-gauss-0.7" now' in said
    assert "--force" in said
    assert main(["sweep", str(study), "--set", "engine=stream"]) == 1
    assert 'engine: "transformers" then, "stream" now' in capsys.readouterr().err
    suite.write_text(yaml.safe_dump({**SUITE, "texts": [{"id": "sentences", "texts": SENTENCES[:1]}]}))
    with pytest.raises(DestinationError, match="asked.texts"):
        ts.exams.sweep(str(study))
    assert (tmp_path / "results" / "records.jsonl").read_bytes() == before


def test_what_a_study_only_says_may_change(tmp_path: Path, suite: Path, study: Path) -> None:
    ts.exams.sweep(str(study))
    before = (tmp_path / "results" / "records.jsonl").read_bytes()
    found = ts.exams.sweep(str(write(tmp_path, suite, about="Said otherwise.", damage="kl")))
    assert "Said otherwise." in found.summary[0]
    assert "Damage is the mean divergence" in found.summary[0]
    assert (tmp_path / "results" / "records.jsonl").read_bytes() == before


def test_a_changed_model_is_refused(tmp_path: Path, suite: Path) -> None:
    source = tmp_path / "source"
    ts.write(ts.open(MANNEQUIN / "bf16"), source)
    path = write(tmp_path, suite, source=str(source), variants=[{"variant": "baseline", "steps": []}])
    ts.exams.sweep(str(path))
    ts.write(ts.ops.perturb(ts.open(MANNEQUIN / "bf16"), method="zero", group="mlp"), source, overwrite=True)
    (tmp_path / "results" / "records.jsonl").write_bytes(
        b"".join((tmp_path / "results" / "records.jsonl").read_bytes().splitlines(keepends=True)[:2])
    )
    with pytest.raises(DestinationError, match="is not the model that the records"):
        ts.exams.sweep(str(path))


def test_two_sweeps_do_not_write_the_same_records(tmp_path: Path) -> None:
    first = Ledger(tmp_path, {"name": "a"})
    with pytest.raises(DestinationError, match="another sweep"):
        Ledger(tmp_path, {"name": "a"})
    first.close()
    Ledger(tmp_path, {"name": "a"}).close()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("study.json", "{", "is not a study"),
        ("study.json", "[]", "is not a study"),
        ("records.jsonl", "nothing\n", "records.jsonl:1: is not a record"),
        ("records.jsonl", '{"variant": "a"}\n', "records.jsonl:1: is not a record"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    Ledger(tmp_path, {"name": "a"}).close()
    (tmp_path / file).write_text(text)
    with pytest.raises(DestinationError, match=re.escape(message)):
        Ledger(tmp_path, {"name": "a"})


def test_records_without_their_study_are_refused(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DestinationError, match=r"study\.json: is not there"):
        Ledger(tmp_path, {"name": "a"})


def test_a_dry_run_makes_nothing(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersEngine, "__init__", lambda *_: pytest.fail("an engine was made"))
    found = ts.exams.sweep(str(study), dry_run=True)
    assert not (tmp_path / "results").exists()
    ts.write(ts.ops.perturb(ts.open(MANNEQUIN / "bf16"), method="mult-gauss", level=0.5, group="mlp"), tmp_path / "it")
    (row,) = (it for it in found.tables["variants"] if it["variant"] == "mult-gauss-0.5")
    # All but the receipt, which is written beside what is planned.
    size = sum(it.stat().st_size for it in (tmp_path / "it").iterdir() if it.name != "tensorsurgeon.json")
    assert (row["layers"], row["records"], row["bytes"]) == (6, EACH, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": [{"layers": {"window": 7}}]}, "a window of 7 layers does not fit into 6"),
        ({"variants": [{"layers": {"window": 0}}]}, "window is 0; a whole number from 1"),
        ({"variants": [{"level": [1, 1], "method": "zero"}]}, "2 variants are called so"),
        ({"baseline": "base"}, "there is no variant 'base'. Did you mean 'baseline'?"),
        ({"bass": 1}, "there is no key 'bass' in a study. Did you mean 'base'?"),
        ({"repeats": 0}, "repeats: Input should be greater than or equal to 1"),
        ({"engine": "llama.cpp"}, "engine: Input should be 'vllm', 'transformers' or 'stream'"),
        ({"variants": [{"a": 1}]}, "there is no value 'method' among the variants"),
        ({"steps": [{"pertub": {}}]}, "Did you mean 'perturb'?"),
        ({"steps": [{"drop-layers": {"layers": "{60-40%}"}}]}, "shares of the depth lie between 0 and 100 %"),
        ({"steps": [{"drop-layers": {"layers": 9}}], "variants": [{"n": 1}], "variant": "it"}, "9"),
        ({"suite": "quik"}, "Did you mean 'quick'?"),
        ({"variant": "{level} {seed}", "repeats": 3}, "'0.0 43': a variant has one name in all repetitions"),
        ({"suite": "bilingual", "damage": "kl"}, "kl is told by probes and a baseline, and there are none"),
        ({"variants": [{"level": 0.5, "method": "mult-gauss"}], "damage": "kl"}, "kl is told by probes and a baseline"),
        ({"base": str(MANNEQUIN / "bf16")}, "is no adapter"),
        (
            {"steps": [{"extract-lora": {"base": str(MANNEQUIN / "bf16"), "rank": 2}}], "variants": [{"n": 1}],
             "variant": "it", "source": str(MANNEQUIN / "tuned")},
            "is an adapter; name the model that it is put on as 'base'",
        ),
    ],
)  # fmt: skip
def test_wrong_studies_are_refused_before_anything_is_made(
    tmp_path: Path, suite: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersEngine, "__init__", lambda *_: pytest.fail("an engine was made"))
    with pytest.raises(UsageError) as caught:
        ts.exams.sweep(str(write(tmp_path, suite, **changes)))
    assert message in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_a_source_that_would_be_served_wrongly_is_refused(tmp_path: Path, suite: Path) -> None:
    source = tmp_path / "source"
    ts.write(ts.open(MANNEQUIN / "bf16"), source)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="source: "):
        ts.exams.sweep(str(write(tmp_path, suite, source=str(source))))


def test_layers_are_found_by_their_depth_in_any_model(tmp_path: Path, suite: Path) -> None:
    path = write(
        tmp_path, suite, variants=[{"at": 1}], steps=[{"drop-layers": {"layers": "{0-12.5%},{50%},{75-100%}"}}],
        variant="it",
    )  # fmt: skip
    (trial,) = load_study(path).trials
    assert trial.steps[0].parameters["layers"] == "0,3,5"


class Forgetful(TransformersEngine):
    """Has too little memory for more than two prompts at once, and says that it can be given other weights."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.settings = settings

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, ends: Sequence[int]) -> list[Generation]:
        if len(prompts) > 1:
            raise OutOfMemoryError("out of memory")
        return super().generate(prompts, sampling, ends)


def test_where_memory_runs_out_the_batch_is_halved(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "make_engine", lambda kind, settings: Forgetful(settings))
    found = ts.exams.sweep(str(write(tmp_path, suite, batch=4)))
    rows = records(tmp_path / "results")
    assert len(rows) == 3 * EACH
    spoken = [it["batch_size"] for it in rows if it["record"] == "open"]
    assert set(spoken) == {1}
    assert [it["note"].partition(":")[0] for it in found.tables["notes"]] == ["baseline", "baseline"]
    monkeypatch.setattr(Forgetful, "generate", lambda *_: (_ for _ in ()).throw(OutOfMemoryError("out of memory")))
    with pytest.raises(OutOfMemoryError):
        ts.exams.sweep(str(write(tmp_path, suite, batch=4)), force=True)


def test_what_a_variant_calls_its_level_need_be_no_number(tmp_path: Path, suite: Path) -> None:
    noise = {"perturb": {"method": "mult-gauss", "level": "1e-1", "group": ["attention-v", "mlp"]}}
    variants = [
        {"variant": "layers", "level": "0-1", "steps": [{"drop-layers": {"layers": "{level}"}}]},
        {"variant": "truth", "level": True, "steps": []},
        {"variant": "noise", "steps": [noise], "n": 1},  # YAML takes 1e-1 for a text
    ]
    ts.exams.sweep(str(write(tmp_path, suite, variants=variants)))  # which ends with a report
    told = {it["variant"]: (it["level_value"], it["param_group_name"]) for it in records(tmp_path / "results")}
    assert told == {"layers": (None, None), "truth": (None, None), "noise": (0.1, "attn_only, mlp_only")}


def test_what_cannot_be_made_is_said_with_its_variant(tmp_path: Path, suite: Path) -> None:
    path = write(tmp_path, suite, variants=[{"level": 3e38, "method": "mult-gauss"}])
    with pytest.raises(RefusedError, match=r"^mult-gauss-3e\+38: .* too large for BF16"):
        ts.exams.sweep(str(path))


def test_a_tokenizer_that_changed_is_refused_too(tmp_path: Path, suite: Path) -> None:
    source = tmp_path / "source"
    ts.write(ts.open(MANNEQUIN / "bf16"), source)
    path = write(tmp_path, suite, source=str(source), variants=[{"variant": "baseline", "steps": []}])
    ts.exams.sweep(str(path))
    with open(source / "chat_template.jinja", "a") as file:
        file.write("{{ '' }}")
    (tmp_path / "results" / "records.jsonl").write_bytes(
        b"".join((tmp_path / "results" / "records.jsonl").read_bytes().splitlines(keepends=True)[:2])
    )
    with pytest.raises(DestinationError, match="is not the model that the records"):
        ts.exams.sweep(str(path))


class Reloading(TransformersEngine):
    """Takes other weights into the model that is there; `wrong` puts them in half."""

    wrong = False
    loaded: int = 0

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.reloads = True

    def load(self, *given: Any) -> None:
        type(self).loaded += 1
        super().load(*given)

    def reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        held = dict(weights)
        if self.wrong:
            held = dict(list(held.items())[::2])
        self._model.load_state_dict({name: it.float() for name, it in held.items()}, strict=not self.wrong)


@pytest.mark.parametrize("wrong", [False, True])
def test_models_of_one_shape_go_into_the_engine_without_a_checkpoint_where_that_is_proved(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    path = write(tmp_path, suite, variants=[{"level": [0.0, 0.1, 0.2, 0.3], "method": "mult-gauss"}])
    ts.exams.sweep(str(path), results=str(tmp_path / "written"))
    monkeypatch.setattr(sweeping, "make_engine", lambda kind, settings: Reloading(settings))
    monkeypatch.setattr(Reloading, "wrong", wrong)
    monkeypatch.setattr(Reloading, "loaded", 0)
    found = ts.exams.sweep(str(path))
    built = {it["variant"]: it.pop("built") for it in records(tmp_path / "results")}
    last = "written" if wrong else "reloaded"
    assert list(built.values()) == ["written", "written", last, last]
    assert Reloading.loaded == (4 if wrong else 2)
    assert len(found.tables.get("notes", [])) == wrong
    # Either way the answers are those of the models as they are written.
    for one, other in zip(lasting(tmp_path / "results"), lasting(tmp_path / "written"), strict=True):
        assert one | {"built": "", "kl": 0} == other | {"built": "", "kl": 0}


@pytest.mark.parametrize("asked", ["a task", "nothing that moved"])
def test_what_proves_nothing_is_no_proof(tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is asked, or the weights that were put in are those that were there, any answer would agree."""
    monkeypatch.setattr(sweeping, "make_engine", lambda kind, settings: Reloading(settings))
    monkeypatch.setattr(Reloading, "reload", lambda self, weights: list(weights) and None)  # takes none
    levels = [0.1, 0.2, 0.3]
    if asked == "a task":
        monkeypatch.setattr(questionnaire, "check_tasks", lambda tasks: None)
        monkeypatch.setattr(asking, "run_task", lambda *_: [])
        suite = {"tasks": [{"task": "any"}]}
    else:
        suite, levels = {"texts": SUITE["texts"]}, [1e-9, 0.2, 0.3]  # the first is lost where it is rounded
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    variants = [{"variant": "baseline", "steps": []}, {"level": levels, "method": "mult-gauss"}]
    found = ts.exams.sweep(str(write(tmp_path, tmp_path / "suite.yaml", variants=variants)))
    assert [it["built"] for it in records(tmp_path / "results")] == ["source", "written", "written", "written"]
    assert len(found.tables["notes"]) == 1


def test_models_computed_alike_are_made_once(tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of levels leaves nothing to chance: the repetitions are one model."""
    loads = []
    load = TransformersEngine.load
    monkeypatch.setattr(TransformersEngine, "load", lambda self, *given: (loads.append(given), load(self, *given)))
    path = write(tmp_path, suite, repeats=3, variants=[{"method": "uniform-quant", "level": 16}])
    ts.exams.sweep(str(path))
    assert len(loads) == 1
    assert len(records(tmp_path / "results")) == 3 * EACH


def test_adapters_of_several_models_are_several(tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is extracted is computed at once, once for all repetitions, and lies where no other's lies."""
    tuned, bf16, calls = str(MANNEQUIN / "tuned"), str(MANNEQUIN / "bf16"), []
    changed = ts.ops.perturb(ts.open(tuned), method="mult-gauss", level=0.5, group="mlp")
    ts.write(changed, tmp_path / "other" / "tuned")
    subject = sweeping.Sweep.subject
    monkeypatch.setattr(sweeping.Sweep, "subject", lambda *given: (calls.append(given), subject(*given))[1])
    lora = {"base": bf16, "steps": [{"extract-lora": {"base": bf16, "rank": 8}}], "n": 1}
    variants = [{"variant": "one", "source": tuned, **lora},
                {"variant": "other", "source": str(tmp_path / "other" / "tuned"), **lora}]  # fmt: skip
    path = str(write(tmp_path, suite, variants=variants, repeats=2, steps=[]))
    ts.exams.sweep(path)
    rows = records(tmp_path / "results")
    texts = {(it["variant"], it["repeat_index"]): it["perplexity"] for it in rows if it["record"] == "text"}
    assert texts["one", 0] == texts["one", 1] != texts["other", 0] == texts["other", 1]
    planned, made = 4, 2
    assert len(calls) == planned + made
    # A record says of all models that it comes of which they were.
    digests = [[it["digest"] for it in row["read"]] for row in rows if row["record"] == "text"]
    names = [[it["name"] for it in row["read"]] for row in rows if row["record"] == "text"]
    assert names == [["tuned", "bf16"]] * 4
    assert digests[0] == digests[1] != digests[2] == digests[3]
    assert digests[0][1] == digests[2][1] == checkpoint_digest(ts.open(bf16).sources[0])


def test_no_model_is_given_more_tokens_than_it_has_positions(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short"
    ts.write(ts.open(MANNEQUIN / "bf16"), short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    suite.write_text(yaml.safe_dump({"texts": [{"id": "long", "texts": [" ".join(SENTENCES * 4)]}]}))
    lengths: dict[str, int] = {}
    load = TransformersEngine.load

    def noted(self: TransformersEngine, directory: Path, length: int, *more: Any) -> None:
        lengths[directory.name] = length
        load(self, directory, length, *more)

    monkeypatch.setattr(TransformersEngine, "load", noted)
    variants = [{"variant": "long", "steps": []}, {"variant": "short", "source": str(short), "steps": []}]
    ts.exams.sweep(str(write(tmp_path, suite, variants=variants)))
    assert lengths["short"] == 40 < lengths["bf16"]


def test_adapters_are_put_on_their_base(tmp_path: Path, suite: Path) -> None:
    tuned, bf16 = str(MANNEQUIN / "tuned"), str(MANNEQUIN / "bf16")
    ts.write(ts.ops.extract_lora(ts.open(tuned), ts.open(bf16), rank=128), tmp_path / "lora")
    steps = [{"extract-lora": {"base": bf16, "rank": 128}}]
    merging = [{"cast": {"dtype": "float32"}}, {"merge-lora": {"adapter": str(tmp_path / "lora")}}]
    variants = [{"variant": "merged", "steps": merging},
                {"variant": "adapter", "source": tuned, "steps": steps, "base": bf16}]  # fmt: skip
    ts.exams.sweep(str(write(tmp_path, suite, variants=variants)))
    texts = {it["variant"]: it for it in records(tmp_path / "results") if it["record"] == "text"}
    assert texts["adapter"]["built"] == "written"
    assert texts["adapter"]["perplexity"] == pytest.approx(texts["merged"]["perplexity"], rel=1e-6)


def test_disk_is_taken_only_within_the_budget(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TransformersEngine.__init__
    monkeypatch.setattr(TransformersEngine, "__init__", lambda *_: pytest.fail("an engine was made"))
    with pytest.raises(DestinationError, match="--budget allows"):
        ts.exams.sweep(str(study), budget="1MB", scratch=str(tmp_path / "scratch"))
    few = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: few)
    with pytest.raises(DestinationError, match=r"free in .*mult-gauss-0\.0 takes .*--scratch"):
        ts.exams.sweep(str(study), scratch=str(tmp_path / "scratch"))
    monkeypatch.undo()
    assert TransformersEngine.__init__ is made
    ts.exams.sweep(str(study), budget="20MB", scratch=str(tmp_path / "scratch"))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_model_is_told_from_others_by_how_it_is_computed(tmp_path: Path) -> None:
    base = ts.open(MANNEQUIN / "bf16")
    noisy = [ts.ops.perturb(base, method="mult-gauss", level=0.1, group="mlp", seed=seed) for seed in (1, 1, 2)]
    one, same, other = map(Subject, noisy)
    assert one.identity == same.identity != other.identity
    assert one.shape == other.shape == Subject(base).shape != ""
    assert Subject(ts.ops.drop_layers(base, "3")).shape != one.shape
    assert Subject(ts.open(MANNEQUIN / "fp8")).shape == ""
