"""Fields: what is written reads as what was asked for, whatever the config and the sequence."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import checkpoint, llama, under

from tensorsurgeon.errors import RefusedError
from tensorsurgeon.families import FAMILIES, FIRST_STAYS, NEEDS, REFUSED
from tensorsurgeon.fields import REMOVED, Field, InexpressibleError, lookup, with_edits
from tensorsurgeon.known_fields import FIELDS, LISTS, SOMETIMES_LISTS

PROPERTY = settings(max_examples=12, deadline=None)
EXTRA = "num_nextn_predict_layers"

INDEX_KEYS = [
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs",
    "rope_scaling_layers", "local_layer_ids", "moe_layers_enum",
]  # fmt: skip
ONE_BASED = ["linear_attn_config.full_attn_layers", "linear_attn_config.kda_layers", "ple_layer_ids"]
TEXTS = {"hybrid_override_pattern": "M-*E", "index_topk_pattern": "FS"}
COUNTS = [
    "first_k_dense_replace", "num_dense_layers", "num_hash_layers", "dense_mlp_idx", "max_window_layers",
    "moe_layer_start_index", "num_kv_shared_layers", "index_skip_topk_offset", "attn_layer_offset",
    "expert_layer_offset",
]  # fmt: skip
KINDS = {
    "layer_types": ["full_attention", "sliding_attention", "linear_attention", "conv", "chunked_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "indexer_types": ["full", "shared"],
    "layers_block_type": ["mamba", "attention", "mlp", "moe"],
    "no_rope_layers": [0, 1],
    "compress_ratios": [0, 4, 128],
}


def lists(of: Sequence[Any], count: int, extra: int) -> st.SearchStrategy[Any]:
    length = st.sampled_from([count, count + extra])
    return length.flatmap(lambda size: st.lists(st.sampled_from(of), min_size=size, max_size=size))


def index_lists(first: int, count: int, extra: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(first, first + count + extra - 1), unique=True, max_size=count)


def values(key: str, count: int, extra: int) -> st.SearchStrategy[Any]:
    """Return values that a key may have in the config of a model, with entries for the layers behind the stack."""
    if key in TEXTS:
        return lists(TEXTS[key], count, extra).map("".join)
    if key in KINDS:
        return lists(KINDS[key], count, extra)
    if key == "moe_layers_enum":
        return index_lists(0, count, extra).map(lambda found: ",".join(map(str, found)))
    if key in INDEX_KEYS:
        return index_lists(0, count, extra)
    if key in ONE_BASED:
        return index_lists(1, count, extra)
    if key in COUNTS:
        return st.integers(0, count + 1)
    if key == "moe_layer_end_index":
        return st.integers(-1, count - 1)
    if key in SOMETIMES_LISTS:
        return st.integers(1, 9) | st.lists(st.integers(1, 9), min_size=1, max_size=8) | lists([1, 2, 3], count, extra)
    if key in LISTS:
        return lists([1, 2, 3], count, extra)
    if key in ("block_types", "sliding_window", "interleaved_sliding_window"):
        return st.lists(st.sampled_from([4, 8, None]), min_size=1, max_size=count)
    if key == "per_layer_config":
        numbers = st.integers(0, count - 1).map(lambda number: f"{number:02}")
        return st.dictionaries(numbers, st.dictionaries(st.sampled_from("ab"), st.integers(0, 2)), max_size=count)
    if key == "attention_types":
        runs = st.lists(st.sampled_from(["global", "local"]), min_size=count, max_size=count)
        return runs.map(lambda kinds: [[kinds, 1]]) | runs.map(lambda kinds: [[[kind], 1] for kind in kinds])
    if key == "kv_source_layers":
        return st.tuples(*(st.integers(0, layer) for layer in range(count))).map(list)
    if key == "scale_depth":
        return st.none() | st.sampled_from([1.0, 1.4, 0.25])
    if key in ("num_layers_per_stack", "use_cla", "is_encoder_decoder", "scale_attn_by_inverse_layer_idx"):
        return st.sampled_from([0, 1, True, False])
    return st.integers(1, 6) | lists([0, 1, 2], count, extra)


BESIDE = {
    "max_window_layers": {"use_sliding_window": [True, False]},
    "layer_types": {"use_sliding_window": [True, False], "sliding_window": [8, None]},
    "mlp_only_layers": {"num_experts": [0, 4]},
}
"""Settings that rules read but do not write."""


@st.composite
def configs(draw: st.DrawFn, keys: Sequence[str], needed: str = "") -> tuple[dict[str, Any], int]:
    """Draw a config with some of the keys, and how many layers it is about."""
    count = draw(st.integers(1, 9), "count")
    extra = draw(st.integers(0, 2), "extra")
    config: dict[str, Any] = {"model_type": "x", "num_hidden_layers": count, "other": {"kept": [1]}}
    config |= {EXTRA: extra} if extra else {}
    for key in keys:
        if key != needed and not draw(st.booleans(), key):
            continue
        first, _, rest = key.partition(".")
        value = draw(values(key, count, extra), key)
        config[first] = {**config.get(first, {"beside": 1}), rest: value} if rest else value
        config |= {name: draw(st.sampled_from(found)) for name, found in BESIDE.get(key, {}).items()}
    return config, count


def sequences(count: int) -> st.SearchStrategy[list[int]]:
    everything = range(count)
    return st.one_of(
        st.lists(st.sampled_from(everything), min_size=1, max_size=count + 4),
        st.permutations(everything).map(list),
        st.sets(st.sampled_from(everything), min_size=1).map(sorted),
        st.just(list(everything)),
        st.integers(1, count).map(lambda size: list(range(size))),
        st.integers(0, count - 1).map(lambda at: [*range(at + 1), *range(at, count)]),
    )


def holds(field: Field, before: Sequence[Any], after: Sequence[Any] | None, seq: Sequence[int]) -> bool:
    """Tell whether a field says of every output layer what it said of its source; names of layers are followed."""
    if after is None or len(after) != len(seq):
        return False
    if not field.points:
        return list(after) == [before[layer] for layer in seq]
    return all(follows(before[seq[place]], target, place, seq) for place, target in enumerate(after))


def follows(before: int | None, target: int | None, place: int, seq: Sequence[int]) -> bool:
    """Tell whether a layer that named none, itself or another one still does, at its place in the sequence."""
    if before is None or target is None:
        return before is target
    return target == place if before == seq[place] else seq[target] == before


def wanted(field: Field, meaning: Sequence[Any], seq: Sequence[int]) -> list[Any]:
    """Return the gathered meaning; of a field that names layers, the places of the copies of the one that is named."""
    gathered = [meaning[layer] for layer in seq]
    if not field.points:
        return gathered
    copies = {layer: {place for place, it in enumerate(seq) if it == layer} for layer in range(len(meaning))}
    return [
        None if it is None else Places({place} if it == seq[place] else copies[it]) for place, it in enumerate(gathered)
    ]


class Places(frozenset):  # type: ignore[type-arg]
    """Places of which any will do."""

    def __eq__(self, other: object) -> bool:
        return other in self if isinstance(other, int) else super().__eq__(other)

    __hash__ = frozenset.__hash__


def read(field: Field, config: dict[str, Any], count: int) -> list[Any] | None:
    try:
        return field.read(config, count)
    except InexpressibleError:
        return None


EVERY = [(key, (key,), field) for key, field in FIELDS.items()] + [
    (f"{kind} {field.keys[0]}{' by number' if field.points else ''}", field.keys, field)
    for kind, fields in FAMILIES.items()
    for field in fields
]
UNIQUE = list({id(field): (name, keys, field) for name, keys, field in EVERY}.values())
LAST_IS_FULL = FAMILIES["gemma4_text"][0]
"""A field that reads a list otherwise than it stands; the sequence refuses what does not come out as asked for."""


@pytest.mark.parametrize(("name", "keys", "field"), UNIQUE, ids=[name for name, _, _ in UNIQUE])
@PROPERTY
@given(data=st.data())
def test_what_is_written_reads_as_what_was_asked_for(
    name: str, keys: tuple[str, ...], field: Field, data: st.DataObject
) -> None:
    config, count = data.draw(configs(keys, keys[0] if name == keys[0] else ""), "config")
    meaning = read(field, config, count)
    if meaning is None:
        return
    assert len(meaning) == count
    seq = data.draw(sequences(count), "sequence")
    before = copy.deepcopy(config)
    try:
        edits = field.write(wanted(field, meaning, seq), config, count)
    except InexpressibleError:
        return
    finally:
        assert config == before
    assert set(edits) <= set(field.keys) | {f"_{key}" for key in field.keys}
    edited = with_edits(config, edits)
    assert config == before
    json.dumps({key: value for key, value in edits.items() if value is not REMOVED})
    if not (field is LAST_IS_FULL and meaning[seq[-1]] != "full_attention"):
        assert holds(field, meaning, read(field, edited, len(seq)), seq), edits
    touched = {key.partition(".")[0] for key in edits}
    assert {key: value for key, value in edited.items() if key not in touched} == {
        key: value for key, value in config.items() if key not in touched
    }
    assert all(lookup(edited, key.partition(".")[0] + ".beside") == 1 for key in edits if "." in key)


@pytest.mark.parametrize("key", [*LISTS, *SOMETIMES_LISTS])
@PROPERTY
@given(data=st.data())
def test_entries_behind_the_stack_stay(key: str, data: st.DataObject) -> None:
    count, extra = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2))
    entries = data.draw(st.lists(st.sampled_from("ab"), min_size=count + extra, max_size=count + extra))
    seq = data.draw(sequences(count))
    value = "".join(entries) if key in TEXTS else entries
    config = with_edits({EXTRA: extra, "sparse_attention_config": {}}, {key: value})
    edits = FIELDS[key].write([entries[layer] for layer in seq], config, count)
    assert list(lookup(with_edits(config, edits), key)) == [*(entries[layer] for layer in seq), *entries[count:]]


@pytest.mark.parametrize(("key", "base"), [*((key, 0) for key in INDEX_KEYS), *((key, 1) for key in ONE_BASED)])
@PROPERTY
@given(data=st.data())
def test_a_list_of_layers_is_the_places_of_those_layers(key: str, base: int, data: st.DataObject) -> None:
    count, extra = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 2))
    marked = data.draw(st.sets(st.integers(0, count + extra - 1), min_size=1))
    seq = data.draw(sequences(count))
    numbers = [layer + base for layer in sorted(marked)]
    value: Any = ",".join(map(str, numbers)) if key == "moe_layers_enum" else numbers
    config = with_edits({EXTRA: extra, "linear_attn_config": {}}, {key: value})
    meaning = FIELDS[key].read(config, count)
    assert meaning == [layer in marked for layer in range(count)]
    written = FIELDS[key].write([meaning[layer] for layer in seq], config, count)[key]
    found = [int(part) for part in written.split(",") if part] if isinstance(written, str) else written
    whole = [*seq, *range(count, count + extra)]
    assert found == [place + base for place, layer in enumerate(whole) if layer in marked]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 12) | st.floats(allow_nan=False) | st.text("ab1,M*", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["0", "01", "a", "9"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("key", FIELDS)
@PROPERTY
@given(data=st.data())
def test_any_value_is_read_or_said_to_be_inexpressible(key: str, data: st.DataObject) -> None:
    config = with_edits({"linear_attn_config": {}, "sparse_attention_config": {}}, {key: data.draw(JSON)})
    count = data.draw(st.integers(1, 5))
    meaning = read(FIELDS[key], config, count)
    assert meaning is None or len(meaning) == count
    assert FIELDS[key].says_something(config, count) in (True, False)


UNDER = [kind for kind in FAMILIES if kind not in REFUSED]


@pytest.mark.parametrize("kind", UNDER)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_whole_config_says_of_every_layer_what_it_said_of_its_source(kind: str, data: st.DataObject) -> None:
    keys = list(dict.fromkeys(key for field in FAMILIES[kind] for key in field.keys))
    config, count = data.draw(configs(keys), "config")
    config = llama(count, **{**config, "model_type": kind})
    seq = data.draw(sequences(count), "sequence")
    before = copy.deepcopy(config)
    ckpt = checkpoint(config, count + config.get(EXTRA, 0), more=["slope_rate"])
    try:
        edited = under(ckpt, *seq)
    except RefusedError:
        return
    finally:
        assert config == before
    for field in FAMILIES[kind]:
        meaning = read(field, before, count)
        if meaning is not None:
            assert holds(field, meaning, read(field, edited, len(seq)), seq), (field.keys[0], edited)
    assert edited["num_hidden_layers"] == len(seq)
    assert edited["other"] == {"kept": [1]}
    lengths = {key: len(value) for key, value in edited.items() if key in LISTS}
    expected = {key: len(before[key]) - count + len(seq) for key in lengths if key in before}
    assert {key: size for key, size in lengths.items() if key in before} == expected


def test_the_tables_name_model_types_once() -> None:
    assert not FAMILIES.keys() & REFUSED.keys()
    assert FIRST_STAYS.keys() - {"zaya"} <= FAMILIES.keys()
    assert NEEDS.keys() <= FAMILIES.keys() | {"neomme"}


@pytest.mark.parametrize("key", [*INDEX_KEYS, *ONE_BASED])
def test_true_is_no_list_of_layers(key: str) -> None:
    with pytest.raises(InexpressibleError, match="not a list of layers"):
        FIELDS[key].read(with_edits({"linear_attn_config": {}}, {key: True}), 4)
