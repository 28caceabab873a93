"""Where in a layer something is taken: the residual stream behind it, or what its attention or MLP writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from tensorsurgeon.errors import RefusedError

Site = Literal["residual", "attention", "mlp"]

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "temporal_block", "mixer", "linear_attn")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "mlp_block", "ff")


def writer(layer: nn.Module, site: Site) -> nn.Module | None:
    """Return the module of a layer that is its attention or its MLP, by the name that its class gives it."""
    children = dict(layer.named_children())
    return next((children[name] for name in (ATTENTION if site == "attention" else MLP) if name in children), None)


def require_site(layers: Mapping[int, nn.Module], site: Site, kind: str) -> None:
    """Raise where layers have no such module.

    Raises:
        RefusedError: with the numbers of the layers, and what they have.
    """
    if site == "residual":
        return
    without = [number for number, layer in layers.items() if writer(layer, site) is None]
    if without:
        has = ", ".join(name for name, _ in layers[without[0]].named_children())
        listed = ", ".join(map(str, without[:5])) + (" and more" if len(without) > 5 else "")
        raise RefusedError(f"{kind}: layers {listed} have no {site} that is known; layer {without[0]} has {has}.")


@contextmanager
def listening(layer: nn.Module, site: Site, into: list[torch.Tensor]) -> Iterator[None]:
    """Put what a layer's attention or MLP writes `into` a list, for the time of a block; of other sites nothing."""
    module = None if site == "residual" else writer(layer, site)
    if module is None:
        yield
        return

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        into.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
