"""Layer operations: what is computed after surgery is what the re-ordered layers compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import RefusedError, UsageError
from tensorsurgeon.notation import parse_layers

SEQUENCES: dict[str, tuple[Callable[[ts.Checkpoint], ts.Checkpoint], list[int]]] = {
    "identity": (lambda ckpt: ts.ops.select_layers(ckpt, "0-5"), [0, 1, 2, 3, 4, 5]),
    "delete one": (lambda ckpt: ts.ops.drop_layers(ckpt, 2), [0, 1, 3, 4, 5]),
    "delete a window": (lambda ckpt: ts.ops.drop_layers(ckpt, "1-3"), [0, 4, 5]),
    "delete the first": (lambda ckpt: ts.ops.drop_layers(ckpt, "0"), [1, 2, 3, 4, 5]),
    "delete the last": (lambda ckpt: ts.ops.drop_layers(ckpt, "5"), [0, 1, 2, 3, 4]),
    "double one": (lambda ckpt: ts.ops.repeat_layers(ckpt, "3"), [0, 1, 2, 3, 3, 4, 5]),
    "double a block": (lambda ckpt: ts.ops.repeat_layers(ckpt, "1-3"), [0, 1, 2, 3, 1, 2, 3, 4, 5]),
    "double each": (lambda ckpt: ts.ops.repeat_layers(ckpt, "1,4", each=True), [0, 1, 1, 2, 3, 4, 4, 5]),
    "double all": (lambda ckpt: ts.ops.repeat_layers(ckpt, "0-5"), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
    "one five times": (lambda ckpt: ts.ops.repeat_layers(ckpt, "2", times=5), [0, 1, 2, 2, 2, 2, 2, 3, 4, 5]),
    "reverse all": (ts.ops.reverse_layers, [5, 4, 3, 2, 1, 0]),
    "reverse a block": (lambda ckpt: ts.ops.reverse_layers(ckpt, "1-4"), [0, 4, 3, 2, 1, 5]),
    "reverse some": (lambda ckpt: ts.ops.reverse_layers(ckpt, "0,2,5"), [5, 1, 2, 3, 4, 0]),
    "every second": (lambda ckpt: ts.ops.keep_layers(ckpt, every=2), [0, 2, 4]),
    "every fourth": (lambda ckpt: ts.ops.keep_layers(ckpt, every=4), [0, 4]),
    "odd": (lambda ckpt: ts.ops.keep_layers(ckpt, parity="odd"), [1, 3, 5]),
    "even": (lambda ckpt: ts.ops.keep_layers(ckpt, parity="even"), [0, 2, 4]),
    "first": (lambda ckpt: ts.ops.keep_layers(ckpt, first=2), [0, 1]),
    "last": (lambda ckpt: ts.ops.keep_layers(ckpt, last=2), [4, 5]),
    "middle": (lambda ckpt: ts.ops.keep_layers(ckpt, middle=3), [1, 2, 3]),
    "arbitrary": (lambda ckpt: ts.ops.select_layers(ckpt, "4,0-1,5*2,3-2"), [4, 0, 1, 5, 5, 3, 2]),
}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.plain(tmp_path_factory.mktemp("six") / "model", layers=6, shards=3)


def load(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


class Output(dict[str, Any]):
    """A decoder's output of which only the hidden states matter."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def part(module: Any, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def replayed(model: Any, sequence: list[int], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the original, and those of its layers run in another order.

    Each layer gets the arguments that it got in the original run but for the hidden states, and the model's
    own head follows. No config and no number of a layer is involved, so the oracle cannot share a mistake with
    the rewriter.
    """
    decoder = model.get_decoder()
    layers = part(decoder, "layers", "h")
    arguments: dict[int, Any] = {}

    def note(place: int) -> Callable[..., None]:
        return lambda _, args, kwargs: arguments.__setitem__(place, (args, kwargs))

    hooks = [layer.register_forward_pre_hook(note(place), with_kwargs=True) for place, layer in enumerate(layers)]
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        hidden = arguments[0][0][0]
        for layer in sequence:
            args, kwargs = arguments[layer]
            output = layers[layer](hidden, *args[1:], **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        last = part(decoder, "norm", "ln_f", "final_layer_norm")(hidden)
        decoder.forward = lambda *args, **kwargs: Output(last_hidden_state=last)
        return before, model(tokens, use_cache=False).logits


TOKENS = torch.randint(0, 304, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_is_written_computes_what_the_reordered_layers_compute(name: str, six: Path, tmp_path: Path) -> None:
    operation, sequence = SEQUENCES[name]
    ts.write(operation(ts.open(six)), tmp_path / "dest", max_shard_size="1MB")
    written = load(tmp_path / "dest")
    assert written.config.num_hidden_layers == len(sequence)
    with torch.no_grad():
        logits = written(TOKENS, use_cache=False).logits
    before, wanted = replayed(load(six), sequence, TOKENS)
    assert torch.equal(logits, wanted)
    changed = (logits - before).abs().max()
    assert changed == 0 if name == "identity" else changed > 0.1


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_layer_is_its_source_layer_bit_for_bit(name: str, six: Path, tmp_path: Path) -> None:
    operation, sequence = SEQUENCES[name]
    ts.write(operation(ts.open(six)), tmp_path / "dest")
    source = make.tensors(6)
    wanted = {tensor: source[tensor] for tensor in source if ".layers." not in tensor}
    for place, layer in enumerate(sequence):
        wanted |= {
            tensor.replace(f"layers.{layer}.", f"layers.{place}."): value
            for tensor, value in source.items()
            if f"layers.{layer}." in tensor
        }
    assert make.same(make.read(tmp_path / "dest"), wanted)


SLIDING: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}


def architecture(name: str, **changes: Any) -> transformers.PretrainedConfig:
    settings = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return AutoConfig.for_model(name, **settings | changes)


def saved(config: transformers.PretrainedConfig, directory: Path) -> Path:
    """Write a random model of an architecture in which every layer matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "config",
    [
        architecture("llama"),
        architecture("mistral", sliding_window=None),
        architecture("qwen2", use_sliding_window=False),
        architecture("mixtral", num_local_experts=4),
        architecture("gpt2", n_layer=6, n_head=4, n_embd=32, n_positions=64),
        architecture("gpt_neox"),
        architecture("phi3", original_max_position_embeddings=64),
        architecture("olmo2"),
        architecture("qwen3", layer_types=["full_attention", "sliding_attention"] * 3, **SLIDING),
        architecture("gemma2", sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("sequence", ["0,2-5", "0-2,2-5", "5-0"])
def test_architectures_that_the_config_can_follow_load_and_compute(
    config: transformers.PretrainedConfig, sequence: str, tmp_path: Path
) -> None:
    source = saved(config, tmp_path / "source")
    if config.model_type == "qwen3":
        settings = json.loads((source / "config.json").read_text())
        settings["use_sliding_window"] = True
        (source / "config.json").write_text(json.dumps(settings | {"max_window_layers": 0}))
    ts.write(ts.ops.select_layers(ts.open(source), sequence), tmp_path / "dest")
    tokens = TOKENS % 96
    with torch.no_grad():
        logits = load(tmp_path / "dest")(tokens, use_cache=False).logits
    before, wanted = replayed(load(source), list(parse_layers(sequence)), tokens)
    assert torch.allclose(logits, wanted, atol=1e-5, rtol=1e-5)
    assert (logits - before).abs().max() > 0.01


FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gemma2"}, {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]}),
        ({"model_type": "qwen3_next"}, {"layer_types": [LINEAR, LINEAR, FULL, LINEAR, LINEAR]}),
        ({"model_type": "modernbert"}, {"layer_types": [FULL, SLIDING, FULL, SLIDING, SLIDING]}),
        ({"mlp_only_layers": [1]}, {"mlp_only_layers": []}),
        ({"mlp_only_layers": [1, 4]}, {"mlp_only_layers": [3]}),
        ({"first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
        ({"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 8}, {"max_window_layers": 1}),
        ({"no_rope_layers": [1, 1, 1, 0, 1, 1]}, {"no_rope_layers": [1, 1, 0, 1, 1]}),
        (
            {"per_layer_config": {"00": {}, "03": {"skip": True}}},
            {"per_layer_config": {"00": {}, "02": {"skip": True}}},
        ),
    ],
)
def test_a_per_layer_field_follows_into_the_file(
    changes: dict[str, Any], expected: dict[str, Any], six: Path, tmp_path: Path
) -> None:
    source = make.save(tmp_path / "source", make.tensors(6), make.config(6, **changes))
    ts.write(ts.ops.drop_layers(ts.open(source), "1"), tmp_path / "dest")
    written = json.loads((tmp_path / "dest" / "config.json").read_text())
    assert written == make.config(6, **changes) | expected | {"num_hidden_layers": 5}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sliding_window_pattern": 3}, "sliding_window_pattern"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "diffllama"}, "model_type"),
        ({"no_rope_layers": [1, 1, 1]}, "no_rope_layers"),
        ({"something_per_layer": [1, 2, 3, 4, 5, 6]}, "something_per_layer"),
        ({"auto_map": {}, "attention_every": 3}, "attention_every"),
    ],
)
def test_a_per_layer_field_that_would_not_hold_is_refused_by_name(
    changes: dict[str, Any], key: str, six: Path, tmp_path: Path
) -> None:
    source = make.save(tmp_path / "source", make.tensors(6), make.config(6, **changes))
    with pytest.raises(RefusedError, match=key):
        ts.ops.drop_layers(ts.open(source), "1")
    assert len(ts.ops.select_layers(ts.open(source), "0-5")) == len(make.tensors(6))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda ckpt: ts.ops.drop_layers(ckpt, "6"), "there is no layer 6; the model has 6 layers, 0 to 5"),
        (lambda ckpt: ts.ops.select_layers(ckpt, "0-99"), "there is no layer 6, 7"),
        (lambda ckpt: ts.ops.repeat_layers(ckpt, "7"), "there is no layer 7"),
        (lambda ckpt: ts.ops.reverse_layers(ckpt, "0,9"), "there is no layer 9"),
        (lambda ckpt: ts.ops.repeat_layers(ckpt, "3-1"), "--each"),
        (lambda ckpt: ts.ops.repeat_layers(ckpt, "1", times=0), "greater than or equal to 1"),
        (lambda ckpt: ts.ops.keep_layers(ckpt, first=7), "7 layers are asked for, but the model has 6"),
        (ts.ops.keep_layers, "give just one of"),
        (lambda ckpt: ts.ops.keep_layers(ckpt, first=1, last=1), "give just one of"),
        (lambda ckpt: ts.ops.select_layers(ckpt, "0,,1"), "expected a layer number at character 3"),
        (lambda ckpt: ts.ops.select_layers(ckpt, -1), "layers are whole numbers"),
    ],
)
def test_a_slip_is_not_understood(operation: Callable[[ts.Checkpoint], ts.Checkpoint], message: str, six: Path) -> None:
    with pytest.raises(UsageError, match=message):
        operation(ts.open(six))


def test_no_layer_at_all_is_refused(six: Path) -> None:
    with pytest.raises(RefusedError, match="at least one layer"):
        ts.ops.drop_layers(ts.open(six), "0-5")


def test_layers_for_multi_token_prediction_stay_behind_the_stack(tmp_path: Path) -> None:
    made = make.tensors(5)
    source = make.save(tmp_path / "source", made, make.config(4, num_nextn_predict_layers=1))
    ts.write(ts.ops.repeat_layers(ts.open(source), "1", times=3), tmp_path / "dest")
    written = make.read(tmp_path / "dest")
    assert torch.equal(written["model.layers.6.mlp.up_proj.weight"], made["model.layers.4.mlp.up_proj.weight"])
    assert ts.open(tmp_path / "dest").layers.count == 6


def test_a_vision_tower_and_unknown_tensors_stay(tmp_path: Path) -> None:
    others = {
        f"{prefix}{layer}.{rest}": torch.full((4, 4), float(layer))
        for prefix, rest in (
            ("model.visual.blocks.", "attn.qkv.weight"),
            ("vision_tower.encoder.layers.", "mlp.fc1.weight"),
            ("mtp.layers.", "mlp.up_proj.weight"),
            ("unknown.", "weight"),
        )
        for layer in range(6)
    }
    source = make.save(tmp_path / "source", make.tensors(6) | others, make.config(6))
    ts.write(ts.ops.drop_layers(ts.open(source), "0"), tmp_path / "dest")
    written = make.read(tmp_path / "dest")
    assert make.same({name: written[name] for name in others}, others)


def test_only_what_must_change_changes_in_the_config(six: Path, tmp_path: Path) -> None:
    ts.write(ts.ops.drop_layers(ts.open(six), "1"), tmp_path / "dest")
    before, after = ((place / "config.json").read_text() for place in (six, tmp_path / "dest"))
    assert after == before.replace('"num_hidden_layers": 6', '"num_hidden_layers": 5')


@pytest.mark.parametrize("command", [ts.ops.reverse_layers, lambda ckpt: ts.ops.drop_layers(ckpt, "1")])
def test_a_model_without_layers_of_its_own_says_why(tmp_path: Path, command: Any) -> None:
    tensors = {"albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": torch.zeros(2, 2)}
    config = {"model_type": "albert", "num_hidden_layers": 4, "num_hidden_groups": 1}
    with pytest.raises(RefusedError, match="'albert': all layers share one set of weights"):
        command(ts.open(make.save(tmp_path / "albert", tensors, config)))
