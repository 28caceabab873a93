"""What every script here does with what a foreign library made; runs in that library's own environment."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CRUMBS = ("tokenizer*", "generation_config.json", "README.md", "*.py", "special_tokens_map.json", "*.log", "*.csv")
"""What libraries leave beside a checkpoint that no test has a use for."""


def record(place: Path, expected: Mapping[str, Any], library: str, how: str, *others: str) -> None:
    """Write beside a checkpoint what its own library decodes it to, and what made it.

    `expected` maps the names that plain parameters have in transformers (`model.layers.0.mlp.up_proj.weight`) to
    float32 numbers in the orientation that they have there. `expected.npz` holds them, `made.json` the versions of
    `library` and of the `others`, and `how` in one sentence.
    """
    for pattern in CRUMBS:
        for path in place.glob(pattern):
            path.unlink()
    for name, numbers in expected.items():
        assert numbers.dtype == np.float32, f"{name}: {numbers.dtype}"
    _save(place / "expected.npz", expected)
    versions = {each: version(each) for each in (library, *others)}
    note = json.dumps({"library": library, "versions": versions, "how": how}, indent=2)
    (place / "made.json").write_text(note + "\n")
    size = sum(path.stat().st_size for path in place.iterdir())
    print(f"{place.name}: {len(expected)} modules, {size / 1e3:.0f} kB")


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as `np.load` reads them, a fifth smaller than NumPy would, and without the time of the day."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, numbers in arrays.items():
            held = io.BytesIO()
            np.save(held, numbers)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), held.getvalue(), zipfile.ZIP_LZMA)
