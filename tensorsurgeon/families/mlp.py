"""How model classes choose the MLP of each layer: dense or of experts, and how wide."""

from __future__ import annotations

from collections.abc import Iterator

from tensorsurgeon.config import Config
from tensorsurgeon.families.attention import NEMOTRON, every
from tensorsurgeon.fields import Field, InexpressibleError, Meaning, entries, lookup
from tensorsurgeon.rules import counted, counts, implied, number, searched

DENSE, SPARSE = "dense", "sparse"


def sparse_steps(config: Config, count: int) -> Meaning:
    """Return which layers of Qwen's mixtures have experts: each at a step, but for those that are listed."""
    step, dense = number(config, "decoder_sparse_step", 1), lookup(config, "mlp_only_layers") or []
    experts = config.get("num_experts", 1) != 0
    return [experts and layer not in dense and (layer + 1) % step == 0 for layer in range(count)]


def dense_layers(meaning: Meaning, config: Config) -> Iterator[Config]:
    """Return the candidates for that: no list where the step alone says it, else a list of all dense layers."""
    dense = [place for place, sparse in enumerate(meaning) if not sparse]
    yield {"mlp_only_layers": [], **({} if dense else {"decoder_sparse_step": 1})}
    yield {"mlp_only_layers": dense, "decoder_sparse_step": 1}


SPARSE_STEPS = searched(["decoder_sparse_step", "mlp_only_layers"], sparse_steps, dense_layers)


def dense_first(default: int, key: str = "first_k_dense_replace") -> Field:
    """Return the field of models whose first layers are dense and whose config has no list for it."""
    return searched([key], counted(key, default, DENSE, SPARSE), counts(key, DENSE))


def mlp_fixed(dense: int) -> Field:
    """Return the field `mlp_layer_types` of models whose class has a number of first dense layers of its own.

    vLLM reads `first_k_dense_replace` there, which follows where the dense layers are the first.
    """

    def fill(config: Config, count: int) -> Meaning:
        return [DENSE if layer < dense else SPARSE for layer in range(count)]

    def prefix(meaning: Meaning, config: Config) -> Iterator[Config]:
        size = meaning.count(DENSE)
        if meaning == [DENSE] * size + [SPARSE] * (len(meaning) - size):
            yield {"first_k_dense_replace": size}

    return implied("mlp_layer_types", fill, ["first_k_dense_replace"], stale=prefix)


def mlp_types(default: int, key: str = "first_k_dense_replace", hit: str = DENSE, rest: str = SPARSE) -> Field:
    """Return the field `mlp_layer_types` of models whose first layers are dense where it is absent."""
    return implied("mlp_layer_types", counted(key, default, hit, rest), [key], counts(key, hit))


def _mlp_by_freq(config: Config, count: int) -> Meaning:
    first, freq = number(config, "first_k_dense_replace", 1), lookup(config, "moe_layer_freq") or 1
    if isinstance(freq, list):
        return [SPARSE if entry else DENSE for entry in entries(freq, config, count)]
    return [SPARSE if layer >= first and layer % freq == 0 else DENSE for layer in range(count)]


def _first_dense(meaning: Meaning, config: Config) -> Iterator[Config]:
    yield {"first_k_dense_replace": meaning.count(DENSE), "moe_layer_freq": 1}


MLP_BY_FREQ = implied("mlp_layer_types", _mlp_by_freq, ["first_k_dense_replace", "moe_layer_freq"], _first_dense)


def moe_range(config: Config, count: int) -> Meaning:
    """Return which layers of ERNIE 4.5 have experts: within a range, at an interval."""
    first, last, step = (
        number(config, f"moe_layer_{key}", default)
        for key, default in (("start_index", 1), ("end_index", -1), ("interval", 1))
    )
    last = count - 1 if last == -1 else last
    return [first <= layer <= last and (layer + 1) % step == 0 for layer in range(count)]


def moe_ranges(meaning: Meaning, config: Config) -> Iterator[Config]:
    """Return the candidates for that."""
    found = [place for place, held in enumerate(meaning) if held] or [len(meaning)]
    for step in range(1, len(meaning) + 2):
        for last in (-1, found[-1]):
            yield {"moe_layer_start_index": found[0], "moe_layer_end_index": last, "moe_layer_interval": step}


def llama4_moe(config: Config, count: int) -> Meaning:
    """Return which layers of Llama 4 have experts: those that are listed, or each at a step."""
    listed_layers = lookup(config, "moe_layers")
    if listed_layers is not None:
        return [layer in listed_layers for layer in range(count)]
    step = number(config, "interleave_moe_layer_step", 1)
    return [(layer + 1) % step == 0 for layer in range(count)]


def llama4_layers(meaning: Meaning, config: Config) -> Iterator[Config]:
    """Give the step that vLLM reads along with the list that transformers reads, where there is one."""
    steps = (step for step in range(1, len(meaning) + 2) if meaning == every(step, True, False)(config, len(meaning)))
    step = next(steps, None)
    layers = [place for place, held in enumerate(meaning) if held]
    written = lookup(config, "moe_layers") is not None
    if step is not None:
        yield {"interleave_moe_layer_step": step, **({"moe_layers": layers} if written else {})}
    yield {"moe_layers": layers}


def gemma3n_sparsity(config: Config, count: int) -> Meaning:
    """Return how sparse each layer of Gemma 3n is: the first ten, where there are more."""
    return [0.95] * (10 if count > 10 else 0) + [0.0] * (count - 10 if count > 10 else count)


def mlp_ordinals() -> Field:
    """Return Nemotron-H's list of MLP widths, which has an entry for each MLP layer only."""

    def read(config: Config, count: int) -> Meaning | None:
        widths = lookup(config, "intermediate_size")
        if not isinstance(widths, list):
            return None
        kinds = NEMOTRON[-1].read(config, count) or []
        if len(widths) != kinds.count("mlp"):
            raise InexpressibleError(f"it has {len(widths)} entries, not one for each of {kinds.count('mlp')} MLPs")
        left = iter(widths)
        return [next(left) if kind == "mlp" else None for kind in kinds]

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        return {"intermediate_size": [width for width in meaning if width is not None]}

    return Field(("intermediate_size",), read, write)
