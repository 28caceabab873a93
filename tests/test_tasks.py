"""Tasks of lm-evaluation-harness on the engines of this package, against the harness's own engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tensorsurgeon as ts
from tensorsurgeon.errors import DestinationError, UsageError
from tensorsurgeon.evaluate import benchmarks
from tensorsurgeon.evaluate.engine import Settings
from tensorsurgeon.evaluate.engines.stream import StreamEngine
from tensorsurgeon.evaluate.engines.transformers import TransformersEngine
from tensorsurgeon.evaluate.suite_parts import Task
from tensorsurgeon.evaluate.tokens import Tokens

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

MANNEQUIN = Path(__file__).parent / "mannequin"
ROOM = 256

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of what the harness uses
    pytest.mark.usefixtures("offline"),
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    made = TransformersEngine(Settings())
    made.load(MANNEQUIN / "bf16", ROOM)
    return made


@pytest.fixture(scope="module")
def own() -> Any:
    """The harness's own engine on the same model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(MANNEQUIN / "bf16"), dtype="float32", device="cpu", batch_size=1, max_length=ROOM)


def requests(kind: str, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, it, place) for place, it in enumerate(arguments)]


def test_likelihoods_are_those_of_the_harness(engine: TransformersEngine, own: Any) -> None:
    mine = benchmarks._model(engine, Tokens(MANNEQUIN / "bf16"), ROOM)
    pairs = [
        ("Amina had 54 coins and found", " 65 more"),
        ("Amina had 54 coins and found ", "65 more"),
        ("What is 14 plus 50?", " 64"),
        ("", "Carlos had 9 coins"),
        ("Amina had 54 coins and found 65 more, so now she has ", "119"),
    ]
    for one, other in zip(
        mine.loglikelihood(requests("loglikelihood", *pairs)),
        own.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True),
        strict=True,
    ):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    texts = [("Amina had 54 coins and found 65 more.",), ("Carlos had 9 coins. " * 60,)]
    # Windows of another length would begin elsewhere: the harness takes ROOM tokens, and ours leave one for the engine.
    for text, expected in zip(
        texts[:1], own.loglikelihood_rolling(requests("r", *texts[:1]), disable_tqdm=True), strict=True
    ):
        (found,) = mine.loglikelihood_rolling(requests("r", text))
        assert found == pytest.approx(expected, abs=1e-4)
    (long,) = mine.loglikelihood_rolling(requests("r", texts[1]))
    own._max_length = ROOM - 2
    (expected,) = own.loglikelihood_rolling(requests("r", texts[1]), disable_tqdm=True)
    own._max_length = ROOM
    assert long == pytest.approx(expected, rel=1e-5)


def test_a_chat_begins_once_as_in_the_harness(tmp_path: Path) -> None:
    """A tokenizer that begins every text with a token meets a template that writes it too, as those of Llama do."""
    from lm_eval.models.huggingface import HFLM

    place = tmp_path / "model"
    shutil.copytree(MANNEQUIN / "bf16", place)
    first = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    single, pair = [first, {"Sequence": {"id": "A", "type_id": 0}}], {"Sequence": {"id": "B", "type_id": 1}}
    tokenizer = json.loads((place / "tokenizer.json").read_text())
    (number,) = (it["id"] for it in tokenizer["added_tokens"] if it["content"] == "<|im_end|>")
    tokenizer["post_processor"] |= {
        "single": single, "pair": [*single, pair],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [number], "tokens": ["<|im_end|>"]}},
    }  # fmt: skip
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|im_end|>"}))
    template = (place / "chat_template.jinja").read_text()
    (place / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    own = HFLM(str(place), dtype="float32", device="cpu", batch_size=1, max_length=ROOM)
    mine = benchmarks._model(TransformersEngine(Settings()), Tokens(place), ROOM)
    chat = mine.apply_chat_template([{"role": "user", "content": "What is 14 plus 50?"}])
    for text in (chat, "Amina had"):
        assert mine.tok_encode(text) == own.tok_encode(text) == own.tok_batch_encode([text])[0][0].tolist()
        assert mine._encode_pair(text, " 64") == own._encode_pair(text, " 64")


def test_answers_are_those_of_the_harness(engine: TransformersEngine, own: Any) -> None:
    mine = benchmarks._model(engine, Tokens(MANNEQUIN / "bf16"), ROOM)
    asked = [
        ("Amina had 54 coins", {"until": ["."], "max_gen_toks": 24, "do_sample": False}),
        ("Carlos had", {"until": [" coins"], "max_gen_toks": 24}),
        ("Carlos had", {"until": [], "max_gen_toks": 5}),
    ]
    given = requests("generate_until", *asked)
    assert mine.generate_until(given) == own.generate_until(given, disable_tqdm=True)


def test_tasks_that_come_along_give_what_the_harness_finds_with_its_own_engine(
    engine: TransformersEngine, own: Any
) -> None:
    from lm_eval.tasks import TaskManager

    names = benchmarks.packaged_tasks()
    assert names == ["plain-facts", "small-sums"]
    tokens = Tokens(MANNEQUIN / "bf16")
    rows = [row for it in names for row in benchmarks.run_task(engine, tokens, Task(task=it, limit=16), ROOM)]
    tasks: list[Any] = [benchmarks._task(name) for name in names]
    expected = lm_eval.simple_evaluate(
        own, tasks=tasks, limit=16, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
    )["results"]
    found = {(row["task"], f"{row['metric']},{row['filter']}"): row["value"] for row in rows}
    assert len(found) == 3
    for (task, metric), value in found.items():
        assert value == expected[task][metric]
    assert {row["documents"] for row in rows} == {16}


def test_a_streamed_model_reads_its_layers_once_for_all_answers_to_choose_from(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, passes = StreamEngine(Settings()), []
    streamed.load(MANNEQUIN / "bf16", ROOM)
    compute = streamed._compute
    monkeypatch.setattr(streamed, "_compute", lambda it: passes.append(len(it.scores)) or compute(it))
    task, tokens = Task(task="plain-facts", limit=4), Tokens(MANNEQUIN / "bf16")
    assert benchmarks.run_task(streamed, tokens, task, ROOM) == benchmarks.run_task(engine, tokens, task, ROOM)
    assert [it for it in passes if it] == [sum(passes)]


def test_the_exam_gives_a_row_for_each_metric_of_each_model(tmp_path: Path) -> None:
    findings = ts.exams.evaluate(
        str(MANNEQUIN / "tuned"), against=str(MANNEQUIN / "bf16"), tasks="small-sums", limit=4, engine="transformers",
        records=str(tmp_path / "records.jsonl"),
    )  # fmt: skip
    assert [(row["model"], row["metric"]) for row in findings.tables["tasks"]] == [
        ("bf16", "exact_match"), ("tuned", "exact_match"),
    ]  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(it["record"], it["prompt_id"], it["engine"]["engine"]) for it in records] == [
        ("task", "small-sums", "transformers")
    ] * 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("task: mine\ndoc_to_text: !function evil.run", "no task of plain YAML"),
        ("- a", "is no task"),
        ("task: mine\ndataset_kwargs: {data_files: {test: none.jsonl}}", "there is no data file"),
    ],
)
def test_a_task_of_the_user_holds_no_code_and_has_its_data(
    tmp_path: Path, engine: TransformersEngine, text: str, problem: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=problem):
        benchmarks.check_tasks([Task(task=str(tmp_path / "mine.yaml"))])


def test_unknown_tasks_are_refused_together_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        ts.exams.evaluate(str(MANNEQUIN / "bf16"), tasks="no-such-task,small-sums,nor-this", engine="transformers")
    first, second = caught.value.problems
    assert (
        first == "tasks: there is none of the name 'no-such-task'; of this package there are plain-facts, small-sums."
    )
    assert "'nor-this'" in second
    with pytest.raises(UsageError, match="limit: counts documents of tasks"):
        ts.exams.evaluate(str(MANNEQUIN / "bf16"), limit=4)


def test_a_sweep_asks_tasks_of_every_variant_and_reports_their_scores(tmp_path: Path) -> None:
    task = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: mine.jsonl}}\ntest_split: test\n"
    task += (
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_target: 0\ndoc_to_choice: [' more', ' xyz']\n"
    )
    (tmp_path / "mine.yaml").write_text(task)
    lines = [json.dumps({"text": f"Amina had {number} coins and found {number}"}) for number in range(10, 14)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    (tmp_path / "suite.yaml").write_text("name: mine\ntasks: [{task: small-sums, limit: 4}, {task: mine.yaml}]\n")
    study = {
        "source": str(MANNEQUIN / "bf16"), "suite": str(tmp_path / "suite.yaml"), "engine": "transformers",
        "variants": [
            {"variant": "baseline", "steps": []},
            {"variant": "headless", "steps": [{"drop-layers": {"layers": "0"}}]},
        ],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    swept = ts.exams.sweep(str(tmp_path / "study.yaml"), results=str(tmp_path / "results"))
    rows = {row["variant"]: row for row in swept.tables["variants, the least damaged first"]}
    alone = ts.exams.evaluate(str(MANNEQUIN / "bf16"), suite=str(tmp_path / "suite.yaml"), engine="transformers")
    scores = {(row["task"], row["metric"]): row["value"] for row in alone.tables["tasks"]}
    assert rows["baseline"]["small-sums: exact_match"] == scores["small-sums", "exact_match"] > 0
    assert rows["baseline"]["mine: acc"] == scores["mine", "acc"] == 1
    assert rows["headless"]["small-sums: exact_match"] == 0

    records = tmp_path / "results" / "records.jsonl"
    before = records.read_text().splitlines(keepends=True)
    assert len(before) == 4
    records.write_text("".join(before[:3]))
    ts.exams.sweep(str(tmp_path / "study.yaml"), results=str(tmp_path / "results"))
    after = [json.loads(line) for line in records.read_text().splitlines()]
    assert after[:3] == [json.loads(line) for line in before[:3]]
    assert after[3]["scores"] == json.loads(before[3])["scores"]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(DestinationError, match=r"asked\.tasks\.1\.task"):
        ts.exams.sweep(str(tmp_path / "study.yaml"), results=str(tmp_path / "results"))
