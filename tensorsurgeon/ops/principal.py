"""Turn PiSSA's pairs, which act on a base without its principal part, into pairs for the base as it is.

Training began with `B0 A0` as the best approximation of W of the rank r, times 1/s, and with `W - s B0 A0` for a base
(Meng et al., 2024, arXiv 2404.02948; PEFT 0.21, `pissa_init`). So `s B A - s B0 A0` is what was learned: a pair of rank
2 r, exact as far as the decomposition is.
"""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.lora import Lora, LoraModule
from tensorsurgeon.ops.dequantization import as_plain
from tensorsurgeon.ops.dtypes import cast_tensor
from tensorsurgeon.running import Budget, running
from tensorsurgeon.shaping import stacked
from tensorsurgeon.tensor import Block, LazyTensor, Rows


def with_principal_parts(lora: Lora, base: Checkpoint, transposed: bool) -> Lora:
    """Return the adapter for the base as it is; every matrix of the base that has a pair is read and decomposed.

    Embeddings begin without principal parts. With `transposed` (`fan_in_fan_out`), weights lie the other way round.

    Raises:
        RefusedError: for a pair whose weight the base does not hold by itself.
    """
    from tensorsurgeon.kernels.deltas import one_thread_each

    plain = as_plain(base)
    budget = Budget(running().memory)

    absent = [it for it, held in lora.modules.items() if not held.embedding and f"{it}.weight" not in plain]
    raise_all(RefusedError, (f"{it}: the base has no weight to take PiSSA's principal part from." for it in absent))

    def converted(module: str) -> LoraModule:
        held = lora.modules[module]
        if held.embedding:
            return held
        return _converted(module, held, plain[f"{module}.weight"], transposed, budget)

    with one_thread_each(), ThreadPoolExecutor(running().workers) as pool:
        return lora._replace(modules=dict(zip(lora.modules, pool.map(converted, lora.modules), strict=True)))


def _converted(module: str, held: LoraModule, weight: LazyTensor, transposed: bool, budget: Budget) -> LoraModule:
    from tensorsurgeon.kernels.deltas import Delta, Goal, Wish, explore
    from tensorsurgeon.kernels.pairs import beside, zeros_like

    ours_a, ours_b = held.factors
    nothing = weight.rowwise(zeros_like, dtype="F32", history="zeros")
    wish = Wish(Goal("rank", held.rank), (), "F32", zlib.crc32(module.encode()), "cpu")
    pair = explore(Delta(weight, nothing, weight.rows), wish, budget, lambda count: None).pair
    if pair is None:
        return held
    right, left = (_in_memory(block, module) for block in pair.blocks(transposed))
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
