"""How model classes choose the kind of each layer: its attention, its window, its rotary positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensorsurgeon.config import Config
from tensorsurgeon.fields import Field, Fill, InexpressibleError, Meaning, entries, indices, listed, lookup
from tensorsurgeon.rules import implied, number, periods

FULL, SLIDING, LINEAR, CHUNKED = "full_attention", "sliding_attention", "linear_attention", "chunked_attention"


def every(size: int, special: Any = FULL, rest: Any = SLIDING, key: str | None = None, first: bool = False) -> Fill:
    """Return the rule that makes the last layer of each period special, or the first; a key may give the period."""

    def fill(config: Config, count: int) -> Meaning:
        period = number(config, key, size) if key else size
        return [special if period and (layer + (not first)) % period == 0 else rest for layer in range(count)]

    return fill


def types(size: int, special: str = FULL, rest: str = SLIDING, key: str | None = None, first: bool = False) -> Field:
    """Return the field `layer_types` under the rule `every`."""
    fill = every(size, special, rest, key, first)
    # transformers writes some settings back under a private name, which nobody reads.
    return implied("layer_types", fill, [key, f"_{key}"], periods(key)) if key else implied("layer_types", fill)


def all_alike(kind: str) -> Field:
    """Return the field `layer_types` of a class whose layers are alike unless the config says otherwise."""
    return implied("layer_types", lambda config, count: [kind] * count)


def last_is_full(meaning: Meaning) -> Meaning:
    """Return layer types as Gemma 4 takes them: the last layer has full attention."""
    return [*meaning[:-1], FULL]


GEMMA4 = implied(
    "layer_types", lambda config, count: last_is_full(every(6)(config, count)), explicit=last_is_full
)  # fmt: skip


def cohere2_moe(config: Config, count: int) -> Meaning:
    """Return the types of Cohere 2 MoE: its first, dense layers have a period of their own; the others count anew."""
    dense = number(config, "first_k_dense_replace", 0)
    if dense > count:
        raise InexpressibleError(f"first_k_dense_replace is {dense}, more than the {count} layers")
    first = every(1, key="prefix_dense_sliding_window_pattern")(config, dense)
    return first + every(4, key="sliding_window_pattern")(config, count - dense)


def exaone4(config: Config, count: int) -> Meaning:
    """Return the types of EXAONE 4: all full where there is no window."""
    if config.get("sliding_window", 4096) is None:
        return [FULL] * count
    return every(4, key="sliding_window_pattern")(config, count)


def olmo_hybrid(config: Config, count: int) -> Meaning:
    """Return the types of OLMo Hybrid: every fourth layer is full, and one at least."""
    made = every(4, FULL, LINEAR)(config, count)
    return made if FULL in made else [*made[:-1], FULL]


def deepseek_v4(config: Config, count: int) -> Meaning:
    """Return the types of DeepSeek V4, from its compression ratios or by its own rule."""
    heavy, sparse = "heavily_compressed_attention", "compressed_sparse_attention"
    by_ratio = {0: SLIDING, 4: sparse, 128: heavy}
    ratios = lookup(config, "compress_ratios")
    if ratios:
        return [by_ratio.get(ratio, ratio) for ratio in entries(ratios, config, count)]
    return [sparse if layer > 2 and layer % 2 else heavy for layer in range(count)]


DEEPSEEK_V4 = (listed("compress_ratios"), implied("layer_types", deepseek_v4))


def kimi(config: Config, count: int) -> Meaning:
    """Return the types of Kimi Linear, from its lists of layers, which count from 1, or by its own rule."""
    full, linear = (lookup(config, f"linear_attn_config.{key}") for key in ("full_attn_layers", "kda_layers"))
    if full is None or linear is None:
        return [FULL if layer and layer % 4 == 0 else LINEAR for layer in range(count)]
    kinds = [FULL if layer + 1 in full else LINEAR if layer + 1 in linear else None for layer in range(count)]
    if None in kinds:
        raise InexpressibleError(f"it leaves out layer {kinds.index(None)}")
    return kinds


KIMI_LISTS = ("linear_attn_config.full_attn_layers", "linear_attn_config.kda_layers")
KIMI = (*(indices(key, base=1) for key in KIMI_LISTS), implied("layer_types", kimi))


def inkling(config: Config, count: int) -> Meaning:
    """Return the types of Inkling, from its list of local layers or by its own rule."""
    local = lookup(config, "local_layer_ids")
    if local is None:
        return every(6, "hybrid", "hybrid_sliding")(config, count)
    return ["hybrid_sliding" if layer in local else "hybrid" for layer in range(count)]


INKLING = (indices("local_layer_ids"), implied("layer_types", inkling))


def lfm2(config: Config, count: int) -> Meaning:
    """Return the types of LFM 2: convolutions but for the listed layers, or full attention alone."""
    full = lookup(config, "full_attn_idxs")
    return [FULL if full is None or layer in full else "conv" for layer in range(count)]


LFM2 = (indices("full_attn_idxs"), implied("layer_types", lfm2))


def qwen2_windows(config: Config, count: int) -> Meaning:
    """Qwen2 and its kin slide from layer `max_window_layers` on, if they slide."""
    slides = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    first = number(config, "max_window_layers", 28) if slides else count
    return [SLIDING if layer >= first else FULL for layer in range(count)]


def dots1_windows(config: Config, count: int) -> Meaning:
    """Return the types of dots.llm1, which slides from layer `max_window_layers` on."""
    first = number(config, "max_window_layers", 62) if config.get("sliding_window", 4096) is not None else count
    return [SLIDING if layer >= first else FULL for layer in range(count)]


def qwen2_moe_windows(config: Config, count: int) -> Meaning:
    """Return the types of Qwen2 MoE, which slides in layers of even number before `max_window_layers`."""
    slides, first = config.get("use_sliding_window"), number(config, "max_window_layers", 28)
    return [SLIDING if slides and layer % 2 == 0 and layer < first else FULL for layer in range(count)]


def first_window(meaning: Meaning, config: Config) -> Iterator[Config]:
    """Return the candidate for `max_window_layers`: the first layer that slides."""
    yield {"max_window_layers": meaning.index(SLIDING) if SLIDING in meaning else len(meaning)}


WINDOWS = implied("layer_types", qwen2_windows, ["max_window_layers"], first_window, stale=first_window)


def rope_interval(config: Config, count: int) -> Meaning:
    """Return which layers use rotary positions: all but the last of each interval."""
    return every(4, 0, 1, key="no_rope_layer_interval")(config, count)


NO_ROPE = implied("no_rope_layers", rope_interval, ["no_rope_layer_interval"], periods("no_rope_layer_interval"))


def smollm3(config: Config, count: int) -> Meaning:
    """Return the types of SmolLM3: where it slides, it does in layers without rotary positions."""
    slides = config.get("use_sliding_window") and config.get("sliding_window") is not None
    rope = lookup(config, "no_rope_layers") or rope_interval(config, count)
    return [SLIDING if slides and not has else FULL for has in entries(rope, config, count)]


def llama4(config: Config, count: int) -> Meaning:
    """Return the types of Llama 4: chunks in layers with rotary positions."""
    rope = lookup(config, "no_rope_layers") or rope_interval(config, count)
    return [CHUNKED if has else FULL for has in entries(rope, config, count)]


def from_the_end(special: Any, rest: Any) -> Fill:
    """Return the rule that makes the last layer special, and every fourth before it."""
    return lambda config, count: [special if (count - 1 - layer) % 4 == 0 else rest for layer in range(count)]


def muse(theta: float) -> tuple[Field, Field]:
    """Return Muse's fields, whose rules count from the last layer; `theta` is the class's RoPE base."""

    def thetas(config: Config, count: int) -> Meaning:
        base = lookup(config, "rope_parameters.rope_theta") or theta
        return from_the_end(0, base)(config, count)

    return implied("layer_types", from_the_end(FULL, SLIDING)), implied("layer_rope_theta", thetas)


def nemotron_kinds(config: Config, count: int) -> Meaning:
    """Return the kinds of layers of Nemotron-H, from the letters of its pattern."""
    letters = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}
    pattern = lookup(config, "hybrid_override_pattern")
    if not pattern:
        raise InexpressibleError("it says nothing of the layers' kinds, and neither does layers_block_type")
    return [letters.get(entry, entry) for entry in entries(pattern, config, count)]


NEMOTRON = (
    listed("hybrid_override_pattern"),
    implied("layers_block_type", nemotron_kinds),
)
