"""Operations: plain functions from a Checkpoint to a Checkpoint that move no data."""

from tensorsurgeon.ops.dequantization import dequantize
from tensorsurgeon.ops.dtypes import cast
from tensorsurgeon.ops.extraction import extract_lora
from tensorsurgeon.ops.layers import drop_layers, keep_layers, repeat_layers, reverse_layers, select_layers
from tensorsurgeon.ops.merging import merge_lora
from tensorsurgeon.ops.perturbation import perturb
from tensorsurgeon.ops.projection import project
from tensorsurgeon.ops.quantization import quantize
from tensorsurgeon.ops.sanitizing import sanitize_lora
from tensorsurgeon.ops.sharding import reshard
from tensorsurgeon.ops.stitching import stitch

__all__ = [
    "cast", "dequantize", "drop_layers", "extract_lora", "keep_layers", "merge_lora", "perturb", "project",
    "quantize", "repeat_layers", "reshard", "reverse_layers", "sanitize_lora", "select_layers", "stitch",
]  # fmt: skip
