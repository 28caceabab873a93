"""Findings made up in the form that exams return them, with values as those of real models lie."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from math import erf, exp, log2, nan, sqrt
from typing import Any

from tensorsurgeon.registry import Findings

ROLES = {
    "attention q": ("self_attn.q_proj", 4096, 4096),
    "attention k": ("self_attn.k_proj", 1024, 4096),
    "attention v": ("self_attn.v_proj", 1024, 4096),
    "attention o": ("self_attn.o_proj", 4096, 4096),
    "attention q norm": ("self_attn.q_norm", 1, 128),
    "attention k norm": ("self_attn.k_norm", 1, 128),
    "mlp gate": ("mlp.gate_proj", 12288, 4096),
    "mlp up": ("mlp.up_proj", 12288, 4096),
    "mlp down": ("mlp.down_proj", 4096, 12288),
    "norm attention": ("input_layernorm", 1, 4096),
    "norm mlp": ("post_attention_layernorm", 1, 4096),
    "mlp router": ("mlp.gate", 128, 4096),
}

OCTAVE = -40
BINS = 100


def edge(number: int) -> float:
    return 2.0 ** (OCTAVE + number // 4) * (1 + number % 4 / 4)


def histogram(elements: int, deviation: float, mean: float = 0.0, wide: float = 0.002) -> dict[str, Any]:
    """Return the histogram of a normal distribution, a share of which (`wide`) is six times as wide."""

    def below(value: float) -> float:
        narrow, broad = (0.5 * (1 + erf((value - mean) / (width * sqrt(2)))) for width in (deviation, 6 * deviation))
        return (1 - wide) * narrow + wide * broad

    edges = [edge(number) for number in range(BINS + 81)]
    pairs = list(pairwise(edges))
    return {
        "octave": OCTAVE,
        "negative": [round(elements * (below(-low) - below(-high))) for low, high in pairs],
        "zero": round(elements * 1e-6),
        "positive": [round(elements * (below(high) - below(low))) for low, high in pairs],
    }


def tensors(layers: int) -> Iterator[tuple[str, str, int | None, int, int]]:
    """Yield name, role, layer and sizes."""
    yield "model.embed_tokens.weight", "embedding token", None, 151936, 4096
    for layer in range(layers):
        for role, (module, rows, columns) in ROLES.items():
            yield f"model.layers.{layer}.{module}.weight", role, layer, rows, columns
    yield "model.norm.weight", "norm final", None, 1, 4096
    yield "lm_head.weight", "head output", None, 151936, 4096


def magnitudes(chance: random.Random, count: int, typical: float, rare: float) -> list[float]:
    found = [typical * chance.lognormvariate(0, 0.12) for _ in range(count)]
    for place in chance.sample(range(count), 3):
        found[place] *= 1 + rare * chance.random()
    return found


def autopsy(layers: int = 36, model: str | None = None, seed: int = 5) -> Findings:
    """Return what an exam might tell of each tensor of a model; one is broken, one has a massive channel."""
    chance = random.Random(seed)
    rows, details = [], []
    for name, role, layer, height, width in tensors(layers):
        depth = (layer or 0) / max(1, layers - 1)
        vector = height == 1
        deviation = (0.4 if vector else 0.02 + 0.006 * depth) * chance.lognormvariate(0, 0.05)
        massive = name == f"model.layers.{min(3, layers - 1)}.mlp.down_proj.weight"
        tail = 60 if massive else 5 * chance.lognormvariate(0, 0.3)
        broken = name == f"model.layers.{layers // 2}.self_attn.k_proj.weight"
        named = {"name": name, "model": model} if model else {"name": name}
        row = {
            **named,
            "layer": layer,
            "role": role,
            "dtype": "BF16",
            "shape": [width] if vector else [height, width],
            "elements": height * width,
            "mean": nan if broken else (1.1 if vector else chance.gauss(0, 2e-5)),
            "deviation": nan if broken else deviation,
            "largest": nan if broken else deviation * tail,
            "kurtosis": None if vector else tail**1.4 * exp(chance.gauss(0, 0.2)) * (1 + 2 * (depth - 0.5) ** 2),
            "zeros": 0 if chance.random() < 0.6 else chance.randrange(1, 400),
            "non-finite": 7 if broken else 0,
        }
        detail: dict[str, Any] = {
            **named,
            "histogram": histogram(height * width, deviation, 1.1 if vector else 0, wide=4e-3 if massive else 1e-5),
        }
        if not vector:
            detail["rows"] = {"largest": magnitudes(chance, 256, 4 * deviation, 3), "group": height // 128}
            detail["columns"] = {"largest": magnitudes(chance, 256, 4 * deviation, tail), "group": width // 256}
        if role == "attention o":
            values = [12 * deviation * (i + 1) ** -0.35 * exp(-((i / 420) ** 3)) for i in range(0, 512, 2)]
            detail["spectrum"] = {"values": values, "step": 2}
        rows.append(row)
        details.append(detail)
    facts = {"name": "Qwen/Qwen3-8B", "architecture": "Qwen3ForCausalLM", "parameters": 8190735360, "dtype": "bfloat16"}
    facts |= {"layers": f"{layers} (model.layers.N)", "tensors": len(rows), "shards": 5, "warnings": "none"}
    shards = [
        {"file": f"model-{n:05}-of-00005.safetensors", "tensors": 80 - n, "bytes": 3 * 10**9 + n} for n in range(5)
    ]
    broken_name = f"model.layers.{layers // 2}.self_attn.k_proj.weight"
    problems = (f"{broken_name}: 7 elements are NaN; the tensor was damaged, or training diverged.",)
    return Findings({"model": [facts], "tensors": rows, "shards": shards}, problems, details)


def noise(layers: int = 28) -> Findings:
    """Return what an exam might tell of two models side by side, one of them a noisy copy."""
    base, noisy = autopsy(layers, "base", 1), autopsy(layers, "noisy", 2)
    pairs = zip(base.details, noisy.details, strict=True)
    laid = [{**it, "histograms": {"base": it["histogram"], "noisy": other["histogram"]}} for it, other in pairs]
    change = [
        {
            **{key: row[key] for key in ("name", "layer", "role")},
            "change": log2(1 + place % 7) - 1.2,
            "cosine": 1 - place * 1e-5,
        }
        for place, row in enumerate(base.tables["tensors"])
    ]
    facts = [{**base.tables["model"][0], "model": "base"}, {**noisy.tables["model"][0], "model": "noisy"}]
    both = [*base.tables["tensors"], *noisy.tables["tensors"]]
    return Findings({"model": facts, "tensors": both, "change": change}, (), [*laid, *noisy.details])
