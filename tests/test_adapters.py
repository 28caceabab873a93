"""Layer operations on a PEFT adapter: its tensors and its config follow as those of the model do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from test_layers import TOKENS
from transformers import AutoModelForCausalLM, GenerationConfig

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import RefusedError

SEQUENCE = (0, 2, 2, 5, 1)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.plain(tmp_path_factory.mktemp("six") / "model", layers=6, shards=2)


def adapted(model: Path, place: Path, **settings: Any) -> Path:
    """Write an adapter in which every factor is random, as PEFT writes it."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(place)
    return place


def logits(model: Path, adapter: Path) -> torch.Tensor:
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    with torch.no_grad():
        return wrapped.eval()(TOKENS, use_cache=False).logits


def merged(model: Path, adapter: Path, place: Path) -> Path:
    """Let PEFT merge the adapter into the model."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    whole.generation_config = GenerationConfig()  # transformers refuses to write back the one that it read
    whole.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_to_transform": [1, 2, 5]},
        {"rank_pattern": {"model.layers.2.self_attn.q_proj": 8}, "alpha_pattern": {"layers.5.mlp.down_proj": 32}},
        {"exclude_modules": ["model.layers.1.mlp.down_proj"]},
    ],
    ids=str,
)
def test_an_adapter_follows_its_model(settings: dict[str, Any], six: Path, tmp_path: Path) -> None:
    adapter = adapted(six, tmp_path / "adapter", **settings)
    ts.write(ts.ops.select_layers(ts.open(six), SEQUENCE), tmp_path / "model")
    ts.write(ts.ops.select_layers(ts.open(adapter), SEQUENCE), tmp_path / "dest")
    # PEFT merges first, and the layers of the merged model are re-ordered: the adapter's config plays no part in it.
    whole = merged(six, adapter, tmp_path / "merged")
    ts.write(ts.ops.select_layers(ts.open(whole), SEQUENCE), tmp_path / "wanted")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "wanted", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = plain(TOKENS, use_cache=False).logits
    found = logits(tmp_path / "model", tmp_path / "dest")
    assert (found - wanted).abs().max() < 2e-4
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (bare(TOKENS, use_cache=False).logits - wanted).abs().max() > 0.1


def test_an_adapter_stays_one_file_beside_its_config(six: Path, tmp_path: Path) -> None:
    adapter = adapted(six, tmp_path / "adapter")
    ts.write(ts.ops.drop_layers(ts.open(adapter), "3"), tmp_path / "dest", max_shard_size="1KB")
    assert sorted(path.name for path in (tmp_path / "dest").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tensorsurgeon.json",
    ]  # fmt: skip
    assert "num_hidden_layers" not in json.loads((tmp_path / "dest/adapter_config.json").read_text())


def test_an_adapter_made_for_a_number_of_layers_is_refused(six: Path, tmp_path: Path) -> None:
    adapter = adapted(six, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["layer_replication"] = [[0, 4], [2, 6]]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(RefusedError, match="'layer_replication' is .*ties the adapter to the model's layers"):
        ts.ops.drop_layers(ts.open(adapter), "3")


def test_inspect_tells_what_an_adapter_is(six: Path, tmp_path: Path) -> None:
    adapter = adapted(six, tmp_path / "adapter", use_rslora=True, rank_pattern={"model.layers.2.self_attn.q_proj": 8})
    tables = ts.exams.inspect(ts.open(adapter)).tables
    (row,) = tables["model"]
    assert (row["adapter"], row["pairs"], row["ranks"], row["max-lora-rank"]) == ("LORA rsLoRA", 12, "4, 8", 8)
    assert row["scales"] == "2.82843, 4"
    assert {(it["role"], it["rank"], it["pairs"]) for it in tables["pairs"]} == {
        ("attention q", 4, 5), ("attention q", 8, 1), ("mlp down", 4, 6),
    }  # fmt: skip


def test_verify_finds_what_is_wrong_with_an_adapter(six: Path, tmp_path: Path) -> None:
    adapter = adapted(six, tmp_path / "adapter")
    assert ts.exams.verify(adapter, deep=True).problems == ()
    tensors = make.read(adapter)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors.pop(name)
    tensors[name.replace("layers.1", "layers.2")] = torch.full((3, 192), float("nan"))
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj", "gone"], "r": 4}))
    problems = "\n".join(ts.exams.verify(adapter, deep=True).problems)
    for text in ("layers.1.self_attn.q_proj: has lora_B but no lora_A", "A is [3, 192]", "target_modules has 'gone'",
                 "NaN"):  # fmt: skip
        assert text in problems
