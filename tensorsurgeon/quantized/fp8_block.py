"""Block FP8 as DeepSeek-V3, Qwen3-FP8, GLM and MiniMax publish it: `quant_method: fp8`.

    M.weight            F8_E4M3              (out, in)
    M.weight_scale_inv  F32, BF16 or F16     (ceil(out / rows), ceil(in / columns))

`rows, columns` are the config's `weight_block_size`. Despite its name the scale is multiplied:
`W[r, c] = q[r, c] * s[r // rows, c // columns]`. The block is never derived from the shapes: 192 rows in a
grid of 2 could be blocks of 96 or ragged blocks of 128, and only one of them is right.
Source: DeepSeek-V3, README_WEIGHTS.md and inference/kernel.py; transformers, integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tensorsurgeon.tensor import Block, LazyTensor

WEIGHT, SCALE = ".weight", ".weight_scale_inv"
ACTIVATION_SCALES = (".activation_scale", ".input_scale")
"""Static scales of activations: without meaning for a plain weight."""
SCALE_DTYPES = ("F32", "BF16", "F16")

BlockSize = tuple[int, int]


class Found(NamedTuple):
    """What a checkpoint holds of this format: `scales` maps each weight to its scale; `problems` are faults."""

    scales: dict[str, str]
    problems: list[str]


def block_size(settings: Mapping[str, Any]) -> tuple[BlockSize | None, list[str]]:
    """Return the block that a quantization_config states, and what is wrong with it."""
    block = settings.get("weight_block_size")
    if settings.get("quant_method") != "fp8":
        return None, [
            f"config.json: the tensors are block FP8, but quantization_config says quant_method "
            f"{settings.get('quant_method')!r}; the block size is not known."
        ]
    if settings.get("weight_scale_semantics") not in (None, "multiply"):
        return None, ["config.json: 'weight_scale_semantics' says that scales divide; this is not block FP8."]
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        return None, [
            f"config.json: 'weight_block_size' is {block!r}; two whole numbers such as [128, 128] are needed."
        ]
    return (block[0], block[1]), []


def find(tensors: Mapping[str, LazyTensor], block: BlockSize | None) -> Found:
    """Pair every weight with its scale and check their dtypes and, for a known block, the scale's shape."""
    scales: dict[str, str] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        module = name.removesuffix(SCALE)
        if name.endswith(SCALE) and tensors.get(module + WEIGHT, tensor).dtype != "F8_E4M3":
            other = tensors.get(module + WEIGHT)
            found = f"is {other.dtype}, not F8_E4M3" if other else "is missing"
            problems.append(f"{name}: has no weight to scale: {module + WEIGHT} {found}.")
        elif tensor.dtype == "F8_E4M3":
            scale = tensors.get(name.removesuffix(WEIGHT) + SCALE) if name.endswith(WEIGHT) else None
            if scale is None:
                problems.append(
                    f"{name}: is F8_E4M3 without a {SCALE[1:]}; its codes are not numbers, fetch its scale."
                )
            else:
                scales[name] = name.removesuffix(WEIGHT) + SCALE
                problems += _pair_problems(name, tensor, scale, block)
    return Found(scales, problems)


def _pair_problems(name: str, weight: LazyTensor, scale: LazyTensor, block: BlockSize | None) -> list[str]:
    problems = []
    if scale.dtype not in SCALE_DTYPES:
        problems.append(f"{name}: its scale is {scale.dtype}, not one of {', '.join(SCALE_DTYPES)}.")
    if len(weight.shape) != 2:
        problems.append(f"{name}: has shape {list(weight.shape)}; block FP8 weights have two dimensions.")
    elif block:
        expected = tuple(-(-size // each) for size, each in zip(weight.shape, block, strict=True))
        if scale.shape != expected:
            problems.append(
                f"{name}: its scale has shape {list(scale.shape)}, but {list(weight.shape)} in blocks of "
                f"{list(block)} needs {list(expected)}; the block size or the scale is wrong."
            )
    return problems


def decode(weight: LazyTensor, scale: LazyTensor, block: BlockSize, dtype: str) -> LazyTensor:
    """Return the weight as plain numbers of dtype F32, F16 or BF16, decoded as it is read."""

    def decode_rows(codes: Block, scales: Block) -> Block:
        from tensorsurgeon.kernels.fp8 import decode_blocks

        return decode_blocks(codes, scales, block, dtype)

    history = f"decode block FP8 {block[0]}x{block[1]} to {dtype}"
    return weight.rowwise(decode_rows, scale, dtype=dtype, history=history, grain=block[0])


def encode(weight: LazyTensor, block: BlockSize | None, scale_dtype: str) -> tuple[LazyTensor, LazyTensor]:
    """Return codes and scales of a weight in F32: `s = absmax / 448` of each block, 1 for one of zeros; `q = W / s`."""
    assert block
    rows, columns = block

    def codes(numbers: Block) -> Block:
        from tensorsurgeon.kernels.fp8_encoding import encode_blocks

        return encode_blocks(numbers, block, scale_dtype)[0]

    def scales(numbers: Block) -> Block:
        from tensorsurgeon.kernels.fp8_encoding import encode_blocks

        return encode_blocks(numbers, block, scale_dtype)[1]

    history = f"encode as block FP8 {rows}x{columns}, scales {scale_dtype}"
    shape = (-(-weight.shape[1] // columns),)
    return (
        weight.rowwise(codes, dtype="F8_E4M3", history=history, grain=rows),
        weight.by_groups(scales, rows, dtype=scale_dtype, row_shape=shape, history=history),
    )
