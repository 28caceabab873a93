"""Globs, and layer stacks of many model families."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from tensorsurgeon.errors import CheckpointError, UsageError
from tensorsurgeon.names import LayerName, LayerStack, find_stack, layer_name, layer_stacks, matching

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.11.mlp.up_proj.bias",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    "pattern", ["*", "model.*", "*.1.*", "*proj*", "lm_head.weight", "*.weigh?", "*layers.[0-9].*", "", "x"]
)
def test_a_glob_matches_as_the_library_of_python_matches(pattern: str) -> None:
    assert matching(pattern, NAMES) == [name for name in NAMES if fnmatchcase(name, pattern)]


def test_alternatives_of_a_glob_keep_the_order_of_the_names() -> None:
    assert matching("lm_head*, *embed*", NAMES) == [NAMES[0], NAMES[3]]


def test_a_dot_in_a_glob_is_a_dot() -> None:
    assert matching("lm_head.weight", ["lm_headxweight"]) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", LayerName("model.layers.", 3, "mlp.up_proj.weight")),
        ("h.0.attn.bias", LayerName("h.", 0, "attn.bias")),
        ("bert.encoder.layer.11.output.dense.weight", LayerName("bert.encoder.layer.", 11, "output.dense.weight")),
        (
            "model.layers.2.block_sparse_moe.experts.7.w1.weight",
            LayerName("model.layers.", 2, "block_sparse_moe.experts.7.w1.weight"),
        ),
        (
            "encoder.block.4.layer.0.SelfAttention.q.weight",
            LayerName("encoder.block.", 4, "layer.0.SelfAttention.q.weight"),
        ),
        ("backbone.blocks.0.x", LayerName("backbone.blocks.", 0, "x")),
        ("model.norm.weight", None),
        ("model.layers.weight", None),
        ("model.layers.3", None),
        ("model.sublayers.3.weight", None),
        ("model.mtp_layers.0.weight", None),
        ("model.altup_projections.0.weight", None),
        ("deepstack_merger_list.0.norm.weight", None),
        ("model.layers.03.weight", None),
        ("model.layers.٣.weight", None),
        ("model.layers." + "9" * 5000 + ".weight", None),
    ],
    ids=lambda it: it[:40] if isinstance(it, str) else "",
)
def test_a_name_is_taken_apart_at_its_first_layer(name: str, expected: LayerName | None) -> None:
    assert layer_name(name) == expected


def llama(prefix: str = "model.layers.", count: int = 4) -> list[str]:
    return [f"{prefix}{n}.{rest}" for n in range(count) for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight")]


def numbered(prefix: str, count: int, rest: str = "weight") -> list[str]:
    return [f"{prefix}{n}.{rest}" for n in range(count)]


FAMILIES: dict[str, tuple[list[str], int | None, int, LayerStack]] = {
    "llama": (
        ["model.embed_tokens.weight", *llama(), "model.norm.weight", "lm_head.weight"],
        4,
        0,
        LayerStack("model.layers.", 4),
    ),
    "llama without a count": (llama(), None, 0, LayerStack("model.layers.", 4)),
    "gpt2": (
        ["transformer.wte.weight", *numbered("transformer.h.", 12, "attn.c_attn.weight")],
        12,
        0,
        LayerStack("transformer.h.", 12),
    ),
    "gpt2 of the hub": (["wte.weight", *numbered("h.", 12, "attn.c_attn.weight")], 12, 0, LayerStack("h.", 12)),
    "bert": (
        ["bert.embeddings.word_embeddings.weight", *numbered("bert.encoder.layer.", 3, "attention.self.query.weight")],
        3,
        0,
        LayerStack("bert.encoder.layer.", 3),
    ),
    "gpt_neox": (
        ["gpt_neox.embed_in.weight", *numbered("gpt_neox.layers.", 6, "attention.dense.weight"), "embed_out.weight"],
        6,
        0,
        LayerStack("gpt_neox.layers.", 6),
    ),
    "opt": (
        ["model.decoder.embed_positions.weight", *numbered("model.decoder.layers.", 2, "fc1.weight")],
        2,
        0,
        LayerStack("model.decoder.layers.", 2),
    ),
    "mamba": (numbered("backbone.layers.", 5, "mixer.A_log"), 5, 0, LayerStack("backbone.layers.", 5)),
    "dbrx": (
        numbered("transformer.blocks.", 5, "norm_attn_norm.attn.Wqkv.weight"),
        5,
        0,
        LayerStack("transformer.blocks.", 5),
    ),
    "mistral's own": (numbered("layers.", 5, "attention.wq.weight"), 5, 0, LayerStack("layers.", 5)),
    "qwen3_vl": (
        [
            *numbered("model.visual.blocks.", 4, "attn.qkv.weight"),
            *numbered("model.visual.deepstack_merger_list.", 3),
            *llama("model.language_model.layers."),
        ],
        4,
        0,
        LayerStack("model.language_model.layers.", 4),
    ),
    "qwen2_vl": ([*numbered("visual.blocks.", 4, "attn.qkv.weight"), *llama()], 4, 0, LayerStack("model.layers.", 4)),
    "llava": (
        [
            *numbered("vision_tower.vision_model.encoder.layers.", 4, "mlp.fc1.weight"),
            "multi_modal_projector.linear_1.weight",
            *llama("language_model.model.layers."),
        ],
        None,
        0,
        LayerStack("language_model.model.layers.", 4),
    ),
    "gemma3": (
        [
            *llama("language_model.model.layers."),
            *numbered("vision_tower.vision_model.encoder.layers.", 4, "mlp.fc1.weight"),
        ],
        4,
        0,
        LayerStack("language_model.model.layers.", 4),
    ),
    "gemma3n": (
        [
            "model.language_model.embed_tokens_per_layer.weight",
            *numbered("model.language_model.altup_projections.", 3),
            *numbered("model.language_model.altup_unembed_projections.", 3),
            *llama("model.language_model.layers."),
            *numbered("model.audio_tower.conformer.", 4, "norm.weight"),
            *numbered("model.vision_tower.timm_model.blocks.", 4, "0.conv.weight"),
        ],
        4,
        0,
        LayerStack("model.language_model.layers.", 4),
    ),
    "qwen3_omni": (
        [*numbered("thinker.audio_tower.layers.", 4), *llama("thinker.model.layers."), *llama("talker.model.layers.")],
        4,
        0,
        LayerStack("thinker.model.layers.", 4),
    ),
    "deepseek_v3": (
        [*llama(count=5), "model.layers.4.eh_proj.weight", "model.layers.4.shared_head.head.weight"],
        4,
        1,
        LayerStack("model.layers.", 4, 1),
    ),
    "deepseek_v3 without its extra layer": (llama(count=4), 4, 1, LayerStack("model.layers.", 4)),
    "deepseek_ocr": (
        [*numbered("model.sam_model.blocks.", 12, "attn.qkv.weight"), *llama(count=6)],
        6,
        0,
        LayerStack("model.layers.", 6),
    ),
    "mixtral": (
        [f"model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight" for n in range(3) for e in range(8)],
        3,
        0,
        LayerStack("model.layers.", 3),
    ),
    "qwen3_next": (
        [*llama(), "mtp.fc.weight", *numbered("mtp.layers.", 1, "mlp.gate.weight")],
        4,
        0,
        LayerStack("model.layers.", 4),
    ),
    "mimo": ([*llama(), *numbered("model.mtp.layers.", 4, "mlp.gate.weight")], 4, 0, LayerStack("model.layers.", 4)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stack_of_a_family(family: str) -> None:
    names, count, extra, expected = FAMILIES[family]
    assert find_stack(names, count, extra) == expected
    assert find_stack(reversed(names), count, extra) == expected


@pytest.mark.parametrize(
    "names",
    [
        [*numbered("model.encoder.layers.", 6, "fc1.weight"), *numbered("model.decoder.layers.", 6, "fc1.weight")],
        [
            *numbered("encoder.block.", 6, "layer.0.SelfAttention.q.weight"),
            *numbered("decoder.block.", 6, "layer.0.x.weight"),
        ],
    ],
    ids=["bart", "t5"],
)
@pytest.mark.parametrize("count", [6, None])
def test_an_encoder_with_a_decoder_is_refused(names: list[str], count: int | None) -> None:
    with pytest.raises(CheckpointError, match=r"cannot tell which .*coder.*N \(0 to 5\), .*coder.*N \(0 to 5\)"):
        find_stack(names, count)


@pytest.mark.parametrize(
    "names", [[], ["lm_head.weight"], numbered("visual.blocks.", 3)], ids=["empty", "no layers", "tower"]
)
def test_a_model_without_layers_is_refused(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="numbered stacks found: none"):
        find_stack(names, 4)


def test_layers_that_are_missing_are_named() -> None:
    names = [name for name in llama(count=9) if layer_name(name).index not in (2, 5, 6)]  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"layers 2,5-6 have no tensors under model\.layers\.N"):
        find_stack(names, 9)


def test_a_layer_with_a_huge_number_is_refused_and_not_counted_to() -> None:
    with pytest.raises(CheckpointError, match="layers 4-999998 have no tensors"):
        find_stack([*llama(), "model.layers.999999.weight"], 4)


@pytest.mark.parametrize(("count", "extra"), [(3, 0), (5, 0), (5, 1), (0, 0), (-4, 0)])
def test_another_count_than_the_config_says_is_refused(count: int, extra: int) -> None:
    with pytest.raises(CheckpointError, match=f"config.json says {count} layers, but there are tensors of 4"):
        find_stack(llama(), count, extra)


def test_stacks_are_listed_without_towers() -> None:
    names = [
        *llama(count=2),
        *numbered("visual.blocks.", 3),
        *numbered("mtp.layers.", 1),
        *numbered("encoder.layer.", 1),
    ]
    assert layer_stacks(names) == {"model.layers.": {0, 1}, "encoder.layer.": {0}}


def test_the_layer_of_a_name() -> None:
    stack = LayerStack("model.layers.", 4, 1)
    assert stack.layer_of("model.layers.2.mlp.up_proj.weight") == 2
    assert stack.layer_of("model.layers.4.eh_proj.weight") == 4
    assert stack.layer_of("visual.layers.2.weight") is None
    assert stack.layer_of("model.norm.weight") is None


def test_a_renamed_tensor_keeps_the_numbers_behind_its_layer() -> None:
    stack = LayerStack("model.layers.", 4)
    assert stack.renamed("model.layers.1.experts.1.w1.weight", 10) == "model.layers.10.experts.1.w1.weight"


def test_layers_that_do_not_exist_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"there is no layer -1, 4, 9; the model has 4 layers, 0 to 3"):
        LayerStack("model.layers.", 4, 1).check([9, 4, 0, 9, -1])


def test_the_sequence_without_some_layers() -> None:
    stack = LayerStack("model.layers.", 6, 1)
    assert stack.without([4, 1, 1]) == (0, 2, 3, 5)
    assert stack.without([]) == (0, 1, 2, 3, 4, 5)
    with pytest.raises(UsageError, match="there is no layer 6"):
        stack.without([6])
