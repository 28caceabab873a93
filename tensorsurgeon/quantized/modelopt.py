"""NVIDIA ModelOpt: `quant_method: modelopt`, or only a `hf_quant_config.json` (0.29 and older); many layouts.

    M.weight                 M.weight_scale                     quant_algo                  W[r, c]
    F8_E4M3 (out, in)        F32 ()                             FP8                         q * s
    F8_E4M3 (out, in)        F32 (out)                          FP8_PER_CHANNEL_PER_TOKEN   q * s[r]
    F8_E4M3 (out, in)        F32 (R, 1, C, 1), (R, C), or ()    fp8_pb_wo, fp8_pb_real      q * s[r / 128, c / 128]
    F8_E4M3 (out, in)        U8 (out, in / 32)                  MXFP8                       q * 2^(e - 127)
    I8 (out, in)             F32 (out)                          W8A8_SQ_PER_CHANNEL, W8A16  q * s[r]
    U8 (out, in / 2)         U8 (out, in / 32)                  mxfp4, W4A8_MXFP4_FP8       E2M1[q] * 2^(e - 127)
    U8 (out, in / 2)         F8_E4M3 (out, in / 16 or 32)       NVFP4, W4A16_NVFP4, ...     E2M1[q] * (s * s2)
    U8 (out / 2, in)         F32 (out, in / group)              W4A16_AWQ, W4A8_AWQ         (q - 16 if q > 7) * s

s2 is `M.weight_scale_2`, F32 (), a factor of NVFP4 and of nothing else: beside W4A8_AWQ it is the step in which the
decoded weight is rounded to FP8 at run time. Two codes of NVFP4 and mxfp4 lie side by side in a byte, the first in its
low half; two of AWQ one below the other, rows 2k and 2k + 1. ModelOpt's NVFP4 knows no negative zero.
`M.pre_quant_scale` (in) multiplies the input at run time, so that a plain weight is W[r, c] * p[c]: left out, it ruins
the model. The layout is told by the tensors; that a config says otherwise is refused. Experts in one tensor are M of
(experts, in, out) with `M_weight_scale`: of NVFP4 two codes lie one below the other and the scales belong to 16 rows,
as everything is transposed.
Source: modelopt, torch/export/quant_utils.py and unified_export_hf.py, torch/quantization/qtensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.decoding import BlockSize, Codes, Scales, each_matrix, grid_shape, lazily, scaled
from tensorsurgeon.quantized.parts import SCALES, WEIGHT, Format, Parts, Plain, Settings
from tensorsurgeon.tensor import Block, Input, LazyTensor

METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8")
EXPONENTS = ("U8", "F8_E8M0")
FACTORS = ".pre_quant_scale"
BLOCK = 128


class Kind(NamedTuple):
    """A layout: dtypes of codes and scales, the codes' bits and table, and what `quant_algo` says of it."""

    name: str
    weight: str
    scales: tuple[str, ...]
    bits: int
    codes: str
    algo: re.Pattern[str]


KINDS = (
    Kind("FP8", "F8_E4M3", SCALES, 8, "E4M3", re.compile("FP8")),
    Kind("MXFP8", "F8_E4M3", EXPONENTS, 8, "E4M3", re.compile("MXFP8")),
    Kind("INT8", "I8", SCALES, 8, "INT8", re.compile("W8A|INT8")),
    Kind("NVFP4", "U8", ("F8_E4M3",), 4, "E2M1_POSITIVE", re.compile(".*NVFP4")),
    Kind("MXFP4", "U8", EXPONENTS, 4, "E2M1", re.compile(".*MXFP4")),
    Kind("INT4", "U8", SCALES, 4, "SIGNED4", re.compile("W4A(16|8)_AWQ|INT4")),
)


class Layout(NamedTuple):
    """How codes lie: the shape of the weight, rows and columns that share a scale, and whether bytes hold two rows."""

    shape: tuple[int, ...]
    block: BlockSize
    pairs: bool = False


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of ModelOpt, or would be if it were whole."""
    if settings.method in METHODS:
        return True
    return any(part in parts for part in (".weight_scale_2", "_weight_scale_2", FACTORS))


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    settings.require(METHODS, "those of ModelOpt")
    code = parts.code if parts.code is not None else WEIGHT
    scale_part = f"{code or '_weight'}_scale"
    weight = parts.expect(code, tuple(dict.fromkeys(kind.weight for kind in KINDS)))
    scale = parts.expect(scale_part, (*SCALES, *EXPONENTS, "F8_E4M3"))
    if len(weight.shape) not in (2, 3):
        raise RefusedError(f"{parts.place(code)}: has shape {list(weight.shape)}; not a matrix.")
    kind = _kind(parts, code, scale_part, settings)
    layout = _layout(kind, weight, scale)
    if layout is None:
        raise RefusedError(
            f"{parts.place(scale_part)}: has shape {list(scale.shape)}, which no {kind.name} has "
            f"beside codes of {list(weight.shape)}; the file is wrong."
        )
    used, outer = [code, scale_part], _outer(parts, f"{scale_part}_2", kind, layout.shape[:-2])
    used += [f"{scale_part}_2"] if f"{scale_part}_2" in parts else []
    factors = _factors(parts, layout.shape)
    used += [FACTORS] if factors else []
    label = f"ModelOpt {kind.name}, blocks of {layout.block[0]}x{layout.block[1]}{', input scaled' * bool(factors)}"

    def decode(dtype: str) -> LazyTensor:
        def matrix(codes: LazyTensor, scales: LazyTensor, outer: LazyTensor | None) -> LazyTensor:
            shape = (layout.shape[-2], layout.shape[-1])
            rows = Codes(codes, kind.bits, kind.codes, shape)
            if layout.pairs:
                rows = Codes(row_pairs(codes), 8, kind.codes, shape)
            return scaled(rows, Scales(scales, layout.block, outer=outer, factors=factors), label, dtype)

        if len(layout.shape) == 2:
            return matrix(weight, scale, outer)
        # One scale of all experts goes with each of them.
        one = scale.shape in ((), (1,))
        top = outer if outer and outer.shape else None
        return each_matrix(
            lambda codes, scales, each: matrix(codes, scales or scale, each or outer),
            weight, None if one else scale, top,
        )  # fmt: skip

    return Plain(f"{parts.module}{code}", label, layout.shape, tuple(used), decode)


FORMAT = Format("modelopt", claims, read)


def _kind(parts: Parts, code: str, scale_part: str, settings: Settings) -> Kind:
    """Return the layout that the dtypes show, which the config may not contradict."""
    found = (parts.dtype(code), parts.dtype(scale_part))
    kind = next((it for it in KINDS if it.weight == found[0] and found[1] in it.scales), None)
    if kind is None:
        raise RefusedError(
            f"{parts.place(scale_part)}: is {found[1]} beside codes in {found[0]}; ModelOpt has no such layout."
        )
    layers = settings.values.get("quantized_layers")
    own = layers.get(parts.module) if isinstance(layers, Mapping) else None
    algo = str((own if isinstance(own, Mapping) else settings.values).get("quant_algo")).upper()
    others = [it.name for it in KINDS if it.algo.match(algo)]
    if others and kind.name not in others:
        raise RefusedError(
            f"{settings.where}: 'quant_algo' of {parts.module} is {algo}, but its tensors{parts.file(code)} are "
            f"{kind.name}: {found[0]} and scales in {found[1]}."
        )
    return kind


def _layout(kind: Kind, weight: LazyTensor, scale: LazyTensor) -> Layout | None:
    """Return how the codes lie, or None where the scales do not fit them."""
    *lead, rows, columns = weight.shape
    if kind.name in ("FP8", "INT8"):
        block = _whole_or_blocks(weight.shape, scale.shape)
        return Layout(weight.shape, block) if block else None
    if kind.name == "INT4":
        shape = (*lead, 2 * rows, columns)
        groups = scale.shape[-1] if scale.shape else 0
        fits = groups and columns % groups == 0 and scale.shape == (*shape[:-1], groups)
        return Layout(shape, (1, columns // groups), pairs=True) if fits else None
    width = columns * 8 // kind.bits
    for group in (16, 32) if kind.name == "NVFP4" else (32,):
        if scale.shape == (*weight.shape[:-1], -(-width // group)):
            return Layout((*lead, rows, width), (1, group))
        if kind.name == "NVFP4" and len(lead) == 1 and scale.shape == (*lead, -(-2 * rows // group), columns):
            return Layout((*lead, 2 * rows, columns), (group, 1), pairs=True)
    return None


def _whole_or_blocks(shape: tuple[int, ...], scale: tuple[int, ...]) -> BlockSize | None:
    *lead, rows, columns = shape
    tall, wide = grid_shape((rows, columns), (BLOCK, BLOCK))
    if scale in ((), (1,), (*lead, 1, 1)) or (lead and scale in ((*lead,), (*lead, 1))):
        return rows, columns
    ways = {
        (1, columns): scale in ((*lead, rows), (*lead, rows, 1)),
        (BLOCK, BLOCK): scale in ((*lead, tall, wide), (*lead, tall, 1, wide, 1)),
        (rows, 1): bool(lead) and scale in ((*lead, columns), (*lead, 1, columns)),
    }
    fitting = [block for block, fits in ways.items() if fits]
    return fitting[0] if len(fitting) == 1 else None


def _outer(parts: Parts, part: str, kind: Kind, lead: tuple[int, ...]) -> LazyTensor | None:
    if kind.name != "NVFP4":
        return None
    outer = parts.expect(part, ("F32",))
    if outer.shape not in ((), (1,), lead, (*lead, 1, 1)):
        raise RefusedError(f"{parts.place(part)}: has shape {list(outer.shape)}, not [].")
    return outer


def _factors(parts: Parts, shape: tuple[int, ...]) -> LazyTensor | None:
    if FACTORS not in parts:
        return None
    expected = (shape[-1],) if len(parts[FACTORS].shape) < 2 else (1, shape[-1])
    return parts.expect(FACTORS, SCALES, expected)


def row_pairs(packed: LazyTensor) -> LazyTensor:
    """Return codes of four bits, one a byte, of which two lie one below the other in a byte."""

    def split(start: int, block: Block) -> Block:
        from tensorsurgeon.kernels.arrays import as_bytes
        from tensorsurgeon.kernels.unpacking import unpack_row_pairs

        codes = unpack_row_pairs(as_bytes(block))
        return Block("U8", codes.shape, memoryview(codes.data).cast("B"))

    shape = (2 * packed.shape[0], packed.shape[1])
    return lazily(split, Input(packed, 2), dtype="U8", shape=shape, label="two rows in a byte", grain=2)
