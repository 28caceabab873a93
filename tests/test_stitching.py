"""Stitching: layers of several models in one, and everything that keeps models from fitting together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layers import TOKENS, load, part

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import RefusedError, UsageError
from tensorsurgeon.plan import make_plan


def model(place: Path, seed: int, layers: int = 6, tied: bool = False, **changes: Any) -> Path:
    tensors = make.tensors(layers, seed=seed)
    if tied:
        del tensors["lm_head.weight"]
    return make.save(place, tensors, make.config(layers, tie_word_embeddings=tied, **changes), 2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model(tmp_path / "base", 1)


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    return model(tmp_path / "instruct", 2)


def stitched(base: Path, layers: str, models: dict[str, Any], dest: Path, **options: Any) -> dict[str, torch.Tensor]:
    ts.write(ts.ops.stitch(ts.open(base), layers, models, **options), dest)
    return make.read(dest)


def layer(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): it for name, it in tensors.items() if name.startswith(prefix)}


ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("layers", "origins", "ends"),
    [
        ("base:0-1,instruct:3-4", [("base", 0), ("base", 1), ("instruct", 3), ("instruct", 4)],
         ("base", "instruct", "instruct")),
        ("instruct:0-1,4,base:5", [("instruct", 0), ("instruct", 1), ("base", 4), ("base", 5)],
         ("instruct", "base", "base")),
        ("(instruct:2,1)*2", [("instruct", 2), ("base", 1), ("instruct", 2), ("base", 1)],
         ("instruct", "base", "base")),
    ],
)  # fmt: skip
def test_every_layer_and_end_is_that_of_its_model_bit_for_bit(
    layers: str, origins: list[tuple[str, int]], ends: tuple[str, ...], base: Path, instruct: Path, tmp_path: Path
) -> None:
    made = {"base": make.read(base), "instruct": make.read(instruct)}
    written = stitched(base, layers, {"instruct": str(instruct)}, tmp_path / "dest")
    for place, (name, number) in enumerate(origins):
        assert make.same(layer(written, place), layer(made[name], number))
    assert not layer(written, len(origins))
    for name, giver in zip(ENDS, ends, strict=True):
        assert torch.equal(written[name], made[giver][name])
    assert json.loads((tmp_path / "dest/config.json").read_text())["num_hidden_layers"] == len(origins)


def test_what_is_written_computes_what_the_layers_of_both_compute(base: Path, instruct: Path, tmp_path: Path) -> None:
    ts.write(ts.ops.stitch(ts.open(base), "base:0-2,instruct:3-5", {"instruct": str(instruct)}), tmp_path / "dest")
    first, second, written = load(base), load(instruct), load(tmp_path / "dest")
    with torch.no_grad():
        # The layers of the second model stand in those of the first: torch does the stitching.
        decoder, donor = first.get_decoder(), second.get_decoder()
        for place in (3, 4, 5):
            decoder.layers[place] = donor.layers[place]
        decoder.norm, first.lm_head = part(donor, "norm"), second.lm_head
        wanted = first(TOKENS, use_cache=False).logits
        assert torch.equal(written(TOKENS, use_cache=False).logits, wanted)


def test_the_ends_are_those_of_the_models_that_are_named(base: Path, instruct: Path, tmp_path: Path) -> None:
    options = {"embedding": "instruct", "head": "base"}
    written = stitched(base, "base:0-2,instruct:3-5", {"instruct": str(instruct)}, tmp_path / "dest", **options)
    made = {"base": make.read(base), "instruct": make.read(instruct)}
    assert torch.equal(written["model.embed_tokens.weight"], made["instruct"]["model.embed_tokens.weight"])
    assert torch.equal(written["lm_head.weight"], made["base"]["lm_head.weight"])
    assert torch.equal(written["model.norm.weight"], made["base"]["model.norm.weight"])


def test_the_plan_says_where_the_ends_come_from(base: Path, instruct: Path) -> None:
    ckpt = ts.ops.stitch(ts.open(base), "base:0-2,instruct:3-5", {"instruct": str(instruct)})
    assert any("embeddings are those of base, final norm and head those of instruct" in it for it in ckpt.warnings)


@pytest.mark.parametrize("tied", [(True, True), (True, False), (False, True)], ids=str)
def test_heads_tied_or_not_are_never_lost(tied: tuple[bool, bool], tmp_path: Path) -> None:
    base = model(tmp_path / "base", 1, tied=tied[0])
    instruct = model(tmp_path / "instruct", 2, tied=tied[1])
    written = stitched(base, "base:0-2,instruct:3-5", {"instruct": str(instruct)}, tmp_path / "dest")
    donor = make.read(instruct)
    wanted = donor["model.embed_tokens.weight"] if tied[1] else donor["lm_head.weight"]
    assert torch.equal(written["lm_head.weight"], wanted)
    assert json.loads((tmp_path / "dest/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load(tmp_path / "dest").lm_head.weight.to(wanted.dtype), wanted)


@pytest.mark.parametrize("tied", [(True, True), (True, False), (False, True)], ids=str)
def test_one_giver_of_both_ends_keeps_its_tie(tied: tuple[bool, bool], tmp_path: Path) -> None:
    base = model(tmp_path / "base", 1, tied=tied[0])
    instruct = model(tmp_path / "instruct", 2, tied=tied[1])
    layers, options = "base:0-2,instruct:3-5", {"embedding": "instruct", "head": "instruct"}
    written = stitched(base, layers, {"instruct": str(instruct)}, tmp_path / "dest", **options)
    assert ("lm_head.weight" in written) == (not tied[1])
    assert json.loads((tmp_path / "dest/config.json").read_text())["tie_word_embeddings"] is tied[1]
    head = load(tmp_path / "dest").lm_head.weight
    assert torch.equal(head, load(instruct).lm_head.weight)


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 1)
    other = model(
        tmp_path / "other", 2, rope_theta=5e5, rms_norm_eps=1e-3, hidden_act="gelu", head_dim=32,
        quantization_config={"quant_method": "fp8"},
    )  # fmt: skip
    with pytest.raises(RefusedError) as caught:
        ts.ops.stitch(ts.open(base), "base:0,other:1", {"other": str(other)})
    text = str(caught.value)
    assert all(f"'{key}'" in text for key in ("rope_theta", "rms_norm_eps", "hidden_act", "head_dim"))
    assert "not quantised alike" in text


def test_a_difference_that_is_accepted_keeps_the_value_of_the_base(tmp_path: Path) -> None:
    base, other = model(tmp_path / "base", 1), model(tmp_path / "other", 2, rope_theta=5e5)
    ckpt = ts.ops.stitch(ts.open(base), "base:0,other:1", {"other": str(other)}, accept="rope_*")
    assert ckpt.config.value.get("rope_theta") == ts.open(base).config.value.get("rope_theta")


def tokenizer(place: Path, words: list[str]) -> None:
    vocabulary = {word: number for number, word in enumerate(words)}
    (place / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))


def test_vocabularies_are_compared_by_their_words(base: Path, instruct: Path) -> None:
    tokenizer(base, ["a", "b"])
    tokenizer(instruct, ["b", "a"])
    with pytest.raises(RefusedError, match="other tokens under the same numbers"):
        ts.ops.stitch(ts.open(base), "base:0,instruct:1", {"instruct": str(instruct)})
    tokenizer(instruct, ["a", "b"])
    assert ts.ops.stitch(ts.open(base), "base:0,instruct:1", {"instruct": str(instruct)})


def test_other_model_types_do_not_fit(tmp_path: Path) -> None:
    base, other = model(tmp_path / "base", 1), model(tmp_path / "other", 2, model_type="llama")
    with pytest.raises(RefusedError, match="'model_type' is 'qwen3' in base and 'llama' in other"):
        ts.ops.stitch(ts.open(base), "base:0,other:1", {"other": str(other)})


TYPES = ["sliding_attention", "full_attention"] * 3


def test_per_layer_lists_are_gathered_from_both(tmp_path: Path) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    base = model(tmp_path / "base", 1, layer_types=TYPES, **settings)
    other = model(tmp_path / "other", 2, layer_types=TYPES[::-1], **settings)
    ckpt = ts.ops.stitch(ts.open(base), "base:0-1,other:0,other:2,base:5", {"other": str(other)})
    assert ckpt.config.value["layer_types"] == [TYPES[0], TYPES[1], TYPES[5], TYPES[3], TYPES[5]]


def test_models_of_different_depths_fit(tmp_path: Path) -> None:
    base, deep = model(tmp_path / "base", 1, layers=4), model(tmp_path / "deep", 2, layers=8)
    written = stitched(base, "base:0-3,deep:6-7", {"deep": str(deep)}, tmp_path / "dest")
    assert make.same(layer(written, 5), layer(make.read(deep), 7))
    assert load(tmp_path / "dest").config.num_hidden_layers == 6


def test_three_models_and_the_same_one_twice(base: Path, instruct: Path, tmp_path: Path) -> None:
    third = model(tmp_path / "third", 3)
    models = {"instruct": str(instruct), "third": str(third), "again": str(instruct)}
    written = stitched(base, "base:0,instruct:1,third:2,again:3", models, tmp_path / "dest")
    assert make.same(layer(written, 2), layer(make.read(third), 2))
    assert make.same(layer(written, 3), layer(make.read(instruct), 3))


def test_a_quantised_model_is_decoded_on_the_way(tmp_path: Path) -> None:
    base, fp8 = make.plain(tmp_path / "base", layers=4), make.fp8(tmp_path / "fp8", layers=4)
    with pytest.raises(RefusedError, match="not quantised alike"):
        ts.ops.stitch(ts.open(base), "base:0-1,fp8:2-3", {"fp8": str(fp8)})
    recipe = {"source": str(fp8), "steps": ["dequantize"]}
    written = stitched(base, "base:0-1,fp8:2-3", {"fp8": recipe}, tmp_path / "dest")
    ts.write(ts.ops.dequantize(ts.open(fp8)), tmp_path / "plain")
    assert make.same(layer(written, 2), layer(make.read(tmp_path / "plain"), 2))
    in_python = stitched(base, "base:0-1,fp8:2-3", {"fp8": ts.ops.dequantize(ts.open(fp8))}, tmp_path / "other")
    assert make.same(in_python, written)


@pytest.mark.parametrize(
    ("layers", "models", "options", "message"),
    [
        ("base:0,instrct:1", {"instruct": "X"}, {}, "no model 'instrct'. Did you mean 'instruct'"),
        ("base:0", {"instruct": "X"}, {}, "'instruct' gives no layer"),
        ("base:0,instruct:1", {"instruct": "X", "base": "X"}, {}, "'base' is the first model"),
        ("base:0,instruct:9", {"instruct": "X"}, {}, "there is no layer 9"),
        ("base:0,instruct:1", {"instruct": "X"}, {"head": "other"}, "no model 'other'"),
        ("base:0,instruct", {"instruct": "X"}, {}, "expected a layer number at character 8"),
        ("base:0,instruct:1", {}, {}, "Give it as --models instruct=MODEL"),
        ("base:0,instruct:1", "instruct", {}, "is not NAME=MODEL"),
        ("base:0,instruct:1", {"instruct": 5}, {}, "neither a directory or hub id"),
    ],
)
def test_a_slip_is_not_understood(
    layers: str, models: Any, options: dict[str, str], message: str, base: Path, instruct: Path
) -> None:
    if isinstance(models, dict):
        models = {name: str(instruct) if model == "X" else model for name, model in models.items()}
    with pytest.raises(UsageError, match=message):
        ts.ops.stitch(ts.open(base), layers, models, **options)


def test_two_sources_with_shards_of_one_name_are_told_apart(base: Path, instruct: Path, tmp_path: Path) -> None:
    one = ts.ops.stitch(ts.open(base), "base:0-2,instruct:3-5", {"instruct": str(instruct)})
    other = ts.ops.stitch(ts.open(base), "base:0-2,instruct:3-5", {"instruct": str(instruct)}, head="base")
    assert make_plan(one).digest != make_plan(other).digest
    receipt = ts.write(one, tmp_path / "dest")
    assert [source["name"] for source in receipt["sources"]] == ["base", "instruct"]
