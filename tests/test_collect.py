"""Activations: those of transformers' own hooks, in the layout that `directions` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MANNEQUIN
from safetensors.torch import load_file

import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import DestinationError, SurgeonError, UsageError
from tensorsurgeon.tensor import LazyTensor

LINES = [
    {"prompt": "What is 14 plus 50?", "group": "en"},
    {"prompt": "14加50等于多少?", "group": "zh"},
    {"prompt": "What is 7 plus 8 or so?", "group": "en"},
    {"prompt": "7加8等于多少?", "group": "zh"},
]
"""Prompts of unequal length, so that a batch of them is filled up."""


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return str(path)


def by_hooks(site: str) -> list[list[torch.Tensor]]:
    """Return what each layer leaves for each prompt, (tokens, width), in transformers' model in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MANNEQUIN / "bf16")
    model: Any = AutoModelForCausalLM.from_pretrained(MANNEQUIN / "bf16", dtype=torch.float32)
    heard: list[torch.Tensor] = []
    for layer in model.model.layers:
        module = {"residual": layer, "attention": layer.self_attn, "mlp": layer.mlp}[site]
        module.register_forward_hook(lambda _, __, it: heard.append((it[0] if isinstance(it, tuple) else it)[0]))
    found = []
    for line in LINES:
        heard.clear()
        with torch.no_grad():
            model(tokenizer(line["prompt"], return_tensors="pt").input_ids, use_cache=False)
        found.append(list(heard))
    return [list(layer) for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("position", ["last", "all", "mean"])
def test_activations_are_those_of_the_model_in_memory(tmp_path: Path, prompts: str, site: str, position: str) -> None:
    out = tmp_path / "out.safetensors"
    ts.derivations.collect(ts.open(MANNEQUIN / "bf16"), prompts, str(out), site=site, position=position)
    found = load_file(out)
    assert set(found) == {f"{group}_L{layer}" for group in ("en", "zh") for layer in range(6)}
    take = {"last": lambda it: it[-1:], "all": lambda it: it, "mean": lambda it: it.mean(0, keepdim=True)}[position]
    for layer, states in enumerate(by_hooks(site)):
        for group in ("en", "zh"):
            wanted = [take(it) for it, line in zip(states, LINES, strict=True) if line["group"] == group]
            assert torch.equal(found[f"{group}_L{layer}"], torch.cat(wanted))


def test_batches_and_npz_hold_the_same_to_rounding(tmp_path: Path, prompts: str) -> None:
    ckpt = ts.open(MANNEQUIN / "bf16")
    ts.derivations.collect(ckpt, prompts, str(tmp_path / "one.safetensors"))
    ts.derivations.collect(ckpt, prompts, str(tmp_path / "four.npz"), batch=4, layers="2,5")
    one, four = load_file(tmp_path / "one.safetensors"), np.load(tmp_path / "four.npz")
    assert set(four.files) == {"en_L2", "zh_L2", "en_L5", "zh_L5"}
    for name in four.files:
        np.testing.assert_allclose(four[name], one[name].numpy(), rtol=1e-4, atol=1e-4)


def test_layers_behind_the_last_that_is_wanted_are_not_read(
    tmp_path: Path, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = ts.open(MANNEQUIN / "bf16")
    late, own, read = {ckpt[name] for name in ckpt.names("model.layers.4.*")}, LazyTensor.read, []

    def noted(self: LazyTensor, *rows: Any, **more: Any) -> Any:
        read.append(self)
        return own(self, *rows, **more)

    monkeypatch.setattr(LazyTensor, "read", noted)
    ts.derivations.collect(ckpt, prompts, str(tmp_path / "out.npz"), layers="1,3")
    assert read
    assert not late & set(read)


def test_directions_are_found_in_what_was_collected(tmp_path: Path, prompts: str) -> None:
    acts, found = str(tmp_path / "acts.safetensors"), str(tmp_path / "found.safetensors")
    assert main(["collect", str(MANNEQUIN / "bf16"), prompts, acts, "--chat", "-q"]) == 0
    assert main(["directions", acts, found, "--method", "mean-difference", "-q"]) == 0
    held = load_file(found)
    assert set(held) == {f"L{layer}" for layer in range(6)}
    assert all(it.shape == (1, 256) for it in held.values())
    dest = str(tmp_path / "cut")
    assert main(["project", str(MANNEQUIN / "bf16"), dest, "--directions", found, "--layers", "2-4", "-q"]) == 0


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"out": "{}/out.bin"}, DestinationError, "ends in .safetensors or .npz"),
        ({"out": "{}/there.npz"}, DestinationError, "exists already"),
        ({"out": "{}/no/out.npz"}, DestinationError, "there is no directory"),
        ({"layers": "4-7"}, UsageError, "there is no layer 6, 7"),
        ({"site": "nose"}, UsageError, "site"),
    ],
)
def test_what_cannot_be_done_is_refused_first(
    tmp_path: Path, prompts: str, changes: dict[str, str], kind: type[SurgeonError], told: str
) -> None:
    (tmp_path / "there.npz").write_text("")
    given = {"out": "{}/out.npz", **changes}
    with pytest.raises(kind, match=told):
        ts.derivations.collect(
            ts.open(MANNEQUIN / "bf16"), prompts, **{key: it.format(tmp_path) for key, it in given.items()}
        )


def test_groups_are_named_by_all_prompts_or_none(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "a", "group": "x"}\n{"prompt": "b"}\n')
    with pytest.raises(UsageError, match="1 name no group, the first of them is prompt 2"):
        ts.derivations.collect(ts.open(MANNEQUIN / "bf16"), str(path), str(tmp_path / "out.npz"))
