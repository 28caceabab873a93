"""compressed-tensors with one code in an element, or floats of 4 and 6 bits: `quant_method: compressed-tensors`.

    strategy | M.weight          | M.weight_scale                        | M.weight_zero_point
    tensor   | F8_E4M3 or I8     | [1]                                   | -
    channel  | "                 | [out, 1]                              | I8 [out, 1]
    group    | "                 | [out, in / group]                     | I8 [out, in / group]
    block    | "                 | [ceil(out / rows), ceil(in / columns)] | -

    mxfp8    | F8_E4M3           | U8 (E8M0) [out, in / 32]
    mxfp4    | .weight_packed U8 [out, in / 2], low half first; U8 (E8M0) [out, in / 32]
    mxfp6    | .weight_packed U8 [out, 3 in / 4], a bit stream of E2M3; U8 (E8M0) [out, in / 32]
    nvfp4    | .weight_packed U8 [out, in / 2]; F8_E4M3 [out, in / 16]; .weight_global_scale F32 [1]

`W = (q - z) * s`; of nvfp4 `W = q * (s / global)`.
Source: compressed-tensors, compressors/ and quantization/lifecycle/forward_helpers.py.
"""

from __future__ import annotations

from math import prod

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.decoding import BlockSize, Codes, Scales, grid_shape, scaled
from tensorsurgeon.quantized.parts import SCALES, WEIGHT, Format, Parts, Plain, Settings
from tensorsurgeon.quantized.schemes import METHODS, Scheme, weight_scheme
from tensorsurgeon.tensor import LazyTensor

SCALE, ZERO, PACKED, OUTER = ".weight_scale", ".weight_zero_point", ".weight_packed", ".weight_global_scale"
EXPONENTS = ("U8", "F8_E8M0")


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of this format."""
    if parts.dtype(PACKED) == "U8":
        return True
    return settings.method in METHODS and parts.dtype(WEIGHT) in ("F8_E4M3", "I8")


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    scheme = weight_scheme(parts.module, settings)
    if PACKED in parts:
        return _small_floats(parts)
    weight = parts.expect(WEIGHT, ("F8_E4M3", "I8"))
    if len(weight.shape) != 2:
        raise RefusedError(f"{parts.module}{WEIGHT}: has shape {list(weight.shape)}; two dimensions are needed.")
    shape = (weight.shape[0], weight.shape[1])
    exponents = parts.dtype(SCALE) in EXPONENTS
    block = (1, 32) if exponents else scale_block(parts.module, scheme, shape)
    grid = grid_shape(shape, block)
    scale = parts.expect(SCALE, (*SCALES, *EXPONENTS))
    if scale.shape != grid and not (prod(grid) == 1 and prod(scale.shape) == 1):
        parts.expect(SCALE, (*SCALES, *EXPONENTS), grid)
    zeros = parts.expect(ZERO, ("I8", "F8_E4M3", "I32", *SCALES), scale.shape) if ZERO in parts else None
    # Symmetric floats may carry zeros that say nothing.
    zeros = None if weight.dtype == "F8_E4M3" else zeros
    codes = Codes(weight, 8, "INT8" if weight.dtype == "I8" else "E4M3", shape)
    name = "INT8" if weight.dtype == "I8" else "FP8"
    label = f"{'MX' if exponents else ''}{name}, {_words(block, shape)}{', asymmetric' if zeros else ''}"
    used = tuple(part for part in (WEIGHT, SCALE, ZERO) if part in parts)

    def decode(dtype: str) -> LazyTensor:
        return scaled(codes, Scales(scale, block, zeros), label, dtype)

    return Plain(f"{parts.module}{WEIGHT}", label, shape, used, decode)


FORMAT = Format("compressed-tensors", claims, read)


def scale_block(module: str, scheme: Scheme, shape: tuple[int, int]) -> BlockSize:
    """Return how many rows and columns share a scale by a scheme."""
    strategy, group = scheme.get("strategy"), scheme.get("group_size")
    if strategy == "tensor":
        return shape
    if strategy == "channel":
        return 1, shape[1]
    if strategy == "group" and isinstance(group, int) and group:
        return 1, group if group > 0 else shape[1]
    block = scheme.get("block_structure")
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        return int(block[0]), int(block[1])
    raise RefusedError(f"{module}: the config's strategy {strategy!r} with group_size {group!r} is not known here.")


def _words(block: BlockSize, shape: tuple[int, int]) -> str:
    if block == shape:
        return "one scale"
    if block[0] > 1:
        return f"blocks of {block[0]}x{block[1]}"
    return "one scale a row" if block[1] >= shape[1] else f"groups of {block[1]}"


def _small_floats(parts: Parts) -> Plain:
    """Describe a module in nvfp4, mxfp4 or mxfp6, which the shapes tell apart."""
    packed = parts.expect(PACKED, ("U8",))
    scale = parts.expect(SCALE, ("F8_E4M3", *EXPONENTS))
    nv = scale.dtype == "F8_E4M3"
    outer = parts.expect(OUTER, ("F32",)) if nv else None
    group = 16 if nv else 32
    if len(packed.shape) != 2 or len(scale.shape) != 2 or packed.shape[0] != scale.shape[0]:
        raise RefusedError(
            f"{parts.module}{PACKED}: codes of shape {list(packed.shape)} and scales of {list(scale.shape)} do not go "
            "together."
        )
    columns = scale.shape[1] * group
    bits = {columns // 2: 4, columns * 3 // 4: 6}.get(packed.shape[1])
    if bits is None or (nv and bits == 6):
        raise RefusedError(
            f"{parts.module}{PACKED}: {packed.shape[1]} bytes a row are neither 4 nor 6 bits for each of {columns} "
            "columns."
        )
    shape = (packed.shape[0], columns)
    label = f"{'NV' if nv else 'MX'}FP{bits}, groups of {group}"
    codes = Codes(packed, bits, "E2M1" if bits == 4 else "E2M3", shape)
    used = (PACKED, SCALE, *((OUTER,) if nv else ()))

    def decode(dtype: str) -> LazyTensor:
        return scaled(codes, Scales(scale, (1, group), outer=outer, outer_divides=True), label, dtype)

    return Plain(f"{parts.module}{WEIGHT}", label, shape, used, decode)
