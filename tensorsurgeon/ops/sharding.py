"""Cut the weights into other shards."""

from __future__ import annotations

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.parameters import Size
from tensorsurgeon.registry import operation


@operation
def reshard(ckpt: Checkpoint, max_shard_size: Size = 5_000_000_000) -> Checkpoint:
    """Cut the weights into shards of at most a given size, without changing a tensor.

    Args:
        max_shard_size: Most bytes of tensors in a shard, such as 5GB; a larger tensor has one of its own.
    """
    return ckpt.replace(shard_size=max_shard_size)
