"""`__metadata__` of the shards of a checkpoint as one map from strings to strings.

Most say `{"format": "pt"}`. torchao's say what its tensors are: each tensor's name is a key, and `tensor_names` lists
them in JSON, in every shard all of them or its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tensorsurgeon.format import Header, load_json

TENSOR_NAMES = "tensor_names"


def merged(headers: Mapping[str, Header]) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of all shards, and where one contradicts an earlier one, which is kept."""
    found: dict[str, str] = {}
    clashes: list[str] = []
    for shard, header in headers.items():
        for key, value in header.metadata.items():
            if found.setdefault(key, value) == value:
                continue
            if key == TENSOR_NAMES:
                found[key] = _dumped([*_listed(found[key]), *_listed(value)])
            else:
                clashes.append(f"{shard}: __metadata__ {key!r} differs from an earlier shard's, which is kept.")
    return found, clashes


def rearranged(metadata: Mapping[str, str], moved: Mapping[str, str], gone: Iterable[str]) -> dict[str, str]:
    """Return metadata without the keys that are `gone` and with those that were `moved`, as its list says too."""
    left = set(gone)
    entries = {key: value for key, value in metadata.items() if key not in left}
    entries |= moved
    if TENSOR_NAMES in entries:
        names = [name for name in _listed(entries[TENSOR_NAMES]) if name not in left]
        entries[TENSOR_NAMES] = _dumped([*names, *moved])
    return entries


def _listed(text: str) -> list[Any]:
    try:
        value = load_json(text)
    except ValueError:
        return []
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _dumped(names: Iterable[str]) -> str:
    return json.dumps(list(dict.fromkeys(names)), ensure_ascii=False)
