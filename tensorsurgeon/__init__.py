"""Operate on LLM checkpoints where they lie: streaming, in bounded memory, never half or silently wrong.

import tensorsurgeon as ts

ckpt = ts.open("Qwen/Qwen3-8B-FP8")
ckpt = ts.ops.dequantize(ckpt)
ckpt = ts.ops.drop_layers(ckpt, "14-17")
ts.write(ckpt, "Qwen3-8B-pruned", max_shard_size="5GB")
"""

from tensorsurgeon import derivations, exams, ops
from tensorsurgeon._version import __version__
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.checkpoint import open_checkpoint as open
from tensorsurgeon.recipe import load_recipe, load_recipes, make_recipe
from tensorsurgeon.variants import levels
from tensorsurgeon.writer import write

__all__ = [
    "Checkpoint",
    "__version__",
    "derivations",
    "exams",
    "levels",
    "load_recipe",
    "load_recipes",
    "make_recipe",
    "open",
    "ops",
    "write",
]
