"""The sequence that is offered in place of one that is not possible: near, really possible, and found at once."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import checkpoint, llama

from tensorsurgeon.arrangement import Arrangement, Origin
from tensorsurgeon.errors import RefusedError
from tensorsurgeon.nearest import MOST_TRIES, nearest_origins
from tensorsurgeon.notation import parse_layers
from tensorsurgeon.sequence import config_under_sequence

Possible = Callable[[Sequence[int]], bool]
OFFER = "layers: the nearest sequence that is possible is "


def prefix(size: int) -> Possible:
    """Return whether the layers below `size` stand before all others."""
    return lambda seq: [layer < size for layer in seq] == sorted((layer < size for layer in seq), reverse=True)


def period(size: int) -> Possible:
    """Return whether every place holds a layer of the same place within its period."""
    return lambda seq: all(layer % size == place % size for place, layer in enumerate(seq))


def suffix(count: int, size: int) -> Possible:
    """Return whether the last `size` of `count` layers end the sequence, each once and in order."""
    last = list(range(count - size, count))
    return lambda seq: list(seq[-size:]) == last and not set(last) & set(seq[:-size])


def near(seq: Sequence[int], count: int, possible: Possible) -> list[int] | None:
    found = nearest_origins([(0, layer) for layer in seq], [count], lambda it: possible([layer for _, layer in it]))
    assert found is None or all(model == 0 for model, _ in found)
    return None if found is None else [layer for _, layer in found]


def without(seq: Sequence[int], *places: int) -> list[int]:
    return [layer for place, layer in enumerate(seq) if place not in places]


def distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many layers must be put in, taken out or exchanged to make one sequence of the other."""
    row = list(range(len(other) + 1))
    for at, layer in enumerate(one, 1):
        last, row = row, [at]
        for place, it in enumerate(other, 1):
            row.append(min(row[-1] + 1, last[place] + 1, last[place - 1] + (layer != it)))
    return row[-1]


@pytest.mark.parametrize(
    ("seq", "count", "possible", "most"),
    [
        ([1, 0, 2, 3, 4, 5], 6, prefix(1), 1),
        ([0, 1, 2, 0, 3], 6, prefix(1), 1),
        ([2, *range(8)], 8, prefix(2), 1),
        ([*range(8), 1], 8, prefix(2), 1),
        (without(range(12), 3), 12, period(4), 3),
        ([*range(5), *range(4, 12)], 12, period(3), 3),
        ([*range(4), *range(6, 12)], 12, period(3), 2),
        ([0, 1, 2, 2, 3], 4, period(2), 1),
        (range(7), 8, suffix(8, 1), 1),
        ([*range(8), 7], 8, suffix(8, 2), 1),
        (range(6), 8, suffix(8, 2), 2),
    ],
)
def test_a_sequence_that_differs_little_is_found(seq: Sequence[int], count: int, possible: Possible, most: int) -> None:
    assert not possible(list(seq))
    found = near(seq, count, possible)
    assert found is not None
    assert possible(found)
    assert 1 <= distance(seq, found) <= most
    assert all(0 <= layer < count for layer in found)


def test_a_reversed_model_gets_its_first_layers_back() -> None:
    assert near(range(7, -1, -1), 8, prefix(2)) == [0, 1, 7, 6, 5, 4, 3, 2]


def test_shuffled_layers_of_a_period_are_put_in_order() -> None:
    found = near([5, 4, 3, 2, 1, 0, 7, 6, 11, 10, 9, 8], 12, period(4))
    assert found is not None
    assert period(4)(found)


def test_a_single_change_comes_before_everything_else() -> None:
    tried: list[tuple[tuple[int, int], ...]] = []
    origins = [(0, layer) for layer in (3, 1, 2)]

    def refuse(candidate: tuple[tuple[int, int], ...]) -> bool:
        tried.append(candidate)
        return False

    assert nearest_origins(origins, [4], refuse) is None
    assert len(tried) == len(set(tried)) <= MOST_TRIES
    assert tuple(origins) not in tried
    assert () not in tried
    distances = [distance([layer for _, layer in it], [3, 1, 2]) for it in tried]
    assert set(distances[:10]) == {1}
    assert max(distances) > 1


@pytest.mark.parametrize("seq", [[0], [2, 1, 0], list(range(100)), [5] * 30])
def test_nothing_is_offered_where_nothing_is_possible(seq: list[int]) -> None:
    assert near(seq, 100, lambda _: False) is None


def test_the_only_layer_is_not_taken_out() -> None:
    assert near([0], 2, lambda seq: not seq) is None
    assert near([0], 2, lambda seq: seq == [1]) == [1]


def test_layers_stay_with_their_model() -> None:
    origins = [(0, 0), (1, 2), (1, 1)]
    found = nearest_origins(origins, [2, 3], lambda it: len(it) == 3 and it[2] == (1, 2))
    assert found is not None
    assert found[2] == (1, 2)
    limits = Counter()
    nearest_origins(origins, [2, 3], lambda it: bool(limits.update(it)))
    assert all(0 <= layer < (2, 3)[model] for model, layer in limits)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_found_is_possible_and_of_the_models_layers(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    seq = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12))
    possible = data.draw(st.sampled_from([prefix(1), prefix(2), prefix(3), period(2), period(3), suffix(count, 1)]))
    found = near(seq, count, possible)
    if found is not None:
        assert found
        assert possible(found)
        assert all(0 <= layer < count for layer in found)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_one_change_would_make_possible_is_offered(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 8))
    size = data.draw(st.integers(1, count))
    good = [layer for layer in range(count) if layer < size] + data.draw(
        st.lists(st.integers(min(size, count - 1), count - 1), min_size=1, max_size=6)
    )
    place = data.draw(st.integers(0, len(good) - 1))
    seq = [*good[: place + 1], *good[place:]] if data.draw(st.booleans()) else good
    if prefix(size)(good):
        found = near(seq, count, lambda it: prefix(size)(it) and it != seq)
        assert found is not None
        assert distance(found, seq) <= 1


@pytest.mark.parametrize(
    "possible",
    [lambda _: False, prefix(3), period(8), suffix(100, 20), lambda seq: seq == list(range(100))],
    ids=["nothing", "prefix", "period", "suffix", "only the identity"],
)
@pytest.mark.parametrize("name", ["one less", "window", "reverse", "doubled", "twice"])
def test_a_hundred_layers_take_less_than_three_seconds(possible: Possible, name: str) -> None:
    seq = {
        "one less": without(range(100), 50),
        "window": without(range(100), *range(40, 55)),
        "reverse": list(range(99, -1, -1)),
        "doubled": [layer for layer in range(100) for _ in range(2)],
        "twice": [*range(100), *range(100)],
    }[name]
    with limit(3):
        found = near(seq, 100, possible)
    assert found is None or possible(found)


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Stop what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def offer(config: dict[str, object], count: int, *seq: int) -> list[int] | None:
    """Return the sequence that a refusal offers, after trying it."""
    ckpt = checkpoint(config, count)
    with pytest.raises(RefusedError) as caught:
        config_under_sequence(Arrangement((ckpt,), tuple(Origin(0, layer) for layer in seq)))
    (text,) = [it for it in caught.value.problems if it.startswith(OFFER)] or [""]
    if not text:
        return None
    found = parse_layers(text.removeprefix(OFFER).rstrip("."))
    config_under_sequence(Arrangement((ckpt,), tuple(Origin(0, layer) for layer in found)))
    return list(found)


ATTENTION = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("changes", "seq", "most"),
    [
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 2}, (2, 0, 1, 3, 4, 5), 1),
        ({"model_type": "jamba", "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 1,
          "expert_layer_offset": 0}, (0, 1, 3, 4, 5, 3, 4, 5), 2),
        ({"model_type": "gemma4_text", "layer_types": ATTENTION * 3}, (1, 2, 3, 4), 1),
        ({"model_type": "gemma3n_text", "layer_types": ATTENTION * 3, "num_kv_shared_layers": 2}, (0, 1, 3, 4), 1),
        ({"model_type": "modernbert", "layer_types": ATTENTION * 3}, (1, 2, 3), 1),
        ({"sliding_window_pattern": 3}, (0, 1, 2, 4, 5), 2),
    ],
    ids=["prefix", "period", "last is full", "shared", "first stays", "period of no class"],
)  # fmt: skip
def test_what_a_refusal_offers_can_be_done(changes: dict[str, object], seq: tuple[int, ...], most: int) -> None:
    found = offer(llama(6, **changes), 6, *seq)
    assert found is not None
    assert distance(seq, found) <= most


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "deepseek_v3", "first_k_dense_replace": 3},
        {"model_type": "gemma3n_text", "num_kv_shared_layers": 20},
        {"model_type": "gemma4_text", "num_kv_shared_layers": 20},
        {"model_type": "jamba"},
        {"is_encoder_decoder": True},
    ],
    ids=lambda it: str(it.get("model_type", "nothing")),
)
@pytest.mark.parametrize("name", ["shifted", "reverse", "doubled"])
def test_a_refusal_of_a_hundred_layers_takes_less_than_three_seconds(changes: dict[str, object], name: str) -> None:
    seq = {
        "shifted": [*range(1, 50), *range(45, 100), 0],
        "reverse": list(range(99, -1, -1)),
        "doubled": [layer for layer in range(100) for _ in range(2)],
    }[name]
    ckpt = checkpoint(llama(100, **changes), 100)
    with limit(3), suppress(RefusedError):
        config_under_sequence(Arrangement((ckpt,), tuple(Origin(0, layer) for layer in seq)))
