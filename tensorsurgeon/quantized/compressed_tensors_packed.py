"""compressed-tensors `pack-quantized`: whole numbers of 1 to 8 bits, several in a word.

    M.weight_packed      I32             [out, ceil(in bits / 32)]      a bit stream in each row
    M.weight_scale       BF16, F16, F32  [out, groups] or [out, 1]
    M.weight_shape       I64 or I32      [2] = out, in
    M.weight_zero_point  I32             [ceil(out bits / 32), groups]  a bit stream down each column
    M.weight_g_idx       I32             [in]                           the group of each column; -1 where unused

Codes and zero points stand for `code - 2^(bits - 1)`; `W[r, c] = (q[r, c] - z[r, k]) * s[r, k]`, k the group of
column c. Before version 0.18 a word held only whole codes: 3, 5, 6 and 7 bits leave its last bits unused. The config
does not tell; the width of a row does, as then it is `ceil(in / (32 // bits))`; where that is the same, the version
does.
Source: compressed-tensors, compressors/pack_quantized.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.decoding import decode_codes, lazily
from tensorsurgeon.quantized.parts import SCALES, WEIGHT, Format, Parts, Plain, Settings
from tensorsurgeon.quantized.schemes import weight_scheme
from tensorsurgeon.tensor import Block, Input, LazyTensor

PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
ZERO, INDEX = ".weight_zero_point", ".weight_g_idx"


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of this format."""
    return PACKED in parts and parts.dtype(PACKED) != "U8"


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    scheme = weight_scheme(parts.module, settings)
    bits = scheme.get("num_bits")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise RefusedError(f"{parts.module}: the config says {bits!r} bits; 1 to 8 can be packed.")
    packed = parts.expect(PACKED, ("I32",))
    scale = parts.expect(SCALE, SCALES)
    if len(packed.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != packed.shape[0]:
        raise RefusedError(
            f"{parts.module}{PACKED}: codes of shape {list(packed.shape)} and scales of {list(scale.shape)} do not go "
            "together."
        )
    group = scheme.get("group_size") if scheme.get("strategy") == "group" else None
    rows, columns = _shape(parts, bits, group if isinstance(group, int) and group > 0 else None)
    dense, padded = -(-columns * bits // 32), -(-columns // (32 // bits))
    if packed.shape[0] != rows or packed.shape[1] not in (dense, padded):
        raise RefusedError(
            f"{parts.module}{PACKED}: has shape {list(packed.shape)}, but {bits} bits for {rows} x {columns} weights "
            f"need {[rows, dense]}; the file is truncated, or the config is of another model."
        )
    groups = scale.shape[1]
    size = columns if groups == 1 else group
    if not size or -(-columns // size) != groups:
        raise RefusedError(f"{parts.module}{SCALE}: {groups} groups do not cover {columns} columns in {group!r} each.")
    lanes = packed.shape[1] != dense or (dense == padded and 32 % bits != 0 and _is_old(settings))
    words = -(-rows // (32 // bits)) if lanes else -(-rows * bits // 32)
    zero = parts.expect(ZERO, ("I32",), (words, groups)) if ZERO in parts else None
    index = parts.expect(INDEX, ("I32",), (columns,)) if INDEX in parts else None
    if zero is None and scheme.get("symmetric") is False:
        parts.expect(ZERO, ("I32",))
    label = f"INT{bits}, {'one scale a row' if groups == 1 else f'groups of {size}'}"
    label += ", asymmetric" * (zero is not None) + ", activation order" * (index is not None)
    aligned = (32 // bits, 1) if lanes else (32, bits)
    inputs = [Input(packed), Input(scale), *([Input(zero, *aligned)] if zero else [])]
    inputs += [Input(index, 0)] if index else []

    def function(dtype: str) -> Any:
        def decode(start: int, codes: Block, scales: Block, *rest: Block) -> Block:
            from tensorsurgeon.kernels import codes as tables
            from tensorsurgeon.kernels import unpacking
            from tensorsurgeon.kernels.arrays import as_array
            from tensorsurgeon.kernels.scaling import Scaling, group_places

            more = list(rest)
            unpack = unpacking.unpack_lanes if lanes else unpacking.unpack_rows
            scaling = Scaling(tables.scale_numbers(scales), 1, size)
            if zero:
                stream = unpacking.transposed(as_array(more.pop(0)))
                points = unpack(stream, bits, codes.shape[0])
                scaling = scaling._replace(zeros=tables.offset(bits)[points].T)
            if index:
                scaling = scaling._replace(places=group_places(more.pop(0), groups, f"{parts.module}{INDEX}"))
            return decode_codes(unpack(as_array(codes), bits, columns), tables.offset(bits), scaling, dtype, 2**bits)

        return decode

    def decode(dtype: str) -> LazyTensor:
        text = f"{label}, {'lanes' if lanes else 'stream'}"
        return lazily(function(dtype), *inputs, dtype=dtype, shape=(rows, columns), label=text)

    used = tuple(part for part in (PACKED, SCALE, SHAPE, ZERO, INDEX) if part in parts)
    return Plain(f"{parts.module}{WEIGHT}", label, (rows, columns), used, decode)


def _is_old(settings: Settings) -> bool:
    """Tell whether the config is of a version before 0.18, which alone tells where both widths are the same."""
    found = re.match(r"(\d+)\.(\d+)", str(settings.values.get("version")))
    return found is not None and (int(found[1]), int(found[2])) < (0, 18)


FORMAT = Format("compressed-tensors packed", claims, read)


def _shape(parts: Parts, bits: int, group: int | None) -> tuple[int, int]:
    """Return rows and columns: from the groups, where they fill the words, else as the file says."""
    rows, words = parts[PACKED].shape
    groups = parts[SCALE].shape[1]
    if group and groups > 1 and groups * group * bits == words * 32:
        return rows, groups * group
    tensor = parts.expect(SHAPE, ("I64", "I32"), (2,))
    data = bytes(tensor.read().data)
    said = struct.unpack("<2q" if tensor.dtype == "I64" else "<2i", data)
    if min(said) < 1:
        raise RefusedError(f"{parts.module}{SHAPE}: says {list(said)}, which is no shape of a matrix.")
    return said[0], said[1]
