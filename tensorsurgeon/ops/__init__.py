"""Operations: plain functions from a Checkpoint to a Checkpoint that move no data."""

from tensorsurgeon.ops.cast import cast
from tensorsurgeon.ops.dequantize import dequantize
from tensorsurgeon.ops.layers import drop_layers, keep_layers, repeat_layers, reverse_layers, select_layers
from tensorsurgeon.ops.reshard import reshard

__all__ = [
    "cast", "dequantize", "drop_layers", "keep_layers", "repeat_layers", "reshard", "reverse_layers",
    "select_layers",
]  # fmt: skip
