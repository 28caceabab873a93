"""A model's class from transformers without its weights: which modules are its layers, embedding and head.

The class is made on the meta device, where a tensor has a shape and a dtype and takes no memory. What a class computes
for itself rather than reads (rotary frequencies, a factor for embeddings) is made for real, by its own code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import nn

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.forward.silence import silence

Dtype = Literal["float32", "bfloat16", "float16"]

SHARED = {
    "num_kv_shared_layers": "later layers take keys and values from earlier ones",
    "add_cross_attention": "its layers look at the states of an encoder",
    "is_encoder_decoder": "it has an encoder beside its decoder",
}
"""Settings that, where they are set, say that a layer needs more than the states before it."""


class Skeleton(NamedTuple):
    """A model without weights: its `layers`, and the names of the modules that matter.

    `path` leads from the outermost module that the head's owner calls down to the decoder, which has the layers.
    """

    model: Any
    layers: list[nn.Module]
    stack: str
    decoder: str
    path: tuple[str, ...]
    embedding: str
    head: str
    dtype: torch.dtype

    def module(self, name: str) -> Any:
        """Return a module by its name."""
        return self.model.get_submodule(name)


def make_skeleton(ckpt: Checkpoint, dtype: Dtype = "float32") -> Skeleton:
    """Make a checkpoint's class, to compute in a dtype.

    Raises:
        RefusedError: for a class that transformers does not have, one that predicts no next token, and one whose
            layers need more than the states that the layer before has left.
    """
    config = ckpt.config.value
    kind = _class_of(config)
    described = _read_config(config)
    text = described.get_text_config()
    for setting, reason in SHARED.items():
        if getattr(described, setting, False) or getattr(text, setting, False):
            raise RefusedError(f"config.json: {setting}: {kind.__name__} cannot be run layer by layer: {reason}.")
    computed = getattr(torch, dtype)
    with silence():
        with torch.device("meta"):
            model = kind._from_config(described, dtype=computed).eval()
        _compute_buffers(model)
    return _anatomy(model, kind.__name__, text.num_hidden_layers, computed)


def _class_of(config: Mapping[str, Any]) -> Any:
    """Return the class that a config names, if it predicts the next token."""
    match config.get("architectures"):
        case [str(name), *_]:
            pass
        case _:
            raise RefusedError("config.json: architectures: names no class, so there is none to run it by.")
    kind = getattr(transformers, name, None)
    if kind is None or config.get("model_type") not in transformers.CONFIG_MAPPING:
        own = " A checkpoint's own code is never run." if "auto_map" in config else ""
        raise RefusedError(f"config.json: transformers {transformers.__version__} has no {name} to run it by.{own}")
    predicts = getattr(kind, "can_generate", bool)()
    if not predicts or ("ForCausalLM" not in name and "ConditionalGeneration" not in name and "LMHead" not in name):
        raise RefusedError(f"config.json: {name} does not predict a next token; only such models are run.")
    return kind


def _read_config(config: Mapping[str, Any]) -> Any:
    """Return a config as transformers reads it from a file: what it does to one in memory differs in places."""
    with TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(config), encoding="utf-8")
        with silence():
            return transformers.CONFIG_MAPPING[config["model_type"]].from_pretrained(directory, local_files_only=True)


def _compute_buffers(model: Any) -> None:
    """Make real what a class computes for itself, by its own initialisation, and mark all else as done."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor._is_hf_initialized = True
        own = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in own:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        module._is_hf_initialized = False
    model.initialize_weights()


def _anatomy(model: Any, kind: str, count: int, dtype: torch.dtype) -> Skeleton:
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or not hasattr(head, "weight"):
        raise RefusedError(f"config.json: {kind} has no embedding and head of its own to run it by.")
    stacks = _stacks(model, names, count)
    if len(stacks) != 1:
        raise RefusedError(f"config.json: {kind} has not one list of {count} decoder layers, but {len(stacks)}.")
    decoder, _, _ = stacks[0].rpartition(".")
    parts = decoder.split(".")
    path = tuple(".".join(parts[: place + 1]) for place in range(len(parts)))
    layers = list(model.get_submodule(stacks[0]))
    return Skeleton(model, layers, stacks[0], decoder, path, names[id(embedding)], names[id(head)], dtype)


def _stacks(model: Any, names: Mapping[int, str], count: int) -> list[str]:
    """Return the lists of as many layers in what the model calls its decoder, or else in any model of text in it."""
    text = type(model.config.get_text_config())
    others = [it for it in model.modules() if isinstance(it, transformers.PreTrainedModel) and type(it.config) is text]
    for owners in ([model.get_decoder()], others):
        found = [
            names[id(module)]
            for owner in owners
            for module in owner.children()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if found:
            return found
    return []
