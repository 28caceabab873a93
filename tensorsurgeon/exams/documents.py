"""What differs between two configs, and between the files that lie beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint import Checkpoint

LISTED = 3
"""Keys of a file that are named, of those that differ."""


class _Absent:
    """Stands for a key that is not there."""


def unequal_keys(one: Any, other: Any, path: str = "") -> Iterator[dict[str, Any]]:
    """Yield where two JSON values differ, key by key."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            yield from unequal_keys(one.get(key, _Absent), other.get(key, _Absent), f"{path}.{key}" if path else key)
    elif type(one) is not type(other) or one != other:
        yield {"key": path, "first": _json(one), "second": _json(other)}


def _json(value: Any) -> str:
    return "-" if value is _Absent else json.dumps(value)


def unequal_files(one: Checkpoint, other: Checkpoint) -> Iterator[dict[str, Any]]:
    """Yield the side files that differ and, of JSON such as a tokenizer's, where."""
    for name in dict.fromkeys([*one.files, *other.files]):
        held = [it.files.get(name) for it in (one, other)]
        contents = [file.read_bytes() if isinstance(file, Path) else file for file in held]
        before, after = contents
        if before is None or after is None:
            yield {"file": name, "change": "added" if before is None else "removed", "where": "-"}
        elif before != after:
            yield {"file": name, "change": "changed", "where": _where(name, before, after)}


def _where(name: str, before: bytes, after: bytes) -> str:
    if not name.endswith(".json"):
        return f"{len(before):,} to {len(after):,} bytes"
    try:
        keys = [row["key"] for row in unequal_keys(json.loads(before), json.loads(after))]
    except ValueError:
        return "not JSON"
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more if keys else "spelling"
