"""FP8 experts that transformers split as it saved them, beside scales that it did not split: `quant_method: fp8`.

    X.experts.N.gate_proj.weight      F8_E4M3  [out, in], and up_proj, down_proj
    X.experts.gate_up_proj_scale_inv  F32      [experts, ceil(2 out / rows), ceil(in / columns)]: gate first, then up
    X.experts.down_proj_scale_inv     F32      [experts, ceil(out / rows), ceil(in / columns)]

With no block size both are [experts, 1, 1]. Where `out` is no multiple of the block's rows, a block holds the last rows
of gate and the first of up.
Source: transformers 5.23, conversion_mapping.py and integrations/finegrained_fp8.py, whose scales have no such mapping.
"""

from __future__ import annotations

import re

from tensorsurgeon.quantized.decoding import Codes, Scales, grid_shape, lazily, scaled
from tensorsurgeon.quantized.fp8 import EXPONENTS, block_words, layout
from tensorsurgeon.quantized.parts import SCALES, WEIGHT, Format, Parts, Plain, Settings, leftover
from tensorsurgeon.shaping import apart
from tensorsurgeon.tensor import Block, Input, LazyTensor

_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w[123])$")
_STACKED = {"down_proj": "down_proj", "w2": "down_proj"}
_SECOND = ("up_proj", "w3")


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of this format."""
    alone = parts.dtype(WEIGHT) == "F8_E4M3" and not leftover(parts, (WEIGHT,))
    return alone and _stacked_name(parts.module) in parts.beside


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    block, divides = layout(settings)
    weight = parts.expect(WEIGHT, ("F8_E4M3",))
    rows, columns = weight.shape
    name = _stacked_name(parts.module)
    experts = Parts(name, {"": parts.beside[name]}, parts.beside)
    match = _EXPERT.match(parts.module)
    assert match
    of_two = match["part"] not in _STACKED
    number, offset = int(match["number"]), rows if match["part"] in _SECOND else 0
    grid = grid_shape((rows * (1 + of_two), columns), block) if block else (1, 1)
    count = max(number + 1, *experts[""].shape[:1])
    scale = experts.expect("", (*SCALES, *EXPONENTS), (count, *grid))
    each = block or (rows * (1 + of_two), columns)

    def decode(dtype: str) -> LazyTensor:
        scales = apart(scale)[number]
        if offset and block:
            scales = _from_row(scales, offset, rows, each[0])
        codes = Codes(weight, 8, "E4M3", (rows, columns))
        shared = (1 if offset and block else each[0], each[1])
        return scaled(codes, Scales(scales, shared, divides=divides), label, dtype)

    label = f"FP8, {block_words(block)}, scales of all experts"
    return Plain(f"{parts.module}{WEIGHT}", label, (rows, columns), (WEIGHT,), decode, (name,))


FORMAT = Format("fp8 split experts", claims, read)


def _stacked_name(module: str) -> str:
    match = _EXPERT.match(module)
    return f"{match['experts']}.{_STACKED.get(match['part'], 'gate_up_proj')}_scale_inv" if match else ""


def _from_row(scales: LazyTensor, offset: int, rows: int, each: int) -> LazyTensor:
    """Return a row of scales for each of some rows of weights, which begin at `offset` of those that scales are for."""

    def decode(start: int, block: Block) -> Block:
        width = scales.row_bytes
        data = memoryview(block.data).cast("B")
        places = ((offset + row) // each * width for row in range(rows))
        return Block(block.dtype, shape, b"".join(data[place : place + width] for place in places))

    shape = (rows, scales.shape[1])
    label = f"rows from {offset} of scales for {each} rows"
    return lazily(decode, Input(scales, 0), dtype=scales.dtype, shape=shape, label=label, grain=rows)
