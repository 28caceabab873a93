"""Every worked example is planned, on headers of the model that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import make
from tensorsurgeon.cli import main

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
SIZES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
MLP = {"gate_proj": (12288, 4096), "up_proj": (12288, 4096), "down_proj": (4096, 12288)}


@pytest.fixture(scope="module")
def qwen3_8b_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-8B-FP8 by names and shapes: 36 layers of zeros that take no disk."""
    described: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [151936, 4096])}
    for layer in range(36):
        prefix = f"model.layers.{layer}."
        linear = {f"self_attn.{name}": size for name, size in SIZES.items()}
        linear |= {f"mlp.{name}": size for name, size in MLP.items()}
        for name, (rows, columns) in linear.items():
            described[f"{prefix}{name}.weight"] = ("F8_E4M3", [rows, columns])
            described[f"{prefix}{name}.weight_scale_inv"] = ("BF16", [rows // 128, columns // 128])
        for name, size in [("input_layernorm", 4096), ("post_attention_layernorm", 4096)]:
            described[f"{prefix}{name}.weight"] = ("BF16", [size])
        for name in ("q_norm", "k_norm"):
            described[f"{prefix}self_attn.{name}.weight"] = ("BF16", [128])
    described |= {"model.norm.weight": ("BF16", [4096]), "lm_head.weight": ("BF16", [151936, 4096])}
    settings = make.config(36, hidden_size=4096, quantization_config=make.fp8_settings())
    return make.sparse(tmp_path_factory.mktemp("hub") / "Qwen3-8B-FP8", described, settings)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 7


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned(
    recipe: Path, qwen3_8b_fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", f"source={qwen3_8b_fp8}", "--set", f"dest={tmp_path / 'dest'}"]
    assert main(["run", str(recipe), *settings, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes_to_write"] > 10**9
    assert plan["steps"]
    assert max(shard["bytes"] for shard in plan["shards"]) < 5_100_000_000
