"""Documents keep their spelling: what is not changed keeps its bytes, line by line."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorsurgeon.document import Document, Spelled, parse, render

STYLES = {
    "indent of 2": '{\n  "a": 1e-06,\n  "b": [\n    1,\n    {\n      "c": 1000000.0\n    }\n  ],\n  "d": {}\n}\n',
    "indent of 4": '{\n    "a": 0.10,\n    "b": {\n        "c": [\n            true\n        ]\n    }\n}\n',
    "tabs": '{\n\t"a": 1E5,\n\t"b": {\n\t\t"c": "x"\n\t}\n}\n',
    "one line": '{"a": 1.50, "b": [1, 2], "c": {"d": null}}',
    "no last line break": '{\n  "a": 1,\n  "b": 2.0\n}',
    "line breaks of Windows": '{\r\n  "a": 1,\r\n  "b": [\r\n    2\r\n  ]\r\n}\r\n',
    "raw letters": '{\n  "a": 1,\n  "b": "größer \U0001f600"\n}\n',
    "escaped letters": '{\n  "a": 1,\n  "b": "gr\\u00f6\\u00dfer \\ud83d\\ude00"\n}\n',
    "unsorted keys": '{\n  "z": 1,\n  "a": 2,\n  "m": 3\n}\n',
}
NUMBERS = [
    "1e-06", "1E-6", "1000000.0", "1e6", "0.60", "-0", "-0.0", "0.1", "1.0", "5e-324", "1e400",
    "0.1000000000000000055511151231",
    "18446744073709551616", "-9223372036854775809", "1" + "0" * 400,
    "12345678901234567890.12345678901234567890", "0", "-7",
]  # fmt: skip


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES)
def test_an_unchanged_document_has_its_own_bytes(text: str) -> None:
    assert parse(text).encode() == text.encode()


def test_a_document_keeps_what_no_style_could_say() -> None:
    text = ' {"a" :1,\n\n"b":[1,   2] ,"c":"\\/\\u0041"}\n\n\n'
    document = parse(text)
    assert document.encode() == text.encode()
    assert document.replace(dict(document.value)).encode() == text.encode()


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES)
def test_a_document_rendered_anew_has_its_own_bytes(text: str) -> None:
    assert render(parse(text).value, like=text) == text


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES)
def test_a_changed_document_differs_in_that_line_only(text: str) -> None:
    document = parse(text)
    changed = document.replace({**document.value, "a": 77})
    before, after = text.splitlines(keepends=True), changed.encode().decode().splitlines(keepends=True)
    removed, added = ([it[2:] for it in difflib.ndiff(before, after) if it.startswith(sign)] for sign in ("- ", "+ "))
    assert len(removed) == len(added) == 1
    assert '"a": 77' in added[0]
    assert json.loads(changed.encode()) == {**json.loads(text), "a": 77}


def test_a_key_more_and_a_key_less_change_no_other_line() -> None:
    document = parse('{\n  "a": 1.50,\n  "gone": 2,\n  "z": 1e-06\n}\n')
    value = {key: value for key, value in document.value.items() if key != "gone"}
    assert document.replace({**value, "new": [4]}).encode() == (
        b'{\n  "a": 1.50,\n  "z": 1e-06,\n  "new": [\n    4\n  ]\n}\n'
    )


@pytest.mark.parametrize("number", NUMBERS, ids=[number[:30] for number in NUMBERS])
def test_a_number_keeps_its_spelling_beside_a_change(number: str) -> None:
    document = parse(f'{{"n": {number}, "deep": [{{"n": {number}}}], "x": 0}}')
    changed = document.replace({**document.value, "x": 1})
    assert changed.encode().decode() == f'{{"n": {number}, "deep": [{{"n": {number}}}], "x": 1}}'


@pytest.mark.parametrize("number", NUMBERS, ids=[number[:30] for number in NUMBERS])
def test_a_number_has_the_value_that_json_gives_it(number: str) -> None:
    value, expected = parse(f'{{"n": {number}}}').value["n"], json.loads(number)
    assert value == expected


def test_whole_numbers_are_integers_and_others_are_spelled() -> None:
    value = parse('{"whole": 36, "float": 36.0}').value
    assert type(value["whole"]) is int
    assert isinstance(value["float"], Spelled)
    assert value["float"].text == "36.0"


def test_not_a_number_and_infinity_survive() -> None:
    text = '{"a": NaN, "b": Infinity, "c": -Infinity, "x": 0}'
    document = parse(text)
    assert math.isnan(document.value["a"])
    assert document.value["b"] == math.inf
    assert document.replace({**document.value, "x": 1}).encode().decode() == text.replace('"x": 0', '"x": 1')


def test_equal_values_leave_the_text_alone() -> None:
    document = parse('{"eps":1e-6}')
    assert document.replace({"eps": 1e-06}) is document


def test_a_change_is_seen_by_the_next_change() -> None:
    document = parse('{"a": 1, "b": 2.50}').replace({"a": 3, "b": 4})
    assert document.value == {"a": 3, "b": 4}
    assert document.replace({"a": 1, "b": 2}).encode() == b'{"a": 1, "b": 2}'


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": {"a": 1, "a": 2}}', '{"b": [{"a": 1, "c": 0, "a": 2}]}'])
def test_a_duplicate_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="'a' occurs twice"):
        parse(text)


@pytest.mark.parametrize("text", ["[]", "null", "1", '"{}"'])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        parse(text)


@pytest.mark.parametrize(
    "text", ["", "{", "{'a': 1}", '{"a": 1,}', '{"a": 01}', "\ufeff{}", '{"a": "\\ud800"}', "[" * 99_999]
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_a_number_of_five_thousand_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="digits"):
        parse('{"n": ' + "9" * 5000 + "}")


@pytest.mark.parametrize(
    "library_style", [{"indent": 2}, {"indent": 4}, {"indent": "\t"}, {}, {"indent": 2, "ensure_ascii": False}]
)
def test_json_of_the_library_of_python_is_rendered_alike(
    library_style: dict[str, int | str | bool], tmp_path: Path
) -> None:
    value = {"a": [1, -2.5, True, None, 'é\n\t"\\'], "b": {"c": {}, "d": [[], [1]]}, "e": 10**30}
    like = json.dumps({"n": "é", "m": 1}, **library_style)
    assert render(value, like=like) == json.dumps(value, **library_style)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    value=st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES, min_size=1, max_size=4),
    indent=st.sampled_from([2, 4, "\t", None]),
    ascii_only=st.booleans(),
    end=st.sampled_from(["", "\n"]),
)
def test_any_document_is_rendered_as_the_library_of_python_wrote_it(
    value: dict[str, object], indent: int | str | None, ascii_only: bool, end: str
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only) + end
    document = parse(text)
    assert document.encode().decode() == text
    rendered = Document(document.value, text, changed=True).encode().decode()
    assert rendered == text
