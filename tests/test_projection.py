"""Projected weights, held against the dense formula in float64 and against what the changed layers give."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, TOKENS, layers_of, load, logits_of
from safetensors.torch import save_file
from scipy.linalg import subspace_angles

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import FormatError, RefusedError, SurgeonError, UsageError
from tensorsurgeon.kernels.projecting import GONE
from tensorsurgeon.plan import make_plan
from tensorsurgeon.report.text import plan_text
from tensorsurgeon.running import Running, run_under
from tensorsurgeon.scratch import Scratch
from tensorsurgeon.tensor import Block
from tensorsurgeon.writer import write_plan

WRITERS = "attention.o,mlp.down,expert.down,embedding.token"
ORIENTED = {
    "llama": "mlp.down,attention.o,embedding.token",
    "gpt2": "mlp.down,attention.o,embedding",
    "mixtral": "expert.down,attention.o",
    "qwen3_moe": "expert.down,mlp.down",
    "gpt_oss": "expert.down,attention.o",
    "granitemoe": "expert.down,attention.o",
    "llama4_text": "expert.down,mlp.down",
}
"""Architectures of every orientation on disk, and what is changed of each."""


def basis(count: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return orthonormal rows."""
    random = np.random.default_rng(seed).standard_normal((width, count))
    return np.ascontiguousarray(np.linalg.qr(random)[0].T)


def saved(path: Path, **arrays: np.ndarray[Any, Any]) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("zoo")

    def made(name: str) -> Path:
        directory = place / name
        return directory if directory.exists() else architectures.make(ARCHITECTURES[name], directory)

    return made


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Five directions of the Qwen3 of `make`."""
    return saved(tmp_path / "directions.npz", directions=basis(5, 192))


def changed_by(source: Path, place: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    ts.write(ts.ops.project(ts.open(source), **options), place)
    return make.read(source), make.read(place)


def as_columns(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight of those architectures in float64, its outputs as columns of the last two dimensions.

    Which side is the output is known here by name, and not by what the code under test thinks of it.
    """
    rows = ("embed", "wte", "wpe", "c_proj.weight", "experts.down_proj", "bias")
    weight = weight.double()
    if weight.dim() == 1:
        return weight[:, None]
    return weight.mT if any(word in name for word in rows) else weight


def dense(weight: torch.Tensor, u: np.ndarray[Any, Any], scale: float, keep: bool, preserve: bool) -> torch.Tensor:
    """Return what becomes of columns, by the formula."""
    inside = torch.from_numpy(u.T @ u)
    matrix = inside if keep else torch.eye(u.shape[1], dtype=torch.float64) - scale * inside
    made = matrix @ weight
    return made * (weight.norm(dim=-2, keepdim=True) / made.norm(dim=-2, keepdim=True)) if preserve else made


@pytest.mark.parametrize("options", [{}, {"keep": True}, {"scale": 0.3}, {"scale": 2.0}, {"preserve_norms": True},
                                     {"keep": True, "preserve_norms": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ORIENTED)
def test_weights_are_what_the_dense_formula_gives(
    name: str, options: dict[str, Any], zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    u = basis(3, 32)
    given = {"directions": saved(tmp_path / "d.npz", u=u), "weights": ORIENTED[name], **options}
    before, after = changed_by(zoo(name), tmp_path / "made", **given)
    told = {"scale": 1.0, "keep": False, "preserve": options.get("preserve_norms", False)}
    told |= {key: value for key, value in options.items() if key != "preserve_norms"}
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    for key in changed:
        expected = dense(as_columns(key, before[key]), u, **told)
        assert torch.allclose(as_columns(key, after[key]), expected, atol=2e-6), key
    roles = ts.open(zoo(name)).roles
    wanted = [key for key, role in roles.items()
              if {role.group, f"{role.group}.{role.part}"} & set(ORIENTED[name].split(","))]  # fmt: skip
    assert changed == [key for key in before if key in wanted]
    assert len(changed) >= 6


@pytest.mark.parametrize("options", [{}, {"keep": True}], ids=["away", "keep"])
def test_projecting_twice_changes_nothing_beyond_rounding(
    options: dict[str, Any], zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    file = saved(tmp_path / "d.npz", u=basis(3, 32))
    given = {"directions": file, "weights": WRITERS.replace("expert.down,", ""), **options}
    before, once = changed_by(zoo("llama"), tmp_path / "once", **given)
    _, twice = changed_by(tmp_path / "once", tmp_path / "twice", **given)
    for name in before:
        assert torch.allclose(once[name], twice[name], atol=1e-6), name


def test_what_is_kept_and_what_is_taken_make_the_original(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    given = {"directions": saved(tmp_path / "d.npz", u=basis(3, 32)), "weights": "mlp.down,attention.o"}
    before, away = changed_by(zoo("gpt2"), tmp_path / "away", **given)
    _, kept = changed_by(zoo("gpt2"), tmp_path / "kept", keep=True, **given)
    changed = [name for name in before if not torch.equal(before[name], away[name])]
    assert all(torch.allclose(away[name] + kept[name], before[name], atol=1e-6) for name in changed)
    assert len(changed) == 4 * 6


def test_a_reflection_done_twice_is_the_identity(plain: Path, file: str, tmp_path: Path) -> None:
    made = make.save(tmp_path / "f32", make.tensors(dtype=torch.float32), make.config(torch_dtype="float32"))
    given = {"directions": file, "weights": "mlp.down,embedding.token", "scale": 2.0}
    before, once = changed_by(made, tmp_path / "once", **given)
    _, twice = changed_by(tmp_path / "once", tmp_path / "twice", **given)
    name = "model.layers.2.mlp.down_proj.weight"
    assert (before[name] - once[name]).abs().max() > 0.05
    assert all(torch.allclose(before[key], twice[key], atol=2e-6) for key in before)
    assert torch.allclose(before[name].norm(dim=0), once[name].norm(dim=0), rtol=1e-5)


def test_a_column_of_which_nothing_is_left_stays_zero_where_norms_are_preserved(tmp_path: Path) -> None:
    tensors, u = make.tensors(dtype=torch.float32), basis(1, 192)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][:, 7] = torch.from_numpy(u[0]).float()
    tensors[name][:, 8] = 0
    source = make.save(tmp_path / "source", tensors, make.config())
    given = {"directions": saved(tmp_path / "d.npz", u=u), "preserve_norms": True}
    before, after = changed_by(source, tmp_path / "made", **given)
    lengths = before[name].norm(dim=0)
    assert not after[name][:, 7:9].any()
    lengths[7:9] = 0
    assert torch.allclose(after[name].norm(dim=0), lengths, rtol=1e-4)
    assert 0 < GONE < 1e-3


@pytest.mark.parametrize(
    ("name", "module"),
    [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("gpt2", "attn.c_proj"), ("gpt_oss", "mlp.experts"),
     ("granitemoe", "block_sparse_moe"), ("qwen3_moe", "mlp")],
)  # fmt: skip
def test_the_output_of_a_changed_layer_has_no_part_in_the_subspace(
    name: str, module: str, zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    u = basis(3, 32)
    given = {"directions": saved(tmp_path / "d.npz", u=u), "weights": "mlp.down,attention.o,expert.down"}
    given["weights"] = {"llama": "mlp.down", "gpt2": "mlp.down,attention.o"}.get(name, "expert.down")
    if name == "qwen3_moe":
        given["weights"] = "expert.down,mlp.down"
    ts.write(ts.ops.project(ts.open(zoo(name)), **given), tmp_path / "made")
    shares = []
    for directory in (zoo(name), tmp_path / "made"):
        model = load(directory)
        outputs: list[torch.Tensor] = []

        def note(_: Any, __: Any, output: Any, outputs: list[torch.Tensor] = outputs) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        for layer in layers_of(model, 6):
            layer.get_submodule(module).register_forward_hook(note)
        logits_of(model, TOKENS)
        vectors = torch.cat([it.reshape(-1, 32) for it in outputs]).double()
        shares.append(float((vectors @ torch.from_numpy(u.T)).norm() / vectors.norm()))
    assert shares[0] > 0.1
    assert shares[1] < 1e-6


def bases_of_layers(path: Path, layers: int = 4, count: int = 3, name: str = "L{}") -> str:
    return saved(path, **{name.format(layer): basis(count, 192, layer) for layer in range(layers)})


@pytest.mark.parametrize("name", ["L{}", "layer_{}", "layers.{}", "{}", "model.layers.{}.direction", "L{}.basis"])
def test_each_layer_may_have_a_basis_of_its_own(name: str, plain: Path, tmp_path: Path) -> None:
    file = bases_of_layers(tmp_path / "d.npz", name=name)
    before, after = changed_by(plain, tmp_path / "made", directions=file, layers="1-2")
    for layer in range(4):
        key = f"model.layers.{layer}.mlp.down_proj.weight"
        expected = (
            dense(before[key].double(), basis(3, 192, layer), 1.0, False, False) if layer in (1, 2) else before[key]
        )
        assert torch.allclose(after[key].double(), expected.double(), atol=2e-3)
        assert torch.equal(after[key], before[key]) == (layer not in (1, 2))


def test_the_report_tells_energies_norms_and_angles(plain: Path, tmp_path: Path) -> None:
    ckpt = ts.ops.project(
        ts.open(plain), directions=bases_of_layers(tmp_path / "d.npz"), weights="mlp.down,attention.o"
    )
    before = make.read(plain)
    assert [row["layer"] for row in ckpt.report["projected layers"]] == [0, 1, 2, 3]
    for row in ckpt.report["projected"]:
        weight, u = before[row["tensor"]].double(), torch.from_numpy(basis(3, 192, row["layer"]))
        share = float((u @ weight).square().sum() / weight.square().sum())
        assert row["in the subspace"] == pytest.approx(share, rel=1e-5)
        assert row["energy removed"] == pytest.approx(share, rel=1e-5)
        assert row["norm before"] == pytest.approx(float(weight.norm()), rel=1e-5)
        assert row["norm after"] == pytest.approx(float((weight - u.T @ (u @ weight)).norm()), rel=1e-5)
    angles = {
        (one, other): float(np.degrees(subspace_angles(basis(3, 192, one).T, basis(3, 192, other).T).max()))
        for one in range(4)
        for other in range(one + 1, 4)
    }
    told = [row["angle to the next"] for row in ckpt.report["projected layers"]]
    assert told == [*(pytest.approx(angles[layer, layer + 1], abs=1e-3) for layer in range(3)), None]
    (widest,) = ckpt.report["bases farthest apart"]
    assert widest["largest angle"] == pytest.approx(max(angles.values()), abs=1e-3)
    assert angles[widest["layer"], widest["and"]] == max(angles.values())


def test_several_projections_are_told_of_together(plain: Path, tmp_path: Path) -> None:
    """Of the second, what is told is of weights that the first has changed already."""
    each = bases_of_layers(tmp_path / "each.npz")
    one = saved(tmp_path / "one.npz", u=basis(5, 192, seed=9))
    first = ts.ops.project(ts.open(plain), each, weights="mlp.down", layers="1-2")
    second = ts.ops.project(first, one, weights="mlp.down,attention.o", layers="2-3")
    third = ts.ops.project(second, one, weights="embedding.token")
    assert "projection" not in first.report["projected"][0]
    for name, table in third.report.items():
        told = [it.report.get(name, []) for it in (first, second)]
        assert table[: len(told[1])] == told[1]
        unnumbered = [{key: value for key, value in row.items() if key != "projection"} for row in table]
        assert unnumbered[: len(told[0])] == told[0]
    places = [(row["projection"], row["layer"]) for row in third.report["projected layers"]]
    assert places == [(1, 1), (1, 2), (2, 2), (2, 3), (3, None)]
    assert [row["projection"] for row in third.report["projected"]] == [1, 1, 2, 2, 2, 2, 3]
    ts.write(second, tmp_path / "made")
    norms = {(row["projection"], row["tensor"]): row["norm after"] for row in second.report["projected"]}
    name = "model.layers.2.mlp.down_proj.weight"
    assert norms[2, name] == pytest.approx(float(make.read(tmp_path / "made")[name].double().norm()), rel=1e-3)
    assert norms[2, name] < norms[1, name]
    assert "projection    layer" in plan_text(make_plan(third), tmp_path / "dest")


@pytest.mark.parametrize("options", [{}, {"preserve_norms": True}, {"keep": True}, {"scale": 2.0}], ids=str)
@pytest.mark.parametrize("name", ["llama", "granitemoe", "gpt_oss"])
def test_the_norms_told_are_those_written(
    name: str, options: dict[str, Any], zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    ckpt = ts.ops.project(
        ts.open(zoo(name)), saved(tmp_path / "d.npz", u=basis(3, 32)), weights=ORIENTED[name], **options
    )
    ts.write(ckpt, tmp_path / "made")
    after = make.read(tmp_path / "made")
    assert len(ckpt.report["projected"]) >= 12
    for row in ckpt.report["projected"]:
        assert row["norm after"] == pytest.approx(float(after[row["tensor"]].double().norm()), rel=1e-5)


def test_directions_are_made_orthonormal_and_that_is_said(plain: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(3).standard_normal((4, 192))
    exact = np.linalg.qr(random.T)[0].T
    made = ts.ops.project(ts.open(plain), saved(tmp_path / "askew.npz", u=random))
    ts.write(made, tmp_path / "made")
    assert any("not orthonormal, and made so: u" in text for text in made.warnings)
    before, after = make.read(plain), make.read(tmp_path / "made")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(after[name].double(), dense(before[name].double(), exact, 1.0, False, False), atol=2e-3)
    assert not ts.ops.project(ts.open(plain), saved(tmp_path / "exact.npz", u=exact.astype(np.float16))).warnings


@pytest.mark.parametrize("form", ["rows", "columns", "vector", "first of more", "safetensors", "bf16"])
def test_forms_of_directions(form: str, plain: Path, tmp_path: Path) -> None:
    count = 1 if form == "vector" else 3
    u = basis(5 if form == "first of more" else count, 192)
    arrays = {"columns": u.T, "vector": u[0]}.get(form, u)
    file = saved(tmp_path / "d.npz", arr_0=arrays)
    if form in ("safetensors", "bf16"):
        file = str(tmp_path / "d.safetensors")
        tensor = torch.from_numpy(u)
        save_file({"any": tensor.bfloat16() if form == "bf16" else tensor}, file)
    rank = 3 if form == "first of more" else None
    before, after = changed_by(plain, tmp_path / "made", directions=file, rank=rank)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = dense(before[name].double(), u[:count], 1.0, False, False)
    assert torch.allclose(after[name].double(), expected, atol=2e-3)


@pytest.mark.parametrize("kept", [5, 187], ids=["onto few", "away from few"])
def test_a_projector_is_what_weights_are_multiplied_by(kept: int, tmp_path: Path) -> None:
    u = basis(kept, 192)
    source = make.save(tmp_path / "f32", make.tensors(dtype=torch.float32), make.config(torch_dtype="float32"))
    file = saved(tmp_path / "p.npz", P=u.T @ u)
    ckpt = ts.ops.project(ts.open(source), file, weights="mlp.down,embedding.token")
    assert {row["directions"] for row in ckpt.report["projected"]} == {5}
    ts.write(ckpt, tmp_path / "made")
    before, after = make.read(source), make.read(tmp_path / "made")
    for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        expected = dense(as_columns(name, before[name]), u, 1.0, True, False)
        assert torch.allclose(as_columns(name, after[name]), expected, atol=3e-6)
    ts.write(ts.ops.project(ts.open(source), file, scale=0.5), tmp_path / "half")
    name = "model.layers.0.mlp.down_proj.weight"
    half = (before[name].double() + dense(before[name].double(), u, 1.0, True, False)) / 2
    assert torch.allclose(make.read(tmp_path / "half")[name].double(), half, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"weights": "mlp.down,attention.o,embedding.token"}, {"preserve_norms": True}], ids=str
)
def test_bytes_depend_on_neither_threads_nor_memory_nor_shards(
    options: dict[str, Any], file: str, tmp_path: Path
) -> None:
    written = set()
    for shards in (1, 9):
        source = make.plain(tmp_path / f"source{shards}", shards=shards)
        for threads, memory in ((1, "1MB"), (8, "64MB")):
            with run_under(Running(64 * 10**6, threads)):
                ckpt = ts.ops.project(ts.open(source), directions=file, **options)
            dest = tmp_path / f"{shards}-{threads}-{memory}"
            ts.write(ckpt, dest, threads=threads, memory=memory)
            made = make.read(dest)
            written.add(tuple(bytes(make.bits(made[name]).numpy()) for name in sorted(made)))
    assert len(written) == 1


def test_bytes_do_not_depend_on_the_threads_that_torch_may_use(tmp_path: Path) -> None:
    """What is multiplied is long enough for a library to share it among threads, which changes the order of sums."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(600, 2048, generator=generator),
        "model.layers.0.mlp.down_proj.weight": torch.randn(2048, 512, generator=generator),
    }
    source = make.save(tmp_path / "source", tensors, make.config(1, hidden_size=2048))
    file = saved(tmp_path / "wide.npz", u=np.random.default_rng(0).standard_normal((33, 2048)))
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            ckpt = ts.ops.project(ts.open(source), file, weights="mlp.down,embedding.token")
            made.append([bytes(ckpt[name].read().data) for name in tensors])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert made[0] == made[1]


MEASURE = """
import resource, sys
import tensorsurgeon as ts, tensorsurgeon.kernels.projecting, tensorsurgeon.kernels.bases
from tensorsurgeon.running import Running, run_under
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with run_under(Running(64 * 2**20, 2)):
    ckpt = ts.ops.project(ts.open(sys.argv[1]), sys.argv[2], weights="expert.down")
ts.write(ckpt, sys.argv[3], memory="64MiB", threads=2, quiet=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_what_is_known_of_thousands_of_experts_does_not_fill_the_memory(tmp_path: Path) -> None:
    """Held together U'W of these would take 470 MiB, and several times as much of a large model."""
    experts, shape, rank = 300, [256, 2048], 200
    names = [f"model.layers.0.mlp.experts.{number}.down_proj.weight" for number in range(experts)]
    settings = make.config(1, hidden_size=256, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"])
    source = make.sparse(tmp_path / "source", dict.fromkeys(names, ("BF16", shape)), settings)
    file = saved(tmp_path / "d.npz", u=basis(rank, 256))
    run = [sys.executable, "-c", MEASURE, str(source), file, str(tmp_path / "made")]
    grown = int(subprocess.run(run, capture_output=True, check=True, text=True).stdout)
    together = experts * (rank + 1) * shape[1] * 4
    assert together > 470 * 2**20
    assert grown < together / 2


def test_scratch_is_read_as_it_was_written_and_made_once_by_one_of_many_threads() -> None:
    scratch, made = Scratch(), []

    def reduce(pieces: Any, number: Block) -> Block:
        made.append(number.data)
        return Block("F32", (2, 3), bytes(number.data) * 24)

    kept = [scratch.keep(reduce) for _ in range(50)]
    blocks = [Block("I8", (1,), bytes([number])) for number in range(50)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: kept[at % 50](iter(()), blocks[at % 50]), range(400)))
    assert all(it == Block("F32", (2, 3), bytes([at % 50]) * 24) for at, it in enumerate(found))
    assert sorted(made) == [bytes([number]) for number in range(50)]


def test_many_tiles_and_pieces_give_what_one_would(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.down_proj.weight": torch.randn(640, 5000, dtype=torch.float32)}
    source = make.save(tmp_path / "wide", tensors, make.config(1, hidden_size=640))
    ckpt = ts.open(source)
    assert len(list(ckpt["model.layers.0.mlp.down_proj.weight"].pieces())) > 1
    u = basis(4, 640)
    before, after = changed_by(source, tmp_path / "made", directions=saved(tmp_path / "d.npz", u=u))
    for name in before:
        assert torch.allclose(after[name].double(), dense(before[name].double(), u, 1.0, False, False), atol=1e-5)


def test_what_is_planned_is_what_is_written_and_reads_no_weights(plain: Path, file: str, tmp_path: Path) -> None:
    with run_under(Running(planned=True)):
        planned = make_plan(ts.ops.project(ts.open(plain), file))
    plan = make_plan(ts.ops.project(ts.open(plain), file))
    assert planned.digest == plan.digest
    assert planned.summary() | {"report": {}} == plan.summary() | {"report": {}}
    assert list(planned.checkpoint.report) == ["projected layers"]
    assert planned.summary()["computed"] == 4
    write_plan(planned, tmp_path / "planned", quiet=True)
    write_plan(plan, tmp_path / "made", quiet=True)
    assert make.same(make.read(tmp_path / "planned"), make.read(tmp_path / "made"))


def test_other_directions_make_another_plan(plain: Path, file: str, tmp_path: Path) -> None:
    ckpt = ts.open(plain)
    same = saved(tmp_path / "same.npz", other=basis(5, 192))
    other = saved(tmp_path / "other.npz", directions=basis(5, 192, seed=1))
    with run_under(Running(planned=True)):
        tensors = [ts.ops.project(ckpt, it)["model.layers.0.mlp.down_proj.weight"] for it in (file, same, other)]
    one, again, another = (it.describe() for it in tensors)
    assert one == again != another


def test_what_is_not_touched_keeps_its_span(plain: Path, file: str) -> None:
    ckpt = ts.ops.project(ts.open(plain), file, layers="1", weights="down_proj")
    assert [name for name, it in ckpt.tensors.items() if not it.span] == ["model.layers.1.mlp.down_proj.weight"]


def test_quantised_weights_are_decoded_on_demand(fp8: Path, file: str, tmp_path: Path) -> None:
    u = basis(5, 192)
    ts.write(ts.ops.dequantize(ts.open(fp8), dtype="float32"), tmp_path / "exact")
    exact, stored = make.read(tmp_path / "exact"), make.read(fp8)
    ts.write(ts.ops.project(ts.open(fp8), file, dequantize=True), tmp_path / "plain")
    plain = make.read(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    ts.write(ts.ops.project(ts.open(fp8), file, requantize=True, layers="1-2"), tmp_path / "again")
    again = make.read(tmp_path / "again")
    assert again.keys() == stored.keys()
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        expected = dense(exact[name].double(), u, 1.0, False, False)
        assert plain[name].dtype == torch.bfloat16
        assert torch.allclose(plain[name].double(), expected, atol=2e-3)
        if layer in (1, 2):
            codes, scales = make.quantize(expected.float())
            assert torch.allclose(again[f"{name}_scale_inv"], scales, rtol=1e-5)
            assert (again[name].float() != codes.float()).float().mean() < 1e-3
        else:
            assert torch.equal(make.bits(again[name]), make.bits(stored[name]))
    others = [name for name in stored if "down_proj" not in name]
    assert all(torch.equal(make.bits(again[name]), make.bits(stored[name])) for name in others)


def test_plain_weights_of_a_quantised_model_need_no_decoding(fp8: Path, file: str) -> None:
    ckpt = ts.ops.project(ts.open(fp8), file, weights="embedding.token")
    assert [name for name, it in ckpt.tensors.items() if not it.span] == ["model.embed_tokens.weight"]


def test_a_tied_head_is_said_to_change(tmp_path: Path, file: str) -> None:
    tensors = {name: it for name, it in make.tensors().items() if name != "lm_head.weight"}
    source = make.save(tmp_path / "tied", tensors, make.config(tie_word_embeddings=True))
    ckpt = ts.ops.project(ts.open(source), file, weights="embedding.token")
    assert ckpt.warnings == ("the head is tied to model.embed_tokens.weight and changes with it.",)


def test_a_norm_behind_the_output_is_warned_of(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    file = saved(tmp_path / "d.npz", u=basis(2, 32))
    (warning,) = ts.ops.project(ts.open(zoo("gemma2")), file).warnings
    assert "passes a norm first" in warning
    assert not ts.ops.project(ts.open(zoo("llama")), file).warnings


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "NaN": ({"u": np.array([[np.nan] * 192])}, {}, ["d.npz: u: holds NaN or infinity."]),
    "infinity": ({"u": np.array([[np.inf] * 192])}, {}, ["holds NaN or infinity."]),
    "wrong width": ({"u": basis(2, 100)}, {}, ["u: has shape [2, 100], but the residual stream is 192 wide."]),
    "three dimensions": ({"u": np.zeros((2, 2, 192))}, {}, ["has shape [2, 2, 192]"]),
    "zero vector": ({"u": np.zeros((2, 192))}, {}, ["direction 0 is zero.", "direction 1 is zero."]),
    "dependent": ({"u": np.stack([basis(1, 192)[0]] * 2)}, {}, ["u: direction 1 depends on those before it."]),
    "too many": ({"u": np.random.default_rng(0).standard_normal((193, 192))}, {}, ["holds 193 directions"]),
    "fewer than asked": ({"u": basis(5, 192)}, {"rank": 6}, ["u: has 5 directions, not the 6 of rank."]),
    "square, no projector": ({"u": np.triu(np.ones((192, 192)))}, {},
                             ["differs from its transpose by up to 1.", "differs from its square by up to 191."]),
    "a projector with a rank": ({"u": basis(5, 192).T @ basis(5, 192)}, {"rank": 3}, ["leave rank out"]),
    "a projector of nothing": ({"u": np.zeros((192, 192))}, {}, ["is a projector that leaves nothing."]),
    "the identity": ({"u": np.eye(192)}, {}, ["is a projector that changes nothing."]),
    "integers": ({"u": np.ones((1, 192), np.int64)}, {}, ["u: is int64, not float16, float32 or float64."]),
    "missing layers": ({"L0": basis(1, 192), "L2": basis(1, 192)}, {},
                       ["there are no directions for layers 1,3; it has 0,2, see 'layers'."]),
    "one layer only": ({"L1": basis(1, 192)}, {}, ["there are no directions for layers 0,2-3; it has 1"]),
    "no layer in a name": ({"a": basis(1, 192), "L1": basis(1, 192)}, {}, ["a: its name tells no layer"]),
    "positional": ({"arr_0": basis(1, 192), "arr_1": basis(1, 192)}, {}, ["arr_1: its name tells no layer"]),
    "a layer twice": ({"L1": basis(1, 192), "layer_1": basis(1, 192)}, {"layers": "1"}, ["are both of layer 1"]),
    "an embedding": ({"L0": basis(1, 192), "L1": basis(1, 192)}, {"weights": "embedding.token"}, ["outside of layers"]),
    "layers beyond": ({"u": basis(1, 192)}, {"layers": "3-5"}, ["there is no layer 4, 5; the model has 4 layers"]),
    "an endless scale": ({"u": basis(1, 192)}, {"scale": float("inf")}, ["scale: inf is not a finite number."]),
    "keep and scale": ({"u": basis(1, 192)}, {"keep": True, "scale": 0.5}, ["keep and scale"]),
    "keep of a projector": ({"u": basis(5, 192).T @ basis(5, 192)}, {"keep": True}, ["a projector says itself"]),
    "unknown weights": ({"u": basis(1, 192)}, {"weights": "mlp.dwon"}, ["'mlp.dwon'. Did you mean 'mlp.down'"]),
    "weights that read": ({"u": basis(1, 192)}, {"weights": "mlp.up"}, ["up_proj.weight', which does not write"]),
    "a head": ({"u": basis(1, 192)}, {"weights": "lm_head"}, ["'lm_head.weight', which does not write"]),
    "no weights": ({"u": basis(1, 192)}, {"weights": ""}, ["weights: names nothing."]),
    "nothing to decode": ({"u": basis(1, 192)}, {"dequantize": True}, ["no weight of the model is quantised."]),
    "both at once": ({"u": basis(1, 192)}, {"dequantize": True, "requantize": True}, ["choose one of them."]),
    "rank 0": ({"u": basis(1, 192)}, {"rank": 0}, ["rank"]),
    "nothing": ({"u": np.zeros((0, 192))}, {}, ["u: has shape [0, 192], and so no directions."]),
    "a checkpoint": ({f"w{it}": basis(1, 192) for it in "abcdefghij"}, {}, ["wa: its name tells no layer",
                     "4 more arrays are like these; is this the right file?"]),
    "several": ({"L0": np.zeros((1, 192)), "L1": basis(1, 3)}, {"weights": "mlp.down,mlp.up", "layers": "0-2,7"},
                ["which does not write", "there is no layer 7", "L0: direction 0 is zero", "L1: has shape",
                 "no directions for layers 2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_weight_is_read(
    case: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, options, messages = BAD[case]
    monkeypatch.setattr("tensorsurgeon.ops.projection.measured", lambda _: pytest.fail("weights were read"))
    with pytest.raises((UsageError, RefusedError)) as caught:
        ts.ops.project(ts.open(plain), saved(tmp_path / "d.npz", **arrays), **options)
    assert all(any(message in text for text in caught.value.problems) for message in messages), caught.value.problems


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"weights": "mlp.dwon"}, 2),
        ({"weights": "lm_head"}, 2),
        ({"layers": "7"}, 2),
        ({"directions": "missing.npz"}, 2),
        ({"rank": "6"}, 1),
    ],
)
def test_what_is_not_there_is_not_understood_and_what_does_not_fit_fails(
    options: dict[str, str], status: int, plain: Path, file: str, tmp_path: Path
) -> None:
    given = {"directions": file, **options}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    assert main(["project", str(plain), str(tmp_path / "made"), *words, "--quiet"]) == status
    assert not (tmp_path / "made").exists()


def test_pickle_and_other_files_are_refused(plain: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    np.savez(tmp_path / "objects.npz", L0=np.array([Trap()], dtype=object), L1=basis(1, 192))
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "empty.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    cut = (tmp_path / "objects.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(cut[: len(cut) // 2])
    save_file({"u": torch.ones(1, 192, dtype=torch.int32)}, tmp_path / "integers.safetensors")
    ckpt = ts.open(plain)
    for name, message in {
        "objects.npz": "L0: holds Python objects, which only pickle can read; save plain arrays",
        "raw.npz": "pickle is never read",
        "raw.pt": "pickle above all, are never read",
        "empty.npz": "holds no arrays",
        "cut.npz": "is no .npz",
        "integers.safetensors": "u: is I32",
        "missing.npz": "there is no such file",
    }.items():
        with pytest.raises(SurgeonError, match=message):
            ts.ops.project(ckpt, str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_an_array_that_is_cut_short_is_refused(plain: Path, tmp_path: Path) -> None:
    import io
    import zipfile

    stream = io.BytesIO()
    np.save(stream, basis(4, 192))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("u.npy", stream.getvalue()[:-8])
    with pytest.raises(RefusedError, match="has fewer bytes than its shape"):
        ts.ops.project(ts.open(plain), str(tmp_path / "d.npz"))
    assert issubclass(FormatError, SurgeonError)


def test_quantised_weights_are_refused_unless_something_is_said(fp8: Path, file: str) -> None:
    with pytest.raises(RefusedError, match="4 of these weights are quantised .* say dequantize .* or requantize"):
        ts.ops.project(ts.open(fp8), file)


def test_weights_that_hold_nan_are_refused_by_name(file: str, tmp_path: Path) -> None:
    tensors = make.tensors()
    for layer, number in ((1, float("nan")), (3, float("inf"))):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][5, 7] = number
    source = make.save(tmp_path / "broken", tensors, make.config())
    with pytest.raises(RefusedError) as caught:
        ts.ops.project(ts.open(source), file)
    assert [text.split(":")[0] for text in caught.value.problems] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 3)
    ]


def test_the_command_writes_a_receipt_of_what_was_taken(
    plain: Path, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["project", str(plain), str(tmp_path / "made"), "--directions", file, "--layers", "1-2"]
    assert main([*arguments, "--weights", "down_proj", "--preserve-norms", "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)["receipt"]
    assert receipt["steps"] == [
        {"project": {"directions": file, "layers": "1-2", "weights": ["down_proj"], "scale": 1.0,
                     "preserve_norms": True, "dtype": "bfloat16"}}
    ]  # fmt: skip
    assert [row["layer"] for row in receipt["report"]["projected"]] == [1, 2]
    assert all(0 < row["in the subspace"] < 0.1 for row in receipt["report"]["projected"])
