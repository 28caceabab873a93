"""Similarity of layers: against NumPy on the states of transformers, raw behind the last layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import MANNEQUIN

import tensorsurgeon as ts
from tensorsurgeon.errors import UsageError
from tensorsurgeon.forward.nearness import angular_distance, centred_kernel, cka, influence

TEXTS = ["What is 14 plus 50?", "Amina had 54 coins and found 65 more, so now she has"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(TEXTS))
    return str(path)


@pytest.fixture(scope="module")
def states() -> list[np.ndarray]:
    """Return the states at each depth, (tokens of all prompts, width), of the model in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MANNEQUIN / "bf16")
    model = AutoModelForCausalLM.from_pretrained(MANNEQUIN / "bf16", dtype=torch.float32)
    raw: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda module, args, output: raw.append(output))
    found = []
    for text in TEXTS:
        with torch.no_grad():
            output = model(tokenizer(text, return_tensors="pt").input_ids, output_hidden_states=True, use_cache=False)
        found.append([*output.hidden_states[:-1], raw[-1]])
    return [torch.cat([it[0] for it in depth]).double().numpy() for depth in zip(*found, strict=True)]


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Return CKA by its other form, `|Y'X|^2 / (|X'X| |Y'Y|)` of centred features."""
    one, other = one - one.mean(0), other - other.mean(0)
    norms = np.linalg.norm(one.T @ one) * np.linalg.norm(other.T @ other)
    return float(np.linalg.norm(other.T @ one) ** 2 / norms)


def test_every_number_is_that_of_numpy(prompts: str, states: list[np.ndarray]) -> None:
    found = ts.exams.similarity(ts.open(MANNEQUIN / "bf16"), prompts)
    for row in found.tables["layers"]:
        alike = cosines(states[row["layer"]], states[row["layer"] + 1])
        assert row["influence"] == pytest.approx(1 - alike.mean(), rel=1e-5)
        assert row["angular distance"] == pytest.approx((np.arccos(alike) / np.pi).mean(), rel=1e-5)
    assert len(found.tables["blocks"]) == 21
    for row in found.tables["blocks"]:
        before, after = states[row["first"]], states[row["first"] + row["removes"]]
        assert row["angular distance"] == pytest.approx((np.arccos(cosines(before, after)) / np.pi).mean(), rel=1e-5)
        assert row["cka"] == pytest.approx(alignment(before, after), rel=1e-5)


def test_the_block_that_changes_least_is_told_for_each_size(prompts: str) -> None:
    found = ts.exams.similarity(ts.open(MANNEQUIN / "bf16"), prompts)
    assert [row["removes"] for row in found.tables["least"]] == [1, 2, 3, 4, 5]
    for row in found.tables["least"]:
        sizes = [it for it in found.tables["blocks"] if it["removes"] == row["removes"]]
        assert row["angular distance"] == min(it["angular distance"] for it in sizes)
        left = ts.ops.drop_layers(ts.open(MANNEQUIN / "bf16"), row["drop-layers"])
        assert left.layers.count == 6 - row["removes"]


def test_one_size_and_the_last_position_alone(prompts: str, states: list[np.ndarray]) -> None:
    found = ts.exams.similarity(ts.open(MANNEQUIN / "bf16"), prompts, position="last", block=2)
    assert [row["drop-layers"] for row in found.tables["blocks"]] == ["0-1", "1-2", "2-3", "3-4", "4-5"]
    assert found.tables["model"][0]["samples"] == 2


def test_a_layer_that_was_doubled_in_a_plan_is_seen(prompts: str) -> None:
    planned = ts.ops.select_layers(ts.open(MANNEQUIN / "bf16"), "0-2,2,3-5")
    found = ts.exams.similarity(planned, prompts)
    assert [row["layer"] for row in found.tables["layers"]] == list(range(7))


def test_the_measures_have_the_values_that_they_must() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 8, generator=generator).double()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
    assert influence(states, 3 * states) == pytest.approx(0, abs=1e-12)
    assert angular_distance(states, -states) == pytest.approx(1)
    assert angular_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])) == pytest.approx(0.5)
    assert cka(centred_kernel(states), centred_kernel(2 * states @ turn + 5)) == pytest.approx(1)
    assert cka(centred_kernel(states), centred_kernel(torch.randn(40, 8, generator=generator))) < 0.5


def test_a_block_larger_than_the_model_is_refused(prompts: str) -> None:
    with pytest.raises(UsageError, match="9"):
        ts.exams.similarity(ts.open(MANNEQUIN / "bf16"), prompts, block=10)
