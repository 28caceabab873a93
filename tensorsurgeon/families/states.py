"""Rules that bind layers to others, to offsets, or to their number: shared keys and values, indexers, residuals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from tensorsurgeon.config import Config
from tensorsurgeon.fields import Field, Fill, Meaning, entries, listed, lookup
from tensorsurgeon.rules import implied, number, searched


def shared_kv(default: int, layer_types: Field) -> Field:
    """Return the field of last layers that take keys and values from the last earlier layer of their type.

    It says of each layer which one it takes them from: itself, or the producer.
    """

    def fill(config: Config, count: int) -> Meaning:
        first = count - number(config, "num_kv_shared_layers", default)
        kinds = layer_types.read(config, count) or []
        producers = {kind: layer for layer, kind in enumerate(kinds[: max(first, 0)])}
        return [layer if layer < first else producers.get(kinds[layer]) for layer in range(count)]

    def candidates(meaning: Meaning, config: Config) -> Iterator[Config]:
        own = [place for place, target in enumerate(meaning) if target == place]
        yield {"num_kv_shared_layers": len(meaning) - 1 - max(own, default=-1)}

    return searched(["num_kv_shared_layers"], fill, candidates, points=True)


def _indexers(config: Config, count: int) -> Meaning:
    pattern = lookup(config, "index_topk_pattern")
    if pattern:
        return [{"F": "full", "S": "shared"}.get(entry, entry) for entry in entries(pattern, config, count)]
    freq, offset = max(number(config, "index_topk_freq", 1), 1), number(config, "index_skip_topk_offset", 2)
    return ["full" if max(layer - offset + 1, 0) % freq == 0 else "shared" for layer in range(count)]


def _indexer_pattern(meaning: Meaning, config: Config) -> Iterator[Config]:
    if not lookup(config, "index_topk_pattern"):
        yield {"index_topk_pattern": "".join(kind[0].upper() for kind in meaning)}


def indexer_types(fill: Fill) -> tuple[Field, Field, Field]:
    """Return the fields of layers that choose keys by an indexer of their own or by that of an earlier layer.

    vLLM reads the pattern, transformers the list.
    """
    kinds = implied("indexer_types", fill, ["index_topk_freq", "index_skip_topk_offset"], stale=_indexer_pattern)

    def providers(config: Config, count: int) -> Meaning:
        provider: int | None = None
        found: Meaning = []
        for layer, kind in enumerate(kinds.read(config, count) or []):
            provider = layer if kind == "full" else provider
            found.append(provider)
        return found

    kinds = replace(kinds, keys=(*kinds.keys, "index_topk_pattern"))
    shared = searched(["indexer_types"], providers, lambda meaning, config: (), points=True)
    return listed("index_topk_pattern"), kinds, shared


INDEXERS = indexer_types(_indexers)


def residual_scale() -> Field:
    """Return MiniCPM's field: `scale_depth / sqrt(layers)` times what a layer makes is added to the residual."""

    def read(config: Config, count: int) -> Meaning:
        depth = config.get("scale_depth", 1.4)
        # Twelve digits: what is written is read back through a square root.
        return [float(f"{(math.sqrt(count) if depth is None else depth) / math.sqrt(count):.12g}")] * count

    def write(meaning: Meaning, config: Config, count: int) -> Config:
        return {} if len(meaning) == count else {"scale_depth": meaning[0] * math.sqrt(len(meaning))}

    return Field(("scale_depth",), read, write)


def period_offset(name: str, period: int, offset: int) -> Field:
    """Return Jamba's field: layers at an offset within each period."""
    keys = (f"{name}_layer_period", f"{name}_layer_offset")

    def fill(config: Config, count: int) -> Meaning:
        size, start = number(config, keys[0], period), number(config, keys[1], offset)
        return [layer % size == start for layer in range(count)]

    def candidates(meaning: Meaning, config: Config) -> Iterator[Config]:
        hits = [place for place, hit in enumerate(meaning) if hit] or [len(meaning)]
        size = hits[1] - hits[0] if len(hits) > 1 else max(hits[0] + 1, len(meaning) - hits[0])
        yield dict(zip(keys, (size, hits[0]), strict=True))

    return searched(keys, fill, candidates)
