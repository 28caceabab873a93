"""Make the checkpoint of an arrangement: layers renamed, per-layer slices gathered, config and files edited."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensorsurgeon.arrangement import Arrangement, Origin
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import SETTINGS_FILES
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.metadata import rearranged
from tensorsurgeon.module_lists import renamed_files
from tensorsurgeon.names import layer_name
from tensorsurgeon.notation import format_layers
from tensorsurgeon.sequence import config_under_sequence
from tensorsurgeon.shaping import stacked
from tensorsurgeon.source import SideFile
from tensorsurgeon.tensor import Block, LazyTensor, Rows

GENERATION = "generation_config.json"
EARLY_EXITS = ("assistant_early_exit", "dola_layers")
"""Settings of generation that name layers by number."""

DRAFTERS = ("eagle_aux_hidden_state_layer_ids", "target_layer_ids", "dspark_target_layer_ids", "speculators_model")
"""Settings by which a draft model taps layers of this one."""

COLUMNS, ROWS = "embed_tokens_per_layer.weight", "per_layer_model_projection.weight"
"""Gemma 3n's tensors that hold a slice for each layer: groups of columns of the one, groups of rows of the other."""


def arranged(arrangement: Arrangement) -> Checkpoint:
    """Return the first model with the layers of the arrangement; nothing else of the others is taken.

    Raises:
        RefusedError: for a config that cannot say what the layers would be in their new places.
    """
    ckpt = arrangement.models[0]
    config = config_under_sequence(arrangement)
    if arrangement.is_identity:
        return ckpt.replace(config=config)
    stack = ckpt.layers
    by_layer: list[dict[int, dict[str, LazyTensor]]] = [
        {layer: {} for layer in range(model.layers.count + model.layers.extra)} for model in arrangement.models
    ]
    before: dict[str, LazyTensor] = {}
    after: dict[str, LazyTensor] = {}
    for place, model in enumerate(arrangement.models):
        for name, tensor in model.tensors.items():
            index = model.layers.layer_of(name)
            if index is not None:
                by_layer[place][index][name] = tensor
            elif place == 0:
                (after if any(by_layer[0].values()) else before)[name] = tensor
    extra = [Origin(0, layer) for layer in range(stack.count, stack.count + stack.extra)]
    moved = {
        stack.renamed(name, place): tensor
        for place, origin in enumerate((*arrangement.origins, *extra))
        for name, tensor in by_layer[origin.model][origin.layer].items()
    }
    tensors = {**before, **moved, **after}
    return ckpt.replace(
        tensors=tensors | _slices(arrangement, tensors),
        config=config,
        files={**ckpt.files, **_files(arrangement)},
        metadata=_metadata(arrangement, extra),
    ).warn(*_warnings(arrangement))


def _slices(arrangement: Arrangement, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Gather the slices of tensors that hold one for each layer."""
    ckpt = arrangement.models[0]
    width = ckpt.text_config.get("hidden_size_per_layer_input") or 0
    gathered = {}
    for name in tensors:
        if layer_name(name) or not name.endswith((COLUMNS, ROWS)):
            continue
        axis = int(name.endswith(COLUMNS))
        sources = [_same_tensor(model, name) for model in arrangement.models]
        for source, model in zip(sources, arrangement.models, strict=True):
            if len(source.shape) != 2 or source.shape[axis] != model.layers.count * width:
                raise RefusedError(
                    f"{name}: has shape {list(source.shape)}, and no {width} {('rows', 'columns')[axis]} for each of "
                    f"{model.layers.count} layers (hidden_size_per_layer_input)."
                )
        gathered[name] = (_columns if axis else _rows)(sources, arrangement.origins, width)
    return gathered


def _same_tensor(model: Checkpoint, name: str) -> LazyTensor:
    ending = COLUMNS if name.endswith(COLUMNS) else ROWS
    found = [tensor for other, tensor in model.tensors.items() if other.endswith(ending)]
    if len(found) != 1:
        raise RefusedError(
            f"{name}: there is no one tensor of that name to take slices from in {model.sources[0].name}."
        )
    return found[0]


def _rows(sources: Sequence[LazyTensor], origins: Sequence[Origin], width: int) -> LazyTensor:
    return stacked([Rows(sources[model], layer * width, (layer + 1) * width) for model, layer in origins])


def _columns(sources: Sequence[LazyTensor], origins: Sequence[Origin], width: int) -> LazyTensor:
    def gather(*blocks: Block) -> Block:
        from tensorsurgeon.kernels.columns import gather_columns

        return gather_columns(blocks, origins, width)

    first, *others = sources
    history = f"gather columns of layers {list(map(tuple, origins))}"
    return first.rowwise(gather, *others, dtype=first.dtype, history=history, row_shape=(len(origins) * width,))


def _metadata(arrangement: Arrangement, extra: Sequence[Origin]) -> dict[str, str]:
    """Return the metadata, in which what is said of a layer's tensors, as torchao says it, moves with the layer."""
    stack = arrangement.models[0].layers
    by_layer: list[dict[int, list[str]]] = []
    for model in arrangement.models:
        found: dict[int, list[str]] = {}
        for key in model.metadata:
            layer = model.layers.layer_of(key)
            if layer is not None:
                found.setdefault(layer, []).append(key)
        by_layer.append(found)
    moved = {
        stack.renamed(key, place): arrangement.models[origin.model].metadata[key]
        for place, origin in enumerate((*arrangement.origins, *extra))
        for key in by_layer[origin.model].get(origin.layer, ())
    }
    return rearranged(arrangement.models[0].metadata, moved, [key for keys in by_layer[0].values() for key in keys])


def _files(arrangement: Arrangement) -> dict[str, SideFile]:
    """Return the side files that speak of layers, edited."""
    ckpt = arrangement.models[0]
    edited: dict[str, SideFile] = {}
    if ckpt.files.keys() & set(SETTINGS_FILES):
        edited |= renamed_files(ckpt, arrangement.renamings()[0])
    settings = _generation(ckpt)
    if any(key in settings for key in EARLY_EXITS):
        kept = {key: value for key, value in settings.items() if key not in EARLY_EXITS}
        edited[GENERATION] = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    return edited


def _generation(ckpt: Checkpoint) -> dict[str, Any]:
    file = ckpt.files.get(GENERATION)
    try:
        settings = json.loads(file if isinstance(file, bytes) else file.read_bytes()) if file else {}
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _warnings(arrangement: Arrangement) -> Iterator[str]:
    ckpt, origins = arrangement.models[0], arrangement.origins
    stack = ckpt.layers
    for key in EARLY_EXITS:
        if key in _generation(ckpt):
            yield f"{GENERATION}: {key!r} names layers of the original and was removed."
    config = ckpt.config.value
    drafters = [key for key in DRAFTERS if key in config or key in ckpt.text_config]
    if drafters:
        yield f"config.json: {', '.join(drafters)} tap layers of the original; draft models for it no longer fit."
    vision = config.get("vision_config")
    levels = len((vision.get("deepstack_visual_indexes") or ()) if isinstance(vision, Mapping) else ())
    changed = [place for place in range(levels) if place >= len(origins) or origins[place] != (0, place)]
    if changed:
        yield (
            f"images: the vision tower adds features behind layers 0-{levels - 1} by position, and layers "
            f"{format_layers(changed)} are others now; text alone is computed exactly."
        )
    if stack.extra and origins[-1] != (0, stack.count - 1):
        yield (
            "multi-token prediction: its layers stay behind the stack, but were trained on the output of layer "
            f"{stack.count - 1}, which is no longer the last."
        )
