"""Make a LoRA adapter one that an engine serves rightly, or say why it cannot be."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from math import frexp
from typing import Any

from tensorsurgeon import document
from tensorsurgeon.checkpoint import Checkpoint, all_sources
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.lora import (
    PREFIX,
    SERVED_RANKS,
    Lora,
    LoraModule,
    lora_config,
    pair_names,
    read_lora,
    served_rank,
    target_names,
)
from tensorsurgeon.ops.dequantization import as_plain
from tensorsurgeon.ops.principal import with_principal_parts
from tensorsurgeon.ops.servable import (
    PROFILES,
    TABLES,
    Profile,
    begins_with_principal_parts,
    broken_values,
    config_problems,
    group_of,
    named_as_in,
    pair_problems,
    target_of,
)
from tensorsurgeon.parameters import Model
from tensorsurgeon.registry import open_model, operation
from tensorsurgeon.running import running
from tensorsurgeon.tensor import Block, Input, LazyTensor


@operation
def sanitize_lora(ckpt: Checkpoint, for_: Profile = "vllm", base: Model | None = None) -> Checkpoint:
    """Check an adapter against what an engine takes, mend what can be mended without loss, and drop only what must be.

    Names and prefix, `target_modules`, patterns of ranks and alphas and rsLoRA (folded into B, so that the scale is 1
    everywhere), PiSSA (with the base, plain pairs of twice the rank), and a rank that vLLM does not serve (filled up
    with zeros) are mended. Norms, biases and modules that were trained as a whole are dropped where the engine holds
    none, with how much is lost; `merge-lora` into the base keeps them. The rank to serve with is in the report.

    Args:
        for_: The engine: vllm (0.32), vllm-minimal (no head or embeddings, as older engines), or peft.
        base: The model that it is for, where names, sizes and losses are to be checked against it.

    Raises:
        RefusedError: for what would be refused or wrongly served and cannot be mended: half a pair, factors of the
            wrong size, layers that the base does not have, NaN, a config that contradicts the tensors, another kind.
    """
    model = open_model(base) if base else None
    raise_all(RefusedError, config_problems(ckpt))
    lora = read_lora(ckpt)
    renamed, mended, problems = named_as_in(lora, model)
    raise_all(RefusedError, problems)
    raise_all(RefusedError, pair_problems(ckpt, renamed, model, PROFILES[for_]))
    if not running().planned:
        raise_all(RefusedError, broken_values(ckpt))
    if begins_with_principal_parts(ckpt):
        if model is None:
            raise RefusedError(
                "adapter_config.json: init_lora_weights is 'pissa'; --base is needed to make plain pairs."
            )
        renamed = with_principal_parts(renamed, model, bool(ckpt.config.value.get("fan_in_fan_out")))
        mended.append("PiSSA's pairs are plain ones of twice the rank, for the base as it is.")
    return _sanitized(ckpt, renamed, model, for_, mended)


def _sanitized(ckpt: Checkpoint, lora: Lora, base: Checkpoint | None, profile: str, mended: list[str]) -> Checkpoint:
    target = target_of(profile, base)
    kept = {name: it for name, it in lora.modules.items() if group_of(name, it, base) in target.groups}
    whole = dict(lora.whole) if target.whole else {}
    if not kept:
        raise RefusedError(f"sanitize-lora: nothing of the adapter can be served by {profile}.")
    rank = max(held.rank for held in kept.values())
    served = served_rank(rank) or 0
    if not served and profile != "peft":
        raise RefusedError(f"sanitize-lora: the rank is {rank}; vLLM serves at most {SERVED_RANKS[-1]}.")
    stored = rank if profile == "peft" else served
    if any(held.scale != 1 or held.rank != stored for held in kept.values()):
        mended.append(f"rank {stored} and scale 1 everywhere; B holds the scales, and zeros fill up the ranks.")
    serve = {"pairs": len(kept), "rank": stored, "serve with": f"--max-lora-rank {served}" if served else "-"}
    report: dict[str, list[dict[str, Any]]] = {"served": [serve]}
    report |= {"mended": [{"mended": text} for text in mended]} if mended else {}
    dropped, lost = _dropped(lora, base, kept, whole)
    report |= {"dropped": dropped, "lost": [lost]} if dropped else {}
    changed = ckpt.replace(
        tensors=_tensors(kept, whole, stored),
        config=document.parse(json.dumps(_config(ckpt, base, dict.fromkeys(kept, stored), whole), indent=2)),
        sources=all_sources(ckpt, *([base] if base else [])),
        report=report,
    )
    tables = sorted({name.rpartition(".")[2] for name in kept if group_of(name, kept[name], base) in TABLES})
    if tables and profile == "vllm" and base is None:
        changed = changed.warn(
            f"{' and '.join(tables)}: vLLM takes pairs for them with some models only; --base tells with which."
        )
    if not dropped:
        return changed
    return changed.warn(
        f"{len(dropped)} parts are dropped, which {profile} cannot hold; to lose nothing, put them into a new base: "
        f"tensorsurgeon merge-lora BASE NEW --adapter {ckpt.sources[0].name} --rest-of {profile}."
    )


def _tensors(kept: Mapping[str, LoraModule], whole: Mapping[str, LazyTensor], rank: int) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for module, held in kept.items():
        names, (a, b) = pair_names(module, held.embedding), held.factors
        tensors |= zip(names, (_padded(a, rank), _scaled(b, held.scale, rank)), strict=True)
        if held.magnitude is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = held.magnitude
    return tensors | {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}


def _dropped(
    lora: Lora, base: Checkpoint | None, kept: Container[str], whole: Container[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what is dropped, each with its share of the squares of all that the adapter adds, and the sum of them."""
    if running().planned:
        names = [name for name in (*lora.modules, *lora.whole) if name not in kept and name not in whole]
        return [{"dropped": name} for name in names], {"dropped": len(names)}
    pairs = {module: held.squares for module, held in lora.modules.items()}
    plain = as_plain(base) if base else None
    others = {name: _difference(tensor, plain, name) for name, tensor in lora.whole.items()}
    # PEFT saves embeddings along that it did not change.
    others = {name: squares for name, squares in others.items() if squares != 0}
    total = sum(pairs.values()) + sum(squares or 0.0 for squares in others.values())
    lost = {name: squares for name, squares in pairs.items() if name not in kept}
    lost_whole = {name: squares for name, squares in others.items() if name not in whole}

    def share(squares: float | None) -> float | str:
        return "not known without --base" if squares is None else float(f"{squares / (total or 1.0):.6g}")

    rows = [{"dropped": name, "share of the adapter": share(it)} for name, it in (lost | lost_whole).items()]
    known = sum(it or 0.0 for it in (*lost.values(), *lost_whole.values()))
    return rows, {"dropped": len(rows), "share of the adapter": share(known)}


def _difference(tensor: LazyTensor, base: Checkpoint | None, name: str) -> float | None:
    """Return the sum of squares by which a whole tensor differs from the base's, where that is known."""
    if base is None or name not in base or base[name].shape != tensor.shape:
        return None
    from tensorsurgeon.kernels.pairs import difference_squares

    return difference_squares(tensor.read(), base[name].read())


def _config(
    ckpt: Checkpoint, base: Checkpoint | None, ranks: Mapping[str, int], whole: Mapping[str, LazyTensor]
) -> dict[str, Any]:
    """Return the config that says what the tensors are, with what else the old one says."""
    old = ckpt.config.value
    every = [name.removesuffix(".weight") for name, it in base.tensors.items() if len(it.shape) > 1] if base else ranks
    modules = sorted({name.rpartition(".")[0] for name in whole if name.endswith(".weight")})
    made = lora_config(
        str(old.get("base_model_name_or_path") or ""),
        ranks,
        target_names(ranks, every),
        old.get("task_type"),
        modules,
        bool(old.get("fan_in_fan_out")),
    )
    return {**made, "use_dora": bool(old.get("use_dora")), "bias": old.get("bias") if whole else "none"}


def _padded(a: LazyTensor, rank: int) -> LazyTensor:
    """Return A with rows of zeros to a rank."""
    if a.shape[0] == rank:
        return a
    size = a.nbytes // a.shape[0] * rank

    def pad(rows: Block) -> Block:
        data = bytearray(size)
        data[: len(rows.data)] = rows.data
        return Block(rows.dtype, (rank, *rows.shape[1:]), data)

    return LazyTensor(
        a.dtype, (rank, *a.shape[1:]), None, pad, (Input(a, 0),), grain=rank, history=f"fill to {rank} rows"
    )


def _scaled(b: LazyTensor, scale: float, rank: int) -> LazyTensor:
    """Return B times the scale, with columns of zeros to a rank; in float32 where its own dtype would round."""
    if scale == 1 and b.shape[1] == rank:
        return b
    dtype = b.dtype if frexp(scale)[0] == 0.5 else "F32"

    def scale_rows(rows: Block) -> Block:
        from tensorsurgeon.kernels.pairs import scaled

        return scaled(rows, scale, rank, dtype)

    history = f"times {scale!r}, fill to {rank} columns, {dtype}"
    return b.rowwise(scale_rows, dtype=dtype, history=history, row_shape=(rank,))
