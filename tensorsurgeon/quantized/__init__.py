"""Quantised formats on disk: what tells them from plain numbers, and one module for each that can be decoded.

The tensors decide: a module is quantised where its companion tensors (scales, zero points, packed codes) lie
beside its weight; the config only says what the tensors cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.format import BITS
from tensorsurgeon.tensor import LazyTensor

PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes whose elements are numbers that mean themselves."""

PACKED = ("I32", "U32", "U8")
"""Dtypes of quantised weights that hold several numbers, or parts of them, in one element."""

_COMPANION = re.compile(
    r"(?P<module>.+?)(?P<suffix>"
    r"\.weight_scale_inv|_scale_inv|\.weight_scale(_2)?|\.weight_packed|\.weight_shape|\.weight_zero_point"
    r"|\.weight_global_scale|\.weight_g_idx|\.qweight|\.qzeros|\.scales|\.g_idx|_blocks|_scales|\.SCB"
    r"|\.weight_format|\.weight\.absmax|\.weight\.quant_map|\.weight\.nested_\w+|\.weight\.quant_state\.\w+"
    r"|\.weight_(absmax|quant_map|quant_state|nested_\w+)|\._weight_\w+|\.compressed|\.bitmask|\.pre_quant_scale"
    r"|\.input_scale(_ub)?|\.activation_scale|\.input_global_scale|\.input_zero_point|\.output_scale"
    r"|\.[kvq]_scale|\.trellis|\.weight_scale_inverse"
    r")$"
)
"""Names of tensors that describe a quantised weight: ../quantized formats of transformers 5 and vLLM 0.32."""

_FORMATS = {
    ".weight_packed": "compressed-tensors packed",
    ".qweight": "GPTQ or AWQ",
    "_blocks": "MXFP4",
    ".weight.absmax": "bitsandbytes",
    ".weight_absmax": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
    ".weight_scale_2": "ModelOpt NVFP4",
    "._weight_qdata": "torchao",
    ".weight_scale_inv": "FP8 with inverse scales",
    ".weight_scale": "FP8 or INT8 with scales",
    ".trellis": "EXL3",
}


def companions(names: Iterable[str]) -> dict[str, str]:
    """Return the tensors that describe a quantised weight, each with the module it belongs to."""
    found = ((name, _COMPANION.match(name)) for name in names)
    return {name: match["module"] for name, match in found if match}


def quantized_tensors(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Return the names of all tensors that are not plain numbers, and of those that describe them.

    Integers that are no weight (`position_ids`, token tables) count as plain.
    """
    described = companions(tensors)
    modules = set(described.values())
    return [
        name
        for name, tensor in tensors.items()
        if name in described
        or (BITS[tensor.dtype] < 16 and tensor.dtype.startswith("F"))
        or (tensor.dtype not in PLAIN and (name in modules or name.removesuffix(".weight") in modules))
    ]


def format_name(tensors: Mapping[str, LazyTensor]) -> str | None:
    """Return a name for the quantised format that the tensors show, or None for plain ones."""
    found = quantized_tensors(tensors)
    if not found:
        return None
    for suffix, name in _FORMATS.items():
        if any(tensor.endswith(suffix) for tensor in found):
            return name
    return f"{tensors[found[0]].dtype} weights"


def require_plain(ckpt: Checkpoint, names: Iterable[str], operation: str) -> None:
    """Raise RefusedError where an operation on numbers would read quantised tensors as numbers."""
    quantized = set(quantized_tensors(ckpt.tensors)).intersection(names)
    if quantized:
        first = min(quantized)
        raise RefusedError(
            f"{operation}: {len(quantized)} tensors are quantised ({format_name(ckpt.tensors)}), for example "
            f"{first!r} in {ckpt[first].dtype}; their codes are not numbers to compute with. Run 'dequantize' first."
        )
