"""Which tensors an exam looks at, and how their roles are called."""

from __future__ import annotations

from collections.abc import Sequence

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import CheckpointError, UsageError, nearest, raise_all
from tensorsurgeon.notation import LayerSequence
from tensorsurgeon.roles import Role


def select(ckpt: Checkpoint, names: str | None, roles: Sequence[str] | None, layers: LayerSequence | None) -> list[str]:
    """Return the tensors that a pattern, any of several roles and a set of layers have in common, in order.

    A role is a group (`mlp`) or a group and a part (`mlp.down`).

    Raises:
        UsageError: for a role or a layer that the checkpoint does not have, and where nothing is left.
    """
    chosen = ckpt.names(names) if names else list(ckpt)
    if roles:
        known = {word for role in ckpt.roles.values() for word in _words(role)}
        unknown = (f"roles: there is no {word!r} here.{nearest(word, known)}" for word in roles if word not in known)
        raise_all(UsageError, unknown)
        chosen = [name for name in chosen if not set(roles).isdisjoint(_words(ckpt.roles[name]))]
    if layers is not None:
        ckpt.layers.check(layers)
        chosen = [name for name in chosen if ckpt.layers.layer_of(name) in layers]
    if not chosen:
        raise UsageError("nothing is selected: no tensor has such a name, role and layer at once.")
    return chosen


def role_label(role: Role) -> str:
    """Return a role as tables show it, such as `mlp down` or `attention q bias`."""
    bias = "bias" if role.kind == "bias" else ""
    return " ".join(filter(None, (role.group, role.mark, role.part, bias)))


def layer_number(ckpt: Checkpoint, name: str) -> int | None:
    """Return the decoder layer of a tensor, and None outside of them or where the layers are not clear."""
    try:
        return ckpt.layers.layer_of(name)
    except CheckpointError:
        return None


def _words(role: Role) -> tuple[str, ...]:
    return role.group, f"{role.group}.{role.part}"
