"""What a layer sequence does to a checkpoint's config, for layers of one model or of several.

Every per-layer field is read, its values are taken in the order of the sequence, and it is written so that it
reads as those; what no value can say is refused, with the field's name, before anything is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tensorsurgeon.arrangement import Arrangement, Origin, Shapes, layer_shapes
from tensorsurgeon.config import COUNT_KEYS, EXTRA_KEYS, Config, config_parts
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.families import BUFFERED, FAMILIES, FIRST_STAYS, NEEDS, REFUSED
from tensorsurgeon.fields import Field, InexpressibleError, Meaning, Positions, lookup, with_edits
from tensorsurgeon.known_fields import FIELDS
from tensorsurgeon.module_lists import adapter_settings, renamed_settings
from tensorsurgeon.nearest import nearest_origins
from tensorsurgeon.notation import format_layers

NOT_PER_LAYER = (
    "architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "ssm_multipliers", "mlp_multipliers", "mrope_section", "time_step_limit", "layers_to_transform",
)  # fmt: skip
"""Lists of configs that may be as long as the stack by chance."""

_SUSPECT = re.compile(r"layer|pattern|period|freq|interval|every|first_k|shared")
_HARMLESS = re.compile(
    r"norm|drop|num_hidden_layers|n_shared|num_shared|shared_expert|share[sd]?_expert|layer_scale|kv_share|scale_layer"
    r"|tie_|weight_shar|share_embed|hidden_layers|activation|nextn|mtp|vision|image|audio|video|feature"
    r"|decoder_sparse|init_|use_cache|projector|rope_|rotary|deepstack|cross_layer_mask|freq_base|frequency_penalty"
    r"|per_layer_input|shared_intermediate|encoder_layers|decoder_layers|max_period|time_freq|layer_init|adapter|_coef|share_ratio|num_layers_per_block"
)
"""Words in keys that may speak of layers one by one, and words that tell that they do not."""


def config_under_sequence(arrangement: Arrangement) -> Config:
    """Return the config of the model whose layers are arranged anew.

    Raises:
        RefusedError: naming every field that cannot say so, the layers, and the nearest sequence that could.
    """
    if arrangement.is_identity:
        return arrangement.models[0].config.value
    if not arrangement.origins:
        raise RefusedError("layers: the sequence is empty; a model keeps at least one layer.")
    if arrangement.models[0].is_adapter:
        return adapter_settings(arrangement.models[0], arrangement.renamings()[0])
    shapes = [layer_shapes(model, model.layers) for model in arrangement.models]
    config, problems = _rewritten(arrangement, shapes)
    if problems:
        raise RefusedError(*problems, *_way_out(arrangement, shapes))
    parts = [(model.config.value, it) for model, it in zip(arrangement.models, arrangement.renamings(), strict=True)]
    return renamed_settings(config, parts)


def _way_out(arrangement: Arrangement, shapes: Sequence[Sequence[Shapes]]) -> list[str]:
    """Return the nearest sequence that is possible, where there is one."""
    counts = [model.layers.count for model in arrangement.models]

    def possible(origins: Sequence[tuple[int, int]]) -> bool:
        return not _rewritten(arrangement._replace(origins=tuple(Origin(*it) for it in origins)), shapes)[1]

    # A sequence that changes nothing else tells a model that cannot be re-ordered from a sequence that does not fit.
    if not possible(tuple(arrangement.origins[:0]) + tuple((0, layer) for layer in range(counts[0]))):
        return []
    found = nearest_origins(arrangement.origins, counts, possible)
    if not found:
        return ["layers: no sequence near this one is possible."]
    near = arrangement._replace(origins=tuple(Origin(*it) for it in found))
    return [f"layers: the nearest sequence that is possible is {near.text()}."]


def _rewritten(arrangement: Arrangement, shapes: Sequence[Sequence[Shapes]]) -> tuple[Config, list[str]]:
    """Return the config with its per-layer fields rewritten, and why it cannot be."""
    first = arrangement.models[0]
    problems: list[str] = []
    if first.model_type in REFUSED:
        problems.append(
            f"model_type {first.model_type!r}: {REFUSED[first.model_type]}; no config can say what the layers would "
            f"be under the sequence {arrangement.text()}."
        )
    path = first.text_config_path
    parts = [list(config_parts(model.config.value, model.text_config_path)) for model in arrangement.models]
    edited = list(parts[0])
    signatures: list[list[Any]] = [[() for _ in range(model.layers.count)] for model in arrangement.models]
    for level in range(len(path) + 1):
        is_text = level == len(path)
        of_level = [part[level] if len(part) == len(parts[0]) else part[-1] for part in parts]
        fields = _fields(arrangement, of_level, is_text)
        edited[level], found = _part_rewritten(arrangement, of_level, fields, signatures)
        problems += found
        if is_text and not any(key in of_level[0] for key in COUNT_KEYS):
            edited[level] = {**edited[level], "num_hidden_layers": len(arrangement.origins)}
        if is_text:
            problems += _places(arrangement, fields, edited[level])
    problems += _structure(arrangement, signatures, shapes)
    config = edited[-1]
    for level in reversed(range(len(path))):
        config = {**edited[level], path[level]: config}
    return config, problems


def _fields(arrangement: Arrangement, parts: Sequence[Config], is_text: bool) -> list[Field]:
    """Return the fields that a part of the config may hold: those of the model type, then any that is present."""
    family = FAMILIES.get(arrangement.models[0].model_type, ()) if is_text else ()
    claimed = {key for field in family for key in field.keys}
    known = [it for key, it in FIELDS.items() if key not in claimed and any(lookup(part, key) for part in parts)]
    return [*family, *known]


def _part_rewritten(
    arrangement: Arrangement, parts: Sequence[Config], fields: Sequence[Field], signatures: list[list[Any]]
) -> tuple[Config, list[str]]:
    """Rewrite one level of the config, and note in `signatures` what it says of each source layer."""
    counts = [model.layers.count for model in arrangement.models]
    becomes = len(arrangement.origins)
    edited: Config = {
        key: becomes if key in COUNT_KEYS and value == counts[0] else value for key, value in parts[0].items()
    }
    problems: list[str] = []
    for field in fields:
        if field.points and problems:
            continue
        shown = next((key for key in field.keys if lookup(parts[0], key) is not None), field.keys[0])
        try:
            meanings = [field.read(part, count) for part, count in zip(parts, counts, strict=True)]
            if all(meaning is None for meaning in meanings):
                continue
            wanted = _gathered(arrangement, field, meanings)
            for signed, meaning in zip(signatures, meanings, strict=True):
                for layer, says in enumerate(meaning or ()):
                    signed[layer] += (says == layer if field.points else repr(says),)
            rewritten = with_edits(edited, field.write(wanted, edited, counts[0]))
            if _says(field, rewritten, becomes) != wanted:
                raise InexpressibleError("the model class would not take it as it would have to be written")
            edited = rewritten
        except InexpressibleError as problem:
            problems.append(_inexpressible(arrangement, field, shown, edited, problem))
    problems += _unknown(arrangement, parts, {key for field in fields for key in field.keys})
    return edited, problems


def _says(field: Field, config: Config, count: int) -> Meaning | None:
    try:
        return field.read(config, count)
    except InexpressibleError:
        return None


def _gathered(arrangement: Arrangement, field: Field, meanings: Sequence[Meaning | None]) -> Meaning:
    """Return what a field shall say of each output layer."""
    values = []
    for model, layer in arrangement.origins:
        meaning = meanings[model]
        if meaning is None:
            raise InexpressibleError("it is given in one model and not in the other")
        values.append((model, meaning[layer]))
    if not field.points:
        return [value for _, value in values]
    places: dict[Origin, list[int]] = {}
    for place, origin in enumerate(arrangement.origins):
        places.setdefault(origin, []).append(place)
    return [
        None
        if target is None
        else Positions([place] if origin == (model, target) else places.get(Origin(model, target), ()))
        for place, (origin, (model, target)) in enumerate(zip(arrangement.origins, values, strict=True))
    ]


def _inexpressible(
    arrangement: Arrangement, field: Field, key: str, config: Config, problem: InexpressibleError
) -> str:
    value = lookup(config, key)
    said = f"{key!r} is {_shown(value)}" if value is not None else f"{key!r} is missing"
    try:
        meanings = [field.read(model.text_config, model.layers.count) for model in arrangement.models]
        wanted, now = _gathered(arrangement, field, meanings), _says(field, config, len(arrangement.origins)) or []
        wrong = [place for place, (one, other) in enumerate(zip(wanted, now, strict=False)) if one != other]
    except InexpressibleError:
        wrong = []
    where = f"; output layers {format_layers(wrong)} would not be what they were" if wrong else ""
    return f"config.json: {said}, a per-layer setting that cannot follow {arrangement.text()}: {problem}{where}."


def _unknown(arrangement: Arrangement, parts: Sequence[Config], claimed: set[str]) -> list[str]:
    """Refuse what may be per layer and is in no table, unless told to take the layers for uniform."""
    if arrangement.assume_uniform:
        return []
    config, count = parts[0], arrangement.models[0].layers.count
    known = {key.partition(".")[0] for key in claimed} | {*COUNT_KEYS, *EXTRA_KEYS, *NOT_PER_LAYER, *FIELDS}
    problems = []
    for key, value in config.items():
        if key in known or not value:
            continue
        if isinstance(value, list) and len(value) == count:
            same = len(set(map(repr, value))) == 1 and len(arrangement.origins) == count
            what = "" if same else "is as long as the stack, and may have an entry for each layer"
        else:
            what = "may be a setting of single layers" if _SUSPECT.search(key) and not _HARMLESS.search(key) else ""
        if what:
            problems.append(
                f"config.json: {key!r} is {_shown(value)}, which {what}; the sequence {arrangement.text()} cannot "
                "follow what is not known. Where all layers are alike, --assume-uniform leaves it as it is."
            )
    return problems


def _places(arrangement: Arrangement, fields: Sequence[Field], config: Config) -> Iterator[str]:
    """Refuse what the model class does by a layer's place, whatever the config says."""
    first, becomes = arrangement.models[0], len(arrangement.origins)
    kind = first.model_type
    if kind in FIRST_STAYS:
        wrong = [place for place, (_, layer) in enumerate(arrangement.origins) if (layer == 0) != (place == 0)]
        if wrong:
            yield (
                f"model_type {kind!r}: the first layer is built otherwise than the rest ({FIRST_STAYS[kind]}), so "
                f"layer 0 stays first and occurs once; output layers {format_layers(wrong)} of the sequence "
                f"{arrangement.text()} break that."
            )
    if kind in BUFFERED and not any(BUFFERED[kind][0] in name for name in first.tensors):
        yield f"model_type {kind!r}: {BUFFERED[kind][1]}; under the sequence {arrangement.text()} it would differ."
    types = next((_says(field, config, becomes) for field in fields if "layer_types" in field.keys), None) or []
    missing = [it for it in NEEDS.get(kind, ()) if it not in types]
    if missing:
        yield f"model_type {kind!r}: its class wants at least one {' and one '.join(missing)} layer."


def _structure(
    arrangement: Arrangement, signatures: Sequence[Sequence[Any]], shapes: Sequence[Sequence[Shapes]]
) -> Iterator[str]:
    """Refuse where layers differ in their tensors in a way that neither the config nor their place explains."""
    stacks = [model.layers for model in arrangement.models]
    first = arrangement.models[0].model_type in FIRST_STAYS
    alike: dict[Any, set[Shapes]] = {}
    for model, stack in enumerate(stacks):
        for layer in range(stack.count):
            alike.setdefault((signatures[model][layer], first and layer == 0), set()).add(shapes[model][layer])
    if all(len(found) == 1 for found in alike.values()):
        return
    last = stacks[0].count - 1
    moved = [
        place
        for place, (model, layer) in enumerate(arrangement.origins)
        if shapes[0][min(place, last)] != shapes[model][layer]
    ]
    if moved:
        yield (
            f"tensors: layers {format_layers(moved)} would hold other tensors than the model has there "
            "(dense and mixture-of-experts layers, say), and the config cannot be seen to follow."
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
