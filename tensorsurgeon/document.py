"""JSON documents that keep their spelling: key order, unknown keys, and numbers as they were written.

`1e-06` stays `1e-06` and `1000000.0` does not turn into `1e6`, so that a rewritten `config.json`, indented as
libraries indent it, differs from its source in what was changed and in nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from tensorsurgeon.format import load_json


class Spelled(float):
    """A number that remembers how its document spells it."""

    text: str

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        number.text = text
        return number


class Document(NamedTuple):
    """A JSON object and the text that it was read from; `replace` keeps that text's style."""

    value: Mapping[str, Any]
    text: str
    changed: bool = False

    def replace(self, value: Mapping[str, Any]) -> Document:
        """Return the document with another value."""
        same = json.dumps(value) == json.dumps(self.value)
        return self if same else Document(value, self.text, True)

    def encode(self) -> bytes:
        """Return the document's bytes: its own text where nothing was changed."""
        return (render(self.value, like=self.text) if self.changed else self.text).encode()


def parse(text: str) -> Document:
    """Parse a JSON object.

    Raises:
        ValueError: for text that is not JSON or not an object, and for a key that occurs twice.
    """
    value = load_json(text, parse_float=Spelled, parse_int=_integer)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return Document(value, text)


def render(value: Any, like: str = "{\n  \n}") -> str:
    """Return JSON in the style of the text `like`: its indent, its escapes, and its line breaks."""
    indent = re.match(r"\s*\{\r?\n([ \t]+)", like)
    text = _render(value, indent[1] if indent else None, "", ascii_only=like.isascii())
    text += "\n" if like.endswith("\n") else ""
    return text.replace("\n", "\r\n") if "\r\n" in like else text


def _integer(text: str) -> int | Spelled:
    number = int(text)
    return number if str(number) == text else Spelled(text)


def _render(value: Any, indent: str | None, margin: str, ascii_only: bool) -> str:
    if isinstance(value, Spelled):
        return value.text
    if not value or not isinstance(value, Mapping | Sequence) or isinstance(value, str):
        return json.dumps(value, ensure_ascii=ascii_only)
    inner = margin + (indent or "")
    if isinstance(value, Mapping):
        items = [
            f"{json.dumps(key, ensure_ascii=ascii_only)}: {_render(item, indent, inner, ascii_only)}"
            for key, item in value.items()
        ]
    else:
        items = [_render(item, indent, inner, ascii_only) for item in value]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    if indent is None:
        return opening + ", ".join(items) + closing
    return opening + "\n" + ",\n".join(inner + item for item in items) + "\n" + margin + closing
