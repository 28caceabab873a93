"""YAML as plain data, with the line of each value for the errors."""

from __future__ import annotations

from typing import Any

import yaml

from tensorsurgeon.errors import UsageError


class _Loader(yaml.SafeLoader):
    """Reads what looks like a date as text: a model may well be named after a day."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Reader:
    """Reads YAML and remembers the line of each value, for the errors."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[tuple[Any, ...], int] = {}
        self.problems: list[str] = []

    def read(self, text: str) -> Any:
        """Return the data of a text; what is wrong with it but for its form is added to `problems`."""
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return self._value(loader, node, ()) if node else None
        except (yaml.YAMLError, ValueError, RecursionError) as problem:
            raise UsageError(f"{self.name}: is not YAML: {problem}") from None

    def at(self, *path: Any) -> str:
        """Return where a value stands, as `file:line`."""
        return f"{self.name}:{self.lines[path]}" if path in self.lines else self.name

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, path: tuple[Any, ...]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return loader.construct_object(node)
        if node.tag not in (loader.DEFAULT_MAPPING_TAG, loader.DEFAULT_SEQUENCE_TAG):
            self.problems.append(f"{self.at(*path)}: the tag {node.tag!r} is refused; a recipe holds plain data.")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, item, (*path, place)) for place, item in enumerate(node.value)]
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                self.problems.append(f"{self.name}:{line}: the key {key!r} is not a word.")
            elif key in mapping:
                self.problems.append(f"{self.name}:{line}: the key {key!r} occurs twice.")
            else:
                self.lines[*path, key] = line
                mapping[key] = self._value(loader, value_node, (*path, key))
        return mapping
