"""Read mergekit's YAML where it re-orders layers and mixes nothing: `merge_method: passthrough`.

mergekit 0.1.5, `mergekit/config.py` and `plan.py`: `layer_range` is half-open; what stands before the layers comes
from the model of the first slice, what stands behind them from that of the last; the config is the base model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tensorsurgeon.errors import UsageError, raise_all

UNSUPPORTED = {
    "modules": "write the slices of the language model at the top level",
    "parameters": "scaling of tensors is not part of stitching",
    "tokenizer": "the tokenizer is the base model's",
    "chat_template": "the chat template is the base model's",
    "residual_weight": "mergekit does not use it either",
}
"""Settings of mergekit that change what comes out, and why they are not followed."""


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Tell whether a recipe is one of mergekit's."""
    return "merge_method" in data


def translated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe that does what a mergekit config says.

    Raises:
        UsageError: with everything that cannot be followed.
    """
    raise_all(UsageError, _problems(data))
    slices = [_slice(item) for item in data.get("slices") or ()]
    only = [str(item["model"]) for item in data.get("models") or ()]
    base = str(data["base_model"]) if data.get("base_model") else (slices[0][0] if slices else only[0])
    used = list(dict.fromkeys(model for model, _, _ in slices))
    recipe: dict[str, Any] = {"source": base, "steps": []}
    if used == [base]:
        layers = ",".join(f"{first}-{last}" for _, first, last in slices)
        recipe["steps"].append({"select-layers": {"layers": layers}})
    elif used:
        names = {base: "base"} | _names(model for model in used if model != base)
        layers = ",".join(f"{names[model]}:{first}-{last}" for model, first, last in slices)
        models = {name: model for model, name in names.items() if model != base}
        recipe["steps"].append({"stitch": {"layers": layers, "models": models}})
    dtype = data.get("out_dtype") or data.get("dtype")
    if dtype:
        recipe["steps"].append({"cast": {"dtype": dtype}})
    return recipe | {key: data[key] for key in ("dest", "max_shard_size", "target") if key in data}


def _problems(data: Mapping[str, Any]) -> Iterator[str]:
    method = data["merge_method"]
    if method != "passthrough":
        yield f"merge_method: {method!r} mixes weights; only passthrough, which moves them, is read."
    yield from _unsupported("", data)
    slices, models = data.get("slices"), data.get("models")
    if bool(slices) == bool(models) and "modules" not in data:
        yield "give either slices or models."
    for key, items in (("slices", slices), ("models", models)):
        if items and not (isinstance(items, Sequence) and all(isinstance(item, Mapping) for item in items)):
            yield f"{key}: is not a list of mappings."
            return
    if models and (len(models) != 1 or not models[0].get("model")):
        yield f"models: passthrough takes one model, and {len(models)} are given."
    for place, item in enumerate(slices or ()):
        yield from _slice_problems(f"slices.{place}", item)
    source = data.get("tokenizer_source")
    if source not in (None, "base", data.get("base_model")):
        yield f"tokenizer_source: {source!r} is not followed; the tokenizer is the base model's."
    for where, reference in _references(data):
        if "+" in str(reference) or not isinstance(reference, str):
            yield f"{where}: {reference!r} is not a directory or hub id; merge an adapter first."


def _unsupported(where: str, settings: Mapping[str, Any]) -> Iterator[str]:
    for key in settings.keys() & UNSUPPORTED.keys():
        if settings[key] is not None:
            yield f"{where}{key}: is not followed; {UNSUPPORTED[key]}."


def _slice_problems(where: str, item: Mapping[str, Any]) -> Iterator[str]:
    yield from _unsupported(f"{where}.", item)
    sources = item.get("sources")
    if not isinstance(sources, Sequence) or len(sources) != 1 or not isinstance(sources[0], Mapping):
        yield f"{where}.sources: passthrough takes one source in each slice."
        return
    yield from _unsupported(f"{where}.sources.0.", sources[0])
    found = sources[0].get("layer_range")
    whole = isinstance(found, Sequence) and len(found) == 2 and all(type(number) is int for number in found)
    if not whole or not 0 <= found[0] < found[1]:  # type: ignore[index]
        yield f"{where}.sources.0.layer_range: {found!r} is not [first, end] of at least one layer, the end left out."
    if not sources[0].get("model"):
        yield f"{where}.sources.0.model: is missing."


def _references(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if data.get("base_model"):
        yield "base_model", data["base_model"]
    for item in data.get("models") or ():
        yield "models.0.model", item.get("model")
    for place, item in enumerate(data.get("slices") or ()):
        for source in item.get("sources") or ():
            yield f"slices.{place}.sources.0.model", source.get("model") if isinstance(source, Mapping) else source


def _slice(item: Mapping[str, Any]) -> tuple[str, int, int]:
    (source,) = item["sources"]
    first, end = source["layer_range"]
    return str(source["model"]), first, end - 1


def _names(models: Iterable[str]) -> dict[str, str]:
    """Return a short name for each model: the last part of its path, told apart by a number where need be."""
    names: dict[str, str] = {}
    for model in models:
        name = re.sub(r"[^\w.-]", "_", model.rstrip("/").rpartition("/")[2])
        name = name if re.match(r"[A-Za-z_]", name) else f"model-{name}"
        taken = {"base", *names.values()}
        names[model] = next(it for it in (name, *(f"{name}-{n}" for n in range(2, 99))) if it not in taken)
    return names
