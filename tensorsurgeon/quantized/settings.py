"""Where it is said how a checkpoint is quantised: config.json at any depth, files beside it, metadata of shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import QUANTIZATION_KEYS, SETTINGS_FILES
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.format import load_json
from tensorsurgeon.quantized.parts import Settings
from tensorsurgeon.source import CONFIG, SideFile

FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": None,
}
"""Files that may say it in the config's place, and the method of those that do not name one."""


def find_settings(ckpt: Checkpoint) -> Settings:
    """Return what a checkpoint says of its quantisation; the first place that says anything counts.

    Raises:
        CheckpointError: for a file beside the config that is not JSON.
    """
    values, where = next(_said(ckpt), ({}, CONFIG))
    method = values.get("quant_method")
    method = str(method).lower() if method is not None else None
    return Settings(values, where, ckpt.metadata, method, str(ckpt.config.value.get("model_type")))


def _said(ckpt: Checkpoint) -> Iterator[tuple[Mapping[str, Any], str]]:
    yield from _in_config(ckpt.config.value, CONFIG)
    for name, method in FILES.items():
        if name in ckpt.files:
            values = _load(name, ckpt.files[name])
            inner = values.get("quantization", values)
            if isinstance(inner, Mapping):
                yield {**({"quant_method": method} if method else {}), **inner}, name
    if "tensor_names" in ckpt.metadata:
        yield {"quant_method": "torchao"}, "the metadata of the shards"


def _in_config(part: Mapping[str, Any], where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    for key in QUANTIZATION_KEYS:
        values = part.get(key)
        if isinstance(values, Mapping) and values:
            # MLX names no method; its settings lie under 'quantization', and often once more under the usual key.
            mlx = "quant_method" not in values and {"bits", "group_size"} <= values.keys()
            yield ({"quant_method": "mlx", **values} if mlx else values), where
    for key, nested in part.items():
        if key.endswith("_config") and key not in QUANTIZATION_KEYS and isinstance(nested, Mapping):
            yield from _in_config(nested, f"{where}: {key}")


def _load(name: str, file: SideFile) -> Mapping[str, Any]:
    assert name in SETTINGS_FILES
    try:
        values = load_json((file.read_bytes() if isinstance(file, Path) else file).decode())
    except (ValueError, OSError) as problem:
        raise CheckpointError(f"{name}: {problem}; what it says of the quantisation cannot be known.") from None
    return values if isinstance(values, dict) else {}
