"""Perturbed weights, held against float64 by hand, scipy, and what the models' own modules compute of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, load, logits_of
from safetensors.torch import save_file
from scipy import special, stats

import make
import tensorsurgeon as ts
from tensorsurgeon.cli import main
from tensorsurgeon.errors import RefusedError, UsageError
from tensorsurgeon.kernels import draws
from tensorsurgeon.plan import make_plan

NAME = "model.layers.1.mlp.up_proj.weight"
CHOSEN = "mlp,attention-v"

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # GPT-BigCode's own


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.plain(tmp_path_factory.mktemp("perturb") / "plain", layers=3, shards=3)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("zoo")
    return cache(lambda name: architectures.make(ARCHITECTURES[name], place / name.replace(" ", "-")))


def perturbed(source: Path, dest: Path, method: str = "zero", group: str = CHOSEN, **options: Any) -> Any:
    """Return the tensors of a perturbed copy."""
    written: dict[str, Any] = {key: options.pop(key) for key in ("threads", "memory") if key in options}
    changed = ts.ops.perturb(ts.open(source), method, group, **options)
    ts.write(changed, dest, overwrite=True, quiet=True, **written)
    return make.read(dest)


def changed_names(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(make.bits(before[name]), make.bits(after[name]))}


# Draws


def test_compiled_draws_are_the_plain_ones_wherever_they_begin() -> None:
    for start, count in [(0, 5000), (7, 1), (1, 3001), (2**33 + 1, 2050)]:
        key = draws.key_of(3, "a")
        plain = draws.normals_plainly(draws.draws_plainly(key, start, count))
        assert np.array_equal(draws.normals(key, start, count).view(np.uint32), plain.view(np.uint32))


def test_splitmix64_gives_the_numbers_of_its_authors() -> None:
    """The first five of java.util.SplittableRandom's C twin, splitmix64.c, for the seed 1234567."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    pairs = draws.draws_plainly(np.uint64(1234567), 0, 10).astype(np.uint64).reshape(5, 2)
    assert (pairs[:, 0] | (pairs[:, 1] << np.uint64(32))).tolist() == wanted


def test_normals_are_the_inverse_of_their_draws() -> None:
    ends = np.concatenate([np.arange(20000), 2**31 - 1 - np.arange(20000), 2 ** np.arange(31)])
    random = np.random.default_rng(0).integers(0, 2**31, 500_000)
    v = np.concatenate([ends, random]).astype(np.uint32)
    wanted = -special.ndtri((v.astype(np.float64) + 0.5) / 2**32)
    assert np.abs(draws.normals_plainly(v) - wanted).max() < 1e-6
    assert np.array_equal(draws.normals_plainly(v | np.uint32(2**31)), -draws.normals_plainly(v))


def test_normals_are_standard_and_independent() -> None:
    count = 4_000_000
    x = draws.normals(draws.key_of(0, "a"), 0, count).astype(np.float64)
    for power, wanted, spread in [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5), (6, 15, 10170**0.5)]:
        assert abs((x**power).mean() - wanted) < 5 * spread / count**0.5, power
    assert stats.kstest(x[:1_000_000], "norm").pvalue > 1e-3
    for beyond in (3, 4, 4.5):
        expected = count * 2 * special.ndtr(-beyond)
        assert abs((np.abs(x) > beyond).sum() - expected) < 5 * expected**0.5
    others = [draws.normals(draws.key_of(*key), 0, count) for key in [(1, "a"), (0, "b"), (0, "a", "")]]
    neighbours = [x[lag:] for lag in (1, 2, 3, 64, 192, 1024, 4096)]
    for other in (*neighbours, *others):
        assert abs((x[: len(other)] * other).mean()) < 5 / len(other) ** 0.5
        assert abs((x[: len(other)] ** 2 * other**2).mean() - 1) < 5 * 8**0.5 / len(other) ** 0.5


def test_the_tail_reaches_six_deviations() -> None:
    v = np.arange(2**31 - 1, -1, -(2**13), dtype=np.int64).astype(np.uint32)
    assert draws.normals_plainly(np.zeros(1, np.uint32))[0] == pytest.approx(-special.ndtri(2.0**-33), abs=1e-6)
    assert (np.diff(draws.normals_plainly(v)) > 0).all()
    six = np.arange(40, dtype=np.uint32)
    assert (draws.normals_plainly(six) > 6).sum() == round(2**32 * special.ndtr(-6))


# Methods


def noise_of(name: str, method: str, shape: torch.Size, seed: int = 0) -> torch.Tensor:
    key = draws.key_of(seed, method, name)
    return torch.from_numpy(draws.normals_plainly(draws.draws_plainly(key, 0, shape.numel()))).reshape(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noise_is_the_formula_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = make.tensors(2, dtype)
    source = make.save(tmp_path / "source", plain, make.config(2))
    for method, level in [("mult-gauss", 0.35), ("add-gauss", 0.5)]:
        after = perturbed(source, tmp_path / "dest", method, "mlp-up,norm", level=level, seed=5)
        assert changed_names(plain, after) == {it for it in plain if "up_proj" in it or "norm" in it}
        for name in (NAME, "model.norm.weight"):
            w, n = plain[name].float(), noise_of(name, method, plain[name].shape, 5)
            if method == "mult-gauss":
                wanted = w * (1 + np.float32(level) * n)
            else:
                wanted = w + np.float32(level * w.double().numpy().std()) * n
            assert torch.equal(after[name], wanted.to(dtype)), name


def test_ablation_is_binomial_and_levels_are_nested(source: Path, tmp_path: Path) -> None:
    before, last = make.read(source), None
    for level in (0.1, 0.5, 0.8):
        after = perturbed(source, tmp_path / "dest", "ablate", level=level, seed=3)
        gone = torch.cat([(after[it] == 0).flatten() for it in sorted(changed_names(before, after))])
        assert all(torch.equal(after[it][after[it] != 0], before[it][after[it] != 0]) for it in before)
        assert abs(int(gone.sum()) - level * len(gone)) < 5 * (len(gone) * level * (1 - level)) ** 0.5
        assert last is None or bool(gone[last].all())
        last = gone
    assert int((perturbed(source, tmp_path / "dest", "ablate", level=1)[NAME] != 0).sum()) == 0


@pytest.mark.parametrize(("by", "side"), [("row", 1), ("column", 0)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_are_outputs_and_columns_are_inputs(
    name: str, by: str, side: int, zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    before, after = make.read(zoo(name)), perturbed(zoo(name), tmp_path / "dest", "ablate", "mlp", level=0.4, by=by)
    shares = []
    for it in changed_names(before, after):
        gone = (after[it].T if name == "gpt2" else after[it]) == 0
        assert bool((gone.all(side) == gone.any(side)).all())
        shares += gone.all(side).tolist()
    assert abs(np.mean(shares) - 0.4) < 5 * (0.24 / len(shares)) ** 0.5


@pytest.mark.parametrize("by", ["smallest", "largest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_magnitudes_are_pruned_to_the_exact_share(by: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = make.tensors(1, dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    plain[name] = (plain[name].float() * 30).round().to(dtype)  # Ties.
    plain["model.layers.0.mlp.gate_proj.weight"].fill_(2.0)
    source = make.save(tmp_path / "source", plain, make.config(1))
    for level in (0.3, 0.9, 1.0):
        after = perturbed(source, tmp_path / "dest", "ablate", "mlp", level=level, by=by)
        for it in changed_names(plain, after):
            w, gone = plain[it].float().abs().flatten(), (after[it] == 0).flatten()
            count = round(level * len(w))
            lost = w[gone].sort().values
            wanted = w.sort(descending=by == "largest").values[:count].sort().values
            # What was zero already is zero wherever the share ends.
            nonzero = wanted[wanted > 0]
            assert torch.equal(lost[len(lost) - len(nonzero) :], nonzero), it
            assert int((lost > 0).sum()) == len(nonzero)
    constant = (after["model.layers.0.mlp.gate_proj.weight"] == 0).float()
    assert constant.mean() == 1


def test_ties_are_spread_over_the_matrix(tmp_path: Path) -> None:
    plain = {**make.tensors(1), "model.layers.0.mlp.up_proj.weight": torch.ones(320, 192, dtype=torch.bfloat16)}
    source = make.save(tmp_path / "source", plain, make.config(1))
    after = perturbed(source, tmp_path / "dest", "ablate", "mlp-up", level=0.25, by="smallest")
    gone = after["model.layers.0.mlp.up_proj.weight"] == 0
    assert int(gone.sum()) == 320 * 192 // 4
    assert 20 < int(gone[0].sum()) < 80


def grid_by_hand(w: np.ndarray[Any, Any], level: int, axis: int | None) -> np.ndarray[Any, Any]:
    """Round to the grid in float32, ties to even, as the formula says."""
    low, high = (np.float32(it) for it in (w.min(axis, keepdims=True), w.max(axis, keepdims=True)))
    step = (high - low) / np.float32(level - 1)
    return np.where(step > 0, np.rint((w - low) / np.where(step > 0, step, 1)) * step + low, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("level", [2, 5, 256])
def test_uniform_quantisation_is_the_formula(dtype: torch.dtype, level: int, tmp_path: Path) -> None:
    plain = make.tensors(2, dtype)
    # Numbers of which many lie halfway between levels, and a row of equal ones.
    plain[NAME] = (torch.arange(320 * 192).reshape(320, 192) % 17 / 8 - 1).to(dtype)
    plain[NAME][3] = 0.25
    source = make.save(tmp_path / "source", plain, make.config(2))
    for per, axis in [("tensor", None), ("channel", 1)]:
        after = perturbed(source, tmp_path / "dest", "uniform-quant", "mlp", level=level, per=per)
        for name in changed_names(plain, after):
            wanted = torch.from_numpy(grid_by_hand(plain[name].float().numpy(), level, axis))
            assert torch.equal(after[name], wanted.to(dtype)), (name, per)
            assert per == "channel" or len(after[name].unique()) <= level


def test_channels_of_a_conv1d_are_columns(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    before = make.read(zoo("gpt2"))
    after = perturbed(zoo("gpt2"), tmp_path / "dest", "uniform-quant", "mlp,attention-k", level=4, per="channel")
    for name in changed_names(before, after):
        part = slice(32, 64) if "c_attn" in name else slice(None)
        wanted = before[name].clone()
        wanted[:, part] = torch.from_numpy(grid_by_hand(before[name][:, part].numpy(), 4, 0))
        assert torch.equal(after[name], wanted), name


def test_shuffling_keeps_the_numbers_and_depends_on_the_seed(source: Path, tmp_path: Path) -> None:
    before = make.read(source)
    one, again, other = (perturbed(source, tmp_path / "dest", "shuffle", seed=seed) for seed in (1, 1, 2))
    assert make.same(one, again)
    for name in changed_names(before, one):
        assert torch.equal(one[name].flatten().sort().values, before[name].flatten().sort().values)
        assert not torch.equal(one[name], other[name])
        assert float((one[name] == before[name]).float().mean()) < 0.02


def test_shuffling_needs_the_tensor_whole(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="--memory allows 100 kB"):
        perturbed(source, tmp_path / "dest", "shuffle", memory="100kB")


@pytest.mark.parametrize("method", ["mult-gauss", "add-gauss", "ablate", "uniform-quant", "shuffle", "zero"])
def test_level_0_is_the_identity(method: str, source: Path, tmp_path: Path) -> None:
    whole = ts.ops.perturb(ts.open(source), method, "*", level=0)
    assert make_plan(whole).summary()["computed"] == 0
    receipt = ts.write(whole, tmp_path / "dest", quiet=True)
    assert receipt["steps"][0]["perturb"]["method"] == method
    assert make.same(make.read(tmp_path / "dest"), make.read(source))


RECIPES: list[dict[str, Any]] = [
    {"method": "mult-gauss", "level": 0.5},
    {"method": "add-gauss", "level": 0.5},
    {"method": "ablate", "level": 0.3},
    {"method": "ablate", "level": 0.3, "by": "row"},
    {"method": "ablate", "level": 0.5, "by": "head"},
    {"method": "ablate", "level": 0.3, "by": "largest"},
    {"method": "uniform-quant", "level": 7, "per": "channel"},
    {"method": "shuffle"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda it: " ".join(map(str, it.values())))
def test_the_same_bytes_whatever_threads_memory_and_shards(recipe: dict[str, Any], tmp_path: Path) -> None:
    tensors = make.tensors(1, torch.float32)
    tensors[NAME.replace("1", "0")] = torch.randn(3000, 192)
    settings = make.config(1)
    places = [make.save(tmp_path / str(shards), tensors, settings, shards) for shards in (1, 9)]
    options = {"group": "mlp,attention,embedding", **recipe}
    small = "20MB"
    results = [
        perturbed(place, tmp_path / "dest", **options, threads=threads, memory=memory)
        for place, threads, memory in [(places[0], 1, "1GB"), (places[0], 8, small), (places[1], 2, "64MB")]
    ]
    assert all(make.same(results[0], it) for it in results[1:])
    command = ["perturb", str(places[0]), str(tmp_path / "parts"), "--quiet", "--max-shard-size", "300kB"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    for part in ("2/3", "1/3", "3/3"):
        assert main([*command, "--shards", part]) == 0
    assert main(command) == 0
    assert make.same(make.read(tmp_path / "parts"), results[0])


def test_what_does_not_fit_the_dtype_is_refused_by_name(tmp_path: Path) -> None:
    for dtype, large in [(torch.bfloat16, 3e38), (torch.float16, 6e4), (torch.float32, 3e38)]:
        plain = make.tensors(1, dtype)
        plain["model.layers.0.mlp.up_proj.weight"].fill_(large)
        source = make.save(tmp_path / str(dtype), plain, make.config(1))
        with pytest.raises(RefusedError, match=r"layers.0.mlp.up_proj.weight: \d+ numbers become too large for"):
            perturbed(source, tmp_path / "dest", "mult-gauss", "mlp", level=1.0)
        for path in tmp_path.glob("dest*"):
            assert path.name == "dest.partial"
            shutil.rmtree(path)


def test_a_statistic_of_what_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    plain = make.tensors(1)
    plain["model.layers.0.mlp.up_proj.weight"][5, 7] = float("nan")
    source = make.save(tmp_path / "source", plain, make.config(1))
    for options in ({"method": "add-gauss", "level": 1.0}, {"method": "uniform-quant", "level": 9}):
        with pytest.raises(RefusedError, match="up_proj.weight: holds NaN or infinity"):
            perturbed(source, tmp_path / "dest", group="mlp", **options)
    after = perturbed(source, tmp_path / "dest", "mult-gauss", "mlp", level=0.1)
    assert int(after["model.layers.0.mlp.up_proj.weight"].isnan().sum()) == 1


# Groups


def without_biases(source: Path, place: Path) -> Path:
    """Return a copy in which all biases of attention are zero: what is left is what its weights make."""
    tensors = make.read(source)
    for name, tensor in tensors.items():
        if name.endswith(("bias", "bias_")):
            tensor.zero_()
    place.mkdir()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_bytes((source / "config.json").read_bytes())
    return place


def inputs_of(model: Any, names: list[str]) -> list[torch.Tensor]:
    """Return a list that the inputs of some modules are put into as the model runs."""
    given: list[torch.Tensor] = []
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    return given


FUSED = [
    "llama", "qwen3", "gpt2", "gpt_bigcode", "gpt_neox", "bloom", "falcon", "phi3", "persimmon", "codegen",
    "modernbert-decoder", "deepseek_v3", "gpt_oss", "glm4",
]  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_queries_keys_and_values_are_those_of_the_model(name: str, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    """Without values no attention comes out; without queries it is as even as without keys."""
    source = without_biases(zoo(name), tmp_path / "source")
    before = logits_of(load(source))
    logits = {}
    outputs = [it for it, role in ts.open(source).roles.items() if role[:3] == ("attention", "o", "weight")]
    assert outputs
    for part in "qkv":
        perturbed(source, tmp_path / part, "zero", f"attention-{part}")
        model = load(tmp_path / part)
        given = inputs_of(model, outputs)
        logits[part] = logits_of(model)
        assert len(given) == len(outputs)
        assert all((it.abs().max() == 0) == (part == "v") for it in given), part
        assert (logits[part] - before).abs().max() > 1e-3
    assert torch.allclose(logits["q"], logits["k"], atol=1e-5)


GATES: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "phi3": ("mlp-gate", "gate_up_proj", lambda w: w[:48]),
    "glm": ("mlp-gate", "gate_up_proj", lambda w: w[:48]),
    "modernbert": ("mlp-gate", "Wi", lambda w: w[:48]),
    "gpt_oss": ("experts-gate", "gate_up_proj", lambda w: w[..., ::2]),
    "granitemoe": ("experts-gate", "input_linear", lambda w: w[:, :48]),
    "llama": ("mlp-gate", "gate_proj", lambda w: w),
    "qwen3_next": ("attention-q", "self_attn.q_proj", lambda w: w.view(4, 16, 32)[:, :8]),
    "mixtral": ("experts-gate", "w1", lambda w: w),
    "qwen3_moe": ("experts-gate", "gate_proj", lambda w: w),
}


@pytest.mark.parametrize("name", GATES)
def test_parts_are_those_that_the_model_takes(name: str, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    group, module, gates = GATES[name]
    before, after = make.read(zoo(name)), perturbed(zoo(name), tmp_path / "dest", "zero", group)
    wanted = {it: tensor.clone() for it, tensor in before.items()}
    for it, tensor in wanted.items():
        if it.removesuffix(".weight").endswith(module):
            gates(tensor).zero_()
    if name == "qwen3_moe":  # Of its dense layers, not the routed experts.
        wanted |= {it: before[it] for it in before if "mlp.gate_proj" in it}
    assert changed_names(before, after)
    assert make.same(after, wanted)


def test_stacked_experts_are_matrices_by_themselves(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    before = make.read(zoo("gpt_oss"))
    after = perturbed(zoo("gpt_oss"), tmp_path / "dest", "uniform-quant", "experts-up", level=3)
    shuffled = perturbed(zoo("gpt_oss"), tmp_path / "other", "shuffle", "experts-up")
    pruned = perturbed(zoo("gpt_oss"), tmp_path / "third", "ablate", "experts", level=0.3, by="smallest")
    names = [it for it in before if it.endswith("experts.gate_up_proj")]
    assert changed_names(before, after) == changed_names(before, shuffled) == set(names)
    for name in names:
        for expert in range(4):
            w = before[name][expert, :, 1::2]
            assert torch.equal(after[name][expert, :, ::2], before[name][expert, :, ::2])
            assert torch.equal(after[name][expert, :, 1::2], torch.from_numpy(grid_by_hand(w.numpy(), 3, None)))
            assert torch.equal(shuffled[name][expert, :, 1::2].flatten().sort().values, w.flatten().sort().values)
            assert int((pruned[name][expert] == 0).sum()) == round(0.3 * before[name][expert].numel())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "phi3"])
def test_heads_go_in_all_matrices_at_once(name: str, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    """What is left of attention is exactly what comes of the heads that are left: the rest of o's input is zero."""
    source = without_biases(zoo(name), tmp_path / "source")
    perturbed(source, tmp_path / "dest", "ablate", "attention-q,attention-v,attention-o", level=0.5, by="head", seed=2)
    ckpt, model, after = ts.open(source), load(tmp_path / "dest"), make.read(tmp_path / "dest")
    outputs = [it for it, role in ckpt.roles.items() if role[:3] == ("attention", "o", "weight")]
    given = inputs_of(model, outputs)
    logits_of(model)
    shares = []
    for it, tensor in zip(outputs, given, strict=True):
        columns = (after[it] if ckpt.roles[it].layout == "out,in" else after[it].T).abs().amax(0).reshape(4, 8) == 0
        assert bool((columns.all(1) == columns.any(1)).all())
        dead_values = tensor.abs().amax((0, 1)).reshape(4, 8).amax(1) == 0
        if name in ("gpt2", "gpt_neox"):  # As many heads of values as of queries.
            assert torch.equal(dead_values, columns.all(1))
        else:
            assert torch.equal(dead_values[::2], dead_values[1::2])
        shares += columns.all(1).tolist()
    assert 0.2 < np.mean(shares) < 0.8


WORDS = {
    "llama": {"attention": 24, "attention-q": 6, "attention-o": 6, "mlp": 18, "mlp-down": 6, "embedding": 1, "head": 1,
              "norm": 13},
    "gpt2": {"attention": 12, "attention-o": 6, "mlp": 12, "mlp-up": 6, "embedding": 1, "norm": 13},
    "qwen3_moe": {"attention": 24, "mlp": 6, "experts": 48, "router": 4, "norm": 25},
    "mixtral": {"experts": 72, "router": 6},
    "deepseek_v3": {"mlp": 18, "experts": 48, "router": 4, "attention-v": 6, "attention-k": 12, "attention-q": 12},
    "qwen3_next": {"attention": 8, "mixer": 16, "attention-q": 2, "mlp": 18},
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_groups_are_the_weights_that_their_words_say(name: str, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    ckpt, before = ts.open(zoo(name)), make.read(zoo(name))
    for word, count in WORDS[name].items():
        changed = ts.ops.perturb(ckpt, "zero", word)
        assert sum(it["tensors"] for it in changed.report["perturbed"]) == count, word
        ts.write(changed, tmp_path / "dest", overwrite=True, quiet=True)
        after = make.read(tmp_path / "dest")
        names = changed_names(before, after)
        assert len(names) == count
        assert not any(it.endswith("bias") for it in names)
        elements = sum(int((after[it] != before[it]).sum()) for it in names)
        assert elements == sum(it["elements"] for it in changed.report["perturbed"])
    assert len(changed_names(before, perturbed(zoo(name), tmp_path / "dest", "zero", "*.1.*"))) > 0


def test_every_group_of_every_architecture_is_planned_or_refused(zoo: Callable[[str], Path]) -> None:
    """Only what has no fixed split is refused: everything of these has one."""
    for name in (
        "mistral3 (nested)",
        "gemma3 (nested)",
        "granitemoehybrid",
        "llama4_text",
        "minimax",
        "phimoe",
        "bert",
    ):
        ckpt = ts.open(zoo(name))
        for word in ("attention", "attention-q", "attention-k", "attention-v", "attention-o", "embedding", "norm"):
            changed = ts.ops.perturb(ckpt, "ablate", word, level=0.5)
            assert changed.report["perturbed"]
            assert not any("vision" in it for it in changed if changed[it].span is None)


def test_layers_are_chosen(source: Path, tmp_path: Path) -> None:
    before, after = make.read(source), perturbed(source, tmp_path / "dest", "zero", "mlp-down", layers="0,2")
    assert changed_names(before, after) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2)}


# Ties


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = make.tensors(2)
    del tensors["lm_head.weight"]
    place = tmp_path_factory.mktemp("tied") / "tied"
    return make.save(place, tensors, make.config(2, tie_word_embeddings=True))


def test_a_tied_head_changes_with_the_embedding_and_that_is_said(tied: Path) -> None:
    changed = ts.ops.perturb(ts.open(tied), "zero", "embedding")
    assert "the head is tied to model.embed_tokens.weight and changes with it; --untie" in changed.warnings[-1]
    with pytest.raises(RefusedError, match="--untie writes it by itself"):
        ts.ops.perturb(ts.open(tied), "zero", "head")


@pytest.mark.parametrize(("group", "other"), [("embedding", "lm_head"), ("head", "model.embed_tokens")])
def test_untied_only_the_one_that_is_chosen_changes(group: str, other: str, tied: Path, tmp_path: Path) -> None:
    before = make.read(tied)["model.embed_tokens.weight"]
    after = perturbed(tied, tmp_path / "dest", "mult-gauss", group, level=0.5, untie=True)
    (name,) = {"lm_head.weight", "model.embed_tokens.weight"} - {f"{other}.weight"}
    assert torch.equal(after[f"{other}.weight"], before)
    assert torch.equal(
        after[name], (before.float() * (1 + 0.5 * noise_of(name, "mult-gauss", before.shape))).bfloat16()
    )
    assert json.loads((tmp_path / "dest" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = load(tmp_path / "dest")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_head_that_is_tied_but_written_follows(tmp_path: Path) -> None:
    tensors = make.tensors(1)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = make.save(tmp_path / "source", tensors, make.config(1, tie_word_embeddings=True))
    after = perturbed(source, tmp_path / "dest", "mult-gauss", "embedding", level=0.5)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    for group in ("head", "lm_head.*"):
        with pytest.raises(RefusedError, match="--untie writes it by itself"):
            ts.ops.perturb(ts.open(source), "zero", group)
    apart = perturbed(source, tmp_path / "apart", "mult-gauss", "embedding", level=0.5, untie=True)
    assert torch.equal(apart["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(apart["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_nothing_that_is_not_tied_is_untied(source: Path) -> None:
    with pytest.raises(UsageError, match="are not tied here"):
        ts.ops.perturb(ts.open(source), "zero", "embedding", untie=True)


# Quantised weights


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.fp8(tmp_path_factory.mktemp("fp8") / "fp8", layers=2)


def decoded(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    scale = tensors[name.replace(".weight", ".weight_scale_inv")]
    rows, columns = tensors[name].shape
    spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return tensors[name].float() * spread


def test_quantised_weights_are_refused_but_not_others_beside_them(fp8: Path, tmp_path: Path) -> None:
    for group in ("mlp", "mlp-up", "*.down_proj.*", "attention-v"):
        with pytest.raises(RefusedError, match="of the chosen tensors are quantised.*--dequantize.*--requantize"):
            ts.ops.perturb(ts.open(fp8), "zero", group)
    after = perturbed(fp8, tmp_path / "dest", "zero", "embedding,norm")
    before = make.read(fp8)
    assert {it for it in changed_names(before, after) if "norm" not in it} == {"model.embed_tokens.weight"}


def test_quantised_weights_are_decoded_and_rounded_once(fp8: Path, tmp_path: Path) -> None:
    after = perturbed(fp8, tmp_path / "dest", "mult-gauss", "mlp-up", level=0.5, dequantize=True)
    before = make.read(fp8)
    wanted = decoded(before, NAME) * (1 + 0.5 * noise_of(NAME, "mult-gauss", before[NAME].shape))
    assert torch.equal(after[NAME], wanted.bfloat16())
    other = NAME.replace("up", "down")
    assert torch.equal(after[other], decoded(before, other).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "dest" / "config.json").read_text())


def test_changed_weights_are_quantised_again_and_others_keep_their_bits(fp8: Path, tmp_path: Path) -> None:
    after = perturbed(fp8, tmp_path / "dest", "mult-gauss", "mlp-up", level=0.5, requantize=True)
    before = make.read(fp8)
    assert changed_names(before, after) == {
        f"model.layers.{layer}.mlp.up_proj.weight{end}" for layer in range(2) for end in ("", "_scale_inv")
    }
    codes, scale = make.quantize(decoded(before, NAME) * (1 + 0.5 * noise_of(NAME, "mult-gauss", before[NAME].shape)))
    assert torch.equal(after[NAME].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(after[f"{NAME}_scale_inv"], scale)


def test_another_quantised_format_is_refused(tmp_path: Path) -> None:
    tensors = make.tensors(1)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(24, 320, dtype=torch.int32)
    tensors["model.layers.0.mlp.up_proj.scales"] = torch.zeros(2, 320, dtype=torch.float16)
    source = make.save(tmp_path / "source", tensors, make.config(1))
    with pytest.raises(RefusedError, match="2 of the chosen tensors are quantised"):
        ts.ops.perturb(ts.open(source), "zero", "mlp")
    with pytest.raises(RefusedError, match="the tensors are packed as GPTQ"):
        ts.ops.perturb(ts.open(source), "zero", "mlp", dequantize=True)


# Bad input


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"method": "mult-gauss"}, ["level is missing"]),
        ({"method": "mult-gauss", "level": -0.1}, ["no finite number from 0"]),
        ({"method": "mult-gauss", "level": float("nan")}, ["no finite number"]),
        ({"method": "add-gauss", "level": float("inf")}, ["no finite number"]),
        ({"method": "ablate", "level": 1.01}, ["no probability"]),
        ({"method": "uniform-quant", "level": 2.5}, ["no whole number from 2"]),
        ({"method": "uniform-quant", "level": 1}, ["no whole number from 2"]),
        ({"method": "uniform-quant", "level": 2**25}, ["no whole number from 2"]),
        ({"method": "shuffle", "level": 0.5}, ["neither 0 nor 1"]),
        ({"method": "zero", "by": "row", "per": "channel", "level": 2}, ["no grids", "by: zero", "neither 0 nor 1"]),
        ({"method": "zero", "dequantize": True, "requantize": True}, ["one writes plain weights"]),
        ({"method": "zero", "dequantize": True}, ["dequantize: no weight here is quantised"]),
        ({"method": "zero", "group": "atention-v,expert"}, ["'atention-v' matches nothing", "mean 'attention-v'",
                                                           "'expert' matches nothing", "mlp-gate", "norm"]),
        ({"method": "zero", "group": "*.w1.*"}, ["'*.w1.*' matches nothing"]),
        ({"method": "zero", "group": ""}, ["group: none is given"]),
        ({"method": "zero", "layers": "3"}, ["no layer 3"]),
        ({"method": "zero", "layers": "1", "group": "embedding"}, ["'embedding' matches nothing"]),
        ({"method": "sine"}, ["method: Input should be"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_all_at_once_before_any_work(
    options: dict[str, Any], texts: list[str], source: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        ts.ops.perturb(ts.open(source), **{"group": "mlp", **options})
    assert all(text in str(caught.value) for text in texts), caught.value


def test_norms_have_no_heads(zoo: Callable[[str], Path]) -> None:
    """One of Qwen 3 is that of every head; a pattern for all names takes the heads of what has some."""
    ckpt = ts.open(zoo("qwen3"))
    everything = ts.ops.perturb(ckpt, "ablate", "*", level=0.5, by="head")
    attention = ts.ops.perturb(ckpt, "ablate", "attention", level=0.5, by="head")
    changed = [{name for name in it if it[name].span is None} for it in (everything, attention)]
    assert len(changed[1]) == 24
    assert changed[0] == changed[1]
    with pytest.raises(RefusedError, match="none of the chosen tensors has attention heads"):
        ts.ops.perturb(ckpt, "ablate", "norm", level=0.5, by="head")


@pytest.mark.parametrize("method", ["mult-gauss", "add-gauss"])
def test_a_level_beyond_float32_is_refused_by_name(method: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="numbers become too large for BF16; choose a lower level"):
        perturbed(source, tmp_path / "dest", method, "mlp", level=1e41)


def test_integers_heads_and_parts_that_are_not_known_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="none of the chosen tensors has attention heads"):
        ts.ops.perturb(ts.open(source), "ablate", "mlp", level=0.5, by="head")
    tensors = {**make.tensors(1), "extra.table": torch.arange(8)}
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(500, 192)
    odd = make.save(tmp_path / "odd", tensors, make.config(1))
    with pytest.raises(RefusedError, match="extra.table: is I64"):
        ts.ops.perturb(ts.open(odd), "zero", "extra.*")
    with pytest.raises(RefusedError, match="qkv_proj.weight: its 500 outputs are not those of q, k, v"):
        ts.ops.perturb(ts.open(odd), "zero", "attention-v")


def test_the_receipt_and_the_plan_tell_what_was_changed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["perturb", str(source), str(tmp_path / "dest"), "--method", "ablate", "--level", "0.5", "--group", "mlp"]
    assert main([*command, "--dry-run"]) == 0
    assert "mlp down" in capsys.readouterr().out
    assert main([*command, "--quiet"]) == 0
    (receipt,) = [json.loads(it.read_text()) for it in (tmp_path / "dest").glob("*surgeon*.json")]
    assert receipt["report"]["perturbed"][0] == {
        "method": "ablate", "level": 0.5, "role": "mlp gate", "tensors": 3, "elements": 3 * 320 * 192,
    }  # fmt: skip
