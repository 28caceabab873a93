"""config.json as data: where the language model's settings are, and the edits that do not concern layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys under which a config counts its decoder layers."""

EXTRA_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Keys under which a config counts the multi-token prediction layers that follow the stack."""

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys under which a config, at any level, says how the model is quantised."""

SETTINGS_FILES = (
    "hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json",
    "quant_cfg.json", "quant_log.csv", "recipe.yaml",
)  # fmt: skip
"""Files that say how a checkpoint is quantised; vLLM believes the first of them where config.json is silent."""


def text_config_path(config: Config) -> tuple[str, ...]:
    """Return the keys that lead from a model's config to its language model's; empty where it is not nested."""
    for key in _TEXT_CONFIGS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return (key, *text_config_path(nested))
    return ()


def layer_count(config: Config) -> int | None:
    """Return the number of decoder layers that a config states, if it does."""
    return next((config[key] for key in COUNT_KEYS if isinstance(config.get(key), int)), None)


def extra_layers(config: Config) -> int:
    """Return the number of multi-token prediction layers that a config states."""
    return next((config[key] for key in EXTRA_KEYS if isinstance(config.get(key), int)), 0)


def without_quantization(config: Config, dtype: str) -> Config:
    """Return a config that describes plain weights of `dtype` (a torch name such as `bfloat16`).

    Removed at every level are the `QUANTIZATION_KEYS` and `expert_dtype`.
    """
    removed = (*QUANTIZATION_KEYS, "expert_dtype")

    def plain(part: Config) -> Config:
        return {
            key: plain(value) if key.endswith("_config") and isinstance(value, Mapping) else value
            for key, value in part.items()
            if key not in removed
        }

    return with_dtype(plain(config), dtype)


def with_dtype(config: Config, dtype: str) -> Config:
    """Return a config that states `dtype` under the keys that it uses: `dtype`, `torch_dtype`, or both."""
    path = text_config_path(config)
    edited = edit_parts(config, path, lambda part: {**part, **dict.fromkeys(_dtype_keys(part), dtype)})
    if any(_dtype_keys(part) for part in config_parts(config, path)):
        return edited
    return {**edited, "torch_dtype": dtype}


def config_parts(config: Config, path: Sequence[str]) -> Iterator[Config]:
    """Yield the config and each nested one on the path."""
    yield config
    for key in path:
        config = config[key]
        yield config


def edit_parts(
    config: Config, path: Sequence[str], edit: Callable[[Config], Config], only_last: bool = False
) -> Config:
    """Apply `edit` to the config and every nested one on the path, or to the last of them only."""
    if path:
        config = {**config, path[0]: edit_parts(config[path[0]], path[1:], edit, only_last)}
    return config if path and only_last else edit(config)


def _dtype_keys(config: Config) -> list[str]:
    return [key for key in ("dtype", "torch_dtype") if key in config]
