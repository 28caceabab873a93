"""Turn PiSSA's pairs, which act on a base without its principal part, into pairs for the base as it is.

Training began with `B0 A0` as the best approximation of W of the rank r, times 1/s, and with `W - s B0 A0` for a base
(Meng et al., 2024, arXiv 2404.02948; PEFT 0.21, `pissa_init`). So `s B A - s B0 A0` is what was learned: a pair of rank
2 r, exact as far as the decomposition is.
"""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.lora import Lora, LoraModule
from tensorsurgeon.ops.dequantization import as_plain
from tensorsurgeon.ops.dtypes import cast_tensor
from tensorsurgeon.running import Budget, running
from tensorsurgeon.tensor import Block, LazyTensor, Rows, stacked


def with_principal_parts(lora: Lora, base: Checkpoint) -> Lora:
    """Return the adapter for the base as it is; every matrix of the base that has a pair is read and decomposed."""
    from tensorsurgeon.kernels.deltas import one_thread_each

    plain = as_plain(base)
    budget = Budget(running().memory)

    def converted(module: str) -> LoraModule:
        return _converted(module, lora.modules[module], plain[f"{module}.weight"], budget)

    with one_thread_each(), ThreadPoolExecutor(running().workers) as pool:
        return lora._replace(modules=dict(zip(lora.modules, pool.map(converted, lora.modules), strict=True)))


def _converted(module: str, held: LoraModule, weight: LazyTensor, budget: Budget) -> LoraModule:
    from tensorsurgeon.kernels.deltas import Delta, Goal, Wish, explore
    from tensorsurgeon.kernels.pairs import beside, zeros_like

    ours_a, ours_b = held.factors
    nothing = weight.rowwise(zeros_like, dtype="F32", history="zeros")
    wish = Wish(Goal("rank", held.rank), (), "F32", zlib.crc32(module.encode()), "cpu")
    pair = explore(Delta(weight, nothing, weight.rows), wish, budget, lambda count: None).pair
    if pair is None:
        return held
    right, left = (_in_memory(block, module) for block in pair.blocks(False))
    a = stacked([Rows(cast_tensor(ours_a, "F32"), 0, held.rank), Rows(right, 0, held.rank)])
    scale = held.scale

    def join(ours: Block, principal: Block) -> Block:
        return beside(ours, scale, principal, -1.0)

    b = ours_b.rowwise(join, left, dtype="F32", history=f"times {scale!r}, less the principal part",
                       row_shape=(2 * held.rank,))  # fmt: skip
    return LoraModule(a, b, held.embedding, None, 1.0, 2 * held.rank)


def _in_memory(block: Block, module: str) -> LazyTensor:
    return LazyTensor(
        block.dtype, block.shape, function=lambda: block, grain=block.shape[0], history=f"part of {module}"
    )
