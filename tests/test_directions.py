"""Directions from activations, held against NumPy's SVD, SciPy's generalised eigenvectors, and formulas by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.linalg import eigh, subspace_angles

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import DestinationError, RefusedError, SurgeonError, UsageError
from tensorsurgeon.kernels.contrasts import METHODS, shrunk_covariance
from tensorsurgeon.running import Running, run_under

WIDTH, SAMPLES = 48, 30
Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]


def activations(groups: str = "abc", layers: int = 3, samples: int = SAMPLES) -> Arrays:
    """Return activations with a part for each sample, one for each group, and noise that is not alike everywhere."""
    random = np.random.default_rng(0)
    made = {}
    spread = np.geomspace(0.2, 3, WIDTH)
    for layer in range(layers):
        problems = random.standard_normal((samples, WIDTH)) * 2
        for group in groups:
            mean = random.standard_normal(WIDTH)
            made[f"{group}_L{layer}"] = problems + mean + random.standard_normal((samples, WIDTH)) * spread
    return made


def saved(path: Path, arrays: Mapping[str, Array]) -> str:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(dict(arrays), path)
    return str(path)


def found(path: Path, arrays: Mapping[str, Array], **options: Any) -> tuple[Arrays, list[dict[str, Any]]]:
    """Return the bases that were written, and the rows of the table."""
    findings = ts.derivations.directions(saved(path / "a.npz", arrays), str(path / "d.safetensors"), **options)
    return load_file(path / "d.safetensors"), findings.tables["directions"]


def same_space(rows: Array, expected: Array) -> bool:
    return bool(rows.shape == expected.shape and subspace_angles(rows.T.astype(float), expected.T).max() < 1e-5)


def test_deviations_are_those_of_the_study(tmp_path: Path) -> None:
    arrays = activations()
    bases, rows = found(tmp_path, arrays, rank=10)
    for layer in range(3):
        # As the script of the study does it.
        per_group = np.stack([arrays[f"{group}_L{layer}"] for group in "abc"], axis=1)
        deviations = (per_group - per_group.mean(axis=1, keepdims=True)).reshape(-1, WIDTH)
        _, values, vectors = np.linalg.svd(deviations, full_matrices=False)
        assert same_space(bases[f"L{layer}"], vectors[:10])
        assert np.allclose(np.abs(np.sum(bases[f"L{layer}"] * vectors[:10], axis=1)), 1, atol=1e-5)
        assert rows[layer]["captured"] == pytest.approx((values[:10] ** 2).sum() / (values**2).sum(), rel=1e-5)
        every = per_group.reshape(-1, WIDTH)
        every = every - every.mean(0)
        held = np.square(every @ vectors[:10].T).sum() / np.square(every).sum()
        assert rows[layer]["of all variance"] == pytest.approx(held, rel=1e-5)


def test_the_mean_difference_of_two_groups_points_to_the_first(tmp_path: Path) -> None:
    arrays = activations()
    bases, rows = found(tmp_path, arrays, method="mean-difference", groups="c,a")
    for layer in range(3):
        difference = arrays[f"c_L{layer}"].mean(0) - arrays[f"a_L{layer}"].mean(0)
        assert np.allclose(bases[f"L{layer}"], difference / np.linalg.norm(difference), atol=1e-6)
    assert [(row["groups"], row["rank"], row["captured"]) for row in rows] == [(2, 1, 1.0)] * 3


def test_mean_differences_of_several_groups_span_each_from_the_others(tmp_path: Path) -> None:
    arrays = activations("abcd")
    bases, _ = found(tmp_path, arrays, method="mean-difference")
    means = np.stack([arrays[f"{group}_L1"].mean(0) for group in "abcd"])
    from_others = np.stack([means[it] - np.delete(means, it, 0).mean(0) for it in range(4)])
    assert same_space(bases["L1"], np.linalg.svd(from_others)[2][:3])


def test_difference_pca_takes_pairs_either_way_round(tmp_path: Path) -> None:
    arrays = activations("ab")
    bases, rows = found(tmp_path, arrays, method="difference-pca", rank=4)
    differences = arrays["a_L2"] - arrays["b_L2"]
    values, vectors = np.linalg.eigh(differences.T @ differences)
    assert same_space(bases["L2"], vectors[:, :-5:-1].T)
    assert rows[2]["captured"] == pytest.approx(values[-4:].sum() / values.sum(), rel=1e-5)
    differences[::2] *= -1
    turned = {"a_L2": differences, "b_L2": np.zeros_like(differences)}
    (tmp_path / "turned").mkdir()
    again, _ = found(tmp_path / "turned", turned, method="difference-pca", rank=4)
    assert same_space(again["L2"], bases["L2"].astype(float))


def ledoit_wolf(rows: Array) -> Array:
    """Return the shrunk covariance by the sums of Ledoit and Wolf's paper, one sample at a time."""
    count, width = rows.shape
    covariance = rows.T @ rows / count
    target = np.trace(covariance) / width * np.eye(width)
    distance = np.linalg.norm(covariance - target) ** 2
    error = sum(np.linalg.norm(np.outer(row, row) - covariance) ** 2 for row in rows) / count**2
    share = min(error, distance) / distance
    return share * target + (1 - share) * covariance


@pytest.mark.parametrize("samples", [SAMPLES, 400])
def test_covariances_are_shrunk_as_the_paper_says(samples: int) -> None:
    rows = np.random.default_rng(1).standard_normal((samples, WIDTH)) * np.geomspace(0.1, 3, WIDTH)
    rows -= rows.mean(0)
    assert np.allclose(shrunk_covariance(rows), ledoit_wolf(rows), rtol=1e-10, atol=1e-12)


def test_nothing_is_left_of_the_covariance_of_what_is_alike_everywhere() -> None:
    rows = np.concatenate([np.eye(4), -np.eye(4)])
    assert np.allclose(shrunk_covariance(rows), np.eye(4) / 4)


def centred(arrays: Arrays, groups: str, layer: int) -> Array:
    return np.concatenate([it - it.mean(0) for it in (arrays[f"{group}_L{layer}"] for group in groups)])


def test_the_whitened_difference_is_fishers_discriminant(tmp_path: Path) -> None:
    arrays = activations("ab")
    bases, _ = found(tmp_path, arrays, method="whitened-difference")
    difference = arrays["a_L0"].mean(0) - arrays["b_L0"].mean(0)
    expected = np.linalg.inv(ledoit_wolf(centred(arrays, "ab", 0))) @ difference
    assert np.allclose(bases["L0"], expected / np.linalg.norm(expected), atol=1e-5)


def test_whitened_differences_of_several_groups_are_generalised_eigenvectors(tmp_path: Path) -> None:
    arrays = activations("abcd")
    for layer, group in ((0, "b"), (1, "d")):
        arrays[f"{group}_L{layer}"] = arrays[f"{group}_L{layer}"][:17]
    bases, rows = found(tmp_path, arrays, method="whitened-difference", rank=2)
    for layer in range(2):
        groups = [arrays[f"{group}_L{layer}"] for group in "abcd"]
        total = np.concatenate(groups).mean(0)
        between = sum(len(it) * np.outer(it.mean(0) - total, it.mean(0) - total) for it in groups)
        values, vectors = eigh(between, ledoit_wolf(centred(arrays, "abcd", layer)))
        assert same_space(bases[f"L{layer}"], np.linalg.qr(vectors[:, :-3:-1])[0].T)
        assert rows[layer]["captured"] == pytest.approx(values[-2:].sum() / values[-3:].sum(), rel=1e-5)
        assert rows[layer]["samples"] == sum(map(len, groups))


@pytest.mark.parametrize("method", METHODS)
def test_bases_are_orthonormal_and_fewer_are_the_first_of_more(method: str, tmp_path: Path) -> None:
    arrays = activations("ab" if method == "difference-pca" else "abcd")
    bases, rows = found(tmp_path, arrays, method=method, rank=3)
    (tmp_path / "fewer").mkdir()
    fewer, _ = found(tmp_path / "fewer", arrays, method=method, rank=2, layers="1")
    assert list(bases) == ["L0", "L1", "L2"]
    for basis in bases.values():
        assert basis.dtype == np.float32
        assert np.allclose(basis @ basis.T, np.eye(3), atol=1e-6)
    assert list(fewer) == ["L1"]
    assert np.allclose(fewer["L1"], bases["L1"][:2], atol=1e-5)
    angles = [np.degrees(subspace_angles(bases[f"L{it}"].T, bases[f"L{it + 1}"].T).max()) for it in range(2)]
    assert [row["angle to the next"] for row in rows] == [*(pytest.approx(it, abs=0.01) for it in angles), None]


def test_metadata_tells_how_they_were_found(tmp_path: Path) -> None:
    _, rows = found(tmp_path, activations(), rank=4, layers="1-2")
    with safe_open(tmp_path / "d.safetensors", "np") as file:
        metadata = file.metadata()
    assert (metadata["method"], metadata["groups"]) == ("deviations", "a,b,c")
    assert json.loads(metadata["captured"]) == {f"L{row['layer']}": row["captured"] for row in rows}


@pytest.mark.parametrize("kind", ["npz", "compressed", "float16", "fortran", "safetensors"])
def test_files_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    arrays = activations(layers=1)
    expected, _ = found(tmp_path, arrays)
    file = tmp_path / ("in.safetensors" if kind == "safetensors" else "in.npz")
    if kind == "compressed":
        np.savez_compressed(file, **arrays)
    else:
        turned = {"float16": lambda it: it.astype(np.float16), "fortran": np.asfortranarray}
        saved(file, {name: turned.get(kind, lambda it: it)(it) for name, it in arrays.items()})
    ts.derivations.directions(str(file), str(tmp_path / "out.safetensors"))
    made = load_file(tmp_path / "out.safetensors")
    assert subspace_angles(made["L0"].T, expected["L0"].T).max() < (1e-2 if kind == "float16" else 1e-5)


def test_the_same_bytes_come_of_any_number_of_threads(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.npz", activations())
    for threads, memory in ((1, 10**5), (8, 10**8)):
        with run_under(Running(memory, threads)):
            ts.derivations.directions(file, str(tmp_path / f"{threads}.safetensors"))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "8.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["deviations", "whitened-difference"])
def test_bytes_do_not_depend_on_the_threads_of_libraries(method: str, tmp_path: Path) -> None:
    """Each number of threads is that of a process of its own, as libraries read it when they are loaded."""
    random = np.random.default_rng(0)
    file = saved(tmp_path / "a.npz", {f"{group}_L0": random.standard_normal((300, 1024)) for group in "ab"})
    made = []
    for threads in ("1", "2"):
        place = tmp_path / f"{threads}.safetensors"
        command = [sys.executable, "-m", "tensorsurgeon", "directions", file, str(place), "--method", method, "--quiet"]
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        subprocess.run(command, check=True, env=os.environ | limits)
        made.append(place.read_bytes())
    assert made[0] == made[1]


def test_what_is_no_activation_is_listed(tmp_path: Path) -> None:
    arrays = activations() | {"labels": np.zeros(3)}
    findings = ts.derivations.directions(saved(tmp_path / "a.npz", arrays), str(tmp_path / "d.safetensors"))
    assert findings.tables["not read"] == [{"array": "labels"}]


def changed(**arrays: Array) -> Arrays:
    return activations("ab") | arrays


NAN = np.full((SAMPLES, WIDTH), np.nan)
BAD: dict[str, tuple[Arrays, dict[str, Any], type[SurgeonError], list[str]]] = {
    "NaN": (changed(a_L0=NAN, b_L2=NAN), {}, RefusedError,
            ["layer 0: a_L0: holds NaN or infinity.", "layer 2: b_L2: holds NaN or infinity."]),
    "widths": (changed(a_L1=np.ones((SAMPLES, 7))), {}, RefusedError, ["a_L1: is 7 wide, and a_L0 is 48."]),
    "shapes": (changed(a_L1=np.ones(7), b_L2=np.ones((0, WIDTH))), {}, RefusedError,
               ["a_L1: has shape [7], not (samples, width).", "b_L2: has shape [0, 48]"]),
    "samples": (changed(a_L1=np.ones((9, WIDTH))), {}, RefusedError, ["layer 1: samples", "a_L1 9, b_L1 30."]),
    "unknown group": (changed(), {"groups": "a,c"}, UsageError, ["groups: there is no 'c'."]),
    "unknown layers": (changed(), {"layers": "1-9"}, UsageError, ["no activations of layers 3-9; there are 0-2."]),
    "one group": (changed(), {"groups": "a"}, UsageError, ["deviations takes two groups or more, not 1."]),
    "three groups": (activations("abc"), {"method": "difference-pca"}, UsageError, ["takes two groups, not 3."]),
    "a group that a layer lacks": (changed(c_L1=np.ones((SAMPLES, WIDTH))), {}, UsageError,
                                   ["layer 0 has no array of c", "layer 2 has no array of c"]),
    "too high a rank": (changed(), {"rank": 31}, RefusedError, ["layer 0: deviations finds 30 directions here, not"]),
    "too high a rank of means": (changed(), {"method": "whitened-difference", "rank": 2}, UsageError,
                                 ["finds one direction less than there are groups, 1 and not 2."]),
    "equal groups": ({"a_L0": np.ones((4, 5)), "b_L0": np.ones((4, 5))}, {"method": "mean-difference"}, RefusedError,
                     ["layer 0: mean-difference finds 0 directions here"]),
    "equal samples": ({"a_L0": np.ones((4, 5)), "b_L0": np.zeros((4, 5))}, {"method": "whitened-difference"},
                      RefusedError, ["nothing to whiten by"]),
    "no such names": ({"x": np.ones((4, 5))}, {}, UsageError, ["no array is named as en_L9 is"]),
    "an unknown method": (changed(), {"method": "pca"}, UsageError, ["method"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_all_reasons_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    arrays, options, kind, messages = BAD[case]
    with pytest.raises(kind) as caught:
        ts.derivations.directions(saved(tmp_path / "a.npz", arrays), str(tmp_path / "d.safetensors"), **options)
    assert all(any(message in text for text in caught.value.problems) for message in messages), caught.value.problems
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz"}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("d.npz", "ends in .safetensors"),
        ("missing/d.safetensors", "there is no directory"),
        ("there.safetensors", "exists"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(out: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"")
    with pytest.raises(DestinationError, match=message):
        ts.derivations.directions(saved(tmp_path / "a.npz", activations()), str(tmp_path / out))
    assert (tmp_path / "there.safetensors").read_bytes() == b""


def test_a_subject_is_a_file() -> None:
    with pytest.raises(UsageError, match="directions: give the activations first."):
        ts.derivations.directions()  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="the first argument is int, not a file."):
        ts.derivations.directions(3, "d.safetensors")  # type: ignore[arg-type]


def test_the_command_finds_what_project_takes_away(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    arrays = {f"{group}_L{layer}": random.standard_normal((20, 192)) for group in "ab" for layer in range(4)}
    source, out = saved(tmp_path / "a.npz", arrays), tmp_path / "d.safetensors"
    assert main(["directions", source, str(out), "--method", "difference-pca", "--rank", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in told["directions"]] == [0, 1, 2, 3]
    assert main(["project", str(plain), str(tmp_path / "made"), "--directions", str(out), "--quiet"]) == 0
    before, after = make.read(plain), make.read(tmp_path / "made")
    for layer, basis in enumerate(load_file(out).values()):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        u = torch.from_numpy(basis)
        assert (u @ after[name].float()).norm() < 0.02 * (u @ before[name].float()).norm()
