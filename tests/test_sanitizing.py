"""Adapters made fit for an engine: mended without loss, refused where they cannot be, and what is lost is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, SERVED, TOKENS, load, logits_of
from peft import PeftModel
from safetensors.torch import load_file
from test_merging import adapted, damaged

import make
import tensorsurgeon as ts
from serving import Answer, Job, Request, adapter_answers
from tensorsurgeon.cli import main
from tensorsurgeon.errors import RefusedError

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")

PREFIX = "base_model.model.model.layers."
Renamer = Callable[[str], str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make(ARCHITECTURES["qwen3"], tmp_path_factory.mktemp("base") / "base", **SERVED)


def renamed(adapter: Path, place: Path, rename: Renamer, **config: Any) -> Path:
    """Write an adapter whose tensors have other names."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return damaged(
        adapter, place, config, **dict.fromkeys(tensors), **{rename(name): it for name, it in tensors.items()}
    )


def sanitized(adapter: Path, place: Path, base: Path | None = None, for_: str = "vllm") -> dict[str, Any]:
    location = {"base": str(base)} if base else {}
    return ts.write(ts.ops.sanitize_lora(ts.open(adapter), for_=for_, **location), place)  # type: ignore[arg-type]


def applied(base: Path, adapter: Path) -> torch.Tensor:
    return logits_of(PeftModel.from_pretrained(load(base), adapter).eval())


def without(adapter: Path, place: Path, *words: str, **config: Any) -> Path:
    """Write an adapter without the tensors in whose names a word is."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return damaged(adapter, place, config, **{name: None for name in tensors if any(word in name for word in words)})


MENDED: dict[str, Callable[[Path, Path], tuple[Path, Path]]] = {
    "rsLoRA": lambda base, place: (one := adapted(base, place / "own", use_rslora=True), one),
    "patterns": lambda base, place: (
        one := adapted(base, place / "own", target_modules=["q_proj", "k_proj", "down_proj"],
                       rank_pattern={"k_proj": 2}, alpha_pattern={"layers.5.mlp.down_proj": 32}), one),
    "rank of no engine": lambda base, place: (one := adapted(base, place / "own", r=11), one),
    "embedding and head": lambda base, place: (
        one := adapted(base, place / "own", target_modules=["embed_tokens", "lm_head", "v_proj"]), one),
    "names with default": lambda base, place: (
        renamed(one := adapted(base, place / "own"), place / "wrong",
                lambda it: it.replace(".weight", ".default.weight")), one),
    "no prefix": lambda base, place: (
        renamed(one := adapted(base, place / "own"), place / "wrong", lambda it: it.removeprefix("base_model.model.")),
        one),
    "wrong prefix": lambda base, place: (
        renamed(one := adapted(base, place / "own"), place / "wrong",
                lambda it: it.replace("base_model.model.model.", "base_model.model.")), one),
    "other targets in the config": lambda base, place: (
        damaged(one := adapted(base, place / "own"), place / "wrong", {"target_modules": ["q_proj", "o_proj"]}), one),
    "PiSSA": lambda base, place: (one := adapted(base, place / "own", init_lora_weights="pissa"), one),
    "norms as a whole": lambda base, place: (
        one := adapted(base, place / "own", modules_to_save=["norm"]),
        without(one, place / "less", "norm", modules_to_save=None)),
    "a bias": lambda base, place: (
        damaged(one := adapted(base, place / "own"), place / "wrong", {"bias": "all"},
                **{f"{PREFIX}0.self_attn.q_proj.bias": torch.ones(128)}), one),
}  # fmt: skip
"""An adapter with something to mend, and one that PEFT applies as the mended one is to be applied."""


@pytest.mark.parametrize("kind", MENDED)
def test_what_is_mended_does_what_it_did(kind: str, base: Path, tmp_path: Path) -> None:
    wrong, meant = MENDED[kind](base, tmp_path)
    receipt = sanitized(wrong, tmp_path / "right", base)
    assert torch.allclose(applied(base, tmp_path / "right"), applied(base, meant), atol=2e-4)
    config = json.loads((tmp_path / "right" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (config["r"], False, {})
    (served,) = receipt["report"]["served"]
    assert served["serve with"] == f"--max-lora-rank {config['r']}"
    tensors = make.read(tmp_path / "right")
    assert {it.shape[0] for name, it in tensors.items() if "lora_A" in name or "embedding_A" in name} == {config["r"]}
    again = sanitized(tmp_path / "right", tmp_path / "again", base)
    assert make.same(make.read(tmp_path / "again"), tensors)
    assert "mended" not in again["report"]


def test_what_is_dropped_is_told_and_goes_into_a_new_base(base: Path, tmp_path: Path) -> None:
    whole = adapted(base, tmp_path / "whole", target_modules=["q_proj", "lm_head"], modules_to_save=["norm"])
    receipt = sanitized(whole, tmp_path / "served", base, "vllm-minimal")
    dropped = {row["dropped"]: row["share of the adapter"] for row in receipt["report"]["dropped"]}
    tensors, before = load_file(whole / "adapter_model.safetensors"), make.read(base)
    norms = [name for name in before if "norm" in name]
    assert dropped.keys() == {"lm_head", *norms}
    squares = {name: (tensors[f"base_model.model.{name}"] - before[name]) ** 2 for name in norms}
    for module in ["lm_head", *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(6))]:
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        squares[module] = (2 * b @ a) ** 2
    total = sum(float(it.sum()) for it in squares.values())
    for name, share in dropped.items():
        assert share == pytest.approx(float(squares[name].sum()) / total, rel=1e-4)
    (lost,) = receipt["report"]["lost"]
    assert lost["share of the adapter"] == pytest.approx(sum(dropped.values()), rel=1e-4)
    ts.write(ts.ops.merge_lora(ts.open(base), adapter=str(whole), rest_of="vllm-minimal"), tmp_path / "new")
    assert torch.allclose(applied(tmp_path / "new", tmp_path / "served"), applied(base, whole), atol=2e-4)


def test_head_and_embeddings_are_kept_where_vllm_takes_them(base: Path, tmp_path: Path) -> None:
    other = architectures.make(ARCHITECTURES["qwen2"], tmp_path / "qwen2", **SERVED)
    for model, kept in ((base, True), (other, False)):
        adapter = adapted(model, tmp_path / f"{kept}", target_modules=["embed_tokens", "lm_head", "v_proj"])
        receipt = sanitized(adapter, tmp_path / f"{kept}-dest", model)
        assert ("dropped" in receipt["report"]) is not kept
        assert any("lm_head" in name for name in make.read(tmp_path / f"{kept}-dest")) is kept
    receipt = sanitized(tmp_path / "True", tmp_path / "unknown")
    assert any(
        "embed_tokens and lm_head: vLLM takes pairs for them with some models" in it for it in receipt["warnings"]
    )


def test_the_command_line_says_what_to_serve_with(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapted(base, tmp_path / "adapter", r=11)
    arguments = ["sanitize-lora", str(adapter), str(tmp_path / "dest"), "--for", "vllm", "--base", str(base)]
    assert main(arguments) == 0
    assert "--max-lora-rank 16" in capsys.readouterr().out


NAME = f"{PREFIX}1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({f"{NAME}A.weight": None}, "has lora_B but no lora_A; half a pair"),
        ({f"{NAME}B.weight": torch.ones(100, 4)}, r"B \[100, 4\]; 128 rows of 128 need"),
        ({f"{NAME}A.weight": torch.ones(8, 128), f"{NAME}B.weight": torch.ones(128, 8)},
         r"A is \[8, 128\] and B \[128, 8\], and the config says rank 4"),
        ({f"{NAME}B.weight": torch.full((128, 4), float("nan"))}, "holds NaN or infinity"),
        ({f"{PREFIX}9.self_attn.q_proj.lora_{side}.weight": torch.ones(4 if side == "A" else 128, 128 if side == "A"
          else 4) for side in "AB"}, "layers.9.self_attn.q_proj: the base has no such module"),
        ({f"{NAME}magnitude_vector": torch.ones(128)}, "is DoRA, whose lengths no pair of factors can hold"),
        ({"base_model.model.prompt_embeddings": torch.ones(4, 4)}, "is of no kind that is known"),
        ({"config": {"peft_type": "IA3"}}, "peft_type is 'IA3', not 'LORA'"),
        ({"config": {"r": 0}}, "r is 0; the scale of the pairs is not known"),
        ({"config": {"lora_alpha": None}}, "lora_alpha is None"),
        ({"config": {"layer_replication": [[0, 4], [2, 6]]}}, "'layer_replication' is"),
        ({"config": {"trainable_token_indices": [1]}}, "'trainable_token_indices' is"),
        ({"config": {"init_lora_weights": "olora"}}, "init_lora_weights is 'olora'"),
        ({"config": {"init_lora_weights": "pissa_niter_4"}}, "init_lora_weights is 'pissa_niter_4'"),
        ({"config": {"fan_in_fan_out": True}}, "fan_in_fan_out is true"),
        ({"config": {"r": 5}}, "the config says rank 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_mended_is_refused(base: Path, tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    changes = dict(changes)
    config = changes.pop("config", None)
    wrong = damaged(adapted(base, tmp_path / "adapter"), tmp_path / "wrong", config, **changes)
    with pytest.raises(RefusedError, match=text):
        sanitized(wrong, tmp_path / "dest", base)


def test_without_a_base_a_name_that_begins_below_the_top_is_refused(base: Path, tmp_path: Path) -> None:
    wrong, _ = MENDED["wrong prefix"](base, tmp_path)
    with pytest.raises(RefusedError, match="is not named from the top of the model.*With --base its name can be found"):
        sanitized(wrong, tmp_path / "dest")
    sanitized(adapted(base, tmp_path / "sound"), tmp_path / "dest")


def test_half_a_pair_of_a_tied_head_is_refused(tmp_path: Path) -> None:
    tied = architectures.make(ARCHITECTURES["qwen3"], tmp_path / "tied", **SERVED, tie_word_embeddings=True)
    half = {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 128)}
    wrong = damaged(adapted(tied, tmp_path / "adapter"), tmp_path / "wrong", **half)
    with pytest.raises(RefusedError, match="lm_head: has lora_A but no lora_B; half a pair"):
        sanitized(wrong, tmp_path / "dest", tied)


def test_a_model_and_an_adapter_of_nothing_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is no PEFT adapter"):
        sanitized(base, tmp_path / "dest")
    head = adapted(base, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(RefusedError, match="nothing of the adapter can be served by vllm-minimal"):
        sanitized(head, tmp_path / "dest", base, "vllm-minimal")
    large = adapted(base, tmp_path / "large", r=513)
    with pytest.raises(RefusedError, match="the rank is 513; vLLM serves at most 512"):
        sanitized(large, tmp_path / "dest", base)


class Served:
    """What vLLM said with each adapter as it was and mended, and what PEFT computes with what was meant."""

    def __init__(self, base: Path, place: Path) -> None:
        self.meant: dict[str, torch.Tensor] = {"nothing": logprobs(logits_of(load(base)))}
        adapters: dict[str, Path] = {}
        for kind, make_it in MENDED.items():
            (place / kind).mkdir()
            adapters[f"{kind}: wrong"], meant = make_it(base, place / kind)
            sanitized(adapters[f"{kind}: wrong"], place / kind / "right", base)
            adapters[f"{kind}: right"] = place / kind / "right"
            self.meant[kind] = logprobs(applied(base, meant))
        sound = adapted(base, place / "sound")
        lost = f"{PREFIX}1.mlp.down_proj.lora_A.weight"
        adapters["half a pair"] = damaged(sound, place / "half", **{lost: None})
        adapters["DoRA"] = adapted(base, place / "dora", use_dora=True)
        adapters["another kind of config"] = damaged(sound, place / "zero", {"r": 0})
        adapters["rank above the engine's"] = adapted(base, place / "above", r=33)
        requests = [Request(row) for row in TOKENS.tolist()]
        found = adapter_answers(Job(base, requests, adapters=list(adapters.values()), max_lora_rank=32))
        self.found = dict(zip(adapters, found, strict=True))

    def difference(self, kind: str, meant: str) -> float:
        """Return the largest difference between vLLM's log probabilities and PEFT's."""
        answers = self.found[kind]
        assert not isinstance(answers, str), answers
        return float((scores(answers) - self.meant[meant]).abs().max())


def scores(answers: list[Answer]) -> torch.Tensor:
    return torch.tensor([answer.prompt_logprobs for answer in answers])


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None])[..., 0]


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(base, tmp_path_factory.mktemp("served"))


@pytest.mark.serving
@pytest.mark.parametrize("kind", MENDED)
def test_vllm_serves_the_mended_adapter_as_peft_applies_it(kind: str, served: Served) -> None:
    assert served.difference(f"{kind}: right", kind) < 1e-3
    assert (served.meant[kind] - served.meant["nothing"]).abs().max() > 0.1


@pytest.mark.serving
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("names with default: wrong", "unsupported LoRA weight"),
        ("norms as a whole: wrong", "modules_to_save"),
        ("a bias: wrong", "bias"),
        ("half a pair", "AssertionError"),
        ("DoRA", "DoRA"),
        ("PiSSA: wrong", "pissa"),
        ("another kind of config", "positive integer"),
        ("rank above the engine's", "greater than max_lora_rank"),
    ],
)
def test_vllm_refuses_what_is_not_mended(kind: str, said: str, served: Served) -> None:
    answer = served.found[kind]
    assert isinstance(answer, str)
    assert said in answer


@pytest.mark.serving
def test_vllm_takes_a_wrong_prefix_for_nothing_without_a_word(served: Served) -> None:
    assert served.difference("wrong prefix: wrong", "nothing") < 1e-3
