"""GPTQ as AutoGPTQ, GPTQModel and AutoRound write it: `quant_method: gptq`, `auto-round`.

    M.qweight   I32               (ceil(in b / 32), out)            each column is a bit stream of b bits a code
    M.qzeros    I32               (groups, ceil(out b / 32))        each row is a bit stream
    M.scales    F16, BF16, F32    (groups, out)
    M.g_idx     I32               (in,), the group of each column of the weight; may be missing

    W[r, c] = (q[c, r] - z[g, r]) * s[g, r],    g = g_idx[c], or c // group_size

All lies transposed: a row of the weight is a column here. The bits are known by the shapes, for `dynamic` and
`extra_config` give them for each module. Zero points are stored in one of two ways: version 1 (`checkpoint_format` is
`gptq` or missing) holds `z - 1`, version 2 (`gptq_v2`) holds z. For 2, 4 and 8 bits the one is taken from whole words,
so that a zero point of 0 borrows from its neighbour; adding it to whole words gives all of them back. Labels lie: where
the config says `sym`, all zero points are 2^(b-1), and what is stored tells the version.
GPTQModel's `gptq_p`, and all it writes in 5, 6 and 7 bits, has planes of bits in place of the stream (`kernels.planes`)
and version 2. AutoRound's `packing_format` is version 1 where it names gptq (not gptqmodel), else 2; it has no planes.
Source: AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel, nn_modules/qlinear/__init__.py and utils/model.py;
AutoRound, export/export_to_autoround/export.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import gcd, prod
from typing import NamedTuple

from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.quantized.decoding import decode_codes, lazily
from tensorsurgeon.quantized.overrides import columns_in_group, values_of
from tensorsurgeon.quantized.parts import SCALES, Format, Parts, Plain, Settings
from tensorsurgeon.tensor import Block, Input, LazyTensor, Pieces

CODES, ZEROS, SCALE, INDEX = ".qweight", ".qzeros", ".scales", ".g_idx"
AUTOROUND = ("auto-round", "intel/auto-round")
PLANES = "gptq_p"
VERSIONS = {"gptq": True, "gptq_v2": False, PLANES: False}
"""Values of `checkpoint_format`, and whether zero points are stored less one."""
WIDTHS = range(2, 9)
ONLY_IN_PLANES = (5, 6, 7)
"""Bits of a code that GPTQModel packs in no other way."""
WORD = 32


class Layout(NamedTuple):
    """How a module is packed: its shape, bits a code, in planes or a stream, and columns in a group without an index.

    `less_one` is what the config says of the zero points, `symmetric` whether all of them are the same.
    """

    shape: tuple[int, int]
    bits: int
    planar: bool
    columns: int
    less_one: bool
    symmetric: bool


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is GPTQ by its parts; AWQ, which has the same, is asked before."""
    return CODES in parts or ZEROS in parts or INDEX in parts


def require_plain_activations(settings: Settings) -> None:
    """Raise RefusedError where AutoRound did more to weights than to pack them."""
    for key, what in (("rotation_config", "weights are rotated"), ("transform_config", "weights are transformed")):
        if settings.values.get(key):
            raise RefusedError(f"{settings.where}: has a {key}; {what} for activations that are, so too; not decoded.")
    bits = settings.values.get("act_bits")
    if settings.method in AUTOROUND and isinstance(bits, int) and bits <= 8:
        raise RefusedError(
            f"{settings.where}: act_bits is {bits}; such weights have one more scale, and are not decoded."
        )


def matrices(parts: Parts, needed: Mapping[str, tuple[str, ...]]) -> list[LazyTensor]:
    """Return parts that are matrices of given dtypes.

    Raises:
        RefusedError: for all of them that are not.
    """
    problems: list[str] = []
    for part, dtypes in needed.items():
        try:
            if len(parts.expect(part, dtypes).shape) != 2:
                problems.append(f"{parts.place(part)}: has shape {list(parts[part].shape)}, and is no matrix.")
        except RefusedError as problem:
            problems += problem.problems
    raise_all(RefusedError, problems)
    return [parts[part] for part in needed]


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    settings.require(("gptq", *AUTOROUND), "packed as GPTQ")
    require_plain_activations(settings)
    layout = _layout(parts, settings)
    used = tuple(part for part in (CODES, ZEROS, SCALE, INDEX) if part in parts)
    label = f"{'AutoRound' if settings.method in AUTOROUND else 'GPTQ'}, {layout.bits} bits"
    label += f"{' in planes' * layout.planar}, groups of {layout.columns}"
    return Plain(f"{parts.module}.weight", label, layout.shape, used, partial(_decode, parts, layout, label))


FORMAT = Format("gptq", claims, read)


def _layout(parts: Parts, settings: Settings) -> Layout:
    values = values_of(settings, parts.module)
    less_one = _less_one(settings)
    codes, _, scales = matrices(parts, {CODES: ("I32",), ZEROS: ("I32",), SCALE: SCALES})
    groups, rows = scales.shape
    known = prod(parts.expect(INDEX, ("I32", "I64")).shape) if INDEX in parts else None
    bits = _bits(parts, values.get("bits"), known)
    columns = known or codes.rows * WORD // bits
    parts.expect(CODES, ("I32",), (-(-columns * bits // WORD), rows))
    parts.expect(ZEROS, ("I32",), (groups, -(-rows * bits // WORD)))
    each = columns_in_group(parts, settings, columns)
    if known is None:
        parts.expect(SCALE, SCALES, (-(-columns // each), rows))
    else:
        parts.expect(INDEX, ("I32", "I64"), (columns,))
    planar = settings.method == "gptq" and (bits in ONLY_IN_PLANES or _said_format(settings) == PLANES)
    planar = planar and WORD % bits != 0
    if planar and (rows % WORD or columns % WORD):
        raise RefusedError(f"{parts.place(CODES)}: {[rows, columns]} in planes of {WORD} codes; the file is wrong.")
    return Layout((rows, columns), bits, planar, each, less_one, bool(values.get("sym", True)))


def _said_format(settings: Settings) -> str:
    said = settings.values.get("checkpoint_format") or settings.values.get("format") or "gptq"
    return str(said).lower()


def _less_one(settings: Settings) -> bool:
    """Tell whether zero points are stored less one, by the config."""
    values = settings.values
    if settings.method in AUTOROUND:
        packing = values.get("packing_format") or values.get("backend")
        if not isinstance(packing, str) or "awq" in packing:
            raise RefusedError(
                f"{settings.where}: packing_format is {packing!r}, but the tensors are packed as GPTQ; whether zero "
                "points are stored less one cannot be known."
            )
        return "gptq" in packing and "gptqmodel" not in packing
    said = _said_format(settings)
    if said not in VERSIONS or values.get("is_marlin_format"):
        raise RefusedError(
            f"{settings.where}: checkpoint_format {said!r} is not decoded"
            f"{', nor what is_marlin_format' * bool(values.get('is_marlin_format'))}; {', '.join(VERSIONS)} are."
        )
    return VERSIONS[said]


def _bits(parts: Parts, said: object, columns: int | None) -> int:
    """Return the bits of a code for which all shapes fit; where several do, those that the config says."""
    codes, zeros, rows = parts[CODES], parts[ZEROS], parts[SCALE].shape[1]
    fitting = [
        bits
        for bits in WIDTHS
        if zeros.shape[1] == -(-rows * bits // WORD)
        and (codes.rows * WORD % bits == 0 if columns is None else codes.rows == -(-columns * bits // WORD))
    ]
    if said in fitting or len(fitting) == 1:
        return int(str(said)) if said in fitting else fitting[0]
    if not fitting and isinstance(said, int) and said in WIDTHS:
        return said
    raise RefusedError(
        f"{parts.place(CODES)}: has shape {list(codes.shape)}, with {list(zeros.shape)} of zero points and "
        f"{list(parts[SCALE].shape)} of scales; that is GPTQ of {fitting or 'no'} bits, and the config says {said!r}."
    )


def _decode(parts: Parts, layout: Layout, label: str, dtype: str) -> LazyTensor:
    bits, planar, index = layout.bits, layout.planar, INDEX in parts
    together = WORD if planar else WORD // gcd(WORD, bits)
    inputs = [
        Input(parts[CODES], columns=True),
        Input(parts[ZEROS], together, together * bits // WORD, columns=True),
        Input(parts[SCALE], columns=True),
    ]
    if layout.symmetric:
        inputs.append(Input(_version(parts, layout), 0))
    if index:
        inputs.append(Input(parts[INDEX], 0))

    def decode(_: int, words: Block, zeros: Block, scales: Block, *others: Block) -> Block:
        from tensorsurgeon.kernels import grouped
        from tensorsurgeon.kernels.codes import UNSIGNED, scale_numbers

        less_one = grouped.is_true(others[0]) if layout.symmetric else layout.less_one
        points = grouped.zero_points(zeros, bits, words.shape[1], planar, less_one)
        scaling = grouped.grouped(scale_numbers(scales).T, points.T, layout.columns)
        if index:
            scaling = grouped.placed(scaling, others[-1], f"{parts.module}{INDEX}")
        codes = grouped.unpack_down(words, bits, layout.shape[1], planar)
        return decode_codes(codes, UNSIGNED, scaling, dtype, 2**bits)

    history = (
        f"{label}, zero points {'less one' if layout.less_one else 'as they are'}{', or constant' * layout.symmetric}"
    )
    return lazily(decode, *inputs, dtype=dtype, shape=layout.shape, label=history)


def _version(parts: Parts, layout: Layout) -> LazyTensor:
    """Return whether the zero points of a symmetric module are stored less one, from themselves."""

    def look(pieces: Pieces) -> Block:
        from tensorsurgeon.kernels.grouped import are_less_one

        return are_less_one(pieces, layout.bits, layout.shape[0], layout.planar, layout.less_one)

    return parts[ZEROS].reduced(look, dtype="I32", shape=(1,), history=f"find the version, said {layout.less_one}")
