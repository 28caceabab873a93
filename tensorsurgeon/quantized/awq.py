"""AWQ as AutoAWQ, GPTQModel and AutoRound write it: `quant_method: awq`, four bits a code; AutoRound's also 5 to 7.

GEMM, transposed, groups of columns of the weight being groups of rows, b bits a code:

    M.qweight   I32               (in, out b / 32)        M.qzeros   I32   (in / group_size, out b / 32)
    M.scales    F16, BF16, F32    (in / group_size, out)

    W[r, c] = (q[c, r] - z[c // group_size, r]) * s[c // group_size, r]

Of codes and zero points alike each row is a bit stream, in which of every eight columns those with even numbers come
first (`kernels.interleaving`).

GEMV, row by row, four bits, all in order; there may be room for more groups than there are:

    M.qweight   I32   (out, in / 8)        M.qzeros   I32   (out, width)        M.scales   F16   (out, 8 width)

Zero points are stored as they are. Which of the two it is, and that it is not GPTQ, is known by the shapes; where they
fit several, by the config's `version`. What AWQ did to activations lies in the norms before them: the weights are those
of a model that was changed, not of the one that was quantised.
Source: AutoAWQ, utils/packing_utils.py, modules/linear/gemm.py and gemv.py.
"""

from __future__ import annotations

from functools import partial
from math import gcd

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.decoding import decode_codes, lazily
from tensorsurgeon.quantized.gptq import AUTOROUND, CODES, SCALE, WORD, ZEROS, matrices, require_plain_activations
from tensorsurgeon.quantized.overrides import columns_in_group, values_of
from tensorsurgeon.quantized.parts import SCALES, Format, Parts, Plain, Settings
from tensorsurgeon.tensor import Block, Input, LazyTensor

GEMV_BITS = 4
EACH = 8
"""Codes of four bits in a word, and columns that are interleaved."""
WIDTHS = (4, 5, 6, 7)


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is AWQ: by the config, or by shapes that no GPTQ has."""
    if settings.method == "awq":
        return CODES not in parts or not _is_gptq(parts) or _fits_gemv(parts)
    return CODES in parts and _gemm_bits(parts) is not None


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    settings.require(("awq", *AUTOROUND), "packed as AWQ")
    require_plain_activations(settings)
    codes, _, _ = matrices(parts, {CODES: ("I32",), ZEROS: ("I32",), SCALE: SCALES})
    gemv = _is_gemv(parts, settings)
    bits = _bits(parts, settings, gemv)
    shape = (codes.rows, codes.shape[1] * EACH) if gemv else (codes.shape[1] * WORD // bits, codes.rows)
    each = columns_in_group(parts, settings, shape[1])
    groups = -(-shape[1] // each)
    width = _zeros_width(groups, each) if gemv else 0
    parts.expect(ZEROS, ("I32",), (shape[0], width) if gemv else (groups, codes.shape[1]))
    parts.expect(SCALE, SCALES, (shape[0], width * EACH) if gemv else (groups, shape[0]))
    label = f"AWQ {'GEMV' if gemv else 'GEMM'}, {bits} bits, groups of {each}"
    decode = partial(_decode_rows, parts, shape, each, label)
    if not gemv:
        decode = partial(_decode_columns, parts, shape, bits, each, label)
    return Plain(f"{parts.module}.weight", label, shape, (CODES, ZEROS, SCALE), decode)


FORMAT = Format("awq", claims, read)


def _bits(parts: Parts, settings: Settings, gemv: bool) -> int:
    """Return the bits of a code by the shapes, or by the config where none fits; they must not contradict."""
    values = values_of(settings, parts.module)
    packing = values.get("packing_format") or values.get("backend") or "awq"
    if settings.method in AUTOROUND and "awq" not in str(packing):
        raise RefusedError(f"{settings.where}: packing_format is {packing!r}, but {parts.module} is packed as AWQ.")
    bits = GEMV_BITS if gemv else _gemm_bits(parts)
    said = values.get("bits", values.get("w_bit", bits or GEMV_BITS))
    if said not in WIDTHS or (bits or said) != said:
        shapes = f"the shapes in {parts.place(CODES)} are of {bits}" if bits else f"only {WIDTHS} are decoded"
        raise RefusedError(f"{settings.where}: {parts.module} is AWQ of {said!r} bits, but {shapes}.")
    return int(said)


def _is_gptq(parts: Parts) -> bool:
    codes, scales = parts[CODES], parts.get(SCALE)
    return scales is not None and codes.shape[1:] == scales.shape[1:]


def _gemm_bits(parts: Parts) -> int | None:
    """Return the bits of a code with which codes and scales are as many columns, if there are such."""
    codes, scales = parts[CODES], parts.get(SCALE)
    if scales is None or not len(codes.shape) == len(scales.shape) == 2:
        return None
    return next((bits for bits in WIDTHS if codes.shape[1] * WORD == scales.shape[1] * bits != 0), None)


def _fits_gemv(parts: Parts) -> bool:
    codes, zeros, scales = parts[CODES], parts.get(ZEROS), parts.get(SCALE)
    if zeros is None or scales is None or not codes.rows == zeros.rows == scales.rows:
        return False
    return tuple(size * EACH for size in zeros.shape[1:]) == scales.shape[1:] != ()


def _is_gemv(parts: Parts, settings: Settings) -> bool:
    """Tell GEMV from GEMM by the shapes, or by the config where they fit both or neither."""
    said = str(settings.values.get("version") or settings.values.get("format") or "gemm").lower()
    if said not in ("gemm", "gemv"):
        raise RefusedError(f"{settings.where}: version {said!r} of AWQ is not decoded; gemm and gemv are.")
    fits, others = _fits_gemv(parts), _gemm_bits(parts) is not None
    return said == "gemv" if fits == others else fits


def _zeros_width(groups: int, each: int) -> int:
    """Return how many words hold the zero points of a row, for which GEMV has room for groups of 128."""
    times = 1 if each >= 128 else 128 // each
    return -(-groups // (EACH * times)) * times


def _decode_columns(parts: Parts, shape: tuple[int, int], bits: int, each: int, label: str, dtype: str) -> LazyTensor:
    def decode(_: int, words: Block, zeros: Block, scales: Block) -> Block:
        from tensorsurgeon.kernels import grouped
        from tensorsurgeon.kernels.codes import UNSIGNED, scale_numbers
        from tensorsurgeon.kernels.interleaving import unpack_interleaved

        codes, points = (unpack_interleaved(grouped.as_words(it), bits) for it in (words, zeros))
        scaling = grouped.grouped(scale_numbers(scales).T, points, each)
        return decode_codes(codes, UNSIGNED, scaling, dtype, 2**bits)

    together = max(EACH, WORD // gcd(WORD, bits))
    packed = (Input(parts[part], together, together * bits // WORD, columns=True) for part in (CODES, ZEROS))
    return lazily(decode, *packed, Input(parts[SCALE], columns=True), dtype=dtype, shape=shape, label=label)


def _decode_rows(parts: Parts, shape: tuple[int, int], each: int, label: str, dtype: str) -> LazyTensor:
    groups = -(-shape[1] // each)

    def decode(_: int, words: Block, zeros: Block, scales: Block) -> Block:
        from tensorsurgeon.kernels import grouped
        from tensorsurgeon.kernels.codes import UNSIGNED, scale_numbers
        from tensorsurgeon.kernels.unpacking import unpack_rows

        numbers = scale_numbers(scales)[:, :groups]
        codes = unpack_rows(grouped.as_words(words), GEMV_BITS, shape[1])
        points = unpack_rows(grouped.as_words(zeros), GEMV_BITS, groups)
        return decode_codes(codes, UNSIGNED, grouped.grouped(numbers, points, each), dtype, 2**GEMV_BITS)

    inputs = (Input(parts[part]) for part in (CODES, ZEROS, SCALE))
    return lazily(decode, *inputs, dtype=dtype, shape=shape, label=label)
