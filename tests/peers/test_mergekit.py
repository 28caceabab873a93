"""mergekit 0.1.5 as a peer, in an environment of its own: the same YAML gives the same tensors, where it works.

`bin/setup peers` makes that environment, which sees the packages of the one that the tests run in.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import yaml
from architectures import ARCHITECTURES, load, logits_of, replay

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main

PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
RECIPES = Path(__file__).parents[2] / "recipes"

# Run by the peer: merges every config of a list, and says for each what it failed with, or nothing.
MERGE_ALL = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
said = []
for config, dest in json.load(open(sys.argv[1])):
    try:
        run_merge(MergeConfiguration.model_validate(config), dest, MergeOptions(copy_tokenizer=False, quiet=True))
        said.append("")
    except Exception as problem:
        said.append(f"{type(problem).__name__}: {problem}")
json.dump(said, open(sys.argv[2], "w"))
"""


def slices(*ranges: tuple[str, int, int]) -> list[Any]:
    return [{"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in ranges]


CASES: dict[str, dict[str, Any]] = {
    "self-stack": {"slices": slices(("one", 0, 4), ("one", 2, 6))},
    "drop": {"slices": slices(("one", 0, 2), ("one", 4, 6))},
    "one layer twice": {"slices": slices(("one", 0, 3), ("one", 2, 3), ("one", 3, 6))},
    "the end first": {"slices": slices(("one", 3, 6), ("one", 0, 3))},
    "whole": {"models": [{"model": "one"}]},
    "as float16": {"slices": slices(("one", 0, 4), ("one", 2, 6)), "dtype": "float16"},
    "written as bfloat16": {"slices": slices(("one", 0, 6)), "out_dtype": "bfloat16"},
    "two models": {"slices": slices(("one", 0, 3), ("two", 3, 6))},
    "two models, the other's config": {"slices": slices(("one", 0, 3), ("two", 1, 6)), "base_model": "two"},
    "two models, in turn": {"slices": slices(("two", 0, 2), ("one", 2, 4), ("two", 3, 6))},
    "tied": {"slices": slices(("tied", 0, 4), ("tied", 2, 6))},
}
REFORMED = {"experts": {"slices": slices(("experts", 0, 4), ("experts", 2, 6))}}
"""A model whose tensors mergekit writes in another form: experts stacked. Here they stay as they are found."""

BREAKS = {
    "qwen3": {"slices": slices(("qwen3", 0, 4), ("qwen3", 2, 6))},
    "gemma3_text": {"slices": slices(("gemma3_text", 0, 2), ("gemma3_text", 3, 6))},
}
"""Models whose config mergekit does not take along; it writes the weights and then fails."""


class Peer:
    """What mergekit wrote for every case, or failed with."""

    def __init__(self, place: Path) -> None:
        torch.manual_seed(0)
        self.place = place
        for name, kind, changes in (
            ("one", "llama", {}),
            ("tied", "llama", {"tie_word_embeddings": True}),
            ("experts", "mixtral", {}),
            *((name, name, {}) for name in BREAKS),
        ):
            architectures.make(ARCHITECTURES[kind], place / name, **changes)
        model = load(place / "one")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        model.save_pretrained(place / "two")
        self.configs = {
            name: {"merge_method": "passthrough", **self.located(case)}
            for name, case in {**CASES, **REFORMED, **BREAKS}.items()
        }
        jobs, said = place / "jobs.json", place / "said.json"
        jobs.write_text(json.dumps([(config, str(self.written(name))) for name, config in self.configs.items()]))
        assert PYTHON.exists(), "there is no environment for mergekit; make it with bin/setup peers"
        subprocess.run([PYTHON, "-c", MERGE_ALL, jobs, said], check=True, capture_output=True)
        self.failed = dict(zip(self.configs, json.loads(said.read_text()), strict=True))

    def located(self, value: Any) -> Any:
        """Return a config in which models are directories."""
        if isinstance(value, dict):
            return {
                key: str(self.place / it) if key in ("model", "base_model") else self.located(it)
                for key, it in value.items()
            }
        return [self.located(it) for it in value] if isinstance(value, list) else value

    def written(self, name: str) -> Path:
        return self.place / f"mergekit-{name.replace(' ', '-')}"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return Peer(tmp_path_factory.mktemp("mergekit"))


def ran(config: dict[str, Any], place: Path) -> Path:
    """Write what our own program makes of a config of mergekit's."""
    (place / "mergekit.yml").write_text(yaml.safe_dump(config))
    assert main(["run", str(place / "mergekit.yml"), str(place / "ours"), "--quiet"]) == 0
    return place / "ours"


@pytest.mark.parametrize("name", CASES)
def test_the_same_yaml_gives_the_same_tensors(name: str, peer: Peer, tmp_path: Path) -> None:
    assert peer.failed[name] == ""
    ours, theirs = make.read(ran(peer.configs[name], tmp_path)), make.read(peer.written(name))
    # mergekit writes a tied head a second time.
    theirs = {key: it for key, it in theirs.items() if key in ours or key != "lm_head.weight"}
    assert make.same(ours, theirs)
    mine, other = (json.loads((it / "config.json").read_text()) for it in (tmp_path / "ours", peer.written(name)))
    differing = {key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)}
    assert differing <= {"transformers_version", "use_cache", "dtype"}
    assert mine["num_hidden_layers"] == other["num_hidden_layers"]


def test_experts_in_another_form_compute_the_same(peer: Peer, tmp_path: Path) -> None:
    ours, theirs = ran(peer.configs["experts"], tmp_path), peer.written("experts")
    assert make.read(ours).keys() != make.read(theirs).keys()
    assert torch.equal(logits_of(load(ours)), logits_of(load(theirs)))


@pytest.mark.parametrize("name", BREAKS)
def test_what_mergekit_cannot_finish_is_a_model_here(name: str, peer: Peer, tmp_path: Path) -> None:
    assert "num_hidden_layers" in peer.failed[name]
    first, second = (it["sources"][0]["layer_range"] for it in BREAKS[name]["slices"])
    (wanted,) = replay(load(peer.place / name), [[*range(*first), *range(*second)]])
    assert torch.allclose(logits_of(load(ran(peer.configs[name], tmp_path))), wanted, atol=2e-4)


def test_the_weights_are_those_that_ts_writes_without_yaml(peer: Peer, tmp_path: Path) -> None:
    ts.write(ts.ops.select_layers(ts.open(peer.place / "one"), "0-3,2-5"), tmp_path / "dest")
    assert make.same(make.read(tmp_path / "dest"), make.read(peer.written("self-stack")))
