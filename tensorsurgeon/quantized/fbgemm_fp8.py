"""FBGEMM FP8: `quant_method: fbgemm_fp8`, as Llama-3.1-405B-FP8 is published.

    M.weight          F8_E4M3  [out, in]
    M.weight_scale    F32      [out, 1]
    M.input_scale_ub  F32      [1], the largest scale of an activation: dropped

`W = q * s`. The fused experts of Llama-4 are `M` [experts, in, out] and `M_scale`, one for each column: of gate_up_proj
it has the shape [experts, 1, out], of down_proj [experts, out, 1].
Source: transformers, integrations/fbgemm_fp8.py.
"""

from __future__ import annotations

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.quantized.decoding import Codes, Scales, each_matrix, scaled
from tensorsurgeon.quantized.parts import SCALES, WEIGHT, Format, Parts, Plain, Settings
from tensorsurgeon.shaping import viewed
from tensorsurgeon.tensor import LazyTensor

METHOD = "fbgemm_fp8"


def claims(parts: Parts, settings: Settings) -> bool:
    """Tell whether a module is of this format."""
    return settings.method == METHOD and parts.dtype(parts.code or "") == "F8_E4M3"


def read(parts: Parts, settings: Settings) -> Plain:
    """Describe a module; see `Format`."""
    if WEIGHT not in parts:
        return _experts(parts)
    weight = parts.expect(WEIGHT, ("F8_E4M3",))
    if len(weight.shape) != 2:
        raise RefusedError(f"{parts.module}{WEIGHT}: has shape {list(weight.shape)}; two dimensions are needed.")
    shape = (weight.shape[0], weight.shape[1])
    scale = parts.expect(".weight_scale", SCALES, (shape[0], 1))
    label = "FP8, one scale a row"

    def decode(dtype: str) -> LazyTensor:
        return scaled(Codes(weight, 8, "E4M3", shape), Scales(scale, (1, shape[1])), label, dtype)

    return Plain(f"{parts.module}{WEIGHT}", label, shape, (WEIGHT, ".weight_scale"), decode)


FORMAT = Format("fbgemm", claims, read)


def _experts(parts: Parts) -> Plain:
    """Describe fused experts, whose columns are outputs and have a scale each."""
    weight = parts.expect("", ("F8_E4M3",))
    if len(weight.shape) != 3:
        raise RefusedError(f"{parts.module}: has shape {list(weight.shape)}; fused experts have three dimensions.")
    experts, rows, columns = weight.shape
    scale = parts.expect("_scale", SCALES)
    if scale.shape not in ((experts, 1, columns), (experts, columns, 1)):
        parts.expect("_scale", SCALES, (experts, 1, columns))
    scales = viewed(scale, scale.dtype, (experts, columns))
    label = "FP8 experts, one scale a column"

    def decode(dtype: str) -> LazyTensor:
        def matrix(codes: LazyTensor, numbers: LazyTensor) -> LazyTensor:
            return scaled(Codes(codes, 8, "E4M3", (rows, columns)), Scales(numbers, (rows, 1)), label, dtype)

        return each_matrix(matrix, weight, scales)

    return Plain(parts.module, label, weight.shape, ("", "_scale"), decode)
