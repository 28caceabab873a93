"""torchao's tensor subclasses, flattened into safetensors: `quant_method: torchao`.

    M._weight_qdata             I8, F8_E4M3, F8_E5M2, or U8 of two codes, the first in the low half
    M._weight_scale             one number for each block; F8_E4M3 of NVFP4, F8_E8M0 of MX
    M._weight_zero_point        I8, or numbers, one for each scale
    M._weight_per_tensor_scale  F32 (), of NVFP4
    M._weight_act_pre_scale     (in), multiplies the input: it is folded into the columns

What kind of tensor it is only stands in `__metadata__`: `M.weight` is JSON with `_type`, its attributes as `_data`, and
the parts as `_tensor_data_names`; `tensor_names` lists all.

    Int8Tensor, IntxUnpackedToInt8Tensor  (q - zero_point) * scale    blocks of `block_size`
    Float8Tensor                          q * scale                   the same
    MXTensor                              q * 2^(e - 127)             E4M3, E5M2, E2M1; `block_size` columns
    NVFP4Tensor                           q * (scale * per_tensor)    E2M1, `block_size` columns

With `is_swizzled_scales` the scales of 128 rows and 4 columns lie together, as cuBLAS wants them: four times 32 rows
side by side; they are filled up to whole such blocks. Stacked matrices are one tall matrix in this.
Source: torchao, prototype/safetensors, prototype/mx_formats/{utils,mx_tensor,nvfp4_tensor}.py, quantization/
quantize_/workflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.format import load_json
from tensorsurgeon.quantized.decoding import BlockSize, Codes, Scales, grid_shape, lazily, scaled
from tensorsurgeon.quantized.parts import SCALES, Format, Parts, Plain, Settings
from tensorsurgeon.shaping import flattened, folded, viewed
from tensorsurgeon.tensor import Block, Input, LazyTensor

PREFIX = "._weight_"
QDATA, SCALE, ZERO = f"{PREFIX}qdata", f"{PREFIX}scale", f"{PREFIX}zero_point"
OUTER, FACTORS = f"{PREFIX}per_tensor_scale", f"{PREFIX}act_pre_scale"
IDLE = tuple(f"{PREFIX}{name}" for name in ("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale"))
ZEROS = ("I8", "I16", "I32", "I64", *SCALES)
SWIZZLED = (128, 4)
"""Rows and columns of scales that lie together."""
FLOAT8 = {"F8_E4M3": "E4M3", "F8_E5M2": "E5M2"}
ELEMENTS = {
    "float8_e4m3fn": ("F8_E4M3", 8, "E4M3"),
    "float8_e5m2": ("F8_E5M2", 8, "E5M2"),
    "float4_e2m1fn_x2": ("U8", 4, "E2M1"),
}
GROUPED = ("MXTensor", "NVFP4Tensor")
"""Kinds whose `block_size` is a number of columns."""
REFUSED = {
    "Int4Tensor": "packed for one kernel of a GPU",
    "Int4TilePackedTo4dTensor": "packed for one kernel of a GPU",
    "Int4PlainInt32Tensor": "packed for one kernel of another device",
}


class Kind(NamedTuple):
    """How codes are stored and scaled: `bits` of a code in the table `codes`, `block` of each dimension to a scale."""

    name: str
    stored: str
    bits: int
    codes: str
    scales: tuple[str, ...]
    block: tuple[int, ...] | None
    swizzled: bool = False


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of torchao, or would be if it were whole."""
    return any(part.startswith(PREFIX) for part in parts.tensors)


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    kind = _kind(parts, settings)
    qdata = parts.expect(QDATA, (kind.stored,))
    if len(qdata.shape) not in (2, 3):
        raise RefusedError(f"{parts.place(QDATA)}: has shape {list(qdata.shape)}; not a matrix.")
    shape = (*qdata.shape[:-1], qdata.shape[-1] * 8 // kind.bits)
    matrix = (prod(shape[:-1]), shape[-1])
    block, rows_of_scales = _block(parts, kind, shape)
    scale = parts.expect(SCALE, kind.scales)
    if kind.swizzled:
        grid = grid_shape(matrix, block)
        tiles = grid_shape(grid, SWIZZLED)
        _require_count(parts, SCALE, prod(tiles) * prod(SWIZZLED))
    else:
        _require_count(parts, SCALE, rows_of_scales)
    zeros = _optional(parts, ZERO, ZEROS, prod(scale.shape)) if kind.stored == "I8" else None
    outer = _optional(parts, OUTER, ("F32",), 1) if kind.name == "NVFP4Tensor" else None
    factors = _optional(parts, FACTORS, SCALES, shape[-1])
    label = f"torchao {kind.name}, {kind.codes}, blocks of {'x'.join(map(str, block))}{', swizzled' * kind.swizzled}"

    def decode(dtype: str) -> LazyTensor:
        grid = unswizzled(scale, grid_shape(matrix, block)) if kind.swizzled else flattened(scale)
        codes = Codes(flattened(qdata), kind.bits, kind.codes, matrix)
        each = Scales(grid, block, flattened(zeros) if zeros else None, outer, factors=factors)
        decoded = scaled(codes, each, label, dtype)
        return decoded if len(shape) == 2 else folded(decoded, shape)

    used = [it for it in (QDATA, SCALE, *IDLE) if it in parts]
    used += [part for part, held in ((ZERO, zeros), (OUTER, outer), (FACTORS, factors)) if held]
    return Plain(f"{parts.module}.weight", label, shape, tuple(used), decode)


FORMAT = Format("torchao", claims, read)


def _kind(parts: Parts, settings: Settings) -> Kind:
    """Return what the metadata says of a module."""
    where = f"{parts.module}.weight"
    entry, data = _entry(where, settings)
    name = str(entry.get("_type"))
    missing = [f"{PREFIX}{it}" for it in entry.get("_tensor_data_names") or () if f"{PREFIX}{it}" not in parts]
    if missing:
        raise RefusedError(*(f"{parts.module}{part}: is missing; the metadata lists it, fetch it." for part in missing))
    block, swizzled = data.get("block_size"), data.get("is_swizzled_scales") is True
    if name in GROUPED:
        if type(block) is not int or block < 1:
            raise RefusedError(f"{where}: the metadata gives 'block_size' {block!r}, not a whole number.")
        element = (data.get("elem_dtype") or {}).get("_data") if name == "MXTensor" else "float4_e2m1fn_x2"
        if element not in ELEMENTS:
            raise RefusedError(f"{where}: is {name} of {element!r}; known are {', '.join(ELEMENTS)}.")
        scales = ("F8_E8M0", "U8") if name == "MXTensor" else ("F8_E4M3",)
        return Kind(name, *ELEMENTS[element], scales, (block,), swizzled)
    sizes = tuple(block) if isinstance(block, list) and all(type(it) is int and it > 0 for it in block) else None
    if block is not None and sizes is None:
        raise RefusedError(f"{where}: the metadata gives 'block_size' {block!r}, not a list of whole numbers.")
    if name == "Float8Tensor":
        stored = parts.expect(QDATA, tuple(FLOAT8)).dtype
        return Kind(name, stored, 8, FLOAT8[stored], SCALES, sizes)
    if name in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        return Kind(name, "I8", 8, "INT8", SCALES, sizes)
    why = f"it is {REFUSED[name]}" if name in REFUSED else "that is not known here"
    raise RefusedError(f"{where}: the metadata says {name}; {why}, and it is not decoded.")


def _entry(where: str, settings: Settings) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    text = settings.metadata.get(where)
    if text is None:
        raise RefusedError(
            f"{where}: no __metadata__ of a shard describes it; what kind of torchao tensor it is cannot be known."
        )
    try:
        entry = load_json(text)
    except ValueError as problem:
        raise RefusedError(f"{where}: __metadata__ is no JSON: {problem}.") from None
    data = entry.get("_data") if isinstance(entry, dict) else None
    return (entry, data) if isinstance(data, dict) else ({}, {})


def _block(parts: Parts, kind: Kind, shape: tuple[int, ...]) -> tuple[BlockSize, int]:
    """Return the rows and columns of the tall matrix that share a scale, and how many scales there are."""
    scale = parts.expect(SCALE, kind.scales).shape
    block = kind.block
    if kind.name in GROUPED and block is not None:
        block = (*(1,) * (len(shape) - 1), *block)
        if shape[-1] % block[-1]:
            raise RefusedError(f"{parts.place(QDATA)}: is {list(shape)}, no whole {block[-1]}s.")
    if block is None and len(scale) == len(shape) and all(scale):
        # Without a size of blocks torchao spreads the scales evenly.
        even = all(size % each == 0 for size, each in zip(shape, scale, strict=True))
        block = tuple(size // each for size, each in zip(shape, scale, strict=True)) if even else None
    if block is None or len(block) != len(shape):
        raise RefusedError(f"{parts.module}.weight: 'block_size' {block} does not fit its shape {list(shape)}.")
    count = prod(-(-size // each) for size, each in zip(shape, block, strict=True))
    if count == 1:
        return (prod(shape[:-1]), shape[-1]), 1
    if len(shape) == 3 and (block[0] != 1 or shape[1] % block[1]):
        raise RefusedError(f"{parts.module}.weight: blocks of {list(block)} cross matrices of {list(shape)}.")
    return (block[-2], block[-1]), count


def _optional(parts: Parts, part: str, dtypes: tuple[str, ...], count: int) -> LazyTensor | None:
    if part not in parts:
        return None
    tensor = parts.expect(part, dtypes)
    _require_count(parts, part, count)
    return tensor


def _require_count(parts: Parts, part: str, count: int) -> None:
    tensor = parts[part]
    if prod(tensor.shape) != count:
        raise RefusedError(
            f"{parts.place(part)}: has shape {list(tensor.shape)}, but {count} numbers are needed; "
            "the block size or the file is wrong."
        )


def unswizzled(scale: LazyTensor, grid: tuple[int, int]) -> LazyTensor:
    """Return scales in rows and columns that lie as cuBLAS wants them."""
    tall, wide = grid_shape(grid, SWIZZLED)
    tiles = viewed(scale, scale.dtype, (tall, wide * prod(SWIZZLED)))

    def straighten(start: int, block: Block) -> Block:
        from tensorsurgeon.kernels.arrays import as_bytes
        from tensorsurgeon.kernels.unpacking import unswizzle

        rows = min(block.shape[0] * SWIZZLED[0], grid[0] - start)
        straight = unswizzle(as_bytes(block).reshape(-1, wide, prod(SWIZZLED)), rows, grid[1])
        return Block(scale.dtype, straight.shape, memoryview(straight.data).cast("B"))

    inputs = (Input(tiles, SWIZZLED[0]),)
    grain = min(SWIZZLED[0], grid[0])
    return lazily(straighten, *inputs, dtype=scale.dtype, shape=grid, label=f"swizzled {grid}", grain=grain)
