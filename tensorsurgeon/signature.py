"""What a function's signature and docstring say of its parameters."""

from __future__ import annotations

import inspect
import re
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin


class Parameter(NamedTuple):
    """One parameter of an operation, exam or derivation."""

    name: str
    annotation: Any
    default: Any
    help: str

    @property
    def word(self) -> str:
        """Its name in recipes: one that Python keeps for itself has an underscore behind it there."""
        return self.name.rstrip("_")

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    @property
    def type(self) -> Any:
        """The annotation without `Annotated` and `| None`."""
        annotation = self.annotation
        if get_origin(annotation) in (Union, types.UnionType):
            (annotation,) = (part for part in get_args(annotation) if part is not type(None))
        return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation

    @property
    def repeated(self) -> bool:
        """Whether it has several entries, given one by one on the command line."""
        return get_origin(self.type) is dict or self.type in (tuple[Any, ...], tuple[float, ...])

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it may be; empty where it is not a choice of words."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return a Google-style docstring's description, and the help of each argument."""
    head, *sections = re.split(r"^(Args|Returns|Raises):\n", text, flags=re.MULTILINE)
    blocks = dict(zip(sections[::2], sections[1::2], strict=True))
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", blocks.get("Args", ""), flags=re.MULTILINE)
    return head.strip(), {name: " ".join(words.split()) for name, words in entries}
