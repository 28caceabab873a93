"""Pictures in prompts: through transformers, a server and real vLLM, against the model's class by itself."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sighted import PER_PICTURE, POSITIONS, logits_of, make_sighted
from test_server_engine import choice, server

import tensorsurgeon as ts
from tensorsurgeon.errors import CheckpointError, DestinationError, EngineError, UsageError
from tensorsurgeon.evaluate.engine import Pictured, Sampling, Settings
from tensorsurgeon.evaluate.engines.transformers import TransformersEngine
from tensorsurgeon.evaluate.pictures import read_picture
from tensorsurgeon.evaluate.questionnaire import Questionnaire
from tensorsurgeon.evaluate.suite import load_suite
from tensorsurgeon.evaluate.tokens import Tokens

HERE = Path(__file__).parent
TEXT, SYSTEM, TOKENS = "What happens here?", "Be brief.", 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another of its shape, two pictures, and a suite about them."""
    made = tmp_path_factory.mktemp("sighted")
    make_sighted(made / "model")
    make_sighted(made / "other", seed=1)
    (made / "suite").mkdir()
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(made / "suite" / name)
    write_suite(
        made / "suite",
        open=[
            {"id": "first", "group": "picture", "text": TEXT, "image": "one.png", "tokens": TOKENS},
            {"id": "second", "group": "picture", "text": TEXT, "image": "two.png", "tokens": TOKENS},
            {"id": "instructed", "group": "picture", "text": TEXT, "system": SYSTEM, "image": "one.png", "tokens": 4},
            {"id": "plain", "group": "words", "text": TEXT, "tokens": 4},
        ],
        prompts=[{"group": "drawn", "texts": [TEXT, "Why?"], "image": "two.png", "tokens": 4, "temperature": 1.0}],
    )
    return made


def write_suite(folder: Path, **parts: Any) -> str:
    (folder / "suite.yaml").write_text(json.dumps(parts))
    return str(folder / "suite.yaml")


def asked_of(model: Path, suite: str, most: int | None = POSITIONS) -> Questionnaire:
    return Questionnaire(load_suite(suite), Tokens(model), most)


def one(folder: Path, picture: str = "one.png", **fields: Any) -> str:
    """Write a suite of one prompt about a picture beside it."""
    return write_suite(folder, open=[{"id": "it", "group": "g", "text": TEXT, "image": picture, "tokens": 4, **fields}])


def by_itself(model: Path, picture: Path, system: str | None, tokens: int) -> tuple[list[int], list[int], Any]:
    """Return the prompt's tokens, the greedy answer and the logits of the class itself, from messages to tokens."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(str(model))
    shown = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": TEXT}]
    messages = [{"role": "user", "content": shown}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    given = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    loaded = AutoModelForImageTextToText.from_pretrained(str(model), dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = loaded(**given).logits[0, -1]
        made = loaded.generate(**given, max_new_tokens=tokens, do_sample=False)
    prompt = given["input_ids"][0].tolist()
    return prompt, made[0, len(prompt) :].tolist(), logits.numpy()


def check_records(records: list[dict[str, Any]], place: Path) -> None:
    """Hold an engine's records against the class by itself."""
    found = {it["prompt_id"]: it for it in records}
    assert list(found) == ["first", "second", "instructed", "plain", "drawn-1", "drawn-2"]
    for name, file, system, tokens in (
        ("first", "one.png", None, TOKENS),
        ("second", "two.png", None, TOKENS),
        ("instructed", "one.png", SYSTEM, 4),
    ):
        path = place / "suite" / file
        prompt, answer, _ = by_itself(place / "model", path, system, tokens)
        record = found[name]
        assert record["output_tokens"] == [token for token in answer if token != 2]
        assert record["prompt_tokens"] == len(prompt)
        assert (record["image"], record["image_sha256"]) == (file, hashlib.sha256(path.read_bytes()).hexdigest())
    assert found["first"]["output_tokens"] != found["second"]["output_tokens"]
    assert (found["plain"]["image"], found["plain"]["image_sha256"]) == (None, None)
    assert found["first"]["prompt_tokens"] == found["plain"]["prompt_tokens"] + PER_PICTURE + 3
    assert [found[f"drawn-{place}"]["image"] for place in (1, 2)] == ["two.png", "two.png"]


def test_a_picture_is_answered_about_as_the_class_by_itself_does(place: Path, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    ts.exams.evaluate(
        str(place / "model"), engine="transformers", suite=str(place / "suite" / "suite.yaml"), records=str(records)
    )
    check_records([json.loads(line) for line in records.read_text().splitlines()], place)


def test_another_picture_gives_other_logits(place: Path) -> None:
    asked = asked_of(place / "model", str(place / "suite" / "suite.yaml"))
    engine = TransformersEngine(Settings())
    engine.load(place / "model", asked.length)
    found = np.array(logits_of(engine, asked))
    for logits, file in zip(found, ("one.png", "two.png"), strict=True):
        np.testing.assert_allclose(logits, by_itself(place / "model", place / "suite" / file, None, 1)[2], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_the_length_holds_the_tokens_of_the_picture(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "suite" / "one.png", tmp_path)
    suite = one(tmp_path)
    prompt, _, _ = by_itself(place / "model", tmp_path / "one.png", None, 1)
    assert asked_of(place / "model", suite).length == len(prompt) + 4
    assert asked_of(place / "model", suite, len(prompt) + 4).length == len(prompt) + 4
    with pytest.raises(UsageError, match=f"it: takes {len(prompt) + 4} tokens"):
        asked_of(place / "model", suite, len(prompt) + 3)


def test_a_model_without_eyes_is_refused_by_name_before_the_work(place: Path) -> None:
    blind = HERE / "mannequin" / "bf16"
    with pytest.raises(CheckpointError, match=r"bf16: takes no pictures.*name a model that takes them"):
        ts.exams.evaluate(str(blind), engine="transformers", suite=str(place / "suite" / "suite.yaml"))


def without_processor(model: Path) -> None:
    (model / "processor_config.json").unlink()


def without_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


def without_place(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for said in messages %}{{ said.role }}{% endfor %}")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (without_processor, "processor"),
        (without_template, "no chat template, which alone says where a picture stands"),
        (without_place, r"cannot put one\.png into a chat|has no place for a picture"),
    ],
)
def test_a_model_that_cannot_be_shown_a_picture_is_refused(
    place: Path, tmp_path: Path, spoil: Any, problem: str
) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(place / "suite" / "one.png", tmp_path)
    spoil(tmp_path / "model")
    with pytest.raises(CheckpointError, match=problem):
        asked_of(tmp_path / "model", one(tmp_path))


def test_what_is_wrong_with_pictures_in_a_suite_is_told(place: Path, tmp_path: Path) -> None:
    suite = write_suite(
        tmp_path,
        open=[{"id": "it", "group": "g", "text": TEXT, "image": "gone.png"}],
        prompts=[{"group": "more", "texts": [TEXT], "image": "gone too.png", "form": "completion"}],
    )
    with pytest.raises(UsageError) as refused:
        load_suite(suite)
    told = "\n".join(refused.value.problems)
    assert "it: there is no file" in told
    assert f"more: there is no file {tmp_path / 'gone too.png'}" in told
    assert "more: an image is shown in a chat; leave out 'form: completion'" in told
    with pytest.raises(UsageError, match=r"probes\.0\.image: there is no such key"):
        load_suite(write_suite(tmp_path, probes=[{"id": "it", "group": "g", "text": TEXT, "image": "one.png"}]))
    (tmp_path / "torn.png").write_bytes((place / "suite" / "one.png").read_bytes()[:200])
    (tmp_path / "words.png").write_text("no picture")
    for name in ("torn.png", "words.png"):
        with pytest.raises(UsageError, match=f"{name}: is no picture that can be read"):
            asked_of(place / "model", one(tmp_path, name))


def test_pixels_are_upright_and_clear_ones_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, 0] = 255, 0, 0, 255
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    seen = np.asarray(read_picture(str(tmp_path / "clear.png")).image)
    assert seen.shape == (2, 3, 3)
    assert seen[0, 0].tolist() == [255, 0, 0]
    assert (seen.reshape(-1, 3)[1:] == 255).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    Image.fromarray(pixels[:, :, :3]).save(tmp_path / "side.png", exif=turned)
    assert np.asarray(read_picture(str(tmp_path / "side.png")).image).shape == (3, 2, 3)


def test_a_server_is_sent_the_same_pixels_in_a_chat(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "suite" / "one.png", tmp_path)
    put = asked_of(place / "model", one(tmp_path, system=SYSTEM)).prompts["it"].given
    assert isinstance(put, Pictured)
    put = put._replace(template={"enable_thinking": False})
    told: list[Any] = [put.tokens, [1, 2], None]

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        status, content = choice(token_ids=[70, 71, 2])
        return status, content | {"prompt_token_ids": told.pop(0)}

    with server(reply) as (engine, seen):
        (made,) = engine.generate([put], Sampling(4, 0.5, 7), (2,))
        with pytest.raises(EngineError, match=r"puts one\.png into a chat of 2 tokens"):
            engine.generate([put], Sampling(4), (2,))
        engine.generate([put], Sampling(4), (2,))
        with pytest.raises(EngineError, match="no probabilities"):
            next(engine.next_logits([put]))
    assert (made.tokens, made.ended) == ((70, 71), True)
    (system, user) = seen[0]["messages"]
    assert system == {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    shown, text = user["content"]
    assert text == {"type": "text", "text": TEXT}
    head, _, data = shown["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert (sent == np.asarray(Image.open(tmp_path / "one.png"))).all()
    assert (seen[0]["temperature"], seen[0]["seed"], seen[0]["max_tokens"]) == (0.5, 7, 4)
    assert seen[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "prompt" not in seen[0]


def test_a_sweep_shows_its_pictures_to_every_variant(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "suite", tmp_path / "suite")
    study = {
        "source": str(place / "model"),
        "variants": [{"level": [0.0, 0.5]}],
        "steps": [{"perturb": {"method": "mult-gauss", "level": "{level}", "group": "mlp", "seed": 1}}],
        "engine": "transformers",
        "suite": one(tmp_path / "suite"),
        "results": str(tmp_path / "results"),
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    ts.exams.sweep(str(tmp_path / "study.yaml"))
    rows = [json.loads(line) for line in (tmp_path / "results" / "records.jsonl").read_text().splitlines()]
    _, answer, _ = by_itself(place / "model", place / "suite" / "one.png", None, 4)
    assert [it["image"] for it in rows] == ["one.png", "one.png"]
    assert rows[0]["output_tokens"] == [token for token in answer if token != 2]
    digest = hashlib.sha256((place / "suite" / "one.png").read_bytes()).hexdigest()
    kept = json.loads((tmp_path / "results" / "study.json").read_text())
    assert kept["asked"]["open"][0]["image"] == digest
    # Another picture of the same name is another study.
    shutil.copy(tmp_path / "suite" / "two.png", tmp_path / "suite" / "one.png")
    with pytest.raises(DestinationError, match=r"asked\.open\.0\.image"):
        ts.exams.sweep(str(tmp_path / "study.yaml"))


@pytest.mark.serving
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_vllm_sees_what_transformers_sees(place: Path, tmp_path: Path) -> None:
    suite, answers = str(place / "suite" / "suite.yaml"), tmp_path / "answers.json"
    command = [sys.executable, str(HERE / "sighted.py"), str(place / "model"), str(place / "other"), suite]
    done = subprocess.run([*command, str(answers)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    found = json.loads(answers.read_text())
    check_records(found["records"], place)
    engine = TransformersEngine(Settings())
    for name, model in (("logits", "model"), ("loaded", "other")):
        asked = asked_of(place / model, suite)
        engine.load(place / model, asked.length)
        np.testing.assert_allclose(found[name], logits_of(engine, asked), atol=1e-4)
    # What vLLM keeps of a picture is that of the encoder's weights before.
    assert found["reloaded"] == found["loaded"]
    assert found["reloaded"] != found["logits"]
