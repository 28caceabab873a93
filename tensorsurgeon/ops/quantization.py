"""Turn plain weights into codes with scales."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import Config
from tensorsurgeon.errors import RefusedError, UsageError, raise_all
from tensorsurgeon.names import matching
from tensorsurgeon.ops.fp8_engines import engine_warnings, plain_modules
from tensorsurgeon.ops.quantizing import Quantized, report_tables
from tensorsurgeon.parameters import Glob, Grid
from tensorsurgeon.quantized import find_modules, format_name, fp8, quantized_tensors
from tensorsurgeon.quantized.settings import find_settings
from tensorsurgeon.registry import operation
from tensorsurgeon.roles import Role
from tensorsurgeon.tensor import LazyTensor

FormatName = Literal["fp8-block"]

GROUPS = ("attention", "mlp", "expert")
"""Groups of roles whose matrices are quantised."""
FLOATS = ("F32", "F16", "BF16")


@operation
def quantize(
    ckpt: Checkpoint, format: FormatName, block: Grid = "128x128", skip: Glob | None = None, ue8m0: bool = False
) -> Checkpoint:
    """Quantise the linear layers of attention, MLPs and experts to FP8 with a scale for each block, as DeepSeek-V3 has.

    With `s = 448 / max |W|` of a block, its codes are `W s` rounded to E4M3, and its scale is `1 / s` in F32, as
    transformers computes both; no weight moves by more than `16 scale`, 1/28 of its block's largest. The table of what
    was lost is of decoded weights before they are rounded to another dtype.

    Plain stay embeddings, heads, norms, routers, biases, mixers without softmax (Mamba, linear attention), sparse
    indexers, layers for multi-token prediction, other towers, and matrices that engines do not take in FP8 as they lie
    (Conv1D of GPT-2, stacked experts, queries, keys and values fused head by head); the config names all of them.

    Args:
        format: What weights become; fp8-block is the format that DeepSeek-V3 and Qwen3-FP8 are published in.
        block: Rows and columns that share a scale.
        skip: Leave modules whose names match this pattern plain too, such as *.kv_b_proj or model.layers.0.*.
        ue8m0: Round scales up to powers of two, as in DeepSeek-V3.1.

    Raises:
        UsageError: for a pattern that matches nothing.
        RefusedError: for a checkpoint that is quantised, for one without such layers, for NaN or infinity in a weight,
            and for a choice that transformers or vLLM would read otherwise.
    """
    raise_all(RefusedError, _problems(ckpt))
    chosen = _choose(ckpt, skip)
    names = plain_modules(ckpt, chosen)
    rows, columns = map(int, block.split("x"))
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in ckpt.tensors.items():
        if name in chosen:
            encoded = fp8.encode(tensor, (rows, columns), powers=ue8m0)
            tensors |= zip((name, name.removesuffix(fp8.WEIGHT) + fp8.SCALE), encoded, strict=True)
        else:
            tensors[name] = tensor
    quantized = [Quantized(name, ckpt.roles[name], ckpt[name], (rows, columns), ue8m0) for name in chosen]
    config = _with_settings(ckpt.config.value, [rows, columns], names, ue8m0)
    report = {**ckpt.report, **report_tables(ckpt, quantized)}
    warnings = engine_warnings(ckpt, chosen, (rows, columns))
    return ckpt.replace(tensors=tensors, config=config, report=report).warn(*warnings)


def _problems(ckpt: Checkpoint) -> Iterator[str]:
    settings = find_settings(ckpt)
    if ckpt.is_adapter:
        yield "quantize: this is an adapter; merge it into its model first."
    elif quantized_tensors(ckpt.tensors):
        known = format_name(ckpt, find_modules(ckpt))
        yield f"quantize: the checkpoint is quantised already ({known}); dequantize it first."
    elif settings.values:
        yield f"quantize: {settings.where} says that this is quantised, and no tensor is; take it out of there."


def _choose(ckpt: Checkpoint, skip: str | None) -> list[str]:
    """Return the names of the weights to quantise."""
    found = [name for name, role in ckpt.roles.items() if _is_linear(role, ckpt[name]) and name.endswith(fp8.WEIGHT)]
    modules = {name.removesuffix(fp8.WEIGHT): name for name in ckpt}
    skipped = {modules[it] for it in matching(skip, modules)} | set(matching(skip, ckpt)) if skip else set()
    if skip and not skipped:
        raise UsageError(f"quantize: skip: {skip!r} matches no module and no tensor.")
    chosen = [name for name in found if name not in skipped]
    if not chosen:
        raise RefusedError("quantize: there is no linear layer of attention, MLP or experts to quantise.")
    return chosen


def _is_linear(role: Role, tensor: LazyTensor) -> bool:
    linear = role.group in GROUPS and role.kind == "weight" and role.layout == "out,in" and role.mark != "indexer"
    # Engines take these apart head by head, and a block of rows holds parts of several.
    by_heads = role.part in ("qkv", "qvk") and role.fused != "blocks"
    return linear and not by_heads and len(tensor.shape) == 2 and min(tensor.shape) > 1 and tensor.dtype in FLOATS


def _with_settings(config: Config, block: list[int], names: Collection[str], ue8m0: bool) -> Mapping[str, Any]:
    """Return a config that says what is quantised; of one that is nested, the outer part does."""
    settings = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": list(names),
        "quant_method": "fp8",
        **({"scale_fmt": fp8.POWERS} if ue8m0 else {}),
        "weight_block_size": block,
    }
    return {**config, "quantization_config": settings}
