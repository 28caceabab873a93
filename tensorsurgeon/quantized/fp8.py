"""FP8 as DeepSeek-V3, Qwen3-FP8, GLM and MiniMax publish it: `quant_method: fp8`.

    M.weight            F8_E4M3                        (out, in), of fused experts M: (experts, out, in)
    M.weight_scale_inv  F32, BF16, F16, E8M0 (or U8)   (ceil(out / rows), ceil(in / columns)), or one number

`rows, columns` are the config's `weight_block_size`; where that is null, all of a weight has one scale. Despite its
name the scale is multiplied: `W[r, c] = q[r, c] * s[r // rows, c // columns]`. The block is never derived from the
shapes: 192 rows in a grid of 2 could be blocks of 96 or ragged blocks of 128, and only one of them is right.
Other names of the scale are `.weight_scale` (vLLM), `.scale` (DeepSeek-V4) and `.qscale_weight` (Mistral). Routed
experts of DeepSeek-V4 hold two E2M1 in each I8, the first in the low half, with an E8M0 for each 32 columns.
GPTQModel writes files that look the same, but whose scales divide: `weight_scale_semantics: inverse`.
Source: DeepSeek-V3, README_WEIGHTS.md and inference/kernel.py; transformers, integrations/finegrained_fp8.py;
GPTQModel, quantization/dtype.py.
"""

from __future__ import annotations

from typing import NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.decoding import BlockSize, Codes, Scales, each_matrix, grid_shape, scaled
from tensorsurgeon.quantized.parts import SCALES, Format, Parts, Plain, Settings
from tensorsurgeon.quantized.settings import find_settings
from tensorsurgeon.tensor import Block, LazyTensor

WEIGHT, SCALE = ".weight", ".weight_scale_inv"
SCALE_PARTS = (SCALE, "_scale_inv", ".scale", ".qscale_weight", ".weight_scale", "_scale")
EXPONENTS = ("F8_E8M0", "U8")
FP4_GROUP = 32
POWERS = "ue8m0"
"""The `scale_fmt` of scales that are powers of two, as DeepSeek-V3.1 has them in F32."""


class Layout(NamedTuple):
    """How codes are scaled: in a block for each scale, or None for one scale of all; whether scales divide."""

    block: BlockSize | None
    divides: bool


def layout(settings: Settings) -> Layout:
    """Return what the config says of the scales.

    Raises:
        RefusedError: where it does not say that, or otherwise than this format allows.
    """
    settings.require(("fp8",), "FP8 with scales")
    values = settings.values
    block = values.get("weight_block_size")
    semantics = values.get("weight_scale_semantics", "multiply")
    if semantics not in ("multiply", "inverse"):
        raise RefusedError(f"{settings.where}: 'weight_scale_semantics' is {semantics!r}; that is not known here.")
    if block is not None and not _is_block(block):
        raise RefusedError(
            f"{settings.where}: 'weight_block_size' is {block!r}; two whole numbers such as [128, 128] are needed."
        )
    return Layout((block[0], block[1]) if block else None, semantics == "inverse")


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is FP8 by this format, or would be if it were whole."""
    if parts.has(SCALE) or parts.has("_scale_inv"):
        return True
    code = parts.dtype(parts.code or "")
    return settings.method in ("fp8", None) and (
        (code == "F8_E4M3") or (code == "I8" and parts.get(*SCALE_PARTS) is not None)
    )


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    block, divides = layout(settings)
    part = next((it for it in SCALE_PARTS if it in parts), None)
    code = parts.code
    _require_both(parts, code, part)
    assert code is not None
    assert part is not None
    weight = parts.expect(code, ("F8_E4M3", "I8"))
    packed = 2 if weight.dtype == "I8" else 1
    shape = (*weight.shape[:-1], weight.shape[-1] * packed)
    if len(shape) not in (2, 3):
        raise RefusedError(f"{parts.module}{code}: has shape {list(shape)}; FP8 weights are matrices, or stacked ones.")
    scale = parts.expect(part, (*SCALES, *EXPONENTS))
    if packed == 2:
        block, divides = (1, FP4_GROUP), False
    if not divides or len(scale.shape) == 2:
        _require_grid(parts, part, shape, block)
    elif scale.shape in ((), (1,)):
        block = None
    else:
        # GPTQModel's rows: one divisor for each.
        parts.expect(part, SCALES, (shape[0],))
        block = (1, shape[1])
    each = block or (shape[-2], shape[-1])

    def decode(dtype: str) -> LazyTensor:
        def matrix(codes: LazyTensor, scales: LazyTensor) -> LazyTensor:
            kind = Codes(codes, 8 // packed, "E2M1" if packed == 2 else "E4M3", (shape[-2], shape[-1]))
            return scaled(kind, Scales(scales, each, divides=divides), label, dtype)

        return matrix(weight, scale) if len(shape) == 2 else each_matrix(matrix, weight, scale)

    label = "FP4, groups of 32" if packed == 2 else f"FP8, {block_words(block)}"
    label += ", divided" if divides else ""
    return Plain(f"{parts.module}{code}", label, shape, (code, part), decode)


FORMAT = Format("fp8", claims, read)


def block_words(block: BlockSize | None) -> str:
    """Return in words how many weights share a scale."""
    return f"blocks of {block[0]}x{block[1]}" if block else "one scale"


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def _require_both(parts: Parts, code: str | None, scale: str | None) -> None:
    dtype = parts.dtype(code) if code is not None else None
    if scale is None:
        raise RefusedError(
            f"{parts.module}{code}: is {dtype} without a {SCALE[1:]}; its codes are not numbers, fetch its scale."
        )
    if dtype not in ("F8_E4M3", "I8"):
        found = f"is {dtype}, not F8_E4M3" if dtype else "is missing"
        # transformers leaves such scales beside weights that it did not quantise; a cast of codes looks the same.
        way = " If the weight is plain all the same, name both with plain." if dtype else ""
        raise RefusedError(
            f"{parts.module}{scale}: has no weight to scale: {parts.module}{code or WEIGHT} {found}.{way}"
        )


def _require_grid(parts: Parts, part: str, shape: tuple[int, ...], block: BlockSize | None) -> None:
    scale = parts[part]
    lead = shape[:-2]
    if block is None:
        fits = scale.shape in (lead, (*lead, 1), (*lead, 1, 1))
        expected, how = [*lead], "with one scale"
    else:
        expected, how = [*lead, *grid_shape(shape[-2:], block)], f"in blocks of {list(block)}"
        fits = list(scale.shape) == expected
    if not fits:
        raise RefusedError(
            f"{parts.module}{part}: has shape {list(scale.shape)}, but {list(shape)} {how} needs {expected}; the block "
            "size or the scale is wrong."
        )


def encode(
    weight: LazyTensor, block: BlockSize, scale_dtype: str = "F32", powers: bool = False
) -> tuple[LazyTensor, LazyTensor]:
    """Return codes and scales of a weight of plain numbers: `s = 448 / absmax` of each block, `q = W s`.

    Scales are `1 / s`, rounded to their dtype or, as `powers`, up to a power of two; see `kernels.fp8_encoding`.
    """
    rows, columns = block

    def codes(numbers: Block) -> Block:
        from tensorsurgeon.kernels.fp8_encoding import Recipe, encode_blocks

        return encode_blocks(numbers, Recipe(rows, columns, scale_dtype, powers))[0]

    def scales(numbers: Block) -> Block:
        from tensorsurgeon.kernels.fp8_encoding import Recipe, find_scales

        return find_scales(numbers, Recipe(rows, columns, scale_dtype, powers))

    history = f"encode as block FP8 {rows}x{columns}, scales {scale_dtype}{', powers of two' * powers}, q = W s"
    shape = (-(-weight.shape[1] // columns),)
    return (
        weight.rowwise(codes, dtype="F8_E4M3", history=history, grain=rows),
        weight.by_groups(scales, rows, dtype=scale_dtype, row_shape=shape, history=history),
    )


def requantized(ckpt: Checkpoint, name: str, changed: LazyTensor) -> dict[str, LazyTensor]:
    """Return codes and scales of a weight in F32 that takes the place of one in block FP8.

    Raises:
        RefusedError: for a weight that is quantised otherwise.
    """
    module = name.removesuffix(WEIGHT)
    scale = module + SCALE
    settings = find_settings(ckpt)
    block, divides = layout(settings)
    plain = scale in ckpt and ckpt[scale].dtype in SCALES and not divides
    if block is None or not plain or len(changed.shape) != 2:
        raise RefusedError(f"{name}: is not block FP8 with plain scales; only that can be quantised again.")
    encoded = encode(changed, block, ckpt[scale].dtype, settings.values.get("scale_fmt") == POWERS)
    return dict(zip((name, scale), encoded, strict=True))
