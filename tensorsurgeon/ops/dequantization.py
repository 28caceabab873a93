"""Turn quantised weights into plain numbers."""

from __future__ import annotations

from typing import Literal

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import SETTINGS_FILES, quantization_config, without_quantization
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.quantized import format_name, fp8_block, quantized_tensors
from tensorsurgeon.registry import operation

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FloatName = Literal["bfloat16", "float16", "float32"]


@operation
def dequantize(ckpt: Checkpoint, dtype: FloatName = "bfloat16") -> Checkpoint:
    """Decode block FP8 weights into plain numbers and remove the quantisation from the config.

    Each weight is `float32(code) * float32(scale)` rounded once to `dtype`. Tensors that are not quantised
    keep their bits.

    Args:
        dtype: What the weights become.

    Raises:
        RefusedError: for a checkpoint that is not quantised or in another format, for a weight without a
            scale, a scale without a weight, or a scale of the wrong shape.
    """
    quantized = quantized_tensors(ckpt.tensors)
    if not quantized:
        raise RefusedError("dequantize: nothing is quantised here; 'cast' changes the dtype of plain weights.")
    if not any(ckpt[name].dtype == "F8_E4M3" or name.endswith(fp8_block.SCALE) for name in quantized):
        raise RefusedError(
            f"dequantize: the weights are {format_name(ckpt.tensors)}, for example {quantized[0]!r}; "
            "only block FP8 can be decoded so far."
        )
    block, problems = fp8_block.block_size(quantization_config(ckpt.config.value))
    found = fp8_block.find(ckpt.tensors, block)
    scales = set(found.scales.values())
    activations = {name for name in quantized if name.endswith(fp8_block.ACTIVATION_SCALES)}
    faulty = {problem.split(":")[0] for problem in found.problems}
    known = {*found.scales, *scales, *activations, *faulty}
    others = [name for name in quantized if name not in known]
    problems += [f"{name}: is {ckpt[name].dtype} and not block FP8; it cannot be decoded so far." for name in others]
    raise_all(RefusedError, problems + found.problems)
    assert block
    tensors = {
        name: fp8_block.decode(tensor, ckpt[found.scales[name]], block, DTYPES[dtype])
        if name in found.scales
        else tensor
        for name, tensor in ckpt.tensors.items()
        if name not in scales and name not in activations
    }
    files = {name: file for name, file in ckpt.files.items() if name not in SETTINGS_FILES}
    return ckpt.replace(tensors=tensors, files=files, config=without_quantization(ckpt.config.value, dtype))


def as_plain(ckpt: Checkpoint, dtype: FloatName = "float32") -> Checkpoint:
    """Return a checkpoint to compute with: decoded to `dtype` where it is quantised, else as it is."""
    return dequantize(ckpt, dtype) if quantized_tensors(ckpt.tensors) else ckpt
