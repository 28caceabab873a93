"""What a layer sequence does to a checkpoint's config: count, `layer_types` and quantisation skip lists follow.

Any other per-layer field must be one that the sequence leaves as it is; otherwise the operation is refused,
with the field's name, before anything is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import COUNT_KEYS, SETTINGS_FILES, Config, config_parts, edit_parts, text_config_path
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.fields import IMPLIED, POSITIONAL, is_affected
from tensorsurgeon.names import LayerSequence, LayerStack, format_layers, layer_name

SKIP_LISTS = (
    "modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules",
    "skip_modules", "exclude",
)  # fmt: skip
"""Keys of a quantization_config that list modules which are not quantised."""

_REGEX = re.compile(r"[\\*+?()\[\]{}|^$]")


def config_under_sequence(ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> Config:
    """Return the config of the model whose layer k is layer `seq[k]` of `ckpt`.

    Raises:
        RefusedError: naming every field that the sequence does not leave as it is.
    """
    config = ckpt.config.value
    if seq == tuple(range(stack.count)):
        return config
    path = text_config_path(config)
    raise_all(RefusedError, _refusals(ckpt, stack, seq))
    edited = edit_parts(config, path, lambda part: _layers_edited(part, stack.count, seq))
    if not any(key in ckpt.text_config for key in COUNT_KEYS):
        edited = edit_parts(edited, path, lambda part: {**part, "num_hidden_layers": len(seq)}, only_last=True)
    return {key: _skip_lists_edited(key, value, ckpt, stack, seq) for key, value in edited.items()}


def _layers_edited(part: Config, count: int, seq: LayerSequence) -> Config:
    edited = {key: len(seq) if key in COUNT_KEYS and value == count else value for key, value in part.items()}
    types = part.get("layer_types")
    if types:
        edited["layer_types"] = [types[i] for i in seq] + list(types[count:])
    return edited


def _refusals(ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> Iterator[str]:
    if not seq:
        yield "layers: the sequence is empty; a model keeps at least one layer."
        return
    config = ckpt.text_config
    nested = "_text" if ckpt.text_config_path else ""
    kind = str(config.get("model_type") or f"{ckpt.config.value.get('model_type')}{nested}")
    what = f"under the sequence {format_layers(seq)}"
    if kind in POSITIONAL:
        yield f"model_type {kind!r}: {POSITIONAL[kind]}; no config can say what the layers would be {what}."
    if kind in IMPLIED and not config.get(IMPLIED[kind]):
        yield (
            f"config.json: {IMPLIED[kind]!r} is missing, and {kind} then alternates its layers by a rule of its "
            f"own, which does not hold {what}; write the field out first."
        )
    lengths = (stack.count, stack.count + stack.extra)
    sound = True
    for part in config_parts(ckpt.config.value, ckpt.text_config_path):
        types = part.get("layer_types")
        if types and not (isinstance(types, list) and len(types) in lengths):
            sound = False
            yield f"config.json: 'layer_types' is {_shown(types)}, not one entry for each of {stack.count} layers."
        for key, value in part.items():
            if is_affected(key, value, part, stack.count, seq):
                yield f"config.json: {key!r} is {_shown(value)}, a per-layer setting that would not hold {what}."
    for file in sorted(ckpt.files.keys() & set(SETTINGS_FILES)):
        content = ckpt.files[file]
        text = content.decode(errors="replace") if isinstance(content, bytes) else content.read_text(errors="replace")
        if _names_a_layer(text):
            yield f"{file}: names layers by number, which would not hold {what}; dequantize first."
    if sound:
        yield from _structure_refusals(ckpt, stack, seq)


def _structure_refusals(ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> Iterator[str]:
    """Refuse where layers differ in their tensors in a way that neither the place nor `layer_types` follows."""
    shapes = layer_shapes(ckpt, stack)
    types = ckpt.text_config.get("layer_types") or [None] * stack.count
    by_type: dict[str, set[Any]] = {}
    for layer in range(stack.count):
        by_type.setdefault(str(types[layer]), set()).add(shapes[layer])
    if all(len(found) == 1 for found in by_type.values()):
        return
    moved = [k for k, i in enumerate(seq) if shapes[min(k, stack.count - 1)] != shapes[i]]
    if moved:
        yield (
            f"tensors: layers {format_layers(moved)} would hold other tensors than the model has there "
            "(dense and mixture-of-experts layers, say), and the config cannot be seen to follow."
        )


def layer_shapes(ckpt: Checkpoint, stack: LayerStack) -> list[frozenset[tuple[str, tuple[int, ...]]]]:
    """Return what each layer is made of: the names and shapes of its plain tensors, scales left out."""
    shapes: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(stack.count + stack.extra)]
    for name, tensor in ckpt.tensors.items():
        found = layer_name(name)
        if found and found.prefix == stack.prefix and not found.rest.endswith("scale_inv"):
            shapes[found.index].add((found.rest, tensor.shape))
    return [frozenset(layer) for layer in shapes]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _skip_lists_edited(key: str, value: Any, ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> Any:
    if (
        key.endswith("_config")
        and isinstance(value, Mapping)
        and key not in ("quantization_config", "compression_config")
    ):
        return {inner: _skip_lists_edited(inner, item, ckpt, stack, seq) for inner, item in value.items()}
    if key not in ("quantization_config", "compression_config", "quantization") or not isinstance(value, Mapping):
        return value
    lists = {
        inner: _skip_list_under(item, ckpt, stack, seq)
        for inner, item in value.items()
        if inner in SKIP_LISTS and isinstance(item, list) and all(isinstance(entry, str) for entry in item)
    }
    others = {inner: item for inner, item in value.items() if inner not in lists}
    raise_all(
        RefusedError,
        (f"config.json: {key!r}: {text!r} names a layer by number in a way that cannot be renumbered; "
         "dequantize first." for text in _strings(others) if _names_a_layer(text)),
    )  # fmt: skip
    return {**value, **lists}


def _skip_list_under(entries: Sequence[str], ckpt: Checkpoint, stack: LayerStack, seq: LayerSequence) -> list[str]:
    """Renumber a skip list; an entry that names a whole layer becomes one entry per module of that layer.

    Engines read entries as prefixes, substrings or regular expressions, and `model.layers.1` would then hit
    layers 10 to 19 as well; a full module name is read alike by all of them.
    """
    matrices: dict[int, list[str]] = {}
    prefixes = set()
    for name, tensor in ckpt.tensors.items():
        found = layer_name(name)
        prefixes.add(found.prefix if found else "")
        if found and found.prefix == stack.prefix and len(tensor.shape) > 1:
            matrices.setdefault(found.index, []).append(name)
    edited: dict[str, None] = {}
    for entry in entries:
        tensor_name = f"{entry}.weight"
        found = None if _REGEX.search(entry) else layer_name(tensor_name)
        if found and found.prefix == stack.prefix:
            copies = [k for k, i in enumerate(seq) if i == found.index]
            copies += [found.index - stack.count + len(seq)] if found.index >= stack.count else []
            whole = found.rest.lstrip(".") == "weight"
            names = matrices.get(found.index, []) if whole else [tensor_name]
            edited |= {stack.renamed(name, k).rpartition(".")[0]: None for k in copies for name in names}
        elif found and found.prefix in prefixes:
            edited[entry] = None
        elif _names_a_layer(entry):
            raise RefusedError(
                f"config.json: the quantisation skip list names layers by the pattern {entry!r}, which cannot be "
                "renumbered; dequantize first, or list the modules one by one."
            )
        else:
            edited[entry] = None
    return list(edited)


def _names_a_layer(text: str) -> bool:
    return bool(re.search(r"(?<![a-z])(layers|layer|h|blocks?)\\?\.[\\(\[]*\d", text))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)
