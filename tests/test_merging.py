"""Merged adapters, held against PEFT's merge_and_unload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import RefusedError, UsageError

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"target_modules": ["q_proj", "k_proj", "down_proj"],
                 "rank_pattern": {"model.layers.2.self_attn.q_proj": 8, "k_proj": 2},
                 "alpha_pattern": {"layers.5.mlp.down_proj": 32}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "some layers": {"layers_to_transform": [1, 4]},
    "all linear": {"target_modules": "all-linear"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "norms and head as a whole": {"modules_to_save": ["norm", "lm_head"]},
    "rsLoRA, DoRA and patterns": {"use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 8}},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make(ARCHITECTURES["llama"], tmp_path_factory.mktemp("base") / "base")


def adapted(model: Path, place: Path, seed: int = 1, **settings: Any) -> Path:
    """Write an adapter in which everything is random, as PEFT writes it."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(load(model), LoraConfig(**{**chosen, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                scale = 0.2 if "magnitude" not in name else 1.0
                change = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(change.abs() + 0.5 if "magnitude" in name else change)
    wrapped.save_pretrained(place)
    return place


def merged_by_peft(model: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    whole = load(model)
    for adapter in adapters:
        whole = PeftModel.from_pretrained(whole, adapter).merge_and_unload()
    return dict(whole.state_dict())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_are_those_of_merge_and_unload(variant: str, base: Path, tmp_path: Path) -> None:
    adapter = adapted(base, tmp_path / "adapter", **VARIANTS[variant])
    ts.write(ts.ops.merge_lora(ts.open(base), adapter=str(adapter)), tmp_path / "merged")
    ours, theirs, before = make.read(tmp_path / "merged"), merged_by_peft(base, adapter), make.read(base)
    assert ours.keys() == before.keys()
    changed = 0
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-5), name
        changed += not torch.equal(tensor, before[name])
    assert changed >= 2


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}], ids=["plain", "PiSSA"])
def test_conv1d_weights_are_merged(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = architectures.make(ARCHITECTURES["gpt2"], tmp_path / "base")
    targets = ["c_attn", "c_proj", "wte"]
    adapter = adapted(base, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True, **settings)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    ts.write(ts.ops.merge_lora(ts.open(base), adapter=str(adapter)), tmp_path / "merged")
    ours, theirs = make.read(tmp_path / "merged"), merged_by_peft(base, adapter)
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-5) for name, tensor in ours.items())


def test_several_adapters_with_scales_of_their_own(base: Path, tmp_path: Path) -> None:
    one = adapted(base, tmp_path / "one", 1, use_dora=True)
    two = adapted(base, tmp_path / "two", 2, target_modules=["q_proj", "up_proj"])
    both = ts.ops.merge_lora(ts.open(base), adapter=[str(one), str(two)])
    ts.write(both, tmp_path / "both")
    theirs = merged_by_peft(base, one, two)
    ours = make.read(tmp_path / "both")
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-5) for name, tensor in ours.items())
    ts.write(ts.ops.merge_lora(ts.open(base), adapter=str(two), scale=0.5), tmp_path / "half")
    before, half = make.read(base), make.read(tmp_path / "half")
    whole = merged_by_peft(base, two)
    for name, tensor in half.items():
        assert torch.allclose(tensor, (before[name] + whole[name]) / 2, rtol=1e-5, atol=1e-5)
    ts.write(ts.ops.merge_lora(ts.open(tmp_path / "half"), adapter=str(two), scale=[-0.5]), tmp_path / "back")
    assert all(torch.allclose(it, before[name], atol=1e-5) for name, it in make.read(tmp_path / "back").items())


def test_an_extracted_adapter_merged_is_the_tuned_model(base: Path, tmp_path: Path) -> None:
    tensors = {name: it + 0.02 * torch.randn(it.shape) for name, it in make.read(base).items()}
    tuned = make.save(tmp_path / "tuned", tensors, json.loads((base / "config.json").read_text()))
    adapter = ts.ops.extract_lora(ts.open(tuned), base=str(base), error=1e-6, include="embedding,head,norm")
    ts.write(adapter, tmp_path / "adapter")
    ts.write(ts.ops.merge_lora(ts.open(base), adapter=str(tmp_path / "adapter")), tmp_path / "merged")
    assert all(torch.allclose(it, tensors[name], atol=1e-5) for name, it in make.read(tmp_path / "merged").items())


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base = make.plain(tmp_path / "base", layers=2)
    adapter = adapted(base, tmp_path / "adapter")
    ts.write(ts.ops.merge_lora(ts.open(base), adapter=str(adapter)), tmp_path / "merged")
    ours, before, factors = (
        make.read(tmp_path / "merged"),
        make.read(base),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        exact = before[f"{name}.weight"].double() + 2 * b.double() @ a.double()
        assert ((ours[f"{name}.weight"] - exact.bfloat16()).abs() <= 2**-7 * exact.abs() + 1e-7).all()
        assert (ours[f"{name}.weight"] == exact.bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize("requantize", [False, True])
def test_a_quantised_base_is_written_plain_or_quantised_again(tmp_path: Path, requantize: bool) -> None:
    base = make.fp8(tmp_path / "base", layers=2)
    plain = tmp_path / "plain"
    ts.write(ts.ops.dequantize(ts.open(base), dtype="float32"), plain)
    adapter = adapted(plain, tmp_path / "adapter")
    ts.write(ts.ops.merge_lora(ts.open(base), adapter=str(adapter), requantize=requantize), tmp_path / "merged")
    if requantize:
        again = make.read(tmp_path / "merged")
        before = make.read(base)
        same = [name for name in before if torch.equal(make.bits(before[name]), make.bits(again[name]))]
        assert len(before) - len(same) == 2 * 2 * 2
        ts.write(ts.ops.dequantize(ts.open(tmp_path / "merged"), dtype="float32"), tmp_path / "decoded")
        ours = make.read(tmp_path / "decoded")
    else:
        ours = make.read(tmp_path / "merged")
        assert ours["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    theirs = merged_by_peft(plain, adapter)
    for name, tensor in ours.items():
        error = (tensor.float() - theirs[name]).norm() / theirs[name].norm()
        assert error < (0.04 if requantize else 0.004), name


@pytest.mark.parametrize(("memory", "threads"), [("64KiB", 1), ("1GiB", 1), ("1GiB", 4)])
def test_neither_memory_nor_threads_change_a_byte(base: Path, tmp_path: Path, memory: str, threads: int) -> None:
    large = make.plain(tmp_path / "large", layers=2)
    adapter = adapted(large, tmp_path / "adapter", use_dora=True)
    merged = ts.ops.merge_lora(ts.open(large), adapter=str(adapter))
    usual = ts.write(merged, tmp_path / "usual")
    other = ts.write(merged, tmp_path / "other", memory="16MiB" if memory == "64KiB" else memory, threads=threads)
    assert usual["files"] == other["files"]


def test_bytes_do_not_depend_on_the_threads_that_torch_may_use(tmp_path: Path) -> None:
    """The rank is high enough for a library to share sums among threads, which changes their order."""
    generator = torch.Generator().manual_seed(0)
    name, rank = "model.layers.0.mlp.down_proj", 1024
    tensors = {f"{name}.weight": torch.randn(128, 1024, generator=generator)}
    source = make.save(tmp_path / "source", tensors, make.config(1, hidden_size=128, intermediate_size=1024))
    factors = {"A": torch.randn(rank, 1024, generator=generator), "B": torch.randn(128, rank, generator=generator)}
    (tmp_path / "adapter").mkdir()
    save_file({f"base_model.model.{name}.lora_{key}.weight": it for key, it in factors.items()},
              tmp_path / "adapter" / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["down_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    merged = ts.ops.merge_lora(ts.open(source), adapter=str(tmp_path / "adapter"))
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            made.append(bytes(merged[f"{name}.weight"].read().data))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert made[0] == made[1]


def damaged(adapter: Path, place: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """Write an adapter with other settings and tensors; None takes one out."""
    place.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text()) | (config or {})
    (place / "adapter_config.json").write_text(json.dumps(settings))
    whole = load_file(adapter / "adapter_model.safetensors") | tensors
    save_file({name: it for name, it in whole.items() if it is not None}, place / "adapter_model.safetensors")
    return place


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({f"{NAME}A.weight": None}, "layers.1.self_attn.q_proj: has lora_B but no lora_A; half a pair"),
        ({f"{NAME}B.weight": None}, "layers.1.self_attn.q_proj: has lora_A but no lora_B; half a pair"),
        ({f"{NAME}A.weight": torch.ones(4, 31)}, r"A is \[4, 31\] and B \[32, 4\]; 32 rows of 32 need A"),
        ({f"{NAME}B.weight": torch.ones(32, 5)}, r"A is \[4, 32\] and B \[32, 5\]"),
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 32),
          "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.ones(48, 4)},
         "layers.9.mlp.up_proj: the base has no such module"),
        ({"base_model.model.model.norm.weight": torch.ones(7)}, r"model.norm.weight: has shape \[7\], and \[32\]"),
        ({"base_model.model.nothing.weight": torch.ones(7)}, "nothing.weight: the base has no such tensor"),
        ({f"{NAME}B.bias": torch.ones(32)}, "is of no kind that can be merged"),
        ({"config": {"peft_type": "IA3"}}, "peft_type is 'IA3'"),
        ({"config": {"r": 0}}, "r and lora_alpha give no scale"),
        ({"config": {"layer_replication": [[0, 2]]}}, "'layer_replication' is"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    config = changes.pop("config", None)
    wrong = damaged(adapted(base, tmp_path / "adapter"), tmp_path / "wrong", config, **changes)
    with pytest.raises(RefusedError, match=text):
        ts.ops.merge_lora(ts.open(base), adapter=str(wrong))


def test_scales_go_with_adapters_and_a_model_is_no_adapter(base: Path, tmp_path: Path) -> None:
    adapter = str(adapted(base, tmp_path / "adapter"))
    with pytest.raises(UsageError, match="1 adapters and 2 scales"):
        ts.ops.merge_lora(ts.open(base), adapter=adapter, scale=[1, 2])
    with pytest.raises(RefusedError, match="is no PEFT adapter"):
        ts.ops.merge_lora(ts.open(base), adapter=str(base))
    with pytest.raises(UsageError, match="no weight of the model is quantised"):
        ts.ops.merge_lora(ts.open(base), adapter=adapter, requantize=True)
