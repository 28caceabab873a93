"""What `evaluate` asks and tells, with transformers: against transformers itself, and by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from perplexity import answer, load, perplexity, prompt_tokens
from safetensors.torch import load_file, save_file

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import CheckpointError, DestinationError, EngineError, RefusedError, UsageError
from tensorsurgeon.evaluate.bilingual import summary
from tensorsurgeon.evaluate.digest import checkpoint_digest
from tensorsurgeon.evaluate.engine import Sampling, Settings
from tensorsurgeon.evaluate.engines.transformers import TransformersEngine
from tensorsurgeon.evaluate.questionnaire import Questionnaire
from tensorsurgeon.evaluate.suite import Suite, load_suite, packaged
from tensorsurgeon.evaluate.tokens import Tokens
from tensorsurgeon.registry import Findings

HERE = Path(__file__).parent
MANNEQUIN = HERE / "mannequin"
SUITE = str(HERE / "suite_of_mannequin.yaml")
HELDOUT = json.loads((MANNEQUIN / "heldout.json").read_text())


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    made = TransformersEngine(Settings())
    made.load(MANNEQUIN / "bf16", 512)
    yield made
    made.close()


@pytest.fixture(scope="module")
def oracle() -> tuple[Any, Any]:
    return load(MANNEQUIN / "bf16")


def sentences(place: Path, count: int = 40) -> str:
    """Write a suite of the held-out sentences and return its path."""
    held = [row["text"] + "<|endoftext|>" for row in HELDOUT["sentences"][:count]]
    (place / "sentences.yaml").write_text(json.dumps({"texts": [{"id": "held-out", "texts": held}]}))
    return str(place / "sentences.yaml")


def evaluate(model: Path, **options: Any) -> Findings:
    return ts.exams.evaluate(str(model), engine="transformers", **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_logits_scores_and_answers_are_the_models_own(engine: TransformersEngine, oracle: tuple[Any, Any]) -> None:
    model, tokenizer = oracle
    prompts = [prompt_tokens(tokenizer, row["prompt"]) for row in HELDOUT["arithmetic"][::40]]
    answers = engine.generate(prompts, Sampling(6), tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    for row, prompt, logits, scores, made in zip(
        HELDOUT["arithmetic"][::40], prompts, engine.next_logits(prompts), engine.score(prompts), answers, strict=True
    ):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].numpy()
        np.testing.assert_allclose(logits, expected[-1], atol=1e-5)
        logprobs = scipy.special.log_softmax(expected[:-1].astype(np.float64), axis=1)
        np.testing.assert_allclose(scores.logprobs, logprobs[range(len(prompt) - 1), prompt[1:]], atol=1e-5)
        assert scores.greedy.tolist() == (expected[:-1].argmax(1) == prompt[1:]).tolist()
        assert tokenizer.decode(made.tokens).strip() == answer(model, tokenizer, row["prompt"])
        assert made.ended


def test_sampling_repeats_with_its_seed_and_not_with_another(engine: TransformersEngine) -> None:
    prompt = engine_prompt = Tokens(MANNEQUIN / "bf16").encode("Amina had")
    one, again, other = (engine.generate([prompt], Sampling(12, 1.5, seed), ())[0].tokens for seed in (1, 1, 2))
    assert one == again != other
    assert len(one) == 12
    greedy = engine.generate([engine_prompt], Sampling(12), ())[0].tokens
    assert greedy != one


def test_perplexity_is_the_models_own(tmp_path: Path, oracle: tuple[Any, Any]) -> None:
    findings = evaluate(MANNEQUIN / "bf16", suite=sentences(tmp_path))
    (row,) = findings.tables["perplexity"]
    texts = [held["text"] + "<|endoftext|>" for held in HELDOUT["sentences"]]
    assert row["perplexity"] == pytest.approx(perplexity(*oracle, texts), rel=1e-6)
    assert row["tokens"] == sum(len(oracle[1](text)["input_ids"]) - 1 for text in texts)


def test_a_long_text_is_cut_into_windows_and_every_token_but_their_first_counts(oracle: tuple[Any, Any]) -> None:
    tokens = Tokens(MANNEQUIN / "bf16")
    text = (HERE.parent / "tensorsurgeon/evaluate/suites/neutral.txt").read_text()
    suite = Suite.model_validate({"texts": [{"id": "a", "texts": [text], "window": 100}]})
    (held,) = Questionnaire(suite, tokens, 512).windows["a"]
    assert [token for prompt in held.prompts for token in prompt] == tokens.encode(text)
    assert [len(prompt) for prompt in held.prompts[:-1]] == [100] * (len(held.prompts) - 1)
    assert held.bytes == len(text.encode())


def test_a_record_stands_by_itself_and_holds_what_was_measured(tmp_path: Path, engine: TransformersEngine) -> None:
    findings = evaluate(MANNEQUIN / "bf16", suite=SUITE, records=str(tmp_path / "records.jsonl"))
    records = lines(tmp_path / "records.jsonl")
    assert findings.problems == ()
    kinds = [it["record"] for it in records]
    assert {kind: kinds.count(kind) for kind in kinds} == {"probe": 4, "text": 2, "question": 2, "open": 1}
    digest = checkpoint_digest(ts.open(MANNEQUIN / "bf16").sources[0])
    for it in records:
        assert (it["model_name"], it["suite"], it["digest"]) == ("bf16", "suite_of_mannequin", digest)
        assert {"engine", "version", "dtype", "threads", "batch", "eager", "prefix_caching", "seed"} <= set(
            it["engine"]
        )
        assert it["engine"]["dtype"] == "float32"
    tokens = Tokens(MANNEQUIN / "bf16")
    asked = Questionnaire(load_suite(SUITE), tokens, 512)
    for it in records[:4]:
        (logits,) = engine.next_logits([asked.prompts[it["prompt_id"]].tokens])
        p = scipy.special.softmax(logits.astype(np.float64))
        assert it["vocabulary"] == len(p) == 1024
        assert [row["token"] for row in it["top"]] == np.argsort(-p, kind="stable")[:20].tolist()
        for row in it["top"]:
            assert row["probability"] == pytest.approx(p[row["token"]], rel=1e-6)
        singles = {row["tokens"][0]: row for row in it["labels"] if row["kind"] == "token"}
        assert {row["spelling"] for row in singles.values()} >= {"Yes", "No"}
        for token, row in singles.items():
            assert row["logit"] == pytest.approx(float(logits[token]), abs=1e-5)
            assert row["probability"] == pytest.approx(p[token], rel=1e-5)
        ratio = it["mass"]["affirm"] / (it["mass"]["affirm"] + it["mass"]["deny"])
        assert it["contrast_ratio"] == pytest.approx(ratio)
        assert it["contrast_mass"] == pytest.approx(it["mass"]["affirm"] + it["mass"]["deny"])
    written = next(it for it in records if it["prompt_id"] == "go-on")
    wanted = {
        "prompt_group",
        "prompt_text",
        "output",
        "duration",
        "tokens",
        "temperature",
        "do_sample",
        "seed",
        "timestamp",
    }
    assert wanted <= set(written)
    assert written["tokens"] == len(written["output_tokens"]) <= 24
    assert written["ended"] == (written["tokens"] < 24)
    assert [it["right"] for it in records if it["record"] == "question"] == [True, True]


def test_a_continuation_is_the_product_of_its_tokens(tmp_path: Path, oracle: tuple[Any, Any]) -> None:
    evaluate(MANNEQUIN / "bf16", suite=SUITE, records=str(tmp_path / "records.jsonl"))
    record = lines(tmp_path / "records.jsonl")[0]
    several = [row for row in record["labels"] if row["kind"] == "continuation"]
    assert len(several) >= 4
    model, tokenizer = oracle
    prompt = prompt_tokens(tokenizer, "Is 38 greater than 18?")
    for row in several:
        assert row["logit"] is None
        product, ids = 0.0, list(prompt)
        for token in row["tokens"]:
            with torch.no_grad():
                product += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
            ids.append(token)
        assert row["logprob"] == pytest.approx(product, abs=1e-4)
        assert tokenizer.decode(row["tokens"]) == row["spelling"]


def test_spellings_that_cannot_matter_are_not_scored_and_change_no_mass(tmp_path: Path) -> None:
    text = Path(SUITE).read_text().replace("../tensorsurgeon", str(HERE.parent / "tensorsurgeon"))
    found = []
    for least in (0, 1e-6, 1):
        (tmp_path / "suite.yaml").write_text(f"least: {least:.7f}\n{text}")
        path = tmp_path / f"{least}.jsonl"
        evaluate(MANNEQUIN / "bf16", suite=str(tmp_path / "suite.yaml"), records=str(path))
        found.append([it for it in lines(path) if it["record"] == "probe"])
    whole, some, _ = found
    kinds = [[row["kind"] for it in records for row in it["labels"]] for records in found]
    assert "not scored" not in kinds[0]
    assert 0 < kinds[1].count("not scored") < kinds[2].count("not scored")
    assert "continuation" not in kinds[2]
    for one, other in zip(whole, some, strict=True):
        assert other["mass"] == pytest.approx(one["mass"], abs=1e-6 * len(one["labels"]))
        for row, same in zip(one["labels"], other["labels"], strict=True):
            assert row["probability"] <= row["first_probability"] * (1 + 1e-4)
            assert same["probability"] is None if same["kind"] == "not scored" else same["probability"] is not None
            assert (same["kind"] == "not scored") == (row["kind"] != "token" and row["first_probability"] < 1e-6)


def test_a_model_against_another_tells_what_differs(tmp_path: Path, engine: TransformersEngine) -> None:
    evaluate(MANNEQUIN / "tuned", against=str(MANNEQUIN / "bf16"), suite=SUITE, records=str(tmp_path / "records.jsonl"))
    records = lines(tmp_path / "records.jsonl")
    assert [it["model_name"] for it in records] == ["bf16"] * 9 + ["tuned"] * 9
    probes = [it for it in records if it["record"] == "probe"]
    assert [it["kl"] for it in probes[:4]] == [None] * 4
    asked = Questionnaire(load_suite(SUITE), Tokens(MANNEQUIN / "bf16"), 512)
    other = TransformersEngine(Settings())
    other.load(MANNEQUIN / "tuned", 512)
    for it in probes[4:]:
        prompt = asked.prompts[it["prompt_id"]].tokens
        p, q = (scipy.special.softmax(next(it.next_logits([prompt])).astype(np.float64)) for it in (engine, other))
        assert it["kl"] == pytest.approx(float(scipy.stats.entropy(p, q)), rel=1e-6)
        assert it["kl"] > 1e-5


def test_a_model_of_another_vocabulary_has_no_divergence(tmp_path: Path) -> None:
    shorter = tmp_path / "shorter"
    make_copy(MANNEQUIN / "tuned", shorter, resize)
    path = tmp_path / "records.jsonl"
    evaluate(shorter, against=str(MANNEQUIN / "bf16"), suite=SUITE, records=str(path))
    probes = [it for it in lines(path) if it["record"] == "probe"]
    assert [it["vocabulary"] for it in probes] == [1024] * 4 + [1000] * 4
    assert all(it["kl"] is None for it in probes)


def test_level_0_changes_no_number_and_damage_is_ordered(tmp_path: Path) -> None:
    """The least important layer of the mannequin is 4, the most important 0, as its own README measured."""
    bf16, suite = ts.open(MANNEQUIN / "bf16"), sentences(tmp_path, 12)
    made = {
        "undamaged": bf16,
        "level 0": ts.ops.perturb(bf16, "mult-gauss", "mlp", level=0, seed=1),
        "4 levels": ts.ops.perturb(bf16, "uniform-quant", "mlp", level=4),
        "without 4": ts.ops.drop_layers(bf16, "4"),
        "without 0": ts.ops.drop_layers(bf16, "0"),
    }
    found = {}
    for name, ckpt in made.items():
        directory = tmp_path / name.replace(" ", "-")
        ts.write(ckpt, directory)
        (row,) = evaluate(directory, suite=suite).tables["perplexity"]
        found[name] = row["perplexity"]
    assert found["level 0"] == found["undamaged"]
    assert found["undamaged"] < found["without 4"] < found["without 0"]
    assert found["4 levels"] > 5 * found["undamaged"]


def test_the_bilingual_test_counts_what_the_records_say(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("extends: bilingual\nbilingual: {each: 1, tokens: 24, form: chat}\n")
    findings = evaluate(MANNEQUIN / "bf16", suite=str(tmp_path / "b.yaml"), records=str(tmp_path / "records.jsonl"))
    records = lines(tmp_path / "records.jsonl")
    assert len(records) == 10
    assert [it["language"] for it in records[:4]] == ["en", "zh", "en", "zh"]
    for it in records:
        assert it["right"] == (it["answer_word"] is not None) == (it["answer_token"] is not None)
        if it["right"]:
            assert it["expected"][0] in it["output"].split()[it["answer_word"]]
    rows = findings.tables["bilingual"]
    assert [(row["language"], row["right"], row["of"]) for row in rows] == [
        (language, sum(it["right"] for it in records if it["language"] == language), 5) for language in ("en", "zh")
    ]


def test_the_bilingual_summary_averages_what_was_found() -> None:
    def row(right: bool, word: int | None, language: str | None) -> dict[str, Any]:
        return {"model_name": "m", "language": "en", "right": right, "answer_word": word, "answer_token": word,
                "answer_language": language, "cjk": 0.0, "latin": 1.0}  # fmt: skip

    (found,) = summary([row(True, 2, "en"), row(True, 5, "zh"), row(False, None, None), row(False, None, "en")])
    assert (found["accuracy"], found["first answer, words"]) == (0.5, 3.5)
    assert (found["in English"], found["in Chinese"], found["in neither"]) == (2, 1, 1)


def make_copy(source: Path, place: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """Write a checkpoint with other tensors or another config, without any of the checks of this package."""
    place.mkdir()
    for file in source.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    tensors = load_file(place / "model.safetensors")
    change(config, tensors)
    (place / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors", {"format": "pt"}
    )
    return place


def resize(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["vocab_size"] = 1000
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:1000]


def without(name: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda config, tensors: [tensors.pop(it) for it in list(tensors) if it.startswith(name)] and None  # type: ignore[func-returns-value]


def narrow(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :500]


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], object], str]] = {
    "a linear is missing": (without("model.layers.2.self_attn.o_proj.weight"), "layers.2.self_attn.o_proj.weight"),
    "the head is missing": (without("lm_head.weight"), "lm_head.weight"),
    "a norm is missing": (without("model.norm.weight"), "model.norm.weight"),
    "a layer is missing": (without("model.layers.5."), "says 6 layers, but there are tensors of 5"),
    "a layer in the middle is missing": (without("model.layers.3."), "layer"),
    "a layer too many": (lambda config, tensors: config.update(num_hidden_layers=5), "says 5 layers"),
    "another shape": (narrow, "model.layers.1.mlp.down_proj.weight"),
    "another vocabulary": (lambda config, tensors: config.update(vocab_size=960), "another shape"),
    "an unknown tensor": (lambda config, tensors: tensors.update(banana=torch.zeros(2)), "banana"),
    "types of other layers": (lambda config, tensors: config.update(layer_types=["full_attention"] * 4), "layer_types"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_an_engine_would_serve_wrongly_is_refused_first(tmp_path: Path, name: str) -> None:
    change, word = BROKEN[name]
    place = make_copy(MANNEQUIN / "bf16", tmp_path / "broken", change)  # type: ignore[arg-type]
    with pytest.raises((RefusedError, CheckpointError), match=word):
        evaluate(place, suite=SUITE)


def stray(place: Path) -> str:
    save_file({"lm_head.weight": torch.zeros(1024, 256)}, place / "model-00002-of-00002.safetensors")
    return "model-00002-of-00002.safetensors"


def truncated(place: Path) -> str:
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "model.safetensors"


def shard_lost(place: Path) -> str:
    in_shards(place)
    (place / "model-00002-of-00003.safetensors").unlink()
    return "model-00002-of-00003.safetensors"


def stale_index(place: Path) -> str:
    index = in_shards(place)
    held = json.loads(index.read_text())
    held["weight_map"] = dict.fromkeys(held["weight_map"], "model-00001-of-00003.safetensors")
    index.write_text(json.dumps(held))
    return "model-00001-of-00003.safetensors"


def in_shards(place: Path) -> Path:
    """Cut a checkpoint into three shards, and return its index."""
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        names = list(tensors)[number::3]
        file = f"model-0000{number + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, place / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("damage", [stray, truncated, shard_lost, stale_index])
def test_files_that_would_be_served_wrongly_are_refused_first(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    place = make_copy(MANNEQUIN / "bf16", tmp_path / "broken", lambda config, tensors: None)
    word = damage(place)
    with pytest.raises((RefusedError, CheckpointError), match=word):
        evaluate(place, suite=SUITE)


def test_shards_that_are_whole_are_taken(tmp_path: Path) -> None:
    place = make_copy(MANNEQUIN / "bf16", tmp_path / "shards", lambda config, tensors: None)
    in_shards(place)
    assert evaluate(place, suite=SUITE).problems == ()


def test_a_missing_scale_and_fp8_without_its_setting_are_refused_first(tmp_path: Path) -> None:
    place = make.fp8(tmp_path / "fp8", layers=2, shards=1)
    path = place / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight_scale_inv")
    save_file(tensors, path)
    with pytest.raises(RefusedError, match="up_proj"):
        evaluate(place, suite=SUITE)
    place = make.fp8(tmp_path / "plain", layers=2)
    config = json.loads((place / "config.json").read_text())
    del config["quantization_config"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="no quantization_config"):
        evaluate(place, suite=SUITE)


def test_numbers_that_are_none_are_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = math.nan

    place = make_copy(MANNEQUIN / "bf16", tmp_path / "nan", spoil)
    status = main(["evaluate", str(place), "--suite", SUITE, "--engine", "transformers", "--json"])
    told = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert status == 3
    assert len(told["problems"]) == 6
    assert "nan: larger: its logits are not numbers; 'autopsy' names the tensor." in told["problems"]
    assert told["perplexity"][0]["perplexity"] is None


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    place = make_copy(MANNEQUIN / "bf16", tmp_path / "copy", lambda config, tensors: None)
    same = make_copy(place, tmp_path / "again", lambda config, tensors: None)
    before = checkpoint_digest(ts.open(place).sources[0])
    assert before == checkpoint_digest(ts.open(same).sources[0])
    (place / "README.md").write_text("Nothing that is asked for.")
    assert checkpoint_digest(ts.open(place).sources[0]) == before
    with open(place / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert checkpoint_digest(ts.open(place).sources[0]) != before
    (same / "chat_template.jinja").write_text("{{ messages }}")
    assert checkpoint_digest(ts.open(same).sources[0]) != before


def test_records_of_which_there_came_none_are_not_in_the_way(tmp_path: Path) -> None:
    suite, kept = tmp_path / "suite.yaml", tmp_path / "records.jsonl"
    for tokens in (600, 2):
        suite.write_text(f"open: [{{id: it, group: g, text: Hello, tokens: {tokens}}}]")
        with pytest.raises(UsageError) if tokens == 600 else nullcontext():
            evaluate(MANNEQUIN / "bf16", suite=str(suite), records=str(kept))
        assert kept.exists() == (tokens == 2)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [("text", " \n", "text: the text has fewer than two tokens"), ("it", "Hello you.", "has one of the id 'it'")],
)
def test_a_text_that_gives_no_figure_of_its_own_is_refused(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / "suite.yaml").write_text("texts: [{id: it, texts: [Hello there.]}]")
    (tmp_path / file).write_text(content)
    with pytest.raises(UsageError, match=message):
        evaluate(MANNEQUIN / "bf16", suite=str(tmp_path / "suite.yaml"), text=str(tmp_path / file))


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("open: [{id: long, group: g, text: Hello, tokens: 600}]")
    with pytest.raises(UsageError, match=r"long: takes 6\d\d tokens with its answer, and the model has 512 positions"):
        evaluate(MANNEQUIN / "bf16", suite=str(tmp_path / "long.yaml"))
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(DestinationError, match="is there already"):
        evaluate(MANNEQUIN / "bf16", suite=SUITE, records=str(tmp_path / "there.jsonl"))
    with pytest.raises(UsageError, match="leave out --against"):
        ts.exams.evaluate(str(MANNEQUIN / "bf16"), against=str(MANNEQUIN / "tuned"), server="http://127.0.0.1:9")
    with pytest.raises(EngineError, match="no answer"):
        ts.exams.evaluate(str(MANNEQUIN / "bf16"), suite=SUITE, server="http://127.0.0.1:9")
    with pytest.raises(UsageError, match="there is no file"):
        evaluate(MANNEQUIN / "bf16", suite=SUITE, text=str(tmp_path / "none.txt"))


def test_a_file_of_the_user_is_measured_too(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Amina had 54 coins and found 65 more, so now she has 119.")
    found = evaluate(MANNEQUIN / "bf16", suite=SUITE, text=str(tmp_path / "mine.txt")).tables["perplexity"]
    assert [row["text"] for row in found] == ["sentences", "neutral", "mine.txt"]


def test_an_adapter_gives_what_the_merged_model_gives(tmp_path: Path) -> None:
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    base, tuned = ts.open(MANNEQUIN / "bf16"), ts.open(MANNEQUIN / "tuned")
    ts.write(ts.ops.extract_lora(tuned, base, rank=16), lora)
    ts.write(ts.ops.merge_lora(ts.ops.cast(base, "float32"), str(lora)), merged)
    found = []
    for directory, adapter in ((MANNEQUIN / "bf16", str(lora)), (merged, None), (MANNEQUIN / "bf16", None)):
        path = tmp_path / f"{len(found)}.jsonl"
        evaluate(directory, adapter=adapter, suite=SUITE, records=str(path))
        found.append([it["entropy_nats"] for it in lines(path) if it["record"] == "probe"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] != pytest.approx(found[2], abs=1e-3)
    with pytest.raises(UsageError, match="give its base as the model"):
        evaluate(lora, suite=SUITE)
    with pytest.raises(UsageError, match="no adapter"):
        evaluate(merged, adapter=str(MANNEQUIN / "tuned"), suite=SUITE)


@pytest.mark.parametrize("name", packaged())
def test_suites_that_come_along_are_sound(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.about
    Questionnaire(suite, Tokens(MANNEQUIN / "bf16"), 40960)


def test_the_suites_ask_what_the_studies_measured() -> None:
    quick, full = load_suite("quick"), load_suite("full")
    words = {word.casefold() for labels in quick.labels.values() for word in labels}
    assert {"yes", "no", "yeah", "nah", "true", "false", "sure", "maybe", "normal", "wrong"} <= words
    assert len(words) >= 30
    assert {it.group for it in quick.probes} >= {"binary"}
    assert [it.group for it in quick.questions] == ["math"] * 3
    assert [it.id for it in quick.texts] == ["neutral"]
    assert {it.group for it in full.probes} >= {"binary", "informed", "blind"}
    assert all(it.system for it in full.probes if it.group == "informed")
    assert not any(it.system for it in full.probes if it.group == "blind")
    assert {it.group for it in full.questions} >= {"math", "logic", "facts", "language", "code", "instructions"}
    assert {it.group for it in full.open} == {"long-form", "behaviour"}
    assert {it.id for it in quick.asked} < {it.id for it in full.asked}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("probes: [{id: a, group: g, text: t}]", "there are no labels 'affirm'"),
        (
            "probes: [{id: a, group: g, text: t, contrast: [afirm, deny]}]\nlabels: {affirm: [a], deny: [b]}",
            "Did you mean",
        ),
        ("questions: [{id: a, group: g, text: t}]", "questions.0.answers: is missing"),
        ("question: []", "question: there is no such key"),
        ("texts: [{id: a, file: nowhere.txt}]", "there is no file"),
        ("texts: [{id: a}]", "a file or texts"),
        ("open: [{id: a, group: g, text: t}, {id: a, group: g, text: u}]", "given 2 times"),
        ("bilingual: {wordings: {en: {}, zh: {}}}", "wordings of en lack plus"),
        ("extends: bilingual\nbilingual: {wordings: {en: {}}}", "lack"),
        ("extends: none", "there is none of the name 'none'"),
        ("about: nothing", "asks nothing"),
        ("- a", "is no mapping"),
        ("labels: {affirm: [yes]}\nopen: [{id: a, group: g, text: t}]", "labels.affirm.0"),
    ],
)
def test_a_suite_with_faults_is_refused_with_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(UsageError, match=problem):
        load_suite(str(tmp_path / "suite.yaml"))


def test_a_suite_extends_the_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever one stands, as with its texts; and one that extends itself is found out."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "text.txt").write_text("Some words.")
    (tmp_path / "suites" / "under.yaml").write_text("texts: [{id: a, file: text.txt}]")
    (tmp_path / "suites" / "over.yaml").write_text("extends: ../suites/under.yaml\ntexts: [{id: b, texts: [More.]}]")
    monkeypatch.chdir(tmp_path)
    for name in ("suites/over.yaml", str(tmp_path / "suites" / "over.yaml")):
        assert [text.id for text in load_suite(name).texts] == ["a", "b"]
    (tmp_path / "suites" / "under.yaml").write_text("extends: ../suites/over.yaml")
    with pytest.raises(UsageError, match="extends itself"):
        load_suite("suites/over.yaml")


def test_an_unknown_suite_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'quick'"):
        load_suite("quik")


def test_chats_are_put_as_the_template_says_and_without_one_as_completion() -> None:
    tokens = Tokens(MANNEQUIN / "bf16")
    ids, form = tokens.chat("What is 1 plus 2?", None, {"enable_thinking": False})
    assert (ids, form) == (prompt_tokens(tokens.tokenizer, "What is 1 plus 2?"), "chat")
    tokens.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    )
    ids, form = tokens.chat("Hello", "Be brief.", {})
    assert (tokens.decode(ids), form) == ("Be brief.\n\nHello", "chat: no system prompt")
    tokens.tokenizer.chat_template = None
    ids, form = tokens.chat("Hello?", "Be brief.", {})
    assert (tokens.decode(ids), form) == ("Be brief.\n\nQuestion: Hello?\nAnswer:", "completion: no chat template")


def test_the_command_writes_a_page_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(MANNEQUIN / "bf16"), "--suite", SUITE, "--engine", "transformers"]
    assert main([*words, "--html", str(tmp_path / "page.html"), "--csv", str(tmp_path / "csv"), "-q"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity:" in shown
    assert "larger" in shown
    names = {path.name for path in (tmp_path / "csv").iterdir()}
    assert {"models.csv", "probes.csv", "labels.csv", "perplexity.csv", "answers.csv"} <= names
    assert (tmp_path / "page.html").stat().st_size > 10**6


def test_the_help_of_evaluate_loads_no_library_of_numbers() -> None:
    script = (
        "import sys\nfrom tensorsurgeon.cli import main\nmain(['evaluate', '--help'])\n"
        "assert not {'numpy', 'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
