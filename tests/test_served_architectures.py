"""Layers in another order, served by real vLLM: it computes what the layers of the original do in that order."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, SEQUENCES, TOKENS, load, logits_of, replay

import tensorsurgeon as ts
from serving import Job, Request, answers

pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")]

SERVED = [name for name, it in ARCHITECTURES.items() if it.vllm]
SEQUENCE = SEQUENCES["block twice"]
TOLERANCE = 1e-3


class Served:
    """For each architecture the logits of the original and of the oracle, and the log probabilities of vLLM."""

    def __init__(self, place: Path) -> None:
        jobs = []
        self.original: dict[str, torch.Tensor] = {}
        self.wanted: dict[str, torch.Tensor] = {}
        for name in SERVED:
            source = architectures.make(ARCHITECTURES[name], place / name, **ARCHITECTURES[name].vllm or {})
            model = load(source)
            model.set_attn_implementation("eager")  # the only one that caps the scores of Gemma 2
            self.original[name] = logits_of(model)
            (self.wanted[name],) = replay(model, [SEQUENCE])
            dest = place / f"{name}-written"
            ts.write(ts.ops.select_layers(ts.open(source), SEQUENCE), dest, target="vllm")
            jobs.append(Job(dest, [Request(row) for row in TOKENS.tolist()]))
        found = answers(jobs, timeout=2400)
        self.found = {
            name: torch.tensor([answer.prompt_logprobs for answer in each])
            for name, each in zip(SERVED, found, strict=True)
        }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Return the log probability of each token but the first."""
    return logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None])[..., 0]


@pytest.mark.parametrize("name", SERVED)
def test_vllm_computes_what_the_reordered_layers_compute(name: str, served: Served) -> None:
    wanted, original = logprobs(served.wanted[name]), logprobs(served.original[name])
    difference = (served.found[name] - wanted).abs().max()
    print(f"{name}: largest difference of log probabilities {difference:.1e}")
    assert difference < TOLERANCE
    assert (wanted - original).abs().max() > 100 * TOLERANCE
