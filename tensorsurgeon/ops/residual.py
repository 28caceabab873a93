"""Find the weights that write into the residual stream, and which way round each of them lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import nearest
from tensorsurgeon.notation import LayerSequence, format_layers
from tensorsurgeon.roles import Role, hidden_size
from tensorsurgeon.tensor import LazyTensor

Side = Literal["outputs", "rows", "experts"]
"""Where vectors of the residual stream lie: they are columns (each row belongs to one number of the output), rows of
the last dimension, or columns of stacked matrices."""

SIDES: dict[str, Side] = {
    "out,in": "outputs", "in,out": "rows", "expert,in,out": "rows", "expert*in,out": "rows", "expert,out,in": "experts",
}  # fmt: skip
WRITERS = ("o", "down")
EMBEDDINGS = ("token", "position", "segment")
RESCALED = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm")
"""Norms of an output before it is added, which stretch it along the axes and turn it out of a subspace."""


class Target(NamedTuple):
    """A tensor to change: its side, and its layer, None outside of layers."""

    name: str
    side: Side
    layer: int | None


class Chosen(NamedTuple):
    """What words and layers choose, what is wrong with the words, and what speaks against the weights."""

    targets: list[Target]
    usage: list[str]
    problems: list[str]
    width: int


def choose_writers(ckpt: Checkpoint, words: Sequence[str], layers: LayerSequence | None) -> Chosen:
    """Return the weights and biases that words name: a role such as `mlp.down`, or the end of a module's name.

    Embeddings lie outside of layers, and are chosen whatever the layers.
    """
    width = hidden_size(ckpt.config.value)
    usage = [] if words else ["weights: names nothing."]
    problems: list[str] = []
    if width is None:
        return Chosen([], usage, ["config.json: does not say how wide the residual stream is (hidden_size)."], 0)
    known = [(name, role) for name, role in ckpt.roles.items() if role.group not in ("other", "norm")]
    targets: dict[str, Target] = {}
    for word in words:
        meant = [(name, role) for name, role in known if word in _words(name, role) and role.kind != "companion"]
        if not meant:
            words_there = {each for name, role in known if role.part in WRITERS for each in _words(name, role)}
            usage.append(f"weights: nothing here is {word!r}.{nearest(word, words_there)}")
        wrong = [name for name, role in meant if not _writes(role)]
        if wrong:
            usage.append(f"weights: {word!r} names {wrong[0]!r}, which does not write into the residual stream.")
            continue
        at = {name: None if role.group == "embedding" else ckpt.layers.layer_of(name) for name, role in meant}
        inside = [it for it in meant if layers is None or at[it[0]] is None or at[it[0]] in layers]
        if meant and not inside:
            usage.append(f"weights: there is no {word!r} in layers {format_layers(layers or ())}.")
        for name, role in inside:
            side = _side(role)
            problems += _shape_problems(name, ckpt[name], side, width)
            targets[name] = Target(name, side or "rows", at[name])
    return Chosen([targets[name] for name in ckpt if name in targets], usage, problems, width)


def warnings_of(ckpt: Checkpoint, targets: Sequence[Target]) -> Iterator[str]:
    """Yield what else of the model a user should know where these tensors are changed."""
    if any(norm in name for name in ckpt for norm in RESCALED) and any(it.layer is not None for it in targets):
        yield (
            "what these layers add passes a norm first, whose weights stretch it along the axes: "
            "some of the subspace comes back there."
        )
    embeddings = [it.name for it in targets if ckpt.roles[it.name].part == "token"]
    tied = ckpt.text_config.get("tie_word_embeddings", ckpt.config.value.get("tie_word_embeddings"))
    if embeddings and tied is not False and not any(role.part == "lm_head" for role in ckpt.roles.values()):
        yield f"the head is tied to {embeddings[0]} and changes with it."


def _words(name: str, role: Role) -> set[str]:
    """Return the words that name a tensor: its role, and its module's name from any dot on."""
    parts = name.removesuffix(role.suffix).split(".") if role.suffix else name.split(".")
    ends = {".".join(parts[begin:]) for begin in range(len(parts))}
    return {role.group, f"{role.group}.{role.part}", *ends}


def _writes(role: Role) -> bool:
    if role.group == "embedding":
        return role.part in EMBEDDINGS
    return role.part in WRITERS and role.group in ("attention", "mixer", "mlp", "expert") and role.mark != "indexer"


def _side(role: Role) -> Side | None:
    return "rows" if role.group == "embedding" or role.kind == "bias" else SIDES.get(role.layout)


def _shape_problems(name: str, tensor: LazyTensor, side: Side | None, width: int) -> Iterator[str]:
    if side is None:
        yield f"{name}: has shape {list(tensor.shape)}; which of its dimensions is the output is not known."
    elif (found := tensor.shape[{"outputs": 0, "rows": -1, "experts": 1}[side]]) != width:
        yield f"{name}: its output has {found} numbers, not the {width} of the residual stream."
