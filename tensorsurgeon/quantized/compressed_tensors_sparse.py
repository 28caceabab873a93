"""compressed-tensors with zeros left out, as versions before 0.13 wrote it: `sparsity_config`.

    M.compressed   BF16, F16, F32, F8_E4M3, I8  sparse-24-bitmask [out, in / 2], sparse-bitmask [numbers that are left]
    M.bitmask      U8                           [out, ceil(in / 8)], bit j of byte k is column 8 k + j
    M.shape        I64                          [2] or [2, 1] = out, in
    M.row_offsets  I64                          [out], where the numbers of a row begin; of sparse-bitmask only
    M.weight_scale                              as of a plain module, where what is left are codes

The numbers are put, row by row, where bits are set; all others are zero.
Source: compressed-tensors 0.12, compressors/sparse_compressors.
"""

from __future__ import annotations

import struct

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.compressed_tensors import SCALE, scale_block
from tensorsurgeon.quantized.decoding import decode_codes, lazily
from tensorsurgeon.quantized.parts import PLAIN, SCALES, WEIGHT, Format, Parts, Plain, Settings
from tensorsurgeon.quantized.schemes import weight_scheme
from tensorsurgeon.tensor import Block, Input, LazyTensor

VALUES, MASK, SHAPE, OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of this format."""
    return VALUES in parts or MASK in parts


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    values = parts.expect(VALUES, (*PLAIN, "F8_E4M3", "I8"))
    mask = parts.expect(MASK, ("U8",))
    shape = _shape(parts)
    parts.expect(MASK, ("U8",), (shape[0], -(-shape[1] // 8)))
    offsets = parts.expect(OFFSETS, ("I64",), (shape[0],)) if OFFSETS in parts else None
    if offsets is None:
        parts.expect(VALUES, (values.dtype,), (shape[0], shape[1] // 2))
    coded = values.dtype not in PLAIN
    block = scale_block(parts.module, weight_scheme(parts.module, settings), shape) if coded else shape
    if block not in (shape, (1, shape[1])):
        raise RefusedError(f"{parts.module}{SCALE}: only one scale, or one a row, goes with left out zeros.")
    scale = parts.expect(SCALE, SCALES) if coded else None
    if scale and scale.nbytes and scale.shape not in ((), (1,), (shape[0], 1)):
        parts.expect(SCALE, SCALES, (shape[0], 1))
    name = {"F8_E4M3": "FP8", "I8": "INT8"}.get(values.dtype, values.dtype)
    label = f"{'2:4 sparse' if offsets is None else 'sparse'} {name}"
    by_row = scale is not None and scale.rows == shape[0] and block == (1, shape[1])
    inputs = [Input(mask), Input(offsets, 0), Input(values, 0)] if offsets else [Input(mask), Input(values)]
    inputs += [Input(scale, int(by_row))] if scale else []

    def decode(dtype: str) -> LazyTensor:
        def decode_rows(start: int, *blocks: Block) -> Block:
            from tensorsurgeon.kernels import codes as tables
            from tensorsurgeon.kernels.arrays import as_float32, from_float32
            from tensorsurgeon.kernels.scaling import Scaling, as_rows
            from tensorsurgeon.kernels.sparse import spread

            dense = spread(blocks[0], blocks[1 : len(inputs) - (scale is not None)], start, shape[1], parts.module)
            if scale is None:
                numbers = as_float32(dense)
                return as_rows(from_float32(numbers, dtype) if dtype == "BF16" else numbers, dtype)
            grouping = Scaling(tables.scale_numbers(blocks[-1]).reshape(-1, 1), 1 if by_row else shape[0], shape[1])
            table = tables.named("INT8" if values.dtype == "I8" else "E4M3")
            return decode_codes(tables.codes_of(dense), table, grouping, dtype)

        return lazily(decode_rows, *inputs, dtype=dtype, shape=shape, label=label)

    used = tuple(part for part in (VALUES, MASK, SHAPE, OFFSETS, *((SCALE,) if coded else ())) if part in parts)
    return Plain(f"{parts.module}{WEIGHT}", label, shape, used, decode)


FORMAT = Format("compressed-tensors sparse", claims, read)


def _shape(parts: Parts) -> tuple[int, int]:
    tensor = parts.expect(SHAPE, ("I64",))
    if tensor.shape not in ((2,), (2, 1)):
        parts.expect(SHAPE, ("I64",), (2, 1))
    rows, columns = struct.unpack("<2q", bytes(tensor.read().data))
    if min(rows, columns) < 1:
        raise RefusedError(f"{parts.module}{SHAPE}: says {[rows, columns]}, which is no shape of a matrix.")
    return rows, columns
