"""What a model's own code gives to each of its layers: masks, rotary tables, the embedded tokens.

The model's forward is run once with layers that only note what they get and hand the states on. It stops before the
head. What lies between the last layer and the head, the final norm above all, is noted too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.forward.batches import Batch
from tensorsurgeon.forward.skeleton import Skeleton

STATES = "hidden_states"


class Call(NamedTuple):
    """What one layer is called with, but for the states, which come first if they are `placed`, else by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    placed: bool

    def on(self, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Run the layer on states, and return those that it leaves."""
        left = layer(states, *self.args, **self.kwargs) if self.placed else layer(**self.kwargs, **{STATES: states})
        after: torch.Tensor = left[0] if isinstance(left, tuple) else left
        return after


class Recording(NamedTuple):
    """What a batch is for the layers: its embedded tokens, a call for each layer, and the modules behind the last.

    `tail` is what the model itself makes of the embedded tokens behind the layers, which the modules `after` have to
    give too. Layers leave their states bare, at `width` 0, or first in
    a tuple of that width.
    """

    embedded: torch.Tensor
    calls: list[Call]
    after: list[str]
    tail: torch.Tensor
    width: int


class _BeforeHead(Exception):
    """The model has come to its head."""


def record(skeleton: Skeleton, batch: Batch) -> Recording:
    """Run a model's own forward on a batch, with layers that only note what they are given.

    Raises:
        RefusedError: where a layer gets other states than the layer before has left, or anything that depends on
            them: such a model cannot be run layer by layer.
    """
    failed: Exception | None = None
    for width in (0, 1, 2):
        try:
            first = _run(skeleton, batch, width, lambda states: states.view_as(states))
        except _Elsewhere as problem:
            failed = failed or problem
            continue
        except (IndexError, ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as problem:
            failed = failed or problem
            continue
        second = _run(skeleton, batch, width, lambda states: states * 1.5 + 0.25)
        for number, (one, other) in enumerate(zip(first.calls, second.calls, strict=True)):
            if not _same((one.args, one.kwargs), (other.args, other.kwargs)):
                raise RefusedError(_refusal(skeleton, f"layer {number} is given more that depends on earlier layers"))
            if _shares(one.args) or _shares(tuple(one.kwargs.values())):
                raise RefusedError(_refusal(skeleton, f"layer {number} is given a store that layers share"))
        return first
    raise RefusedError(_refusal(skeleton, str(failed))) from failed


@contextmanager
def replaced(modules: Mapping[int, tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules another forward for the time of a block."""
    for module, forward in modules.values():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in modules.values():
            del module.__dict__["forward"]


def arguments(skeleton: Skeleton, batch: Batch) -> dict[str, Any]:
    """Return what the model's forward is called with for a batch."""
    known = inspect.signature(skeleton.model.forward).parameters
    text = skeleton.model.config.get_text_config()
    given: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if batch.padded and "position_ids" in known:
        given["position_ids"] = batch.positions
    if getattr(text, "use_cache", None) is not None:
        given["use_cache"] = False
    return given


def as_left(states: torch.Tensor, width: int) -> Any:
    """Return states in the form in which a model's layers leave them."""
    return (states, *(None,) * (width - 1)) if width else states


class _Elsewhere(Exception):
    """A layer was given other states than the layer before has left."""


def _run(
    skeleton: Skeleton,
    batch: Batch,
    width: int,
    leave: Callable[[torch.Tensor], torch.Tensor],
) -> Recording:
    calls: list[Call] = []
    states: list[torch.Tensor] = []
    after: list[str] = []

    def note(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            placed = bool(args)
            came = args[0] if placed else kwargs.get(STATES)
            if number != len(calls) or (states and came is not states[-1]) or not isinstance(came, torch.Tensor):
                raise _Elsewhere(f"layer {number} does not get just what the layer before it has left")
            calls.append(Call(args[1:], {key: it for key, it in kwargs.items() if key != STATES}, placed))
            states.extend([came] if not states else [])
            states.append(leave(came))
            return as_left(states[-1], width)

        return forward

    def behind(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if len(calls) == len(skeleton.layers) and isinstance(output, torch.Tensor):
                after.append(name)

        return hook

    ended: list[torch.Tensor] = []

    def end(module: nn.Module, args: Any, output: Any) -> None:
        ended.append(output if isinstance(output, torch.Tensor) else output[0])
        # What follows may have weights, which are not in memory yet.
        raise _BeforeHead

    decoder, prefix = skeleton.module(skeleton.decoder), f"{skeleton.decoder}." if skeleton.decoder else ""
    hooks = [
        module.register_forward_hook(behind(prefix + name))
        for name, module in decoder.named_children()
        if not isinstance(module, nn.ModuleList)
    ]
    hooks.append(decoder.register_forward_hook(end))
    patched = {number: (layer, note(number)) for number, layer in enumerate(skeleton.layers)}
    try:
        with replaced(patched), torch.inference_mode():
            skeleton.model(**arguments(skeleton, batch))
    except _BeforeHead:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != len(skeleton.layers) or not ended:
        raise _Elsewhere(f"of its {len(skeleton.layers)} layers only {len(calls)} are called, one after the other")
    return Recording(states[0], calls, after, ended[0], width)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two things that layers are given are the same, down to the numbers."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


def _shares(given: Any) -> bool:
    """Tell whether something that layers are given can take up what one of them puts into it for others."""
    if given is None or isinstance(given, torch.Tensor | bool | int | float | str | torch.dtype | torch.device):
        return False
    if isinstance(given, tuple):
        return any(map(_shares, given))
    if isinstance(given, Mapping | list):
        return not given or any(map(_shares, given.values() if isinstance(given, Mapping) else given))
    return True


def _refusal(skeleton: Skeleton, reason: str) -> str:
    kind = type(skeleton.model).__name__
    return f"config.json: {kind} cannot be run layer by layer: {reason}."
