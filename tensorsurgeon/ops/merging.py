"""Merge LoRA adapters into the weights of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensorsurgeon.checkpoint import Checkpoint, all_sources
from tensorsurgeon.errors import RefusedError, UsageError, raise_all
from tensorsurgeon.lora import Lora, LoraModule, half_pairs, read_lora, shape_problems
from tensorsurgeon.ops.dequantization import FloatName, decoded
from tensorsurgeon.ops.dtypes import cast_tensor
from tensorsurgeon.ops.principal import with_principal_parts
from tensorsurgeon.ops.servable import Profile, begins_with_principal_parts, dropped_by, kind_problems
from tensorsurgeon.parameters import Scales, Several
from tensorsurgeon.quantized import find_modules, fp8, quantized_tensors
from tensorsurgeon.registry import open_model, operation
from tensorsurgeon.tensor import Block, LazyTensor

if TYPE_CHECKING:
    from tensorsurgeon.kernels.merging import Term

FLOATS = ("F32", "F16", "BF16")
TILE = 128
"""Rows that are multiplied at once: always as many, so that sums come out the same whatever the block."""


@operation
def merge_lora(
    ckpt: Checkpoint,
    adapter: Several,
    scale: Scales = (1.0,),
    dtype: FloatName = "bfloat16",
    requantize: bool = False,
    rest_of: Profile | None = None,
) -> Checkpoint:
    """Add adapters to the weights that they are for, as PEFT's merge_and_unload does, without loading the model.

    Each weight becomes `W + s B A` in float32 and is rounded once to its own dtype; rsLoRA, DoRA, patterns of ranks
    and alphas, embeddings and modules that were trained as a whole are merged too. Block FP8 is decoded, and written
    plain or as block FP8 again, in which the weights that no adapter names keep their bits.

    Args:
        adapter: The adapter, or several, merged one after the other.
        scale: What to multiply the adapter's own scale by; one for all, or one for each.
        dtype: What weights become that were quantised.
        requantize: Quantise weights again that were block FP8, with the largest number of each block as 448.
        rest_of: Merge only what sanitize-lora drops for this engine, so that base and adapter together lose nothing.

    Raises:
        UsageError: for another number of scales than of adapters.
        RefusedError: for an adapter that does not fit the model, with everything that does not.
    """
    scales = scale * len(adapter) if len(scale) == 1 else scale
    if len(scales) != len(adapter) or not adapter:
        raise UsageError(f"merge-lora: {len(adapter)} adapters and {len(scale)} scales are given.")
    opened = [open_model(it) for it in adapter]
    raise_all(RefusedError, (text for it in opened for text in _kind_problems(it)))
    loras = [dropped_by(read_lora(it), ckpt, rest_of) if rest_of else read_lora(it) for it in opened]
    found = find_modules(ckpt) if quantized_tensors(ckpt.tensors) else None
    plain, exact = (decoded(ckpt, found, dtype), decoded(ckpt, found)) if found else (ckpt, ckpt)
    raise_all(
        RefusedError, (text for it, lora in zip(opened, loras, strict=True) for text in _problems(it, lora, plain))
    )
    loras = [
        with_principal_parts(lora, exact, bool(it.config.value.get("fan_in_fan_out")))
        if begins_with_principal_parts(it)
        else lora
        for it, lora in zip(opened, loras, strict=True)
    ]
    if requantize and not found:
        raise UsageError("merge-lora: requantize: no weight of the model is quantised.")
    kept = ckpt if requantize else plain
    tensors = dict(kept.tensors)
    replaced: dict[str, LazyTensor] = {}
    terms: dict[str, list[tuple[LoraModule, Term]]] = {}
    for it, lora, factor in zip(opened, loras, scales, strict=True):
        replaced |= lora.whole
        for module, held in lora.modules.items():
            name = f"{module}.weight" if f"{module}.weight" in plain else module
            terms.setdefault(name, []).append((held, _term(it.config.value, held, factor)))
    tensors |= {name: cast_tensor(it, plain[name].dtype) for name, it in replaced.items()}
    for name, each in terms.items():
        before = replaced.get(name, exact[name])
        if kept[name].dtype == "F8_E4M3":
            tensors |= fp8.requantized(ckpt, name, _merged(before, "F32", each))
        else:
            tensors[name] = _merged(before, kept[name].dtype, each)
    return kept.replace(tensors=tensors, sources=all_sources(ckpt, *opened), steps=ckpt.steps)


def _kind_problems(adapter: Checkpoint) -> Iterator[str]:
    yield from kind_problems(adapter)
    config = adapter.config.value
    for key in ("layer_replication", "trainable_token_indices"):
        if config.get(key):
            yield f"adapter_config.json: {key!r} is {config[key]!r}, which no weight of the model can hold."


def _problems(adapter: Checkpoint, lora: Lora, base: Checkpoint) -> Iterator[str]:
    """Yield what keeps an adapter from being merged into a model."""
    name = adapter.sources[0].name
    for key in lora.unknown:
        yield f"{name}: {key}: is of no kind that can be merged."
    config = adapter.config.value
    transposed = bool(config.get("fan_in_fan_out"))
    yield from (f"{name}: {text}" for text in (*half_pairs(lora), *shape_problems(lora, base, transposed)))
    for module, held in lora.modules.items():
        if not held.scale > 0 and held.a is not None:
            yield f"{name}: {module}: r and lora_alpha give no scale; the config is incomplete."
        if held.magnitude and (held.embedding or transposed):
            yield f"{name}: {module}: DoRA of a weight that lies the other way round is not merged."
    for key, tensor in lora.whole.items():
        if key not in base:
            yield f"{name}: {key}: the base has no such tensor to put this in the place of."
        elif base[key].shape != tensor.shape:
            yield f"{name}: {key}: has shape {list(tensor.shape)}, and {list(base[key].shape)} in the base."
    broken = [key for key in adapter if adapter[key].dtype not in FLOATS]
    yield from (f"{name}: {key}: is {adapter[key].dtype}, not one of {', '.join(FLOATS)}." for key in broken)


def _term(config: Mapping[str, Any], held: LoraModule, factor: float) -> Term:
    from tensorsurgeon.kernels.merging import Term

    transposed = held.embedding or bool(config.get("fan_in_fan_out"))
    return Term(factor * held.scale, transposed, held.magnitude is not None)


def _merged(weight: LazyTensor, dtype: str, parts: Sequence[tuple[LoraModule, Term]]) -> LazyTensor:
    terms = tuple(term for _, term in parts)

    def add(start: int, rows: Block, *others: Block) -> Block:
        from tensorsurgeon.kernels.merging import add_factors

        return add_factors(start, rows, others, terms, TILE, dtype)

    whole = [it for held, _ in parts for it in (held.a, held.b, held.magnitude) if it is not None]
    history = f"merge {[tuple(term) for term in terms]} to {dtype}"
    return weight.rowwise(add, dtype=dtype, history=history, grain=TILE, whole=whole, placed=True)
