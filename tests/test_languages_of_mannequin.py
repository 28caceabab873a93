"""Take the directions in which its languages differ out of a model that speaks seven, and see what it can still do.

Directions come from the study's recipe on questions that the model was trained with, and that are none of those asked.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import MANNEQUIN
from mannequin.train import ARITHMETIC, all_triples
from patient import Patient
from safetensors.numpy import load_file

import tensorsurgeon as ts

PROBLEMS = {"add": 60, "sub": 45, "mul": 15}
RANK = 10
WEIGHTS = {"mlp.down": "mlp.down_proj", "mlp.down,attention.o": "self_attn.o_proj"}
OPERATIONS = [("0-5", "mlp.down"), ("0-5", "mlp.down,attention.o"), ("1-4", "mlp.down")]
FILES = {
    "question": ["question.safetensors"],
    "answer": ["answer.safetensors"],
    "random": ["random0.npz", "random1.npz", "random2.npz"],
}

pytestmark = pytest.mark.slow


class Result(NamedTuple):
    """What is left: perplexity of English sentences, and the share of right answers in all languages, and in each."""

    perplexity: float
    right: float
    by_language: dict[str, float]


class Ward:
    """The patient, and files of directions: those of its languages, and random ones."""

    def __init__(self, place: Path) -> None:
        self.patient, self.place = Patient(), place
        held_out = {row["prompt"] for row in self.patient.problems}
        chance = random.Random(0)
        self.problems = [
            problem
            for kind, count in PROBLEMS.items()
            for problem in chance.sample([it for it in all_triples()[kind] if it.ask("en") not in held_out], count)
        ]
        self.tables = {kind: self.find(kind) for kind in ("question", "answer")}
        for seed, name in enumerate(FILES["random"]):
            numbers = np.random.default_rng(seed).standard_normal((6, 256, RANK))
            np.savez(place / name, **{f"L{at}": np.linalg.qr(it)[0].T for at, it in enumerate(numbers)})

    def find(self, kind: str) -> list[dict[str, Any]]:
        """Collect activations, let `directions` find the bases, and return its table."""
        np.savez(self.place / f"{kind}.npz", **self.activations(kind))
        found = ts.derivations.directions(
            str(self.place / f"{kind}.npz"), str(self.place / f"{kind}.safetensors"), method="deviations", rank=RANK
        )
        return found.tables["directions"]

    def activations(self, kind: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return what layers give, as `{language}_L{layer}` of shape (problems, width).

        That is the mean over all tokens of a question, or what stands at the last one, where the answer begins.
        """
        made = {}
        for language in ARITHMETIC:
            outputs = self.patient.outputs("", [self.patient.prompt(it.ask(language)) for it in self.problems])
            for layer, rows in enumerate(outputs):
                vectors = [row.mean(0) if kind == "question" else row[-1] for row in rows]
                made[f"{language}_L{layer}"] = torch.stack(vectors).numpy()
        return made

    def operated(self, directions: str, weights: str, layers: str = "0-5") -> Patient:
        """Return the patient without some directions."""
        ckpt = ts.open(MANNEQUIN / "bf16")
        return self.patient.gets(ts.ops.project(ckpt, str(self.place / directions), weights=weights, layers=layers))

    def examined_after(self, directions: str, weights: str, layers: str) -> Result:
        """Return how the patient is after an operation."""
        self.operated(directions, weights, layers)
        return self.examined(f"{directions} {weights} {layers}")

    def examined(self, what: str) -> Result:
        """Return how the patient is."""
        right = self.patient.right(self.patient.problems)
        by_language = {
            language: float(np.mean([it for it, row in zip(right, self.patient.problems, strict=True)
                                     if row["language"] == language]))
            for language in ARITHMETIC
        }  # fmt: skip
        result = Result(self.patient.perplexity(), float(np.mean(right)), by_language)
        shares = ", ".join(f"{language} {share:.1%}" for language, share in by_language.items())
        print(f"{what}: perplexity {result.perplexity:.4g}, right {result.right:.1%} ({shares})")
        return result


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward(tmp_path_factory.mktemp("ward"))


def test_directions_hold_most_of_what_differs_between_the_languages(ward: Ward) -> None:
    """Of whole questions; where the answer begins, what differs is spread over more than ten directions."""
    for kind, rows in ward.tables.items():
        print(f"{kind}: {', '.join(str(row['captured']) for row in rows)}")
    assert all(row["captured"] > 0.8 for row in ward.tables["question"])
    assert all(row["captured"] < 0.8 for row in ward.tables["answer"])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_the_modules_add_has_no_part_in_the_directions(weights: str, ward: Ward) -> None:
    """Beyond what rounding to BF16 leaves of it; asked of the model itself, with questions of every language."""
    bases = load_file(ward.place / "question.safetensors")
    questions = [ward.patient.prompt(row["prompt"]) for row in ward.patient.problems[::20]]
    shares = []
    for ckpt in (ts.open(MANNEQUIN / "bf16"), None):
        patient = ward.patient.gets(ckpt) if ckpt else ward.operated("question.safetensors", weights)
        outputs = [torch.cat(rows) for rows in patient.outputs(WEIGHTS[weights], questions)]
        shares.append([
            float((it @ torch.from_numpy(bases[f"L{layer}"]).T).norm() / it.norm()) for layer, it in enumerate(outputs)
        ])  # fmt: skip
    print(f"{weights}: {shares}")
    assert min(shares[0]) > 0.1
    assert max(shares[1]) < 2e-3


def test_what_is_lost_with_the_directions_and_with_random_ones(ward: Ward) -> None:
    """As many random directions are hardly missed; those of the languages are, also by sentences that are all English.

    Bounds hold for each of three samples of the problems that directions are found with; the README has the figures.
    """
    ward.patient.gets(ts.open(MANNEQUIN / "bf16"))
    whole = ward.examined("whole")
    found = {
        (layers, weights, kind): [ward.examined_after(file, weights, layers) for file in files]
        for layers, weights in OPERATIONS
        for kind, files in FILES.items()
    }
    for operation in OPERATIONS:
        (question,), (answer,), randoms = (found[*operation, kind] for kind in FILES)
        assert all(it.perplexity < 1.03 * whole.perplexity and it.right > 0.9 for it in randoms)
        assert answer.right < min(question.right, *(it.right for it in randoms))
        if operation[0] == "0-5":
            assert min(question.perplexity, answer.perplexity) > 1.05 * max(it.perplexity for it in randoms)
    # Of the MLPs arithmetic is mostly kept, in every language; of attention it is not, in any.
    for layers in ("0-5", "1-4"):
        assert min(found[layers, "mlp.down", "question"][0].by_language.values()) > 0.85
    assert max(found["0-5", "mlp.down,attention.o", "question"][0].by_language.values()) < 0.75
