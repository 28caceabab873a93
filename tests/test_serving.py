"""Real vLLM serves what was written, and computes with it what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from perplexity import load, perplexity, prompt_tokens

import tensorsurgeon as ts
from serving import Answer, Job, Request, answers

MANNEQUIN = Path(__file__).parent / "mannequin"
QUESTIONS = 60
LONGEST_ANSWER = 5
SKIPPED = "model.layers.0.*,*.2.mlp.*,*.3.self_attn.o_proj"
BF16_NOISE = 0.01
"""How far log probabilities in bfloat16 may be from those in float32, in the mean."""

pytestmark = pytest.mark.serving


class Served:
    """The mannequin's variants, what vLLM answered for each, and the requests that it answered."""

    def __init__(self, place: Path) -> None:
        self.heldout = json.loads((MANNEQUIN / "heldout.json").read_text())
        self.model, self.tokenizer = load(MANNEQUIN / "bf16")
        plain, shorter = ts.ops.dequantize(ts.open(MANNEQUIN / "fp8")), place / "shorter"
        ts.write(plain, place / "plain")
        ts.write(ts.ops.drop_layers(plain, "3"), shorter, max_shard_size="2MB")
        original = ts.open(MANNEQUIN / "bf16")
        ts.write(ts.ops.quantize(original, "fp8-block"), place / "quantized")
        ts.write(ts.ops.quantize(original, "fp8-block", block="64x128", skip=SKIPPED, ue8m0=True), place / "partly")
        for name in ("quantized", "partly"):
            ts.write(ts.ops.dequantize(ts.open(place / name)), place / f"{name}, decoded")
        self.directories = {
            "original": MANNEQUIN / "bf16",
            **{name: place / name for name in ("quantized", "partly", "quantized, decoded", "partly, decoded")},
            "fp8": MANNEQUIN / "fp8",
            "plain": place / "plain",
            "shorter": shorter,
        }
        problems = self.heldout["arithmetic"] + self.heldout["yes_no"]
        step = len(problems) // QUESTIONS
        self.problems = problems[::step][:QUESTIONS]
        sentences = [self.tokenizer(row["text"])["input_ids"] for row in self.heldout["sentences"][:12]]
        requests = [Request(prompt_tokens(self.tokenizer, row["prompt"]), LONGEST_ANSWER) for row in self.problems]
        self.requests = requests + [Request(tokens) for tokens in sentences]
        # vLLM serves block FP8 in half precision only.
        halves = ("fp8", "quantized", "partly")
        dtypes = {name: "bfloat16" if name in halves else "float32" for name in self.directories}
        jobs = [Job(directory, self.requests, dtypes[name]) for name, directory in self.directories.items()]
        self.answers: dict[str, list[Answer]] = dict(zip(self.directories, answers(jobs), strict=True))

    def said(self, name: str) -> list[str]:
        """Return what a variant answered to each question, up to the end of its turn."""
        texts = [self.tokenizer.decode(answer.token_ids) for answer in self.answers[name][:QUESTIONS]]
        return [text.split(self.tokenizer.eos_token)[0].strip() for text in texts]

    def right(self, name: str) -> float:
        """Return the share of questions that a variant answered rightly."""
        pairs = zip(self.said(name), self.problems, strict=True)
        return sum(said == problem["answer"] for said, problem in pairs) / QUESTIONS

    def agreement(self, one: str, other: str) -> float:
        """Return the share of questions that two variants answered alike."""
        return sum(a == b for a, b in zip(self.said(one), self.said(other), strict=True)) / QUESTIONS


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the log probability of each token but the first, by transformers in float32."""
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(tokens)[1:, None])[:, 0]


@pytest.mark.parametrize("name", ["original", "plain", "shorter"])
def test_prompt_logprobs_are_transformers_to_1e_4(name: str, served: Served) -> None:
    model, _ = load(served.directories[name])
    for request, answer in zip(served.requests, served.answers[name], strict=True):
        wanted = logprobs(model, request.prompt_token_ids)
        assert torch.allclose(torch.tensor(answer.prompt_logprobs), wanted, atol=1e-4, rtol=0)


def test_the_original_knows_its_answers(served: Served) -> None:
    assert served.right("original") > 0.8


def test_the_dequantized_model_answers_as_the_original(served: Served) -> None:
    print(f"agreement of greedy answers: {served.agreement('original', 'plain'):.3f}")
    assert served.agreement("original", "plain") >= 0.95


def test_the_dequantized_model_answers_as_fp8_itself(served: Served) -> None:
    assert served.agreement("fp8", "plain") >= 0.95


@pytest.mark.parametrize("name", ["quantized", "partly"])
def test_what_was_quantized_answers_as_what_it_decodes_to(name: str, served: Served) -> None:
    """A weight that vLLM took for quantised where it is not, or the other way round, would answer anything."""
    original, twin = served.agreement("original", name), served.agreement(f"{name}, decoded", name)
    pairs = zip(served.answers[name], served.answers[f"{name}, decoded"], strict=True)
    differences = [(torch.tensor(a.prompt_logprobs) - torch.tensor(b.prompt_logprobs)).abs() for a, b in pairs]
    mean = torch.cat(differences).mean()
    print(f"{name}: as the original {original:.3f}, as what it decodes to {twin:.3f}; log probabilities {mean:.4f} off")
    assert original >= 0.95
    assert twin >= 0.95
    assert mean < BF16_NOISE


def test_a_model_with_a_layer_less_loads_and_answers_worse(served: Served) -> None:
    assert all(len(answer.token_ids) == LONGEST_ANSWER for answer in served.answers["shorter"][:QUESTIONS])
    assert served.right("shorter") < served.right("original")


def test_perplexity_tells_dequantization_from_damage(served: Served) -> None:
    sentences = [row["text"] for row in served.heldout["sentences"]]
    names = ("original", "plain", "shorter", "quantized, decoded", "partly, decoded")
    found = {name: perplexity(*load(served.directories[name]), sentences) for name in names}
    print(found)
    for name in ("plain", "quantized, decoded", "partly, decoded"):
        assert abs(found[name] / found["original"] - 1) < 0.02
    assert found["shorter"] > 1.05 * found["original"]
