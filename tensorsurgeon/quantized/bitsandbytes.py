"""bitsandbytes: 4 bits that a table gives a meaning (nf4, fp4), and 8 bits by rows (LLM.int8).

    M.weight                                 U8   (ceil(n / 2), 1)    two codes a byte, the first in its HIGH half
    M.weight.absmax                          F32  (ceil(n / size))    a[k]; quantised itself: U8
    M.weight.quant_map                       F32  (16)                what each code stands for
    M.weight.quant_state.bitsandbytes__nf4   U8   JSON: shape, blocksize, quant_type, nested_blocksize, nested_offset
    M.weight.nested_absmax                   F32  (ceil(ceil(n / size) / nested size))
    M.weight.nested_quant_map                F32  (256)

n is out * in: blocks of `size` codes run over the flattened weight and cross its rows, the last may be shorter, and
an odd n leaves half a byte. The weight may lie under BF16, F16 or F32 (`bnb_4bit_quant_storage`): the same bytes.

    W.flat[j] = quant_map[code[j]] * a[j // size]
    a[k] = nested_quant_map[absmax[k]] * nested_absmax[k // nested_size] + nested_offset     where absmax is U8

    M.weight         I8   (out, in)
    M.SCB            F32  (out)
    M.weight_format  U8   ()          0: by rows

    W[r, c] = q[r, c] * SCB[r] * 7.874015718698502e-3     in this order; the constant is 1 / 127

GPTQModel writes the same with other names: `M.weight_absmax`, `M.weight_quant_state`, `M.weight_scb`; its 8 bits are
`q * (scb[r] / 127)`, which may differ in the last bit. A Conv1D, of GPT-2 and its kin, holds (in, out), but (out, in)
once it is quantised: what is decoded is turned back.
Source: bitsandbytes, functional.py (QuantState, int8_vectorwise_dequant) and backends/default/ops.py; transformers,
integrations/bitsandbytes.py; GPTQModel, nn_modules/qlinear/bitsandbytes.py.
"""

from __future__ import annotations

from math import gcd, isfinite, lcm, prod
from typing import Any, NamedTuple

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.format import load_json
from tensorsurgeon.quantized.decoding import lazily
from tensorsurgeon.quantized.parts import PLAIN, WEIGHT, Format, Parts, Plain, Settings
from tensorsurgeon.shaping import folded, viewed
from tensorsurgeon.tensor import Block, Input, LazyTensor

METHODS = ("bitsandbytes",)
STATE = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4", "quant_state")
SPELLINGS = (".weight.", ".weight_")
SCALES = (".SCB", ".weight_scb")
FORMAT_PART = ".weight_format"
LARGEST = 2**16
"""More codes share no scale; bitsandbytes allows 4096."""
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


class State(NamedTuple):
    """What the JSON of a module says: its shape, codes that share a scale, and how the scales are quantised."""

    kind: str
    shape: tuple[int, ...]
    size: int
    nested_size: int
    nested_offset: float


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of bitsandbytes, or would be if it were whole."""
    return _has_eight_bits(parts) or _spelling(parts) is not None


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    settings.require(METHODS, "those of bitsandbytes")
    return _eight_bits(parts, settings) if _has_eight_bits(parts) else _four_bits(parts, settings)


FORMAT = Format("bitsandbytes", claims, read)


def _has_eight_bits(parts: Parts) -> bool:
    return any(part in parts for part in (*SCALES, FORMAT_PART))


def _spelling(parts: Parts) -> str | None:
    marks = ("absmax", "nested_absmax", "quant_map", *STATE)
    return next((way for way in SPELLINGS if any(f"{way}{mark}" in parts for mark in marks)), None)


def _four_bits(parts: Parts, settings: Settings) -> Plain:
    way = _spelling(parts)
    assert way is not None
    state_part = next((f"{way}{name}" for name in STATE if f"{way}{name}" in parts), f"{way}{STATE[0]}")
    state = _read_state(parts, state_part)
    count = prod(state.shape)
    blocks = -(-count // state.size)
    weight = _require_codes(parts, -(-count // 2), state.shape)
    absmax = parts.expect(f"{way}absmax", ("F32", "U8"), (blocks,))
    table = parts.expect(f"{way}quant_map", ("F32",), (16,))
    used = [WEIGHT, f"{way}absmax", f"{way}quant_map", state_part]
    nested: tuple[LazyTensor, ...] = ()
    if absmax.dtype == "U8":
        if not state.nested_size:
            raise RefusedError(f"{parts.place(f'{way}absmax')}: is U8, but no nested_blocksize is given.")
        groups = -(-blocks // state.nested_size)
        nested = (
            parts.expect(f"{way}nested_absmax", ("F32",), (groups,)),
            parts.expect(f"{way}nested_quant_map", ("F32",), (256,)),
        )
        used += [f"{way}nested_absmax", f"{way}nested_quant_map"]
    turned = _is_conv1d(parts, settings)

    def decode(dtype: str) -> LazyTensor:
        return _turned(_decoded(state, weight, absmax, table, nested, dtype), turned)

    label = f"bitsandbytes {state.kind}, blocks of {state.size}{', scales quantised' * bool(nested)}"
    shape = state.shape[::-1] if turned else state.shape
    return Plain(f"{parts.module}{WEIGHT}", label, shape, tuple(used), decode)


def _decoded(
    state: State, weight: LazyTensor, absmax: LazyTensor, table: LazyTensor, nested: tuple[LazyTensor, ...], dtype: str
) -> LazyTensor:
    rows, columns = prod(state.shape[:-1]), state.shape[-1]
    # As many rows as begin with a byte and with a block.
    grain = min(rows, lcm(2, state.size) // gcd(columns, lcm(2, state.size)))
    each = (grain * columns // 2, grain * columns // state.size)
    whole = grain == rows

    def decode(start: int, packed: Block, scales: Block, codebook: Block, *more: Block) -> Block:
        from tensorsurgeon.kernels.arrays import as_bytes
        from tensorsurgeon.kernels.blockwise import decode_run, nested_scales
        from tensorsurgeon.kernels.codes import scale_numbers, table_of

        if more:
            place = (start * columns // state.size, state.nested_size, state.nested_offset)
            outer = scale_numbers(more[0])
            numbers = nested_scales(as_bytes(scales)[:, 0], table_of(more[1]), outer, *place)
        else:
            numbers = scale_numbers(scales)
        stream = as_bytes(packed)[:, 0]
        count = min(2 * len(stream), (rows - start) * columns)
        run = decode_run(stream, count, table_of(codebook), numbers, state.size, dtype)
        return Block(dtype, (count // columns, columns), run.data)

    inputs = (
        Input(viewed(weight, "U8", (weight.nbytes, 1)), 0 if whole else grain, each[0]),
        Input(absmax, 0 if whole else grain, each[1]),
        *(Input(it, 0) for it in (table, *nested)),
    )
    # The JSON that says these is no input.
    label = f"bitsandbytes {state}"
    matrix = lazily(decode, *inputs, dtype=dtype, shape=(rows, columns), label=label, grain=grain)
    return matrix if len(state.shape) == 2 else folded(matrix, state.shape)


def _require_codes(parts: Parts, needed: int, shape: tuple[int, ...]) -> LazyTensor:
    weight = parts.expect(WEIGHT, ("U8", *PLAIN))
    if weight.nbytes != needed:
        raise RefusedError(
            f"{parts.place(WEIGHT)}: holds {weight.nbytes} bytes, but {list(shape)} in 4 bits are "
            f"{needed}; the file is cut short, or its shape is wrong."
        )
    return weight


def _read_state(parts: Parts, part: str) -> State:
    """Read what no header says: the shape of the weight and the size of its blocks."""
    tensor = parts.expect(part, ("U8",))
    where = parts.place(part)
    try:
        values = load_json(bytes(tensor.read().data).decode())
    except ValueError as problem:
        raise RefusedError(f"{where}: {problem}; what the codes mean cannot be known.") from None
    state = _as_state(values if isinstance(values, dict) else {})
    if state is None or (part.endswith(("__nf4", "__fp4")) and not part.endswith(state.kind)):
        raise RefusedError(f"{where}: says {values!r:.200}; that is no state of nf4 or fp4.")
    return state


def _as_state(values: dict[str, Any]) -> State | None:
    shape, kind, offset = values.get("shape"), values.get("quant_type"), values.get("nested_offset", 0.0)
    sizes = (values.get("blocksize"), values.get("nested_blocksize", 0))
    if not (isinstance(shape, list) and len(shape) > 1 and all(type(it) is int and it > 0 for it in shape)):
        return None
    if kind not in ("nf4", "fp4") or not all(type(it) is int and 0 <= it <= LARGEST for it in sizes) or not sizes[0]:
        return None
    if not isinstance(offset, int | float) or not isfinite(offset):
        return None
    return State(kind, tuple(shape), sizes[0], sizes[1], float(offset))


def _eight_bits(parts: Parts, settings: Settings) -> Plain:
    weight = parts.expect(WEIGHT, ("I8",))
    if len(weight.shape) != 2:
        raise RefusedError(f"{parts.place(WEIGHT)}: has shape {list(weight.shape)}, not two.")
    part = next((it for it in SCALES if it in parts), SCALES[0])
    scale = parts.expect(part, ("F32",), weight.shape[:1])
    if FORMAT_PART in parts:
        layout = parts.expect(FORMAT_PART, ("U8",))
        if any(layout.read().data):
            raise RefusedError(f"{parts.place(FORMAT_PART)}: is not 0, rows; other layouts are those of a GPU.")
    turned = _is_conv1d(parts, settings)

    def decode(dtype: str) -> LazyTensor:
        def rows(start: int, codes: Block, scales: Block) -> Block:
            from tensorsurgeon.kernels.arrays import as_bytes
            from tensorsurgeon.kernels.blockwise import decode_rows
            from tensorsurgeon.kernels.codes import scale_numbers

            return decode_rows(as_bytes(codes), scale_numbers(scales), part == SCALES[0], dtype)

        label = f"bitsandbytes int8, rows by {part}"
        inputs = (Input(weight), Input(scale))
        return _turned(lazily(rows, *inputs, dtype=dtype, shape=weight.shape, label=label), turned)

    shape = weight.shape[::-1] if turned else weight.shape
    used = tuple(it for it in (WEIGHT, part, FORMAT_PART) if it in parts)
    return Plain(f"{parts.module}{WEIGHT}", "bitsandbytes int8, rows", shape, used, decode)


def _is_conv1d(parts: Parts, settings: Settings) -> bool:
    return settings.model_type in CONV1D_MODELS and parts.module.endswith(CONV1D)


def _turned(matrix: LazyTensor, turned: bool) -> LazyTensor:
    """Return the transpose of a matrix where it is asked for; it is held as a whole, models with Conv1D are small."""
    if not turned:
        return matrix

    def turn(start: int, whole: Block) -> Block:
        from tensorsurgeon.kernels.blockwise import exchanged

        return exchanged(whole)

    shape = matrix.shape[::-1]
    label = "with rows and columns exchanged"
    return lazily(turn, Input(matrix, 0), dtype=matrix.dtype, shape=shape, label=label, grain=shape[0])
