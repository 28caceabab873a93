"""Change the dtype of plain weights."""

from __future__ import annotations

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import with_dtype
from tensorsurgeon.ops.dequantization import DTYPES, FloatName
from tensorsurgeon.parameters import Glob
from tensorsurgeon.quantized import PLAIN, require_plain
from tensorsurgeon.registry import operation
from tensorsurgeon.tensor import Block, LazyTensor


@operation
def cast(ckpt: Checkpoint, dtype: FloatName, tensors: Glob = "*") -> Checkpoint:
    """Round plain weights to another dtype, to nearest, ties to even.

    Tensors of integers keep their bits. The config states the new dtype where all tensors are cast.

    Args:
        dtype: What the weights become.
        tensors: Names of the tensors to cast.

    Raises:
        RefusedError: for quantised tensors, and while writing for a number too large for float16.
    """
    names = ckpt.names(tensors)
    require_plain(ckpt, names, "cast")
    target = DTYPES[dtype]
    changed = ckpt.map(lambda tensor: cast_tensor(tensor, target), tensors)
    whole = len(names) == len(ckpt)
    return changed.replace(config=with_dtype(ckpt.config.value, dtype)) if whole else changed


def cast_tensor(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """Return a tensor rounded to another dtype; one of that dtype, or of integers, as it is."""
    if tensor.dtype not in PLAIN or tensor.dtype == dtype:
        return tensor

    def cast_rows(block: Block) -> Block:
        from tensorsurgeon.kernels.casting import cast_block

        return cast_block(block, dtype)

    return tensor.rowwise(cast_rows, dtype=dtype, history=f"cast to {dtype}")
