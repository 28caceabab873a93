"""Noise of quantisation, held against float64 by hand and the singular value decomposition of LAPACK."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, stats

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import RefusedError, UsageError
from tensorsurgeon.exams.claims import CANCELLING, NOTICEABLE, SIGNIFICANT, overall, verdict_of, weighted_median
from tensorsurgeon.kernels.noise import ks_distance
from tensorsurgeon.kernels.subspaces import angles_between, energies, find_subspaces
from tensorsurgeon.registry import Findings
from tensorsurgeon.running import Running, run_under
from tensorsurgeon.source import ADAPTER

NAME = "model.layers.0.mlp.down_proj.weight"
Weights = dict[str, torch.Tensor]
Numbers = np.ndarray[Any, np.dtype[np.float64]]


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def save(directory: Path, weights: Weights, layers: int = 1) -> ts.Checkpoint:
    return ts.open(make.save(directory, weights, make.config(layers)))


def planted(tmp_path: Path, base: Weights, one: Weights, tuned: Weights, other: Weights) -> list[ts.Checkpoint]:
    """Write A, A - N, B and B - M."""
    models = [base, {k: base[k] - one[k] for k in base}, tuned, {k: tuned[k] - other[k] for k in base}]
    return [save(tmp_path / name, model) for name, model in zip(("A", "AQ", "B", "BQ"), models, strict=True)]


def of_pairs(models: list[ts.Checkpoint], **options: Any) -> Findings:
    return ts.exams.noise(models[0], models[1], models[2], models[3], **options)


def only_row(findings: Findings, table: str = "statistics") -> dict[str, Any]:
    (row,) = findings.tables[table]
    return row


def double(tensor: torch.Tensor) -> Numbers:
    return tensor.double().numpy()


def own_by_hand(weights: Numbers, quantised: Numbers) -> dict[str, float]:
    noise = weights - quantised
    return {
        "SNR": 10 * np.log10((weights**2).sum() / (noise**2).sum()),
        "relative noise": linalg.norm(noise) / linalg.norm(weights),
        "cosine to weights": (weights * noise).sum() / linalg.norm(weights) / linalg.norm(noise),
        "size correlation": np.corrcoef(abs(weights).ravel(), abs(noise).ravel())[0, 1],
        "kurtosis": stats.kurtosis(noise.ravel()),
        "zero share": (noise == 0).mean(),
    }


def joint_by_hand(a: Numbers, a_quantised: Numbers, b: Numbers, b_quantised: Numbers) -> dict[str, float]:
    one, other, delta, kept = a - a_quantised, b - b_quantised, b - a, b_quantised - a_quantised
    n = a.size
    cosine = (one * other).sum() / linalg.norm(one) / linalg.norm(other)
    grids = [(it.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).ravel() for it in (one, other)]
    return {
        "cancelled": 1 - ((one - other) ** 2).sum() / ((one**2).sum() + (other**2).sum()),
        "cosine": cosine,
        "cosine by chance": n**-0.5,
        "z": cosine * n**0.5,
        "sign z": (one * other).sum() / np.sqrt((one**2 * other**2).sum()),
        "norm ratio": linalg.norm(other) / linalg.norm(one),
        "KS": stats.ks_2samp(*grids).statistic,
        "KS limit": 1.628 * np.sqrt((n + n) / (n * n)),
        "delta ratio": linalg.norm(delta) / linalg.norm(one),
        "delta SNR": 10 * np.log10((delta**2).sum() / ((kept - delta) ** 2).sum()),
        "delta cosine": (delta * kept).sum() / linalg.norm(delta) / linalg.norm(kept),
    }


@cache
def tuned_weights() -> tuple[Weights, Weights]:
    """Return a small model, and one that differs from it by little, of low rank, in its linear layers."""
    base = make.tensors(2)

    def change(place: int, tensor: torch.Tensor) -> torch.Tensor:
        rows, columns = tensor.shape
        return 3e-4 * normal(rows, 4, seed=place) @ normal(4, columns, seed=place + 1000)

    changes = {k: change(place, it) for place, (k, it) in enumerate(base.items()) if k.endswith("_proj.weight")}
    tuned = {k: (it.float() + changes[k]).bfloat16() if k in changes else it for k, it in base.items()}
    return base, tuned


@pytest.fixture
def fp8_pairs(tmp_path: Path) -> list[ts.Checkpoint]:
    """A, its FP8 form, a model tuned from A, and its FP8 form."""
    base, tuned = tuned_weights()
    settings = make.config(2, quantization_config=make.fp8_settings())
    written = [
        make.save(tmp_path / "A", base, make.config(2)),
        make.save(tmp_path / "AQ", make.quantized(base), settings, shards=2),
        make.save(tmp_path / "B", tuned, make.config(2)),
        make.save(tmp_path / "BQ", make.quantized(tuned), settings),
    ]
    return [ts.open(directory) for directory in written]


def decoded(weight: torch.Tensor) -> Numbers:
    codes, scale = make.quantize(weight)
    rows, columns = weight.shape
    spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return double(codes.float() * spread)


def test_fp8_of_one_model_by_hand(fp8_pairs: list[ts.Checkpoint]) -> None:
    base, _ = tuned_weights()
    findings = ts.exams.noise(fp8_pairs[0], fp8_pairs[1])
    rows = findings.tables["statistics"]
    assert [row["name"] for row in rows] == sorted(name for name in base if name.endswith("_proj.weight"))
    for row in rows:
        expected = own_by_hand(double(base[row["name"]]), decoded(base[row["name"]]))
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9)
        assert set(row) - set(expected) == {"name", "layer", "role", "shape", "elements"}
    assert rows[7]["layer"] == 1
    assert rows[7]["role"] == "mlp down"
    assert rows[7]["shape"] == [192, 320]
    model = only_row(findings, "model")
    assert model["matrices"] == 14
    assert model["left out"] == "9 tensors that are no matrices; matrices without noise: 2 in MODEL"
    assert model["median SNR"] == weighted_median(rows, "SNR")
    assert "verdict" not in model
    assert not findings.problems
    assert not findings.details


def test_fp8_of_two_models_by_hand(fp8_pairs: list[ts.Checkpoint]) -> None:
    """The change is smaller than steps of FP8, so that both models are rounded alike in part of their elements."""
    base, tuned = tuned_weights()
    findings = of_pairs(fp8_pairs)
    for row in findings.tables["statistics"]:
        one, other = base[row["name"]], tuned[row["name"]]
        expected = joint_by_hand(double(one), decoded(one), double(other), decoded(other))
        second = own_by_hand(double(other), decoded(other))
        expected |= own_by_hand(double(one), decoded(one)) | {f"{key} B": value for key, value in second.items()}
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-7)
        assert row["verdict"] == "partly"
        assert f"cancelled {row['cancelled']:.3g}" in row["because"]
    model = only_row(findings, "model")
    assert model["verdict"] == "partly"
    assert [model[f"matrices: {it}"] for it in ("cancels", "partly", "independent", "adds up")] == [0, 14, 0, 0]
    assert model["the noise is the same and cancels"].startswith("does not hold: it cancels in 0.0% of the elements")
    assert model["left out"].endswith("matrices without noise: 2 in MODEL and 2 in other")


def test_a_quantised_form_may_be_given_decoded(fp8_pairs: list[ts.Checkpoint], tmp_path: Path) -> None:
    written = ts.write(ts.ops.dequantize(fp8_pairs[1], "float32"), tmp_path / "decoded", quiet=True)
    assert written
    given = [str(it.sources[0].directory) for it in (fp8_pairs[0], fp8_pairs[1])]
    one = ts.exams.noise(ts.open(given[0]), given[1])
    other = ts.exams.noise(ts.open(given[0]), quantized=str(tmp_path / "decoded"))
    assert one.tables["statistics"] == other.tables["statistics"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_by_hand(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = [normal(300, 70, seed=seed).to(dtype) for seed in range(4)]
    models = [save(tmp_path / f"{place}", {NAME: it}) for place, it in enumerate(weights)]
    row = only_row(of_pairs(models))
    expected = joint_by_hand(*map(double, weights)) | own_by_hand(*map(double, weights[:2]))
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9)


def mixed(share: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda noise, fresh: share * noise + (1 - share**2) ** 0.5 * fresh


PLANTED = {
    "equal": (mixed(1.0), "cancels", 1.0),
    "nearly equal": (mixed(0.95), "cancels", 0.95),
    "half": (mixed(0.5), "partly", 0.5),
    "hardly": (mixed(0.05), "independent", 0.05),
    "none": (mixed(0.0), "independent", 0.0),
    "half opposite": (mixed(-0.5), "adds up", -0.5),
    "opposite": (mixed(-1.0), "adds up", -1.0),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_verdicts_on_planted_noise(tmp_path: Path, kind: str) -> None:
    mix, verdict, cancelled = PLANTED[kind]
    base, noise = normal(400, 200), normal(400, 200, seed=1, std=0.01)
    other = mix(noise, normal(400, 200, seed=2, std=0.01))
    tuned = base + normal(400, 200, seed=3, std=0.05)
    findings = of_pairs(planted(tmp_path, {NAME: base}, {NAME: noise}, {NAME: tuned}, {NAME: other}))
    row, model = only_row(findings), only_row(findings, "model")
    assert row["verdict"] == model["verdict"] == verdict
    assert row["cancelled"] == pytest.approx(cancelled, abs=0.01)
    assert model[f"matrices: {verdict}"] == 1
    holds = model["the noise is the same and cancels"].startswith("holds: it cancels in 100.0% of the elements")
    assert holds == (verdict == "cancels")
    if kind == "none":
        assert abs(row["z"]) < SIGNIFICANT
        assert "no more than chance" in row["because"]
        assert row["KS"] < row["KS limit"]
    if kind == "hardly":
        assert row["z"] > SIGNIFICANT
        assert "significant" in row["because"]
        assert "small" in row["because"]
    if kind == "equal":
        assert row["delta SNR"] > 60
        assert row["KS"] < row["KS limit"]


def test_the_same_noise_may_be_the_change_itself(tmp_path: Path) -> None:
    """Where both models are rounded to the same numbers, the noise cancels, and so does the change."""
    base = normal(300, 200)
    tuned = base + normal(300, 200, seed=1, std=1e-4)
    rounded = (base * 8).round() / 8
    models = [save(tmp_path / name, {NAME: it}) for name, it in {"A": base, "Q": rounded, "B": tuned}.items()]
    findings = of_pairs([*models, models[1]])
    row = only_row(findings)
    assert row["verdict"] == "cancels"
    assert row["delta SNR"] == pytest.approx(0, abs=1e-9)
    assert row["delta cosine"] is None
    model = only_row(findings, "model")
    assert model["the noise is the same and cancels"] == "holds: it cancels in 100.0% of the elements"
    assert model["the change B - A survives"] == "does not hold: it is off by 100.0% of itself"


def test_noise_of_another_distribution_is_told(tmp_path: Path) -> None:
    base, noise = normal(300, 200), normal(300, 200, seed=1, std=0.01)
    other = torch.rand(300, 200, generator=torch.Generator().manual_seed(2)) * 0.03464 - 0.01732
    row = only_row(of_pairs(planted(tmp_path, {NAME: base}, {NAME: noise}, {NAME: base + 1}, {NAME: other})))
    assert row["KS"] > 3 * row["KS limit"]
    assert row["norm ratio"] == pytest.approx(1, abs=0.02)
    assert row["kurtosis"] == pytest.approx(0, abs=0.1)
    assert row["kurtosis B"] == pytest.approx(-1.2, abs=0.02)


def test_significance_knows_sizes_that_go_together() -> None:
    """Signs are independent, but sizes are the same and heavy-tailed: the cosine spreads more than 1 / sqrt(n)."""
    random = np.random.default_rng(0)
    sizes = np.exp(random.normal(size=2000))
    signs = random.choice([-1, 1], (2, 1000, 2000))
    dots = (sizes**2 * signs[0] * signs[1]).sum(1)
    plain = dots / (sizes**2).sum() * 2000**0.5
    robust = dots / np.sqrt((sizes**4).sum())
    assert plain.std() > 3
    assert robust.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("cancelled", "z", "verdict"),
    [
        (CANCELLING, SIGNIFICANT, "cancels"),
        (0.899, 1e4, "partly"),
        (NOTICEABLE, SIGNIFICANT, "partly"),
        (0.099, 1e4, "independent"),
        (-0.099, -1e4, "independent"),
        (-NOTICEABLE, -SIGNIFICANT, "adds up"),
        (0.95, 4.9, "independent"),
        (-0.95, -4.9, "independent"),
        (0.0, None, "independent"),
    ],
)
def test_limits_of_verdicts(cancelled: float, z: float | None, verdict: str) -> None:
    assert verdict_of({"cancelled": cancelled, "sign z": z})[0] == verdict


def test_the_whole_is_weighed_by_elements() -> None:
    rows = [
        {"elements": 10, "verdict": "cancels", "delta SNR": 20.0},
        {"elements": 1, "verdict": "adds up", "delta SNR": None},
        {"elements": 1, "verdict": "partly", "delta SNR": 0.0},
    ]
    found = overall(rows)
    assert found["verdict"] == "cancels"
    assert found["matrices: adds up"] == found["matrices: partly"] == 1
    assert found["the noise is the same and cancels"] == "does not hold: it cancels in 83.3% of the elements"
    assert found["the change B - A survives"] == "holds: it is off by 10.0% of itself"
    assert "the change B - A survives" not in overall(rows[1:2])
    assert overall(rows[:1])["the noise is the same and cancels"].startswith("holds")
    assert weighted_median(rows, "delta SNR") == 20
    assert weighted_median(rows[1:2], "delta SNR") is None


def low_rank(shape: tuple[int, int], rank: int, seed: int, flat: float = 1e-4) -> torch.Tensor:
    """Return a matrix of which a few directions stand out."""
    rows, columns = shape
    strong = normal(rows, rank, seed=seed) @ torch.diag(2.0 ** -torch.arange(rank)) @ normal(rank, columns, seed=-seed)
    return 1e-3 * strong + flat * normal(rows, columns, seed=seed + 500)


def svd(matrix: Numbers, rank: int) -> tuple[Numbers, Numbers, Numbers]:
    left, values, right = linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values, right[:rank].T


@pytest.mark.parametrize("shape", [(512, 640), (640, 512), (300, 200), (130, 700)])
def test_subspaces_by_hand(tmp_path: Path, shape: tuple[int, int]) -> None:
    rank = 4
    base, noise = normal(*shape), low_rank(shape, rank, seed=1)
    # Half of what stands out in one noise stands out in the other too, turned by a little.
    other = 0.7 * noise + low_rank(shape, rank, seed=2)
    tuned = base + noise + low_rank(shape, rank, seed=3)
    models = planted(tmp_path, {NAME: base}, {NAME: noise}, {NAME: tuned}, {NAME: other})
    findings = of_pairs(models, rank=rank)
    a, a_quantised, b, b_quantised = (double(make.read(it.sources[0].directory)[NAME]) for it in models)
    matrices = {"noise A": a - a_quantised, "noise B": b - b_quantised, "delta": b - a}
    sides = {"output": 0, "input": 2}
    parts = {label: svd(matrix, rank) for label, matrix in matrices.items()}

    compared = findings.tables["subspaces"]
    assert len(compared) == 6
    for row in compared:
        one, two = (parts[label][sides[row["side"]]] for label in row["between"].split(", "))
        angles = np.rad2deg(linalg.subspace_angles(one, two))[::-1]
        size = len(one)
        assert row["overlap"] == pytest.approx((np.cos(np.deg2rad(angles)) ** 2).mean(), abs=1e-4)
        assert row["smallest angle"] == pytest.approx(angles[0], abs=0.05)
        assert row["by chance"] == rank / size
        assert row["over chance"] == pytest.approx(row["overlap"] * size / rank)
        assert row["z"] > 5
    for row in findings.tables["energy"]:
        left, _, right = parts[row["inside"]]
        delta = matrices["delta"]
        inside = delta @ right if row["side"] == "input" else left.T @ delta
        assert row["share"] == pytest.approx((inside**2).sum() / (delta**2).sum(), rel=1e-4)
        assert row["by chance"] == rank / shape[row["side"] == "input"]
    for row in findings.tables["spectra"]:
        values = parts[row["matrix"]][1]
        assert [row["largest"], row["last"]] == pytest.approx(values[[0, rank - 1]], rel=1e-4)
        assert row["following"] == pytest.approx(values[rank], rel=0.05)
        assert row["gap"] == pytest.approx(1 - values[rank] / values[rank - 1], abs=0.03)
        assert row["over flat"] > 2
    summary = only_row(findings)
    pairs = [row for row in compared if row["between"] == "noise A, noise B"]
    assert [summary[f"{row['side']} overlap over chance"] for row in pairs] == [row["over chance"] for row in pairs]
    assert "angles" not in findings.tables


def test_independent_flat_noise_has_subspaces_as_chance_has_it(tmp_path: Path) -> None:
    """A start that all matrices shared would stay in the space that is found of each."""
    shape = (512, 640)
    noises = [normal(*shape, seed=seed, std=0.01) for seed in (1, 2)]
    base = normal(*shape)
    tuned = base + normal(*shape, seed=3, std=0.01)
    findings = of_pairs(planted(tmp_path, {NAME: base}, {NAME: noises[0]}, {NAME: tuned}, {NAME: noises[1]}), rank=8)
    for row in findings.tables["subspaces"]:
        assert abs(row["z"]) < 4
    for row in findings.tables["spectra"]:
        exact = svd(double(noises[0]), 8)[1] if row["matrix"] == "noise A" else None
        assert row["over flat"] == pytest.approx(1, abs=0.05)
        assert row["gap"] < 0.03
        assert exact is None or row["largest"] == pytest.approx(exact[0], rel=0.03)
    for row in findings.tables["energy"]:
        assert row["over chance"] == pytest.approx(1, abs=0.3)


def test_chance_of_subspaces_is_that_of_random_ones() -> None:
    def basis(size: int, seed: int) -> torch.Tensor:
        return torch.linalg.qr(normal(40, size, seed=seed).double())[0]

    found = [angles_between(basis(3, 2 * draw), basis(7, 2 * draw + 1)) for draw in range(1500)]
    overlaps, z = np.array([it.overlap for it in found]), np.array([it.z for it in found])
    assert overlaps.mean() == pytest.approx(found[0].chance, rel=0.02)
    assert found[0].chance == 7 / 40
    assert [z.mean(), z.std()] == pytest.approx([0, 1], abs=0.07)
    assert len(found[0].angles) == 3
    assert angles_between(basis(40, 1), basis(3, 2)).z is None


def test_a_change_of_lower_rank_has_no_more_dimensions(tmp_path: Path) -> None:
    shape = (512, 640)
    delta = normal(512, 3) @ normal(3, 640, seed=9)
    tiles = [(delta[begin : begin + 100], -2 * delta[begin : begin + 100]) for begin in range(0, 512, 100)]
    total = float((delta.double() ** 2).sum())
    one, other = find_subspaces(lambda: tiles, shape, [total, 4 * total], 8, seed=1)
    assert one.rank == other.rank == 3
    assert one.values[:3] == pytest.approx(svd(double(delta), 3)[1][:3], rel=1e-5)
    assert one.gap == pytest.approx(1, abs=1e-3)
    between = angles_between(one.right, other.right)
    assert between.overlap == pytest.approx(1)
    assert len(between.angles) == 3
    assert energies(lambda: tiles, 0, total, [other]) == [pytest.approx((1, 1), rel=1e-5)]


def test_one_model_has_the_noise_in_the_subspace_of_its_weights(tmp_path: Path) -> None:
    base = normal(512, 640, std=0.01) + 10 * low_rank((512, 640), 4, seed=1)
    noise = 0.01 * low_rank((512, 640), 4, seed=1) + 1e-4 * normal(512, 640, seed=2)
    models = [save(tmp_path / "A", {NAME: base}), save(tmp_path / "AQ", {NAME: base - noise})]
    findings = ts.exams.noise(models[0], models[1], rank=4)
    a, a_quantised = (double(make.read(it.sources[0].directory)[NAME]) for it in models)
    left, _, right = svd(a, 4)
    shares = {row["side"]: row["share"] for row in findings.tables["energy"]}
    total = ((a - a_quantised) ** 2).sum()
    assert shares["input"] == pytest.approx((((a - a_quantised) @ right) ** 2).sum() / total, rel=1e-3)
    assert shares["output"] == pytest.approx(((left.T @ (a - a_quantised)) ** 2).sum() / total, rel=1e-3)
    assert {row["between"] for row in findings.tables["subspaces"]} == {"noise, weights"}
    row = only_row(findings)
    assert row["input energy over chance"] == pytest.approx(shares["input"] * 640 / 4)


def test_a_module_in_depth(fp8_pairs: list[ts.Checkpoint]) -> None:
    base, tuned = tuned_weights()
    module = NAME.removesuffix(".weight")
    findings = of_pairs(fp8_pairs, module=module)
    assert only_row(findings)["name"] == NAME
    (detail,) = findings.details
    assert detail["name"] == NAME
    for label, weights in {"A": base[NAME], "B": tuned[NAME]}.items():
        noise, found = double(weights) - decoded(weights), detail["histograms"][label]
        assert sum(found["negative"]) == (noise < 0).sum()
        assert sum(found["positive"]) == (noise > 0).sum()
        assert found["zero"] == (noise == 0).sum()
        first = 2.0 ** found["octave"]
        assert found["positive"][0] == ((noise >= first) & (noise < 1.25 * first)).sum()
    left, values, _ = svd(double(base[NAME]) - decoded(base[NAME]), 16)
    assert detail["spectrum"]["values"] == pytest.approx(values[:17], rel=1e-5)
    other = svd(double(tuned[NAME]) - decoded(tuned[NAME]), 16)[0]
    angles = [
        row["degrees"]
        for row in findings.tables["angles"]
        if (row["between"], row["side"]) == ("noise A, noise B", "output")
    ]
    assert angles == pytest.approx(np.rad2deg(linalg.subspace_angles(left, other))[::-1], abs=1e-3)
    both = ts.exams.noise(fp8_pairs[0], fp8_pairs[1], module="*.mlp.down_proj", layers="0", rank=5)
    assert len(both.details[0]["spectrum"]["values"]) == 6
    assert list(both.details[0]["histograms"]) == ["A"]


def test_rows_that_are_inputs_are_called_so(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 2}
    name = "transformer.h.0.mlp.c_fc.weight"
    weights = {name: normal(64, 256), "transformer.h.0.mlp.c_proj.weight": normal(256, 64)}
    rounded = {key: (it * 8).round() / 8 for key, it in weights.items()}
    models = [ts.open(make.save(tmp_path / str(place), it, config)) for place, it in enumerate((weights, rounded))]
    energy = ts.exams.noise(*models, names=name, rank=4).tables["energy"]
    assert {row["side"]: row["by chance"] for row in energy} == {"input": 4 / 64, "output": 4 / 256}


@pytest.mark.parametrize("options", [{"rank": 8}, {"module": "*.mlp.*"}])
def test_neither_threads_nor_memory_change_anything(fp8_pairs: list[ts.Checkpoint], options: dict[str, Any]) -> None:
    def found(memory: int, threads: int) -> Findings:
        with run_under(Running(memory, threads)):
            return of_pairs(fp8_pairs, **options)

    first = found(2**30, 1)
    assert found(2**30, 3) == first
    assert found(1, 3) == first


def test_pieces_and_tiles_are_put_together(tmp_path: Path) -> None:
    """A matrix of several pieces, whose last is short."""
    shape = (2600, 1024)
    base, noise = normal(*shape), normal(*shape, seed=1, std=0.01)
    tuned, other = base + normal(*shape, seed=2, std=0.01), 0.6 * noise + normal(*shape, seed=3, std=0.01)
    models = planted(tmp_path, {NAME: base}, {NAME: noise}, {NAME: tuned}, {NAME: other})
    read = [double(make.read(it.sources[0].directory)[NAME]) for it in models]
    expected = joint_by_hand(*read) | own_by_hand(*read[:2])
    findings = of_pairs(models, rank=4)
    with run_under(Running(2**20, 2)):
        assert of_pairs(models, rank=4) == findings
    row = only_row(findings)
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    spectra = {it["matrix"]: it for it in findings.tables["spectra"]}
    assert spectra["noise A"]["largest"] == pytest.approx(linalg.svdvals(read[0] - read[1])[0], rel=0.03)


def test_what_the_grid_cannot_tell_apart_is_equal() -> None:
    counts = np.zeros((3, 65536), np.int64)
    counts[0, [0, 0x3F80]] = 5, 5
    counts[1, [0x8000, 0x3F80]] = 5, 5
    counts[2, [0xBF80, 0x3F80]] = 5, 5
    assert ks_distance(counts[0], counts[1]) == 0
    assert ks_distance(counts[0], counts[2]) == 0.5


def test_all_mismatches_are_refused_at_once(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
    whole = save(tmp_path / "A", {name: normal(64, 32) for name in names})
    lacking = save(tmp_path / "AQ", {names[1]: normal(32, 64), names[2]: normal(64, 32)})
    fewer = save(tmp_path / "B", {names[0]: normal(64, 32), names[1]: normal(64, 32)})
    with pytest.raises(RefusedError) as refused:
        of_pairs([whole, lacking, fewer, whole])
    assert refused.value.problems == (
        f"{names[0]}: is missing in quantized, AQ.",
        f"{names[1]}: has shape [32, 64] in quantized, and [64, 32] in MODEL.",
        f"{names[2]}: is missing in other, B.",
    )
    assert not ts.exams.noise(whole, lacking, names=names[2]).problems


def test_the_command(fp8_pairs: list[ts.Checkpoint], capsys: pytest.CaptureFixture[str]) -> None:
    a, a_quantised, b, b_quantised = (str(it.sources[0].directory) for it in fp8_pairs)
    given = ["noise", a, a_quantised]
    assert main([*given, "--other", b, "--other-quantized", b_quantised, "--layers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "the change B - A survives" in shown
    assert "model.layers.1.mlp.down_proj.weight" in shown
    assert main([*given, "--module", "*.1.mlp.*", "--rank", "3", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in tables["spectra"]] == 6 * [3]
    assert tables["problems"] == []
    assert main([*given, "--other", b]) == 2


def test_integers_are_refused(tmp_path: Path) -> None:
    models = save(tmp_path / "A", {NAME: normal(64, 32)}), save(tmp_path / "AQ", {NAME: normal(64, 32).to(torch.int8)})
    with pytest.raises(RefusedError, match="is I8 in quantized; those are no numbers to compute with"):
        ts.exams.noise(*models)


def test_adapters_are_refused(plain: Path) -> None:
    model = ts.open(plain)
    with pytest.raises(RefusedError, match="other: is an adapter; merge it first"):
        of_pairs([model, model, model.replace(layout=ADAPTER), model])


@pytest.mark.parametrize("given", ["other", "other_quantized"])
def test_half_a_pair_is_refused(plain: Path, given: str) -> None:
    with pytest.raises(UsageError, match="give both or neither"):
        ts.exams.noise(ts.open(plain), str(plain), **{given: str(plain)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "*.mlp.down_prj"}, "module: nothing matches '*.mlp.down_prj'. Did you mean"),
        ({"names": "*norm.weight"}, "none of the tensors is a matrix"),
        ({"roles": "mpl"}, "there is no 'mpl' here"),
        ({"rank": 0}, "rank"),
    ],
)
def test_nothing_selected_is_refused(plain: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        ts.exams.noise(ts.open(plain), str(plain), **options)
    assert message in str(refused.value)


def test_identical_models_have_no_noise(plain: Path) -> None:
    findings = ts.exams.noise(ts.open(plain), str(plain), str(plain), str(plain))
    assert list(findings.tables) == ["model"]
    model = only_row(findings, "model")
    assert model["verdict"] == "no matrix has any noise to look at"
    assert model["left out"].endswith("matrices without noise: 30 in MODEL and 30 in other")
    assert not findings.problems


def test_the_same_pair_twice_cancels_without_a_change(fp8_pairs: list[ts.Checkpoint]) -> None:
    findings = of_pairs([*fp8_pairs[:2], *fp8_pairs[:2]], rank=4)
    for row in findings.tables["statistics"]:
        assert (row["verdict"], row["cancelled"], row["KS"], row["norm ratio"]) == ("cancels", 1.0, 0.0, 1.0)
        assert row["cosine"] == pytest.approx(1, abs=1e-12)
        assert (row["delta SNR"], row["delta cosine"], row["delta ratio"]) == (None, None, 0.0)
        assert row["input overlap over chance"] == pytest.approx(192 / 4, rel=1e-6) or row["shape"][1] != 192
    assert {row["matrix"] for row in findings.tables["spectra"]} == {"noise A", "noise B"}
    assert "energy" not in findings.tables


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_what_is_no_number_is_named(tmp_path: Path, bad: float) -> None:
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    base = {name: normal(64, 32).double() for name in names}
    noise = {name: normal(64, 32, seed=1, std=0.01).double() for name in names}
    models = planted(tmp_path, base, noise, base, noise)
    broken = make.read(tmp_path / "BQ")
    broken[names[1]][3, 4] = bad
    models[3] = save(tmp_path / "broken", broken)
    findings = of_pairs(models, rank=4)
    assert findings.problems == (
        f"{names[1]}: holds NaN, infinity or numbers too large to sum in other-quantized, broken.",
    )
    assert [row["name"] for row in findings.tables["statistics"]] == names[:1]
    assert only_row(findings, "model")["matrices not looked at"] == 1
    single = ts.exams.noise(models[3], models[2], rank=4)
    assert single.problems == (f"{names[1]}: holds NaN, infinity or numbers too large to sum in MODEL, broken.",)
