"""Adapters of a model that has learned something: PEFT and vLLM answer with them as the tuned model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from perplexity import load, prompt_tokens

import tensorsurgeon as ts
from serving import Answer, Job, Request, adapter_answers

MANNEQUIN = Path(__file__).parent / "mannequin"
RANKS = (4, 16, 64)
LONGEST_ANSWER = 4
FULL: dict[str, Any] = {"error": 1e-5, "include": "embedding,head,norm"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*CPU is not supported.*"),
]


class Adapters:
    """Adapters by method A (against BF16) and B (against FP8), at several ranks, and the models they are for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.bases = {"bf16": MANNEQUIN / "bf16", "plain": place / "plain"}
        ts.write(ts.ops.dequantize(ts.open(MANNEQUIN / "fp8"), dtype="float32"), self.bases["plain"])
        for method, base in (("A", "bf16"), ("B", "fp8")):
            for rank in RANKS:
                self.extract(f"{method}{rank}", MANNEQUIN / base, rank=rank, include="embedding,head")
            self.extract(f"{method}full", MANNEQUIN / base, **FULL)
        self.tuned, self.tokenizer = load(MANNEQUIN / "tuned")
        self.problems = json.loads((MANNEQUIN / "heldout-tuned.json").read_text())["problems"][::2]
        self.prompts = [prompt_tokens(self.tokenizer, row["prompt"]) for row in self.problems]

    def extract(self, name: str, base: Path, **options: Any) -> None:
        adapter = ts.ops.extract_lora(ts.open(MANNEQUIN / "tuned"), base=str(base), **options)
        ts.write(adapter, self.place / name)

    def applied(self, base: str, adapter: str) -> Any:
        """Return the model of PEFT, in float32."""
        model, _ = load(self.bases[base])
        return PeftModel.from_pretrained(model, self.place / adapter).eval()

    def distance(self, model: Any) -> float:
        """Return the mean squared difference of the logits from the tuned model's, over all prompts."""
        with torch.no_grad():
            squares = [
                (model(torch.tensor([prompt])).logits - self.tuned(torch.tensor([prompt])).logits).square().mean()
                for prompt in self.prompts
            ]
        return float(torch.stack(squares).mean())

    def said(self, model: Any) -> list[list[int]]:
        """Return what a model answers to each question, greedily."""
        answers = []
        with torch.no_grad():
            for prompt in self.prompts:
                tokens = list(prompt)
                for _ in range(LONGEST_ANSWER):
                    tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
                answers.append(tokens[len(prompt) :])
        return answers

    def right(self, answers: list[list[int]]) -> float:
        """Return the share of right answers."""
        texts = [self.tokenizer.decode(tokens).split(self.tokenizer.eos_token)[0].strip() for tokens in answers]
        return sum(text == row["answer"] for text, row in zip(texts, self.problems, strict=True)) / len(texts)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize(("method", "base"), [("A", "bf16"), ("B", "plain")])
def test_the_higher_the_rank_the_nearer_to_the_tuned_model(method: str, base: str, adapters: Adapters) -> None:
    model, _ = load(adapters.bases[base])
    distances = [adapters.distance(model)]
    distances += [adapters.distance(adapters.applied(base, f"{method}{rank}")) for rank in (*RANKS, "full")]
    print(f"method {method}: mean squared difference of logits {', '.join(f'{it:.2e}' for it in distances)}")
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01 * distances[0]


def test_against_fp8_method_b_beats_method_a_at_full_rank(adapters: Adapters) -> None:
    a, b = (adapters.distance(adapters.applied("plain", name)) for name in ("Afull", "Bfull"))
    print(f"on the FP8 base, at full rank: method A {a:.2e}, method B {b:.2e}")
    assert b < 0.01 * a


def test_the_tuned_model_s_answers_come_with_the_adapter(adapters: Adapters) -> None:
    base, _ = load(adapters.bases["bf16"])
    found = {"base": adapters.right(adapters.said(base)), "tuned": adapters.right(adapters.said(adapters.tuned))}
    found |= {f"A{rank}": adapters.right(adapters.said(adapters.applied("bf16", f"A{rank}"))) for rank in RANKS}
    print(f"right answers to the new questions: {found}")
    assert found["base"] < 0.1
    assert found["tuned"] > 0.9
    assert found["A64"] > 0.9


@pytest.fixture(scope="module")
def served(adapters: Adapters) -> dict[str, list[Answer]]:
    requests = [Request(prompt, LONGEST_ANSWER) for prompt in adapters.prompts]
    found = {}
    for base, dtype, names in (("bf16", "float32", ("A16", "A64")), ("fp8", "bfloat16", ("A64", "B64"))):
        ready = []
        for name in names:
            right = adapters.place / f"{base}-{name}-served"
            model = str(MANNEQUIN / base)
            ts.write(ts.ops.sanitize_lora(ts.open(adapters.place / name), for_="vllm", base=model), right)
            ready.append(right)
        job = Job(MANNEQUIN / base, requests, dtype, adapters=ready, max_lora_rank=256)
        for name, answers in zip(names, adapter_answers(job), strict=True):
            assert not isinstance(answers, str), answers
            found[f"{base} {name}"] = answers
    return found


@pytest.mark.serving
@pytest.mark.parametrize(
    ("served_as", "base", "adapter", "least"),
    [("bf16 A16", "bf16", "A16", 1.0), ("bf16 A64", "bf16", "A64", 1.0), ("fp8 A64", "plain", "A64", 0.95),
     ("fp8 B64", "plain", "B64", 0.95)],
)  # fmt: skip
def test_vllm_answers_with_the_adapter_as_peft_does(
    served_as: str, base: str, adapter: str, least: float, adapters: Adapters, served: dict[str, list[Answer]]
) -> None:
    """In float32 the answers are the same; an FP8 base runs in bfloat16 with activations of eight bits."""
    wanted = adapters.said(adapters.applied(base, adapter))
    pairs = zip(wanted, served[served_as], strict=True)
    same = sum(_until_end(adapters, one) == _until_end(adapters, other.token_ids) for one, other in pairs) / len(wanted)
    print(
        f"{served_as}: {same:.3f} of the answers of vLLM are PEFT's, {adapters.right(wanted):.3f} of PEFT's are right"
    )
    assert same >= least


def _until_end(adapters: Adapters, tokens: list[int]) -> list[int]:
    end = adapters.tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens
