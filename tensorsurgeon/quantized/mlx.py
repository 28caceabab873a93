"""MLX, as mlx-lm and mlx-community publish it: `quantization: {group_size, bits, mode}` in config.json.

    M.weight        U32         (out, in * bits / 32)    each row a bit stream, the lowest bits first
    M.scales        F16, BF16   (out, in / group_size)   of affine; else U8
    M.biases        F16, BF16   (out, in / group_size)   of affine only
    M.global_scale  F32         (), (experts)            of nvfp4, seldom

    mode     bits                 group_size    W[r, c]
    affine   1, 2, 3, 4, 5, 6, 8  32, 64, 128   q * scale + bias
    mxfp4    4                    32            E2M1[q] * 2^(scale - 127)
    mxfp8    8                    32            E4M3[q] * 2^(scale - 127)
    nvfp4    4                    16            E2M1[q] * E4M3[scale], E2M1[q] * (E4M3[scale] * (global / 2688))

A global scale is the largest magnitude, 2688 = 448 * 6 what the codes reach. Stacked experts (`switch_mlp`) have one
dimension more; embeddings and the head are quantised too. Modules that differ are named under `quantization`, each
with its own settings, of which `mode` is affine where it is not given. Scales in U8 tell their mode by the shapes;
of affine, bits and group size only come from the config, and the shapes hold it to them. Names are those of MLX's own
models, which are not always those of transformers.
Source: mlx, nn/layers/quantized.py and mlx.core.quantize; mlx-lm, utils.py and models/switch_layers.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.decoding import Codes, Scales, each_matrix, lazily, scaled
from tensorsurgeon.quantized.parts import SCALES, WEIGHT, Format, Parts, Plain, Settings
from tensorsurgeon.shaping import viewed
from tensorsurgeon.tensor import Block, Input, LazyTensor

SCALE, BIAS, GLOBAL = ".scales", ".biases", ".global_scale"
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
RANGE = 448 * 6


class Mode(NamedTuple):
    """How a module is quantised."""

    name: str
    bits: int
    group: int
    kind: str


AFFINE = Mode("affine", 4, 64, "UNSIGNED")
FLOATS = (Mode("nvfp4", 4, 16, "E2M1"), Mode("mxfp4", 4, 32, "E2M1"), Mode("mxfp8", 8, 32, "E4M3"))
MODES = {mode.name: mode for mode in (AFFINE, *FLOATS)}


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of MLX, or would be if it were whole."""
    return settings.method == "mlx" or (parts.dtype(WEIGHT) == "U32" and SCALE in parts)


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    settings.require(("mlx",), "those of MLX")
    weight = parts.expect(WEIGHT, ("U32",))
    scale = parts.expect(SCALE, (*SCALES, "U8"))
    if len(weight.shape) not in (2, 3):
        raise RefusedError(f"{parts.place(WEIGHT)}: has shape {list(weight.shape)}; see MLX.")
    mode = _mode(parts, settings)
    shape = (*weight.shape[:-1], weight.shape[-1] * 32 // mode.bits)
    grid = (*shape[:-1], shape[-1] // mode.group)
    parts.expect(SCALE, SCALES if mode.name == "affine" else ("U8",), grid)
    bias = parts.expect(BIAS, SCALES, grid) if mode.name == "affine" else None
    outer = parts.expect(GLOBAL, SCALES, shape[:-2]) if mode.name == "nvfp4" and GLOBAL in parts else None
    stored = viewed(scale, "F8_E4M3", grid) if mode.name == "nvfp4" else scale
    label = f"MLX {mode.name}, {mode.bits} bits, groups of {mode.group}"

    def decode(dtype: str) -> LazyTensor:
        def matrix(codes: LazyTensor, scales: LazyTensor, biases: LazyTensor | None, top: LazyTensor | None) -> Any:
            kind = Codes(codes, mode.bits, mode.kind, (shape[-2], shape[-1]))
            outer = _reached(top) if top else None
            return scaled(kind, Scales(scales, (1, mode.group), biases=biases, outer=outer), label, dtype)

        every = (weight, stored, bias, outer)
        return matrix(*every) if len(shape) == 2 else each_matrix(matrix, *every)

    used = (WEIGHT, SCALE, *([BIAS] if bias else ()), *([GLOBAL] if outer else ()))
    return Plain(f"{parts.module}{WEIGHT}", label, shape, used, decode)


FORMAT = Format("mlx", claims, read)


def _mode(parts: Parts, settings: Settings) -> Mode:
    """Return how a module is quantised: as the shapes say, else as the config does, which has to fit them."""
    own = settings.values.get(parts.module)
    named = isinstance(own, dict)
    said = _said(parts, settings, own if isinstance(own, dict) else settings.values)
    # Bits in a row of codes for each scale: the product of bits and group size.
    words, groups = parts[WEIGHT].shape[-1], parts[SCALE].shape[-1:]
    product = 32 * words / groups[0] if groups and groups[0] else 0
    if parts[SCALE].dtype == "U8" and not named:
        said = next((mode for mode in FLOATS if mode.bits * mode.group == product), said)
    if said.bits * said.group != product:
        raise RefusedError(
            f"{parts.place(SCALE)}: has shape {list(parts[SCALE].shape)} beside a weight of "
            f"{list(parts[WEIGHT].shape)}; {said.bits} bits in groups of {said.group}, as {settings.where} says, do "
            "not fit that."
        )
    return said


def _said(parts: Parts, settings: Settings, values: Any) -> Mode:
    name = values.get("mode", "affine")
    known = MODES.get(name) if isinstance(name, str) else None
    if known is None:
        raise RefusedError(f"{settings.where}: 'mode' of {parts.module} is {name!r}; known are {', '.join(MODES)}.")
    bits, size = values.get("bits") or known.bits, values.get("group_size") or known.group
    allowed = bits in AFFINE_BITS and size in (32, 64, 128) if known is AFFINE else (bits, size) == known[1:3]
    if not allowed:
        raise RefusedError(f"{settings.where}: {parts.module} in mode {name}, {bits!r} bits, groups of {size!r}: no.")
    return known._replace(bits=bits, group=size)


def _reached(scale: LazyTensor) -> LazyTensor:
    """Return a global scale as what scales are multiplied with."""

    def over(start: int, block: Block) -> Block:
        from tensorsurgeon.kernels.arrays import as_float32

        numbers = as_float32(block) / RANGE
        return Block("F32", block.shape, memoryview(numbers.tobytes()))

    return lazily(over, Input(scale, 0), dtype="F32", shape=scale.shape, label="the range of a global scale", grain=1)
