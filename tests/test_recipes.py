"""Every worked example is planned, on headers of the model that it names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import MANNEQUIN
from safetensors.torch import save_file

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.plan import Plan, make_plan
from tensorsurgeon.running import Running, run_under

TOP = Path(__file__).parent.parent
RECIPES = sorted(it for it in (TOP / "recipes").rglob("*.yaml") if "studies" not in it.parts)
"""All but the studies, which are planned by tests of their own."""
SIZES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
MLP = {"gate_proj": (12288, 4096), "up_proj": (12288, 4096), "down_proj": (4096, 12288)}


QWEN25 = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2,
          "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True, "model_type": "qwen2",
          "architectures": ["Qwen2ForCausalLM"]}  # fmt: skip


GEMMA3 = {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_hidden_layers": 34,
          "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "model_type": "gemma3_text"}  # fmt: skip


def described_gemma3() -> dict[str, tuple[str, list[int]]]:
    """Return Gemma 3 4B by names and shapes, with one layer of its vision tower."""
    attention = {"q_proj": (2048, 2560), "k_proj": (1024, 2560), "v_proj": (1024, 2560), "o_proj": (2560, 2048)}
    linear = {f"self_attn.{name}": size for name, size in attention.items()}
    linear |= {"mlp.gate_proj": (10240, 2560), "mlp.up_proj": (10240, 2560), "mlp.down_proj": (2560, 10240)}
    norms = {"self_attn.q_norm": 256, "self_attn.k_norm": 256}
    norms |= {f"{name}_layernorm": 2560 for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")}
    tensors = {"language_model.model.embed_tokens.weight": ("BF16", [262208, 2560])}
    for layer in range(34):
        prefix = f"language_model.model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": ("BF16", list(size)) for name, size in linear.items()}
        tensors |= {f"{prefix}{name}.weight": ("BF16", [size]) for name, size in norms.items()}
    vision = "vision_tower.vision_model.encoder.layers.0."
    tensors |= {f"{vision}self_attn.{name}.weight": ("BF16", [1152, 1152]) for name in ("q_proj", "k_proj", "v_proj")}
    tensors |= {f"{vision}mlp.fc1.weight": ("BF16", [4304, 1152]), f"{vision}mlp.fc2.weight": ("BF16", [1152, 4304])}
    return tensors | {"language_model.model.norm.weight": ("BF16", [2560])}


def described_qwen25() -> dict[str, tuple[str, list[int]]]:
    """Return Qwen2.5-3B by names and shapes."""
    attention = {"q_proj": (2048, 2048), "k_proj": (256, 2048), "v_proj": (256, 2048), "o_proj": (2048, 2048)}
    linear = {f"self_attn.{name}": size for name, size in attention.items()}
    linear |= {"mlp.gate_proj": (11008, 2048), "mlp.up_proj": (11008, 2048), "mlp.down_proj": (2048, 11008)}
    tensors: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [151936, 2048])}
    for layer in range(36):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": ("BF16", list(size)) for name, size in linear.items()}
        tensors |= {f"{prefix}self_attn.{name}.bias": ("BF16", [attention[name][0]]) for name in list(attention)[:3]}
        tensors |= {
            f"{prefix}{name}.weight": ("BF16", [2048]) for name in ("input_layernorm", "post_attention_layernorm")
        }
    return tensors | {"model.norm.weight": ("BF16", [2048])}


def described(quantized: bool) -> dict[str, tuple[str, list[int]]]:
    """Return Qwen3-8B by names and shapes."""
    tensors: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [151936, 4096])}
    for layer in range(36):
        prefix = f"model.layers.{layer}."
        linear = {f"self_attn.{name}": size for name, size in SIZES.items()}
        linear |= {f"mlp.{name}": size for name, size in MLP.items()}
        for name, (rows, columns) in linear.items():
            tensors[f"{prefix}{name}.weight"] = ("F8_E4M3" if quantized else "BF16", [rows, columns])
            if quantized:
                tensors[f"{prefix}{name}.weight_scale_inv"] = ("BF16", [rows // 128, columns // 128])
        for name, size in [("input_layernorm", 4096), ("post_attention_layernorm", 4096)]:
            tensors[f"{prefix}{name}.weight"] = ("BF16", [size])
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}self_attn.{name}.weight"] = ("BF16", [128])
    return tensors | {"model.norm.weight": ("BF16", [4096]), "lm_head.weight": ("BF16", [151936, 4096])}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what recipes name: models of 36 layers of zeros that take no disk, and a file of directions."""
    hub = tmp_path_factory.mktemp("hub")
    settings = make.config(36, hidden_size=4096, quantization_config=make.fp8_settings())
    make.sparse(hub / "Qwen/Qwen3-8B-FP8", described(quantized=True), settings)
    for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"):
        make.sparse(hub / name, described(quantized=False), make.config(36, hidden_size=4096))
    make.sparse(hub / "Qwen/Qwen2.5-3B", described_qwen25(), make.config(36, **QWEN25))
    nested = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": GEMMA3,
              "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152}}  # fmt: skip
    make.sparse(hub / "google/gemma-3-4b-it", described_gemma3(), nested)
    generator = torch.Generator().manual_seed(0)
    bases = {f"L{layer}": torch.randn(2048, 10, generator=generator) for layer in range(36)}
    save_file(
        {name: torch.linalg.qr(it)[0].T.contiguous() for name, it in bases.items()}, hub / "languages.safetensors"
    )
    return hub


def test_every_experiment_has_a_recipe() -> None:
    """One for each of deletion, skipping, doubling, reversal, repetition, subset, stitching, extraction and damage."""
    names = {path.stem for path in RECIPES}
    assert names >= {
        "delete-first-8", "delete-last-8", "delete-middle-8", "delete-a-window", "delete-one",
        "keep-every-second", "keep-every-third", "keep-every-fourth", "keep-even", "keep-odd",
        "keep-first-half", "keep-second-half", "double-one", "double-a-block", "double-all",
        "reverse-a-block", "reverse-first-half", "reverse-second-half", "reverse-all",
        "repeat-one-3", "repeat-one-5", "repeat-one-10", "keep-a-subset",
        "stitch-base-and-instruct", "mergekit-self-stack", "method-a", "method-b",
        "kernel-surgery", "degradation",
    }  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned(
    recipe: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A folder of the name of a hub id is a directory like any other.
    monkeypatch.chdir(hub)
    # Each variant has a destination of its own; of the others it is given here.
    dest = [] if "variants" in recipe.read_text() else [str(tmp_path / "dest")]
    assert main(["run", str(recipe), *dest, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for plan in found if isinstance(found, list) else [found]:
        assert plan["bytes_to_write"] > 10**9
        assert plan["steps"]
        assert max(shard["bytes"] for shard in plan["shards"]) < 5_100_000_000


def planned(recipe: str, hub: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> dict[str, Plan]:
    """Return the plans of a recipe's variants by the names of their destinations."""
    monkeypatch.chdir(hub)
    with run_under(Running(planned=True)):
        recipes = ts.load_recipes(TOP / "recipes" / recipe, settings)
        return {Path(it.dest).name: make_plan(it.checkpoint()) for it in recipes}


def computed(plan: Plan) -> set[str]:
    return {name for name, it in plan.checkpoint.tensors.items() if not it.span}


def test_the_degradation_recipe_is_the_study_s(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its levels are written here as the study gives them, its groups as the weights that it changes."""
    levels = {
        "mult-gauss": ["0", "0.35", "0.7", "1.05", "1.4"],
        "ablate": ["0", "0.2", "0.4", "0.6", "0.8"],
        "uniform-quant": ["1024", "256", "64", "16", "4"],
    }
    layer = "language_model.model.layers.{}."
    mlp = ("gate_proj", "up_proj", "down_proj")
    groups = {
        "attention-v": {f"{layer.format(it)}self_attn.v_proj.weight" for it in range(34)},
        "mlp": {f"{layer.format(it)}mlp.{name}.weight" for it in range(34) for name in mlp},
        "embedding": {"language_model.model.embed_tokens.weight"},
    }
    plans = planned("degradation.yaml", hub, monkeypatch)
    names = [f"{method}-{group}-{level}-42" for method in levels for group in groups for level in levels[method]]
    assert list(plans) == names
    for name, plan in plans.items():
        (group,) = (words for words in groups if f"-{words}-" in name)
        assert computed(plan) == (set() if name.endswith("-0-42") else groups[group]), name
        assert any("head is tied" in text for text in plan.checkpoint.warnings) == (
            computed(plan) == groups["embedding"]
        )


def test_the_degradation_recipe_is_repeated_with_other_seeds(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = planned("degradation.yaml", hub, monkeypatch, "variants.0.seed={from: 42, repeats: 10}")
    seeds = [name.removeprefix("mult-gauss-mlp-0.35-") for name in plans if name.startswith("mult-gauss-mlp-0.35-")]
    assert seeds == [str(seed) for seed in range(42, 52)]
    assert len({plans[f"mult-gauss-mlp-0.35-{seed}"].digest for seed in seeds}) == 10


def test_the_kernel_surgery_recipe_is_the_study_s(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = planned("kernel-surgery.yaml", hub, monkeypatch).values()
    assert computed(plan) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(9, 27)}
    assert [row["directions"] for row in plan.checkpoint.report["projected layers"]] == [10] * 18


def test_the_pages_of_the_mannequin_are_made(tmp_path: Path) -> None:
    script = TOP / "recipes" / "look-inside.sh"
    models = [str(MANNEQUIN / name) for name in ("bf16", "fp8")]
    subprocess.run([str(script), *models, str(tmp_path), str(MANNEQUIN / "tuned"), models[0]], check=True)
    made = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert made.keys() == {"autopsy.html", "side-by-side.html", "diff.html", "noise.html"}
    assert all(1e6 < size < 6e6 for size in made.values())
