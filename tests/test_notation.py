"""The notation for a sequence of layers, of one model and of several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorsurgeon.errors import UsageError
from tensorsurgeon.notation import NamedLayer, format_layers, format_named_layers, parse_layers, parse_named_layers

NOTATION = {
    "0-7,12,9": [0, 1, 2, 3, 4, 5, 6, 7, 12, 9],
    "51-36": [51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36],
    "0-63/2": [
        0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
        32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62,
    ],
    "32*5": [32, 32, 32, 32, 32],
    "(8-15)*2": [8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15],
    "3,8-11": [3, 8, 9, 10, 11],
    "0": [0],
    "5-5": [5],
    "5-5/3": [5],
    "7-2/2": [7, 5, 3],
    "1-8/3": [1, 4, 7],
    "2-3*2": [2, 3, 2, 3],
    "(1,2*2)*2,0": [1, 2, 2, 1, 2, 2, 0],
    "((1))": [1],
    "((0-1)*2,5)*2": [0, 1, 0, 1, 5, 0, 1, 0, 1, 5],
    " 0 - 3 / 2 , ( 4 ) * 2 ": [0, 2, 4, 4],
    "3,3,3": [3, 3, 3],
    "007": [7],
    ",".join(f"({n}-{n + 1})*2" for n in range(0, 160, 2)): [n + k for n in range(0, 160, 2) for k in (0, 1, 0, 1)],
}  # fmt: skip

WRONG = {
    "": (0, "expected a layer number"),
    "x": (0, "expected a layer number"),
    "-3": (0, "expected a layer number"),
    "0-7,,9": (4, "expected a layer number"),
    "0-7,": (4, "expected a layer number"),
    "3-": (2, "expected the last layer of the range"),
    "3-x": (2, "expected the last layer of the range"),
    "1 2": (2, "expected a comma or the end"),
    "1;2": (1, "expected a comma or the end"),
    "1-2-3": (3, "expected a comma or the end"),
    "3/2": (1, "expected a comma or the end"),
    "1.5": (1, "expected a comma or the end"),
    "5)": (1, "expected a comma or the end"),
    "0-9/0": (4, "expected a step, 1 or more"),
    "0-9/": (4, "expected a step, 1 or more"),
    "0-9/-1": (4, "expected a step, 1 or more"),
    "4*0": (2, "expected how many times, 1 or more"),
    "4*": (2, "expected how many times, 1 or more"),
    "4*x": (2, "expected how many times, 1 or more"),
    "(1,2": (4, "expected a closing bracket"),
    "(1,2]": (4, "expected a closing bracket"),
    "()": (1, "expected a layer number"),
    "1,  y": (4, "expected a layer number"),
    "٣": (0, "expected a layer number"),
    "1234567890": (0, "expected a layer number"),
    "0-9*1000000": (11, "more than 100000 layers"),
    "0-100000": (8, "more than 100000 layers"),
    "(0-999)*100,0-9": (15, "more than 100000 layers"),
    "((0-99)*1000)*2": (15, "more than 100000 layers"),
    "(" * 60 + "1" + ")" * 60: (51, "more than 50 brackets inside each other"),
}


@pytest.mark.parametrize(("text", "layers"), NOTATION.items(), ids=[text[:20] for text in NOTATION])
def test_the_notation(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == tuple(layers)


def points_at(parse: Callable[[str], object], text: str, column: int, complaint: str) -> None:
    """Fail unless parsing the text complains, and points at a column."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    message, echo, pointer = str(caught.value).split("\n")
    assert complaint in message
    assert f"at character {column + 1}," in message
    assert echo == "    " + text
    assert pointer == "    " + " " * column + "^"


@pytest.mark.parametrize(("text", "expected"), WRONG.items(), ids=[text[:20] or "empty" for text in WRONG])
def test_an_error_points_at_its_place(text: str, expected: tuple[int, str]) -> None:
    points_at(parse_layers, text, *expected)


@pytest.mark.parametrize(("given", "layers"), [(4, (4,)), ([3, 1, 1], (3, 1, 1)), (range(3), (0, 1, 2)), ((), ())])
def test_numbers_stand_for_themselves(given: int | list[int], layers: tuple[int, ...]) -> None:
    assert parse_layers(given) == layers


@pytest.mark.parametrize("given", [-1, [0, -2], True, [False], [1.0], ["1"], [None]])
def test_what_is_no_layer_is_refused(given: int | list[int]) -> None:
    with pytest.raises(UsageError, match="is not a layer"):
        parse_layers(given)


def test_what_is_not_understood_has_the_exit_status_of_usage() -> None:
    assert UsageError.exit_status == 2


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([0, 1, 2, 3, 7, 6, 5, 4], "0-3,7-4"),
        ([0, 1, 2, 3, 7, 6, 4], "0-3,7-6,4"),
        ([5], "5"),
        ([5, 5, 5], "5,5,5"),
        ([0, 2, 4], "0,2,4"),
        ([1, 2, 1], "1-2,1"),
        ([], ""),
    ],
)
def test_a_sequence_is_written_in_runs(layers: list[int], text: str) -> None:
    assert format_layers(layers) == text


@given(st.lists(st.integers(0, 12) | st.integers(0, 99_999), min_size=1, max_size=60))
def test_what_is_written_is_read_back(layers: list[int]) -> None:
    assert parse_layers(format_layers(layers)) == tuple(layers)


UNITS = st.recursive(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 4)).map(
        lambda it: (f"{it[0]}-{it[1]}/{it[2]}", [*range(it[0], it[1] + 1, it[2])] or [*range(it[0], it[1] - 1, -it[2])])
    ),
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)).map(
        lambda it: (f"({','.join(text for text, _ in it[0])})*{it[1]}", [n for _, part in it[0] for n in part] * it[1])
    ),
    max_leaves=6,
)


@given(UNITS)
def test_ranges_and_brackets_mean_what_python_means_by_them(unit: tuple[str, list[int]]) -> None:
    text, layers = unit
    assert parse_layers(text) == tuple(layers)


@given(st.text(st.sampled_from("0123456789-/*,() x"), max_size=30))
def test_any_text_is_a_sequence_or_a_usage_error(text: str) -> None:
    try:
        layers = parse_layers(text)
    except UsageError:
        return
    assert layers
    assert all(layer >= 0 for layer in layers)


def named(*blocks: tuple[str, list[int]]) -> tuple[NamedLayer, ...]:
    return tuple(NamedLayer(model, layer) for model, layers in blocks for layer in layers)


NAMED = {
    "0-2": named(("", [0, 1, 2])),
    "base:0-1,instruct:3-2": named(("base", [0, 1]), ("instruct", [3, 2])),
    "a:0,1,b:2": named(("a", [0]), ("", [1]), ("b", [2])),
    "a:(0-1,5)*2": named(("a", [0, 1, 5, 0, 1, 5])),
    "(a:0,b:1)*2": named(("a", [0]), ("b", [1]), ("a", [0]), ("b", [1])),
    "a:(0,b:1,2),3": named(("a", [0]), ("b", [1]), ("a", [2]), ("", [3])),
    "a:(0,(b:(1,2),3))": named(("a", [0]), ("b", [1, 2]), ("a", [3])),
    "a:4*3": named(("a", [4, 4, 4])),
    "a:0-6/3*2": named(("a", [0, 3, 6, 0, 3, 6])),
    " base : 0 , base:1 ": named(("base", [0, 1])),
    "Llama-3.1_8B:7": named(("Llama-3.1_8B", [7])),
    "_:0": named(("_", [0])),
}

WRONG_NAMES = {
    ":0": (0, "expected a layer number"),
    "a:": (2, "expected a layer number"),
    "a:b:0": (2, "expected a layer number"),
    "a": (0, "expected a layer number"),
    "a:0-b:3": (4, "expected the last layer of the range"),
    "3b:0": (1, "expected a comma or the end"),
    "-a:0": (0, "expected a layer number"),
    "a/b:0": (0, "expected a layer number"),
    "é:0": (0, "expected a layer number"),
    "a:0;b:1": (3, "expected a comma or the end"),
    "a:(0,b:1": (8, "expected a closing bracket"),
    "a:0*b:2": (4, "expected how many times, 1 or more"),
}


@pytest.mark.parametrize(("text", "layers"), NAMED.items())
def test_layers_of_named_models(text: str, layers: tuple[NamedLayer, ...]) -> None:
    assert parse_named_layers(text) == layers


@pytest.mark.parametrize(("text", "layers"), NOTATION.items(), ids=[text[:20] for text in NOTATION])
def test_without_names_the_notation_means_the_same(text: str, layers: list[int]) -> None:
    assert parse_named_layers(text) == named(("", layers))


@pytest.mark.parametrize(("text", "expected"), [*WRONG_NAMES.items(), *WRONG.items()])
def test_an_error_among_names_points_at_its_place(text: str, expected: tuple[int, str]) -> None:
    points_at(parse_named_layers, text, *expected)


@pytest.mark.parametrize(("text", "column"), [("base:0", 1), ("0-3,base:0", 5), ("(1,x.y : 2)", 4)])
def test_names_are_refused_where_there_is_one_model(text: str, column: int) -> None:
    with pytest.raises(UsageError, match="are for 'stitch'; expected a layer number") as caught:
        parse_layers(text)
    assert f"at character {column}," in str(caught.value)


@pytest.mark.parametrize(
    ("given_", "layers"),
    [(4, named(("", [4]))), ([3, 1], named(("", [3, 1]))), ((), ()), (NAMED["a:4*3"], NAMED["a:4*3"])],
)
def test_numbers_and_named_layers_stand_for_themselves(given_: object, layers: tuple[NamedLayer, ...]) -> None:
    assert parse_named_layers(given_) == layers  # type: ignore[arg-type]


@pytest.mark.parametrize("given_", [-1, True, [NamedLayer("a", 0), 1], [("a", 0)], [1.0]])
def test_what_is_no_layer_of_a_model_is_refused(given_: object) -> None:
    with pytest.raises(UsageError, match="is not a layer"):
        parse_named_layers(given_)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (named(("base", [0, 1, 2]), ("instruct", [8, 9])), "base:0-2,instruct:8-9"),
        (named(("a", [0, 1, 5, 4, 3])), "a:0-1,a:5-3"),
        (named(("", [0, 1]), ("a", [2]), ("", [3])), "0-1,a:2,3"),
        (named(("a", [0]), ("b", [1]), ("a", [2])), "a:0,b:1,a:2"),
        ((), ""),
    ],
)
def test_a_sequence_of_named_layers_is_written_in_runs(layers: tuple[NamedLayer, ...], text: str) -> None:
    assert format_named_layers(layers) == text


MODELS = st.sampled_from(["", "base", "a", "Qwen3-8B", "x.y_z"])


@given(st.lists(st.builds(NamedLayer, MODELS, st.integers(0, 12) | st.integers(0, 99_999)), min_size=1, max_size=40))
def test_what_is_written_with_names_is_read_back(layers: list[NamedLayer]) -> None:
    assert parse_named_layers(format_named_layers(layers)) == tuple(layers)


@given(st.text(st.sampled_from("012-/*,() ab:._"), max_size=24))
def test_any_text_with_names_is_a_sequence_or_a_usage_error(text: str) -> None:
    try:
        layers = parse_named_layers(text)
    except UsageError:
        return
    assert layers
    assert parse_named_layers(format_named_layers(layers)) == layers
    if ":" not in text:
        assert parse_layers(text) == tuple(layer for _, layer in layers)
