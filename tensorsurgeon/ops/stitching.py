"""Stitch a model together from layers of several."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tensorsurgeon.arrangement import Arrangement, Origin
from tensorsurgeon.checkpoint import Checkpoint, all_sources
from tensorsurgeon.config import COUNT_KEYS, EXTRA_KEYS, QUANTIZATION_KEYS, Config, config_parts, edit_parts
from tensorsurgeon.errors import RefusedError, UsageError, nearest, raise_all
from tensorsurgeon.families import FAMILIES
from tensorsurgeon.fields import lookup
from tensorsurgeon.known_fields import FIELDS
from tensorsurgeon.names import layer_name, matching
from tensorsurgeon.ops.arranging import arranged
from tensorsurgeon.ops.untying import TIE, head_name, untied
from tensorsurgeon.parameters import Glob, Models, NamedLayers
from tensorsurgeon.registry import open_model, operation
from tensorsurgeon.renaming import names_a_layer
from tensorsurgeon.tensor import LazyTensor

BASE = "base"
DO_NOT_MATTER = (
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "max_position_embeddings", "initializer_range", "tie_word_embeddings", "pretraining_tp",
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "output_router_logits",
    "router_aux_loss_coef", "auto_map", "id2label", "label2id", "task_specific_params", "unsloth_version",
    "unsloth_fixed", "finetuning_task", *QUANTIZATION_KEYS,
)  # fmt: skip
"""Settings of a config that may differ between models whose layers fit together; the base's are kept."""


@operation
def stitch(
    ckpt: Checkpoint,
    layers: NamedLayers,
    models: Models,
    embedding: str | None = None,
    head: str | None = None,
    accept: Glob | None = None,
    assume_uniform: bool = False,
) -> Checkpoint:
    """Make a model of layers of several models, in the given order, numbered anew.

    The first model is called `base`; its config, tokenizer and other files are kept, and so is all that is neither
    a decoder layer, nor an embedding, nor the final norm or head. Per-layer settings are gathered from all.

    Args:
        layers: Source layers in output order with the names of their models, such as base:0-31,instruct:32-63.
        models: The other models by name, such as instruct=Qwen/Qwen3-8B.
        embedding: Model that gives the embeddings; that of the first layer where not given.
        head: Model that gives the final norm and the head; that of the last layer where not given.
        accept: Settings of the config that may differ, by a pattern such as rope_*; the base's value is kept.
        assume_uniform: Leave settings alone that may be per layer but are not known, as of models with own code.

    Raises:
        UsageError: for a model that is not named, or a layer that it does not have.
        RefusedError: for models that do not fit together, with everything in which they differ.
    """
    if not layers:
        raise RefusedError("layers: the sequence is empty; a model keeps at least one layer.")
    used = [name or BASE for name, _ in layers]
    embedding, head = embedding or used[0], head or used[-1]
    raise_all(UsageError, _slips({*used, embedding, head}, models))
    names = [BASE, *models]
    opened = [ckpt, *(open_model(model) for model in models.values())]
    for place, (name, model) in enumerate(zip(names, opened, strict=True)):
        model.layers.check(layer for used_name, (_, layer) in zip(used, layers, strict=True) if used_name == name)
        raise_all(RefusedError, _mismatches(names[0], ckpt, name, model, accept) if place else ())
    origins = tuple(Origin(names.index(name), layer) for name, (_, layer) in zip(used, layers, strict=True))
    stitched = arranged(Arrangement(tuple(opened), origins, assume_uniform, tuple(names)))
    givers = dict(zip(names, opened, strict=True))
    whole = _with_ends(stitched, givers[embedding], givers[head]).replace(sources=all_sources(*opened))
    return whole.warn(*_notes(names, opened, embedding, head))


def _slips(used: set[str], models: Mapping[str, Any]) -> Iterator[str]:
    known = [BASE, *models]
    for name in sorted(used - set(known)):
        yield f"stitch: there is no model {name!r}.{nearest(name, known)} Give it as --models {name}=MODEL."
    for name in models:
        if name == BASE:
            yield f"stitch: {BASE!r} is the first model, and cannot be another."
        elif name not in used:
            yield f"stitch: the model {name!r} gives no layer, nor embedding or head."


def _mismatches(one: str, base: Checkpoint, other: str, model: Checkpoint, accept: str | None) -> Iterator[str]:
    """Yield everything in which two models differ that keeps their layers from fitting together."""
    kind = base.model_type
    if kind != model.model_type:
        yield f"config.json: 'model_type' is {kind!r} in {one} and {model.model_type!r} in {other}."
        return
    ignored = {*DO_NOT_MATTER, *COUNT_KEYS, *EXTRA_KEYS, *_per_layer(base), *_per_layer(model), "model_type"}
    ours, theirs = base.text_config, model.text_config
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if key not in ignored and ours.get(key) != theirs.get(key)]
    accepted = set(matching(accept, keys)) if accept else set()
    for key in keys:
        if key not in accepted:
            yield (
                f"config.json: {key!r} is {ours.get(key)!r} in {one} and {theirs.get(key)!r} in {other}; "
                f"--accept {key} keeps the value of {one} for all layers."
            )
    if _quantization(ours, base.config.value) != _quantization(theirs, model.config.value):
        yield f"config.json: {one} and {other} are not quantised alike; dequantize both first."
    if base.layers.prefix != model.layers.prefix:
        yield f"tensors: layers are named {base.layers.prefix}N in {one} and {model.layers.prefix}N in {other}."
    vocabularies = _vocabulary(base), _vocabulary(model)
    if all(vocabularies) and vocabularies[0] != vocabularies[1] and not (accept and matching(accept, ["tokenizer"])):
        yield (
            f"tokenizer.json: {one} and {other} have other tokens under the same numbers, so one's layers and the "
            f"other's embeddings do not speak of the same words; --accept tokenizer keeps that of {one}."
        )


def _per_layer(ckpt: Checkpoint) -> set[str]:
    """Return the settings that say something of each layer; they are gathered, and need not be alike."""
    config, count = ckpt.text_config, ckpt.layers.count
    present = [field for field in FIELDS.values() if any(lookup(config, key) for key in field.keys)]
    return {
        key.partition(".")[0]
        for field in (*FAMILIES.get(ckpt.model_type, ()), *present)
        if field.says_something(config, count)
        for key in field.keys
    }


def _quantization(*configs: Config) -> Any:
    """Return the quantisation settings but for what names layers."""
    found = [config[key] for config in configs for key in QUANTIZATION_KEYS if config.get(key)]
    return json.loads(json.dumps(found[:1]), object_hook=_without_layers) if found else None


def _without_layers(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if not names_a_layer(key)}
    return {
        key: [item for item in value if not (isinstance(item, str) and names_a_layer(item))]
        if isinstance(value, list)
        else value
        for key, value in kept.items()
    }


def _vocabulary(ckpt: Checkpoint) -> dict[str, Any] | None:
    """Return the number of each token, from the tokenizer's file."""
    file = ckpt.files.get("tokenizer.json")
    if file is None:
        return None
    try:
        tokenizer = json.loads(file if isinstance(file, bytes) else file.read_bytes())
        vocabulary = tokenizer["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(vocabulary, dict):
        vocabulary = {str(entry): number for number, entry in enumerate(vocabulary)}
    return vocabulary | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}


class Ends(NamedTuple):
    """The tensors before and behind the layers of a model."""

    embedding: dict[str, LazyTensor]
    norm: dict[str, LazyTensor]
    head: dict[str, LazyTensor]


def _ends(ckpt: Checkpoint) -> Ends:
    ends = Ends({}, {}, {})
    for name, role in ckpt.roles.items():
        if layer_name(name) is None and role.part != "per_layer":
            group = "embedding" if (role.group, role.part) == ("norm", "embedding") else role.group
            if group in Ends._fields:
                getattr(ends, group)[name] = ckpt[name]
    return ends


def _with_ends(stitched: Checkpoint, embedding: Checkpoint, head: Checkpoint) -> Checkpoint:
    """Replace embeddings, final norm and head by those of the models that give them; ties follow the head's."""
    own, first, last = _ends(stitched), _ends(embedding), _ends(head)
    layers = {name: it for name, it in stitched.tensors.items() if not any(name in part for part in own)}
    head_tensors = last.head
    if embedding is not head and not head_tensors:
        head_tensors = {head_name(head, "stitch"): _token_embedding(head, last)}
    tensors = {**first.embedding, **layers, **last.norm, **head_tensors}
    config = _with_tie_of(stitched, head) if embedding is head else untied(stitched)
    return stitched.replace(tensors=tensors, config=config)


def _with_tie_of(stitched: Checkpoint, giver: Checkpoint) -> Config:
    """Return the config with what the giver's says of tied embeddings, level by level."""
    levels = iter(list(config_parts(giver.config.value, giver.text_config_path))[::-1])

    def tie(part: Config) -> Config:
        said = next(levels)
        kept = {key: value for key, value in part.items() if key != TIE or key in said}
        return {**kept, TIE: said[TIE]} if TIE in said else kept

    return edit_parts(stitched.config.value, stitched.text_config_path, tie)


def _token_embedding(ckpt: Checkpoint, ends: Ends) -> LazyTensor:
    """Return the embedding that is tied to the head."""
    vocabulary = ckpt.text_config.get("vocab_size")
    found = [it for it in ends.embedding.values() if it.shape[:1] == (vocabulary,)] or list(ends.embedding.values())
    if len(found) != 1:
        raise RefusedError(f"stitch: cannot tell which embedding of {ckpt.sources[0].name} is tied to its head.")
    return found[0]


def _notes(names: list[str], models: list[Checkpoint], embedding: str, head: str) -> Iterator[str]:
    yield f"stitch: embeddings are those of {embedding}, final norm and head those of {head}."
    dtypes = {
        name: {it.dtype for tensor, it in model.tensors.items() if model.layers.layer_of(tensor) is not None}
        for name, model in zip(names, models, strict=True)
    }
    if len(set(map(frozenset, dtypes.values()))) > 1:
        said = ", ".join(f"{'/'.join(sorted(found))} in {name}" for name, found in dtypes.items())
        yield f"stitch: layers are {said}; engines load all in the config's dtype, and 'cast' makes the file say so."
    if embedding != head and not _ends(models[names.index(head)]).head:
        yield f"stitch: the head of {head} was tied to its embeddings; it is written by itself, and nothing is tied."
    if any("tokenizer.json" not in model.files for model in models):
        yield "stitch: not every model has a tokenizer.json, so vocabularies could not be compared."
