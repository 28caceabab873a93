"""Extract the difference of two models as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Literal, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, UsageError, raise_all
from tensorsurgeon.lora import SERVED_RANKS
from tensorsurgeon.names import matching
from tensorsurgeon.ops.accounting import Made, made_adapter, planned_adapter
from tensorsurgeon.ops.dequantization import DTYPES, as_plain
from tensorsurgeon.ops.extracting import Module, extracted
from tensorsurgeon.parameters import Count, Glob, Model, Ranks, Share, Words
from tensorsurgeon.registry import open_model, operation
from tensorsurgeon.roles import Role
from tensorsurgeon.running import running
from tensorsurgeon.tensor import LazyTensor

LINEAR = ("attention", "mixer", "mlp", "expert")
"""Groups of roles whose matrices a LoRA is made for."""
INCLUDABLE = ("embedding", "head", "norm")
HEAD = "lm_head.weight"


@operation
def extract_lora(
    ckpt: Checkpoint,
    base: Model,
    rank: Count | None = None,
    energy: Share | None = None,
    error: Share | None = None,
    ranks: Ranks | None = None,
    exclude: Glob | None = None,
    include: Words | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    pad_rank: bool = False,
    vocabulary: Literal["refuse", "cut"] = "refuse",
    experts: Literal["refuse", "each"] = "refuse",
    device: Literal["cpu", "cuda"] = "cpu",
) -> Checkpoint:
    """Make a LoRA adapter of the difference between a tuned model and its base.

    Each matrix of a layer gives a pair `B A`, the best that its rank allows (Eckart and Young): the singular values
    lie in equal parts on both, and the scale is 1. Either model may be block FP8 and is decoded as it is read: against
    an FP8 base the adapter also mends what quantisation did. What is not captured is told.

    Args:
        base: The model that the adapter is to be applied to.
        rank: Rank of every pair.
        energy: Share of each delta's squares to capture, instead of a rank, such as 0.95.
        error: Relative error to allow in each matrix, instead of a rank, such as 0.1.
        ranks: Other ranks for some modules, such as *.mlp.*=64 or attention=16 (a group or role of inspect).
        exclude: Modules to leave out, such as *.experts.*.
        include: Also take these, embedding, head or norm; norms are kept as a whole.
        dtype: What the factors are written in.
        pad_rank: Raise every rank to the next that vLLM takes as its --max-lora-rank, with zeros.
        vocabulary: Whether to refuse embeddings of another number of rows, or to cut them to the base's.
        experts: Whether each expert gets pairs of its own, which vLLM takes, and PEFT does not apply.
        device: Where to compute.

    Raises:
        UsageError: for not just one of rank, energy and error.
        RefusedError: for models that do not belong together or are the same, and for NaN or infinity in either.
    """
    goals = {"rank": rank, "energy": energy, "error": error}
    given = [(kind, float(value)) for kind, value in goals.items() if value is not None]
    if len(given) != 1:
        raise UsageError("extract-lora: give just one of rank, energy and error.")
    unknown = sorted(set(include or ()) - set(INCLUDABLE))
    raise_all(UsageError, (f"extract-lora: include: {it!r} is none of {', '.join(INCLUDABLE)}." for it in unknown))
    original = open_model(base)
    tuned, plain = as_plain(ckpt), as_plain(original)
    raise_all(RefusedError, _mismatches(tuned, plain))
    chosen = _Choice(given[0], ranks or {}, exclude, include or (), vocabulary == "cut", experts == "each")
    modules, problems = _modules(tuned, plain, chosen)
    raise_all(RefusedError, problems)
    norms = [name for name, role in plain.roles.items() if role.group == "norm"] if "norm" in (include or ()) else []
    steps = SERVED_RANKS if pad_rank else ()
    name = base if isinstance(base, str) else original.sources[0].name
    if running().planned and given[0][0] == "rank":
        return planned_adapter(Made(ckpt, original, tuned, plain, modules, norms, name), DTYPES[dtype], pad_rank)
    sums, pairs = extracted(tuned, plain, modules, steps, DTYPES[dtype], device)
    changed = [name for name in norms if name in sums and sums[name].delta]
    return made_adapter(Made(ckpt, original, tuned, plain, modules, changed, name), sums, pairs)


class _Choice(NamedTuple):
    """What was asked for: the goal, ranks by pattern, what to leave out and to take along, and what is allowed."""

    goal: tuple[str, float]
    ranks: Mapping[str, int]
    exclude: str | None
    include: Container[str]
    cut: bool
    experts: bool


def _mismatches(tuned: Checkpoint, base: Checkpoint) -> Iterator[str]:
    """Yield why two models cannot be compared matrix by matrix."""
    if tuned.is_adapter or base.is_adapter:
        yield "extract-lora: an adapter is no model; merge it first."
        return
    if tuned.model_type != base.model_type:
        yield f"config.json: 'model_type' is {tuned.model_type!r} in the tuned model, {base.model_type!r} in the base."
        return
    layers = tuned.layers.count, base.layers.count
    if layers[0] != layers[1]:
        yield f"config.json: the tuned model has {layers[0]} layers, the base {layers[1]}; their layers do not match."
        return
    absent = [name for name, role in base.roles.items() if role.group in LINEAR and name not in tuned]
    if absent:
        yield f"{absent[0]}: the tuned model lacks it, and {len(absent) - 1} other tensors of the base's layers."
    for name, role in base.roles.items():
        if name in tuned and tuned[name].shape != base[name].shape and role.group not in ("embedding", "head"):
            ours, theirs = list(tuned[name].shape), list(base[name].shape)
            yield f"{name}: has shape {ours} in the tuned model and {theirs} in the base."


def _modules(tuned: Checkpoint, base: Checkpoint, chosen: _Choice) -> tuple[list[Module], list[str]]:
    """Return the modules to make factors for, and what keeps some from having any."""
    modules: list[Module] = []
    problems: list[str] = []
    used: set[str] = set()
    expert: dict[int, list[str]] = {}
    above: dict[tuple[str, float, tuple[int, ...]], list[str]] = {}
    left_out = set(matching(chosen.exclude, base)) if chosen.exclude else set()
    for name, role in _weights(base, chosen.include):
        weight = _weight(base, name)
        linear = role.group in LINEAR and len(weight.shape) > 1
        included = role.group in chosen.include and role.group != "norm" and role.part != "position"
        if not (linear or included) or role.kind != "weight" or name in left_out:
            continue
        if role.group == "expert" and (len(weight.shape) != 2 or not chosen.experts):
            expert.setdefault(len(weight.shape), []).append(name)
        if len(weight.shape) != 2:
            continue
        other = _weight(tuned, name)
        if other.shape[0] != weight.shape[0] and not chosen.cut:
            problems.append(
                f"{name}: has {other.shape[0]} rows in the tuned model and {weight.shape[0]} in the base; "
                "--vocabulary cut takes those that both have, and leaving it out of --include none."
            )
            continue
        kind, value = chosen.goal
        roles = (role.group, f"{role.group}.{role.part}")
        for pattern, rank in chosen.ranks.items():
            if matching(pattern, [name.removesuffix(".weight")]) or pattern in roles:
                kind, value = "rank", float(rank)
                used.add(pattern)
                break
        if kind == "rank" and value > min(weight.shape):
            above.setdefault((role.part, value, weight.shape), []).append(name)
        modules.append(Module(name, role, other, weight, kind, value))
    problems += _expert_problems(base, expert)
    for (_, value, shape), names in above.items():
        short = names[0].removesuffix(".weight").rpartition(".")[2]
        problems.append(
            f"{names[0]}: rank {value:g} is above {min(shape)}, the shorter side of {list(shape)}, here and in "
            f"{len(names) - 1} others; give them a rank of their own with --ranks '*.{short}={min(shape)}'."
        )
    unused = (pattern for pattern in chosen.ranks if pattern not in used)
    problems += [f"extract-lora: ranks: {pattern!r} is no module, group or role here." for pattern in unused]
    if not modules and not problems:
        problems.append("extract-lora: there is no matrix to make a pair for.")
    return modules, problems


def _expert_problems(base: Checkpoint, expert: Mapping[int, list[str]]) -> Iterator[str]:
    """Yield why experts get no pairs: stacked ones, or each by itself where that was not asked for."""
    for dimensions, names in expert.items():
        what = f"{names[0]}: has shape {list(base[names[0]].shape)}, and so have {len(names) - 1} others of experts"
        if dimensions == 2:
            yield (
                f"{what}; PEFT holds experts stacked and would apply none of their pairs, without a word. "
                "--experts each makes them for vLLM; --exclude '*.experts.*' leaves them out."
            )
        else:
            yield (
                f"{what}; neither PEFT nor vLLM has a pair of factors for them as they lie. --exclude '*.experts.*' "
                "leaves them out."
            )


def _weights(ckpt: Checkpoint, include: Container[str]) -> Iterator[tuple[str, Role]]:
    """Yield every tensor with its role; a head that is asked for and tied is there by its own name too."""
    yield from ckpt.roles.items()
    if "head" in include and HEAD not in ckpt and not any(role.group == "head" for role in ckpt.roles.values()):
        yield HEAD, Role("head", "lm_head", layout="out,in")


def _weight(ckpt: Checkpoint, name: str) -> LazyTensor:
    """Return a tensor; of a head that is tied, the embeddings.

    Raises:
        RefusedError: where there is none.
    """
    if name in ckpt:
        return ckpt[name]
    tables = [it for it, role in ckpt.roles.items() if (role.group, role.part) == ("embedding", "token")]
    if name != HEAD or len(tables) != 1:
        raise RefusedError(f"{name}: there is no such tensor in {ckpt.sources[0].name}.")
    return ckpt[tables[0]]
