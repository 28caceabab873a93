"""Where vLLM reads a config otherwise than transformers: said at plan time, refused for that target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.engines import engine_warnings, vllm_warnings
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.plan import make_plan

FULL, SLIDING = "full_attention", "sliding_attention"

# Worked by hand from vLLM's model files: the settings, and which layers it takes for something else.
CASES: list[tuple[str, dict[str, Any], int, str]] = [
    ("gpt_oss", {"layer_types": [SLIDING, FULL, SLIDING, FULL]}, 4, ""),
    ("gpt_oss", {"layer_types": [SLIDING, SLIDING, FULL]}, 3, "slides in layers of even number"),
    ("gpt_oss", {}, 7, ""),
    ("llama4_text", {"interleave_moe_layer_step": 2}, 4, ""),
    ("llama4_text", {"interleave_moe_layer_step": 2, "moe_layers": [0, 2]}, 4, "goes by interleave_moe_layer_step"),
    ("llama4_text", {"interleave_moe_layer_step": 1, "moe_layers": [0, 1]}, 2, ""),
    ("qwen2", {"layer_types": [FULL, FULL]}, 2, ""),
    ("qwen2", {"layer_types": [FULL, SLIDING]}, 2, "refuses to load it"),
    ("qwen2_moe", {"layer_types": [FULL, SLIDING]}, 2, "has no sliding layers"),
    ("glm4_moe_lite", {"first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"]}, 2, ""),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"]}, 2, "goes by first_k_dense_replace"),
    ("deepseek_v32", {"indexer_types": ["full", "shared"], "index_topk_pattern": "FS"}, 2, ""),
    ("deepseek_v32", {"indexer_types": ["full", "shared"]}, 2, "goes by index_topk_pattern"),
    ("gemma3n_text", {"layer_types": [SLIDING, SLIDING, FULL, SLIDING], "num_kv_shared_layers": 1}, 4, ""),
    ("gemma3n_text", {"layer_types": [FULL, SLIDING, SLIDING, FULL], "num_kv_shared_layers": 1}, 4, "shared keys"),
    ("exaone4", {"layer_types": [FULL, FULL], "sliding_window": 8}, 2, "turns rotary positions on"),
    ("exaone4", {"layer_types": [FULL, FULL], "sliding_window": None}, 2, ""),
    ("exaone4", {"layer_types": [FULL, SLIDING], "sliding_window": 8}, 2, ""),
    ("gemma2", {"layer_types": [FULL, FULL, SLIDING]}, 3, ""),
    ("llama", {}, 3, ""),
]


@pytest.mark.parametrize(("kind", "settings", "count", "said"), CASES, ids=str)
def test_vllm_s_reading(kind: str, settings: dict[str, Any], count: int, said: str) -> None:
    found = list(vllm_warnings(kind, settings, count))
    assert len(found) == bool(said)
    assert all(said in text for text in found)


@pytest.mark.parametrize(
    ("kind", "settings", "warned"),
    [
        ("qwen3_next", {"layer_types": ["linear_attention"] * 3}, True),
        ("qwen3_next", {"layer_types": ["linear_attention", FULL]}, False),
        ("nemotron_h", {"hybrid_override_pattern": "M-M"}, True),
        ("nemotron_h", {"hybrid_override_pattern": "M-*"}, False),
        ("gemma2", {}, False),
    ],
)
def test_hybrids_without_attention_cannot_generate_in_transformers(
    kind: str, settings: dict[str, Any], warned: bool
) -> None:
    assert bool(engine_warnings(kind, settings, 3 if "-" in str(settings) else len(settings.get("layer_types", "..")))[
        "transformers"
    ]) == warned  # fmt: skip


@pytest.fixture
def oss(tmp_path: Path) -> Path:
    types = [SLIDING, FULL] * 2
    return make.save(tmp_path / "oss", make.tensors(4), make.config(4, model_type="gpt_oss", layer_types=types))


def test_the_plan_names_engine_and_consequence(oss: Path) -> None:
    assert not make_plan(ts.ops.drop_layers(ts.open(oss), "1-2")).checkpoint.warnings
    (warning,) = make_plan(ts.ops.drop_layers(ts.open(oss), "1")).checkpoint.warnings
    assert "vLLM slides in layers of even number" in warning
    assert "without a word" in warning
    assert "layers 1-2 of gpt_oss" in warning


def test_a_target_turns_the_warning_into_a_refusal(oss: Path, tmp_path: Path) -> None:
    ckpt = ts.ops.drop_layers(ts.open(oss), "1")
    with pytest.raises(RefusedError, match="vLLM slides"):
        ts.write(ckpt, tmp_path / "dest", target="vllm")
    assert not (tmp_path / "dest").exists()
    ts.write(ckpt, tmp_path / "dest", target="transformers")


def test_a_target_is_an_option_and_a_key_of_recipes(
    oss: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["drop-layers", str(oss), str(tmp_path / "dest"), "--layers", "1", "-n"]
    assert main([*command, "--target", "vllm"]) == 1
    assert main(command) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"source": str(oss), "target": "vllm", "steps": [{"drop-layers": {"layers": 1}}]}))
    capsys.readouterr()
    assert main(["run", str(recipe), str(tmp_path / "dest"), "-n"]) == 1
    assert "vLLM slides" in capsys.readouterr().err
    recipe.write_text(json.dumps({"source": "a", "dest": "b", "target": "tgi"}))
    assert main(["run", str(recipe)]) == 2
    assert "target is one of vllm, transformers, not 'tgi'" in capsys.readouterr().err
