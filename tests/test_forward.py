"""The streamed forward pass: the states and logits of the whole model in memory, to the bit, one layer at a time.

The oracle is transformers with the model in memory. Norm weights are random, as with norms of one a norm that is
applied twice is not seen, and heads are scaled up, as without it a soft-cap that is missing is hardly seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, VOCABULARY, WINDOW, load
from architectures import make as make_architecture

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import CheckpointError, RefusedError, UsageError
from tensorsurgeon.forward.batches import Batch, make_batches
from tensorsurgeon.forward.head import Head
from tensorsurgeon.forward.recording import arguments
from tensorsurgeon.forward.stream import Stream
from tensorsurgeon.running import Running, run_under

QUICK = (
    "llama", "mistral3 (nested)", "qwen2 (sliding)", "qwen3 (sliding)", "gemma2", "gemma3_text", "mixtral",
    "qwen3_moe", "gpt_oss", "deepseek_v3", "granite", "cohere2", "olmo2", "phi3", "gpt_neox", "gpt2", "opt",
    "minicpm3", "llama4_text",
)  # fmt: skip
"""Experts, soft-caps, windows, scaled logits, norms with a bias, learned positions, parts of rotary, a nested model."""
SHIFTED = ("mamba", "mamba2")
"""Their `output_hidden_states` begin behind the first layer."""
SHARING = ("gemma3n_text", "gemma4_text")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "modernbert")
STREAMED = [name for name in ARCHITECTURES if name not in (*SHARING, *ENCODERS)]


def prompts(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def batches() -> list[Batch]:
    """Return two batches, one of them filled up on the left by more than a window."""
    return make_batches(prompts(30, 17), 2) + make_batches(prompts(24, seed=1))


def test_rows_are_filled_up_by_more_than_the_windows() -> None:
    padded, _ = batches()
    assert int((padded.mask == 0).sum()) > WINDOW["sliding_window"]
    assert min(int(it.mask.sum(1).min()) for it in batches()) > WINDOW["sliding_window"]


def whole(model: Any, stream: Stream, batch: Batch) -> Any:
    with torch.no_grad():
        return model(**arguments(stream.skeleton, batch), output_hidden_states=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # transformers' GPTBigCode uses it
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STREAMED]
)
def test_states_and_logits_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    directory = make_architecture(ARCHITECTURES[name], tmp_path / "model")
    model = load(directory)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(directory, max_shard_size="60KB")
    model = load(directory)
    stream = Stream(ts.open(directory), batches())
    walked = [(run, [it.clone() for it in states]) for run, states in stream.walk()]
    assert [run for run, _ in walked] == list(range(LAYERS + 1))
    head = Head(stream)
    with head.held():
        for place, batch in enumerate(stream.batches):
            expected = whole(model, stream, batch)
            shift = 1 if name in SHIFTED else 0
            states = expected.hidden_states[: LAYERS - shift]
            for number, wanted in enumerate(states):
                assert torch.equal(walked[number + shift][1][place], wanted)
            last = walked[-1][1][place]
            assert torch.equal(head.logits(head.normed(last)), expected.logits)
            assert torch.equal(head.whole(place, last, range(last.shape[1])), expected.logits)


@pytest.mark.parametrize("name", SHARING)
def test_families_whose_layers_share_are_refused_by_name(tmp_path: Path, name: str) -> None:
    directory = make_architecture(ARCHITECTURES[name], tmp_path / "model")
    with pytest.raises(RefusedError, match=r"num_kv_shared_layers: Gemma\w+ cannot be run layer by layer"):
        Stream(ts.open(directory), batches())


@pytest.mark.parametrize("name", SHARING)
def test_sharing_is_found_without_the_setting_that_tells_of_it(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    directory = make_architecture(architecture, tmp_path / "model", num_kv_shared_layers=0)
    with pytest.raises(RefusedError, match=r"Gemma\w+ cannot be run layer by layer"):
        Stream(ts.open(directory), batches())


@pytest.mark.parametrize("name", ENCODERS)
def test_models_that_predict_no_next_token_are_refused(tmp_path: Path, name: str) -> None:
    directory = make_architecture(ARCHITECTURES[name], tmp_path / "model")
    with pytest.raises(RefusedError, match="does not predict a next token"):
        Stream(ts.open(directory), batches())


def test_half_precision_is_that_of_the_whole_model(plain: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    stream = Stream(ts.open(plain), make_batches(prompts(20, 9)), "bfloat16")
    walked = [[it.clone() for it in states] for _, states in stream.walk()]
    head = Head(stream, exact=False)
    exact = Head(stream, exact=True)
    for place, batch in enumerate(stream.batches):
        expected = whole(model, stream, batch)
        for number, wanted in enumerate(expected.hidden_states[:-1]):
            assert torch.equal(walked[number][place], wanted)
        with head.held():
            assert torch.equal(head.logits(head.normed(walked[-1][place])), expected.logits)
        with exact.held(), torch.no_grad():
            logits = exact.logits(exact.normed(walked[-1][place]))
            assert torch.equal(logits, expected.hidden_states[-1].float() @ model.lm_head.weight.float().T)
            assert logits.dtype == torch.float32


def test_a_planned_surgery_runs_without_being_written(tmp_path: Path, plain: Path) -> None:
    planned = ts.ops.select_layers(ts.open(plain), "2,0,0,3")
    ts.write(planned, tmp_path / "written")
    one, other = (Stream(it, batches()) for it in (planned, ts.open(tmp_path / "written")))
    assert one.depth == 4
    for (_, states), (_, others) in zip(one.walk(), other.walk(), strict=True):
        assert all(map(torch.equal, states, others))


def test_quantised_weights_are_decoded_as_they_are_read(tmp_path: Path, fp8: Path) -> None:
    ts.write(ts.ops.dequantize(ts.open(fp8), "float32"), tmp_path / "plain")
    model = load(tmp_path / "plain")
    stream = Stream(ts.open(fp8), batches())
    last = [states for _, states in stream.walk()][-1]
    head = Head(stream)
    with head.held():
        for place, batch in enumerate(stream.batches):
            assert torch.equal(head.logits(head.normed(last[place])), whole(model, stream, batch).logits)


def test_layers_run_in_any_order_and_as_often_as_one_likes(tmp_path: Path, plain: Path) -> None:
    stream = Stream(ts.open(plain), batches())
    states = stream.embedded
    for number in (2, 0, 0, 3):
        with stream.layer(number) as run:
            states = [run(place, it) for place, it in enumerate(states)]
    planned = Stream(ts.ops.select_layers(ts.open(plain), "2,0,0,3"), batches())
    assert all(map(torch.equal, states, [it for _, it in planned.walk()][-1]))


def test_a_head_in_slices_gives_the_same_logits(tmp_path: Path) -> None:
    directory = make_architecture(ARCHITECTURES["gemma2"], tmp_path / "model")
    stream = Stream(ts.open(directory), batches())
    last = [states for _, states in stream.walk()][-1]
    head = Head(stream)
    with head.held():
        at_once = [head.logits(head.normed(it)) for it in last]
    with run_under(Running(memory=2 * 32 * 4 * 40)):
        assert head.slices == [(0, 32), (32, 64), (64, 96)]
        with head.held():
            sliced = [head.logits(head.normed(it)) for it in last]
            entire = [head.whole(place, it, range(it.shape[1])) for place, it in enumerate(last)]
    # Products of matrices of another shape may be summed in another order.
    for one, other, third in zip(at_once, sliced, entire, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert torch.equal(other, third)


def test_norms_are_left_out_as_is_asked(tmp_path: Path) -> None:
    directory = make_architecture(ARCHITECTURES["gpt2"], tmp_path / "model")
    model = load(directory)
    stream = Stream(ts.open(directory), batches())
    head, norm = Head(stream), model.transformer.ln_f
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(head.normed(states), norm(states))
        torch.testing.assert_close(head.normed(states, "no-beta"), norm(states) - norm.bias)
    assert torch.equal(head.normed(states, "none"), states)


def drop(directory: Path, part: str) -> None:
    kept = {name: it for name, it in make.read(directory).items() if part not in name}
    make.save(directory, kept, json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("model.layers.2.mlp", r"misses model\.layers\.2\.mlp\.down_proj\.weight, "),
        ("model.layers.2.", r"misses model\.layers\.2\.input_layernorm\.weight, .* and \d+ more"),
    ],
)
def test_a_missing_layer_is_told_before_any_work(plain: Path, part: str, told: str) -> None:
    drop(plain, part)
    with pytest.raises(CheckpointError, match=told):
        Stream(ts.open(plain), batches())


def test_a_weight_of_another_shape_is_told(plain: Path) -> None:
    made = make.read(plain)
    made["model.norm.weight"] = made["model.norm.weight"][:100].contiguous()
    make.save(plain, made, make.config())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: is \[100\], and Qwen3ForCausalLM has \[192\]"):
        Stream(ts.open(plain), batches())


def test_nan_is_told_with_its_layer_and_weight(plain: Path) -> None:
    made = make.read(plain)
    made["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    make.save(plain, made, make.config())
    stream = Stream(ts.open(plain), batches())
    with pytest.raises(CheckpointError, match=r"layer 1: .*model\.layers\.1\.mlp\.up_proj\.weight holds some"):
        list(stream.walk())


def test_numbers_that_grow_beyond_the_dtype_are_told(plain: Path) -> None:
    made = make.read(plain)
    for name in ("up_proj", "down_proj"):
        made[f"model.layers.2.mlp.{name}.weight"] *= 1e38
    make.save(plain, made, make.config())
    with pytest.raises(CheckpointError, match=r"layer 2: .*its weights hold none"):
        list(Stream(ts.open(plain), batches()).walk())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["NobodyForCausalLM"]}, "has no NobodyForCausalLM"),
        ({"architectures": ["NobodyForCausalLM"], "auto_map": {"AutoModel": "x.Y"}}, "own code is never run"),
        ({"architectures": []}, "names no class"),
        ({"architectures": ["Qwen3Model"]}, "does not predict a next token"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "an encoder beside its decoder"),
    ],
)
def test_an_unknown_architecture_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    directory = make.save(tmp_path / "model", make.tensors(), make.config(**changes))
    with pytest.raises(RefusedError, match=told):
        Stream(ts.open(directory), batches())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([list(range(257))], "prompt 1 has 257 tokens, and the model's context 256; shorten it"),
        ([[1, 2], []], "prompt 2 has no tokens"),
        ([[1, 304]], "token 304 is beyond the 304 rows of the embedding"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(plain: Path, given: list[list[int]], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Stream(ts.open(plain), make_batches(given))


def test_layers_are_dropped_and_only_used_rows_of_the_embedding_are_read(plain: Path) -> None:
    stream = Stream(ts.open(plain), make_batches([[7, 9, 7], [9]]))
    assert stream.skeleton.module("model.embed_tokens").weight.shape == (2, 192)

    def held() -> set[str]:
        return {name for name, it in stream.skeleton.model.named_parameters() if not it.is_meta}

    before = held()
    assert before == {"model.embed_tokens.weight", "model.norm.weight"}
    with stream.layer(2):
        assert held() - before == {name for name in make.tensors() if ".2." in name}
    assert held() == before
    with Head(stream).held():
        assert held() - before == {"lm_head.weight"}
    assert held() == before


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A Qwen3 of 1.75 GB in BF16, 3.5 GB in float32, of zeros that take no room on the disk."""
    width, inner, vocabulary, layers, heads, pairs = 1024, 6144, 65536, 32, 2048, 1024
    shapes = {"model.embed_tokens.weight": [vocabulary, width], "model.norm.weight": [width]}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": [width],
            prefix + "self_attn.q_proj.weight": [heads, width],
            prefix + "self_attn.k_proj.weight": [pairs, width],
            prefix + "self_attn.v_proj.weight": [pairs, width],
            prefix + "self_attn.o_proj.weight": [width, heads],
            prefix + "self_attn.q_norm.weight": [128],
            prefix + "self_attn.k_norm.weight": [128],
            prefix + "post_attention_layernorm.weight": [width],
            prefix + "mlp.gate_proj.weight": [inner, width],
            prefix + "mlp.up_proj.weight": [inner, width],
            prefix + "mlp.down_proj.weight": [width, inner],
        }
    settings = make.config(
        layers, hidden_size=width, intermediate_size=inner, vocab_size=vocabulary, head_dim=128,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    return make.sparse(tmp_path / "large", {name: ("BF16", shape) for name, shape in shapes.items()}, settings)


@pytest.mark.slow
@pytest.mark.alone
def test_a_model_larger_than_the_memory_is_streamed_where_the_whole_one_does_not_fit(large: Path) -> None:
    """The limit is on all memory that no file backs, that of Python and torch included.

    transformers maps the file as private memory, which counts although it takes none: it gets that much more. So do the
    stacks of threads: there is one.
    """
    size = (large / "model.safetensors").stat().st_size
    assert 1.7e9 < size < 1.8e9

    def run(mode: str, megabytes: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(Path(__file__).parent / "streaming.py"), mode, str(large), str(megabytes)]
        return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    done = run("stream", 900)
    assert done.returncode == 0, done.stderr[-2000:]
    layer = 4 * (3 * 1024 * 6144 + 6 * 1024 * 1024) / 1e6
    head = 4 * 65536 * 1024 / 1e6
    assert json.loads(done.stdout)["megabytes"] < 1.2 * layer + head + 300
    failed = run("whole", 900 + size // 10**6)
    assert failed.returncode != 0
    assert "allocate memory" in failed.stderr or failed.returncode < 0
