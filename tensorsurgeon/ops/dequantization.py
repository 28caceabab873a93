"""Turn quantised weights into plain numbers."""

from __future__ import annotations

from collections.abc import Collection, Set
from typing import Literal

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import SETTINGS_FILES, without_quantization
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.names import companions
from tensorsurgeon.parameters import Glob
from tensorsurgeon.quantized import Found, find_modules, quantized_tensors, residue
from tensorsurgeon.registry import operation
from tensorsurgeon.tensor import LazyTensor

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FloatName = Literal["bfloat16", "float16", "float32"]


@operation
def dequantize(ckpt: Checkpoint, dtype: FloatName = "bfloat16", plain: Glob | None = None) -> Checkpoint:
    """Decode quantised weights into plain numbers and remove the quantisation from the config.

    Each weight is what its format's formula gives in float32, rounded once to `dtype`. Tensors that are not quantised
    keep their bits; scales of activations and caches are dropped.

    Args:
        dtype: What the weights become.
        plain: Tensors whose names match this pattern are plain although they look quantised: they keep their bits, and
            scales among them are dropped.

    Raises:
        RefusedError: for a checkpoint that is not quantised or in a format that is not decoded, for parts of a module
            that are missing or do not fit, and for codes and scales that would be left.
    """
    said = set(ckpt.names(plain)) if plain else set()
    found = find_modules(ckpt.replace(tensors={name: it for name, it in ckpt.tensors.items() if name not in said}))
    if not found.coded:
        raise RefusedError("dequantize: nothing is quantised here; 'cast' changes the dtype of plain weights.")
    return decoded(ckpt, found, dtype, said)


def decoded(
    ckpt: Checkpoint, found: Found, dtype: FloatName = "float32", said: Collection[str] = frozenset()
) -> Checkpoint:
    """Return a checkpoint of plain numbers: decoded to `dtype` where it is quantised, else as it is.

    `found` is what is quantised of it, without what is `said` to be plain although it looks quantised.

    Raises:
        RefusedError: for what cannot be decoded.
    """
    if not found.coded:
        return ckpt
    raise_all(RefusedError, found.problems)
    dropped = found.idle.union(companions(said))
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in ckpt.tensors.items():
        module = found.tensors.get(name)
        if module is None and name not in dropped:
            tensors[name] = tensor
        elif module is not None and module not in tensors:
            tensors[module] = found.modules[module].decode(DTYPES[dtype])
    raise_all(RefusedError, _residue_problems(tensors, said))
    files = {name: file for name, file in ckpt.files.items() if name not in SETTINGS_FILES}
    config = without_quantization(ckpt.config.value, dtype)
    return ckpt.replace(tensors=tensors, files=files, config=config, metadata={"format": "pt"})


def as_plain(ckpt: Checkpoint, dtype: FloatName = "float32") -> Checkpoint:
    """Return a checkpoint to compute with: decoded to `dtype` where it is quantised, else as it is."""
    return decoded(ckpt, find_modules(ckpt), dtype) if quantized_tensors(ckpt.tensors) else ckpt


def as_numbers(ckpt: Checkpoint, found: Found, decode: bool) -> tuple[Checkpoint, Set[str]]:
    """Return a checkpoint to choose weights from, decoded to float32 where that can be done, and what is quantised.

    Raises:
        RefusedError: for what cannot be decoded, where it is to be.
    """
    if decode or not found.problems:
        return decoded(ckpt, found), found.modules.keys()
    return ckpt, found.coded


def _residue_problems(tensors: dict[str, LazyTensor], said: Collection[str]) -> list[str]:
    return [
        f"{name}: is {tensors[name].dtype}, and nothing says what it means; if it is no quantised weight, name it with "
        "plain."
        for name in residue(tensors)
        if name not in said
    ]
