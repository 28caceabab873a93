"""Groups of weights by role, as people name them: attention-v, mlp, embedding; and the parts of matrices in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, UsageError, nearest, raise_all
from tensorsurgeon.fused import Heads, Part, grid_of, heads_of, parts_of, slots_of
from tensorsurgeon.names import matching
from tensorsurgeon.notation import LayerSequence
from tensorsurgeon.roles import Role

GROUPS: dict[str, tuple[str, frozenset[str]]] = {
    "attention": ("attention", frozenset()),
    "attention-q": ("attention", frozenset({"q", "q_a", "q_b"})),
    "attention-k": ("attention", frozenset({"k"})),
    "attention-v": ("attention", frozenset({"v"})),
    "attention-o": ("attention", frozenset({"o", "o_a"})),
    "mixer": ("mixer", frozenset()),
    "mlp": ("mlp", frozenset()),
    "mlp-gate": ("mlp", frozenset({"gate"})),
    "mlp-up": ("mlp", frozenset({"up"})),
    "mlp-down": ("mlp", frozenset({"down"})),
    "experts": ("expert", frozenset()),
    "experts-gate": ("expert", frozenset({"gate"})),
    "experts-up": ("expert", frozenset({"up"})),
    "experts-down": ("expert", frozenset({"down"})),
    "router": ("router", frozenset()),
    "embedding": ("embedding", frozenset({"token"})),
    "head": ("head", frozenset()),
    "norm": ("norm", frozenset()),
}
"""The role's group of each word, and its parts; all of them where none is named."""


class Chosen(NamedTuple):
    """Some of a tensor: its role, what part it is, and the attention heads in that."""

    role: Role
    part: Part
    heads: tuple[Heads, ...] = ()


def words_of(role: Role, dimensions: int) -> list[str]:
    """Return the groups that a tensor is in, wholly or with a part: weights, which but for norms are matrices."""
    matrix = dimensions > 1 or role.kind == "companion"
    if role.kind == "bias" or role.part == "cache" or matrix == (role.group == "norm"):
        return []
    own = frozenset(parts_of(role))
    return [
        word
        for word, (group, parts) in GROUPS.items()
        if group == role.group and (not parts or (own & parts and role.mark != "indexer"))
    ]


def choose(
    ckpt: Checkpoint, groups: Sequence[str], layers: LayerSequence | None, with_heads: bool = False
) -> dict[str, Chosen]:
    """Return what belongs to any of some groups, in order: words of GROUPS, or globs, which name whole tensors.

    `ckpt` holds plain numbers.

    Raises:
        UsageError: for a group or layer that is not there, with those that are.
        RefusedError: for matrices of which the parts, or heads, cannot be told apart.
    """
    wanted = find_members(ckpt, groups, layers)
    chosen: dict[str, Chosen] = {}
    problems = []
    for name, words in wanted.items():
        if ckpt.roles[name].kind == "companion" and any(words):
            continue
        try:
            chosen[name] = _choose(ckpt.roles[name], ckpt[name].shape, ckpt.text_config, words, with_heads)
        except RefusedError as problem:
            problems += [f"{name}: {text}" for text in problem.problems]
    raise_all(RefusedError, problems)
    return {name: it for name, it in chosen.items() if it.heads} if with_heads else chosen


def find_members(ckpt: Checkpoint, groups: Sequence[str], layers: LayerSequence | None) -> dict[str, list[str]]:
    """Return, for each tensor that is meant, the words that mean it, or "" for a glob; companions of weights too.

    Raises:
        UsageError: for a group or layer that is not there, with those that are.
    """
    if layers is not None:
        ckpt.layers.check(layers)
    words = {
        name: words_of(role, len(ckpt[name].shape))
        for name, role in ckpt.roles.items()
        if layers is None or ckpt.layers.layer_of(name) in layers
    }
    found: dict[str, list[str]] = {name: [] for name in words}
    problems = []
    for group in groups:
        is_glob = group not in GROUPS and any(mark in group for mark in "*?[.")
        meant = matching(group, words) if is_glob else [name for name in words if group in words[name]]
        for name in meant:
            found[name].append("" if is_glob else group)
        if not meant:
            known = list(dict.fromkeys(word for it in words.values() for word in it))
            there = sorted(known, key=list(GROUPS).index)
            listed = ", ".join(there) or "no groups at all, only names"
            problems.append(f"group: {group!r} matches nothing here.{nearest(group, there)} There are: {listed}.")
    raise_all(UsageError, problems or ([] if groups else ["group: none is given."]))
    return {name: it for name, it in found.items() if it}


def _choose(
    role: Role, shape: tuple[int, ...], config: Mapping[str, Any], words: Sequence[str], with_heads: bool
) -> Chosen:
    grid = grid_of(role, shape, config)
    parts = frozenset(_parts(role, words))
    heads = tuple(heads_of(role, grid, parts, config)) if with_heads else ()
    if parts.issuperset(parts_of(role)):
        return Chosen(role, Part(grid), heads)
    slots = slots_of(role, grid, config)
    return Chosen(role, Part(grid, tuple(slots[part] for part in slots if part in parts)), heads)


def _parts(role: Role, words: Sequence[str]) -> Iterator[str]:
    """Yield the parts of a tensor that some words mean."""
    own = frozenset(parts_of(role))
    for word in words:
        yield from (GROUPS[word][1] if word else own) & own or own
