"""Layer surgery on many architectures: what is written loads, and computes what the re-ordered layers compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, LAYERS, SEQUENCES, Architecture, decoded, load, logits_of, replay
from safetensors.torch import save_file

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import RefusedError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # GPT-BigCode's own

TOLERANCE = 2e-4
FOLLOWED = [name for name, it in ARCHITECTURES.items() if set(it.refused) != set(SEQUENCES)]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep transformers from talking of kernels that are not installed and of tiny models."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("zoo")

    @cache
    def made(name: str) -> tuple[Path, Any]:
        directory = architectures.make(ARCHITECTURES[name], place / name.replace(" ", "-"))
        return directory, load(directory)

    return made


def sequences_of(architecture: Architecture, model: Any) -> dict[str, list[int]]:
    """Return the sequences to try: those of all architectures, and those that leave layers of one type only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    alone = {
        f"{kind} alone": [layer for layer, it in enumerate(kinds) if it == kind]
        for kind in sorted(set(kinds))
        if len(set(kinds)) > 1
    }
    return {**SEQUENCES, **alone}


def without_implied(source: Path, architecture: Architecture, place: Path) -> Path:
    """Return a copy whose config leaves to the class what the class fills in, as configs on the hub do."""
    shutil.copytree(source, place)
    settings = json.loads((place / "config.json").read_text())
    for key in architecture.implied:
        settings.pop(key, None)
    settings |= {key: value for key, value in architecture.settings.items() if key not in architecture.implied}
    (place / "config.json").write_text(json.dumps(settings))
    return place


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_oracle_replays_the_original(name: str, zoo: Any) -> None:
    _, model = zoo(name)
    whole, *shorter = replay(
        model, [list(range(LAYERS))] + [[i for i in range(LAYERS) if i != k] for k in range(LAYERS)]
    )
    logits = logits_of(model)
    assert torch.equal(whole, logits)
    assert all((it - logits).abs().max() > 0.05 for it in shorter), "every layer matters"


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_written_computes_what_the_reordered_layers_compute(name: str, zoo: Any, tmp_path: Path) -> None:
    architecture, (source, model) = ARCHITECTURES[name], zoo(name)
    plain = logits_of(model)
    places = {"": source}
    if architecture.implied:
        places["hub"] = without_implied(source, architecture, tmp_path / "hub")
        assert torch.equal(logits_of(load(places["hub"])), plain)
    wanted_sequences = sequences_of(architecture, model)
    oracle = dict(zip(wanted_sequences, replay(model, list(wanted_sequences.values())), strict=True))
    followed = 0
    for form, place in places.items():
        for sequence, layers in wanted_sequences.items():
            dest = tmp_path / f"{form}{sequence}".replace(" ", "-")
            try:
                ts.write(ts.ops.select_layers(ts.open(place), layers), dest)
            except RefusedError:
                assert sequence in architecture.refused or " alone" in sequence, sequence
                continue
            assert sequence not in architecture.refused, f"{sequence} was to be refused"
            written = load(dest)
            assert (logits_of(written) - oracle[sequence]).abs().max() < TOLERANCE, sequence
            assert (oracle[sequence] - plain).abs().max() > 0.05
            followed += 1
    assert followed >= (len(SEQUENCES) - len(architecture.refused)) * len(places)


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("sequence", ["drop", "duplicate"])
def test_decoding_with_a_cache_agrees(name: str, sequence: str, zoo: Any, tmp_path: Path) -> None:
    architecture, (source, model) = ARCHITECTURES[name], zoo(name)
    own = decoded(model)
    agrees = own is not None and bool((own - logits_of(model)[:, 23:-1]).abs().max() < TOLERANCE)
    assert agrees == architecture.cached
    if sequence in architecture.refused or not agrees:
        return
    ts.write(ts.ops.select_layers(ts.open(source), SEQUENCES[sequence]), tmp_path / "dest")
    (wanted,) = replay(model, [SEQUENCES[sequence]])
    found = decoded(load(tmp_path / "dest"))
    assert found is not None
    assert (found - wanted[:, 23:-1]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "sequence"), [(name, sequence) for name, it in ARCHITECTURES.items() for sequence in it.refused]
)
def test_what_cannot_be_said_is_refused_before_any_work(name: str, sequence: str, zoo: Any, tmp_path: Path) -> None:
    source, _ = zoo(name)
    with pytest.raises(RefusedError, match="config.json|model_type|tensors"):
        ts.write(ts.ops.select_layers(ts.open(source), SEQUENCES[sequence]), tmp_path / "dest")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_permutation_and_its_inverse_give_back_every_byte(name: str, zoo: Any, tmp_path: Path) -> None:
    source, _ = zoo(name)
    for order in ([5, 4, 3, 2, 1, 0], [0, 1, 3, 2, 4, 5], [1, 0, 2, 3, 4, 5], [0, 1, 2, 4, 3, 5]):
        inverse = [order.index(layer) for layer in range(LAYERS)]
        try:
            there = ts.ops.select_layers(ts.open(source), order)
        except RefusedError:
            continue
        ts.write(ts.ops.select_layers(there, inverse), tmp_path / "dest", overwrite=True)
        assert make.same(make.read(tmp_path / "dest"), make.read(source))
        assert torch.equal(logits_of(load(tmp_path / "dest")), logits_of(load(source)))


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_for_multi_token_prediction_stay_behind_the_stack(name: str, zoo: Any, tmp_path: Path) -> None:
    source, model = zoo(name)
    extra = {f"model.layers.{LAYERS}.{module}.weight": torch.randn(8, 32) for module in ("eh_proj", "mlp.up_proj")}
    with_extra = shutil.copytree(source, tmp_path / "source")
    index = json.loads((with_extra / "model.safetensors.index.json").read_text())
    save_file(extra, with_extra / "extra.safetensors")
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (with_extra / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((with_extra / "config.json").read_text())
    (with_extra / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    for sequence in ("drop", "repeat"):
        dest = tmp_path / sequence
        ts.write(ts.ops.select_layers(ts.open(with_extra), SEQUENCES[sequence]), dest)
        written, place = make.read(dest), len(SEQUENCES[sequence])
        for key, tensor in extra.items():
            assert torch.equal(written.pop(key.replace(f".{LAYERS}.", f".{place}.")), tensor)
        assert json.loads((dest / "config.json").read_text())["num_nextn_predict_layers"] == 1
        (wanted,) = replay(model, [SEQUENCES[sequence]])
        loaded, info = architectures.model_class(model.config).from_pretrained(
            dest, dtype=torch.float32, output_loading_info=True
        )
        assert set(info["unexpected_keys"]) <= {key.replace(f".{LAYERS}.", f".{place}.") for key in extra}
        assert not info["missing_keys"]
        assert (logits_of(loaded.eval()) - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize(("name", "key", "count"), [("gpt2", "n_layer", 12), ("gpt_neo", "num_layers", 24)])
def test_a_count_that_only_the_class_knows_is_written(name: str, key: str, count: int, tmp_path: Path) -> None:
    changes = {"attention_types": [[["global", "local"], count // 2]]} if name == "gpt_neo" else {}
    source = architectures.make(
        ARCHITECTURES[name], tmp_path / "source", **{key: count, "num_hidden_layers": count, **changes}
    )
    model = load(source)
    config = json.loads((source / "config.json").read_text())
    absent = {it: value for it, value in config.items() if it not in (key, *changes, "attention_layers")}
    (source / "config.json").write_text(json.dumps(absent))
    assert torch.equal(logits_of(load(source)), logits_of(model))
    sequence = [*range(5), *range(4, count - 2)]
    ts.write(ts.ops.select_layers(ts.open(source), sequence), tmp_path / "dest")
    (wanted,) = replay(model, [sequence], count=count)
    assert (logits_of(load(tmp_path / "dest")) - wanted).abs().max() < TOLERANCE
