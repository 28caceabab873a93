"""Tell whether a checkpoint is whole and consistent, so that no engine serves garbage from it in silence."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from tensorsurgeon.arrangement import layer_shapes
from tensorsurgeon.checkpoint import Checkpoint, open_checkpoint
from tensorsurgeon.config import COUNT_KEYS
from tensorsurgeon.document import render
from tensorsurgeon.errors import CheckpointError
from tensorsurgeon.format import load_json
from tensorsurgeon.lora import read_lora
from tensorsurgeon.names import companions
from tensorsurgeon.ops.servable import PROFILES, config_problems, pair_problems
from tensorsurgeon.parameters import Location
from tensorsurgeon.progress import Advance, progress_bar
from tensorsurgeon.quantized import find_modules
from tensorsurgeon.quantized.settings import find_settings
from tensorsurgeon.receipt import seal
from tensorsurgeon.registry import Findings, exam
from tensorsurgeon.running import cores
from tensorsurgeon.source import INDEX, RECEIPT, SINGLE

CHUNK = 4 * 2**20

Problems = Iterator[str]


class Skipped(Exception):
    """A check could not be made; the reason is its text."""


@exam
def verify(model: Location, deep: bool = False) -> Findings:
    """Tell whether a checkpoint is whole and consistent.

    Checked are headers and index, stray weights, the layers and the config, scales of FP8 weights, the
    receipt's SHA-256 of every file, and, where transformers is installed, that the model class finds every
    tensor it needs with the right shape (on the meta device, without memory): vLLM serves garbage for a
    missing linear layer without a word. Of an adapter, its pairs and its config are checked.

    Args:
        deep: Read every tensor and look for NaN and infinity too.
    """
    try:
        ckpt = open_checkpoint(model)
    except CheckpointError as problem:
        return Findings({"checks": [_row("headers and index", problem.problems)]}, problem.problems)
    checks = _checks(ckpt) | {"receipt": lambda: _receipt(ckpt.sources[0].directory)}
    if deep:
        checks["values"] = lambda: _values(ckpt)
    rows, problems = [], []
    for name, check in checks.items():
        try:
            found = list(check())
            rows.append(_row(name, found))
            problems += found
        except Skipped as reason:
            rows.append({"check": name, "result": f"skipped: {reason}"})
    return Findings({"checks": rows}, tuple(problems))


def faults(ckpt: Checkpoint) -> list[str]:
    """Return what would keep an engine from serving a checkpoint rightly, most of which vLLM does not notice."""
    found: list[str] = []
    for check in _checks(ckpt).values():
        with suppress(Skipped):
            found += check()
    return found


def _checks(ckpt: Checkpoint) -> dict[str, Callable[[], Problems]]:
    directory = ckpt.sources[0].directory
    checks: dict[str, Callable[[], Problems]] = {
        "headers and index": lambda: _unlisted(ckpt, directory),
        "stray weights": lambda: _strays(ckpt, directory),
    }
    if ckpt.is_adapter:
        return checks | {"config": lambda: config_problems(ckpt), "pairs": lambda: _pairs(ckpt)}
    return checks | {
        "layers": lambda: _layers(ckpt),
        "quantisation": lambda: _quantization(ckpt),
        "model class": lambda: _model_class(ckpt, directory),
    }


def _row(name: str, problems: Sequence[str]) -> dict[str, Any]:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return {"check": name, "result": count if problems else "ok"}


def _unlisted(ckpt: Checkpoint, directory: Path) -> Problems:
    """Find tensors that the index does not list: whether they are loaded depends on the reader."""
    if (directory / INDEX).exists():
        listed = load_json((directory / INDEX).read_bytes().decode())["weight_map"]
        for name, tensor in ckpt.tensors.items():
            if name not in listed:
                file = tensor.span.path.name if tensor.span else ""
                yield f"{INDEX}: does not list {name!r}, which {file} holds; some engines load it all the same."


def _strays(ckpt: Checkpoint, directory: Path) -> Problems:
    """Find weights that do not belong: without an index engines load them all, later ones winning."""
    known = set(ckpt.sources[0].headers)
    for file in sorted(directory.glob("*.safetensors")):
        # Mistral's own copy of the same weights, as published; tensorsurgeon never writes one.
        published = file.name.startswith("consolidated") and not (directory / RECEIPT).exists()
        if file.name in known or published:
            continue
        if file.name == SINGLE:
            yield f"{SINGLE}: lies beside {INDEX}; which of the two is the model depends on the reader."
        else:
            yield f"{file.name}: is not part of the model; some engines load it all the same. Remove it."


def _layers(ckpt: Checkpoint) -> Problems:
    """Find missing layers, layers unlike the others of their kind, and a config of another depth."""
    try:
        stack = ckpt.layers
    except CheckpointError as problem:
        yield from problem.problems
        return
    config = ckpt.text_config
    for key in COUNT_KEYS:
        if isinstance(config.get(key), int) and config[key] != stack.count:
            yield f"config.json: {key} is {config[key]}, but there are tensors of {stack.count} layers."
    types = config.get("layer_types") or []
    if not isinstance(types, list):
        yield f"config.json: layer_types is {types!r}, not a list."
        types = []
    if types and len(types) not in (stack.count, stack.count + stack.extra):
        yield f"config.json: layer_types has {len(types)} entries for {stack.count} layers."
        types = []
    shapes = layer_shapes(ckpt, stack)
    shared = config.get("num_kv_shared_layers")
    # Layers that take keys and values from earlier ones may come without weights for their own.
    own = stack.count - (shared if isinstance(shared, int) else 0)
    kinds: dict[Any, list[int]] = defaultdict(list)
    for layer in range(stack.count):
        experts = any(".experts." in rest for rest, _ in shapes[layer])
        kinds[(str(types[layer]) if types else "", experts, layer < own)].append(layer)
    for (kind, *_), members in kinds.items():
        usual, count = Counter(shapes[layer] for layer in members).most_common(1)[0]
        if 2 * count <= len(members):
            continue
        for layer in members:
            yield from _unlike(layer, shapes[layer], usual, f"{count} other {kind} layers".replace("  ", " "))


def _unlike(layer: int, shapes: frozenset[Any], usual: frozenset[Any], others: str) -> Problems:
    """Tell what a layer lacks or has too much; one with tensors of its own in place of others is another kind."""
    here, there = dict(shapes), dict(usual)
    if here.keys() - there.keys() and there.keys() - here.keys():
        return
    for rest in sorted(there.keys() - here.keys()):
        yield f"layer {layer}: lacks {rest}, which {others} have."
    for rest in sorted(here.keys() - there.keys()):
        yield f"layer {layer}: has {rest}, which {others} do not have."
    for rest in sorted(here.keys() & there.keys()):
        if here[rest] != there[rest]:
            yield f"layer {layer}: {rest} is {list(here[rest])}, and {list(there[rest])} in {others}."


def _pairs(ckpt: Checkpoint) -> Problems:
    """Find half pairs, factors that do not fit each other or the config, and targets without a pair."""
    lora = read_lora(ckpt)
    yield from pair_problems(ckpt, lora, None, PROFILES["peft"])
    targets = ckpt.config.value.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not any(module == target or module.endswith(f".{target}") for module in lora.modules):
            yield f"adapter_config.json: target_modules has {target!r}, and no pair is for it."


def _quantization(ckpt: Checkpoint) -> Problems:
    settings = find_settings(ckpt).values
    found = find_modules(ckpt)
    if found.coded and not settings:
        first = next(name for name in ckpt if name in found.coded)
        yield f"config.json: has no quantization_config, but {len(found.coded)} tensors are quantised: {first!r}."
    if settings and not found.coded:
        yield "config.json: has a quantization_config, but no tensor is quantised."
    yield from found.problems


def _receipt(directory: Path) -> Problems:
    """Find files that differ from what the receipt says was written."""
    if not (directory / RECEIPT).exists():
        raise Skipped("there is no receipt")
    try:
        text = (directory / RECEIPT).read_bytes().decode()
        receipt = load_json(text)
        files = {str(name): str(entry["sha256"]) for name, entry in receipt["files"].items()}
        sealed = receipt["seal"] == seal(receipt) and text == render(receipt) + "\n"
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{RECEIPT}: is damaged."
        return
    if not sealed:
        yield f"{RECEIPT}: was changed after it was written."
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    present = {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}
    yield from (f"{name}: is missing; the receipt lists it." for name in sorted(files.keys() - present))
    yield from (
        f"{name}: is not in the receipt; it was added later." for name in sorted(present - files.keys() - {RECEIPT})
    )
    names = sorted(files.keys() & present)
    total = sum((directory / name).stat().st_size for name in names)
    with progress_bar(total, "receipt") as advance, ThreadPoolExecutor(cores()) as pool:
        digests = pool.map(lambda name: _sha256(directory / name, advance), names)
        for name, digest in zip(names, digests, strict=True):
            if digest != files[name]:
                yield f"{name}: was changed after it was written; its SHA-256 is not the receipt's."


def _sha256(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _model_class(ckpt: Checkpoint, directory: Path) -> Problems:
    """Find tensors that the model class misses, does not know, or has in another shape."""
    missing = [library for library in ("transformers", "accelerate") if not find_spec(library)]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed")
    from tensorsurgeon.exams.meta import load_problems, model_class

    if model_class(ckpt.config.value) is None:
        raise Skipped("transformers does not have it")
    found = find_modules(ckpt)
    if any(plain.name not in ckpt or plain.shape != ckpt[plain.name].shape for plain in found.modules.values()):
        raise Skipped("the weights are packed, and have other names and shapes")
    described = {*found.tensors, *found.idle, *companions(ckpt.tensors)} - found.modules.keys()
    yield from load_problems(directory, ckpt.config.value, described)


def _values(ckpt: Checkpoint) -> Problems:
    """Find NaN and infinity in plain tensors and in the codes and scales of FP8."""
    from tensorsurgeon.kernels.finite import count_nonfinite

    total = sum(tensor.nbytes for tensor in ckpt.tensors.values())
    with progress_bar(total, "values") as advance:
        for name, tensor in ckpt.tensors.items():
            found = [count_nonfinite(tensor.read(start, stop)) for start, stop in tensor.blocks(CHUNK)]
            nan, infinite = (sum(counts) for counts in zip((0, 0), *found, strict=True))
            advance(tensor.nbytes)
            if nan or infinite:
                yield f"{name}: holds {nan} NaN and {infinite} infinite of {prod(tensor.shape)} elements."
