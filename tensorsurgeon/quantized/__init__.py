"""Quantised formats on disk: what tells them from plain numbers, and one module for each that can be decoded.

The tensors decide: a module is quantised where its companion tensors (scales, zero points, packed codes) lie
beside its weight; the config only says what the tensors cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.format import BITS
from tensorsurgeon.names import companions
from tensorsurgeon.tensor import LazyTensor

PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes whose elements are numbers that mean themselves."""

PACKED = ("I32", "U32", "U8")
"""Dtypes of quantised weights that hold several numbers, or parts of them, in one element."""

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
