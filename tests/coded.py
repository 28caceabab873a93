"""Checkpoints of a single quantised module, for faults and corner cases that no library writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import make
import tensorsurgeon as ts
from tensorsurgeon.errors import RefusedError

MODULE = "model.layers.0.mlp.up_proj"
FILE = "model.safetensors"

Parts = Mapping[str, torch.Tensor | None]


def random_bytes(*shape: int, below: int = 256, seed: int = 0) -> torch.Tensor:
    """Return bytes."""
    return torch.randint(0, below, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_scales(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return scales that differ."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 1e-4


def checkpoint(
    directory: Path,
    parts: Parts,
    settings: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    module: str = MODULE,
) -> Path:
    """Write a checkpoint of one module; a part that is None is left out. `settings` are those of config.json."""
    made = {f"{module}{part}": tensor for part, tensor in parts.items() if tensor is not None}
    return make.save(directory, {"model.norm.weight": torch.ones(4), **made}, settings, metadata=metadata)


def decoded(source: Path, dest: Path, dtype: str = "float32", name: str = f"{MODULE}.weight") -> torch.Tensor:
    """Return what a weight is decoded to."""
    ts.write(ts.ops.dequantize(ts.open(source), dtype), dest)
    return make.read(dest)[name]


def assert_refused(source: Path, message: str) -> None:
    """Assert that a checkpoint is refused before a code is read."""
    with pytest.raises(RefusedError, match=message):
        ts.ops.dequantize(ts.open(source))


def assert_refused_while_decoding(source: Path, dest: Path, message: str) -> None:
    """Assert that a fault that only the codes show is found, and nothing written."""
    plain = ts.ops.dequantize(ts.open(source))
    with pytest.raises(RefusedError, match=message):
        ts.write(plain, dest)
    assert not dest.exists()


def as_bytes(values: Mapping[str, Any]) -> torch.Tensor:
    """Return JSON as the bytes of a tensor."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
