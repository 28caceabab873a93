"""What transformers and vLLM make of block FP8: which modules they are told to leave plain, and what they fuse.

transformers leaves a module plain whose name begins or ends with an entry of `modules_to_not_convert`, or begins with
what the entry matches (quantizers/quantizers_utils.py); vLLM one whose name is an entry, and the experts of a layer
where an entry is one of them (quantization/utils/quant_utils.py). Each takes all others for quantised, whatever the
tensors are: codes without scales are then read as numbers, without a word.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.fused import grid_of, parts_of, slots_of
from tensorsurgeon.quantized.decoding import BlockSize

WEIGHT = ".weight"
HEAD = "lm_head"
HEADS = {
    "bert": "cls.predictions.decoder", "distilbert": "vocab_projector", "gpt_neox": "embed_out",
    "modernbert": "decoder", "modernbert-decoder": "decoder",
}  # fmt: skip
"""What a head that is tied, and so in no file, is called in transformers where it is not HEAD."""
OWN_CLASS = ("falcon",)
"""Model types whose linear layers are a class of their own, which transformers does not take for FP8."""
EXPERTS = ".experts."
FUSED = (("q", "k", "v"), ("gate", "up"), ("q_a", "kv_a"))
"""What vLLM makes one matrix of, in order."""


def plain_modules(ckpt: Checkpoint, chosen: Collection[str]) -> list[str]:
    """Return the names of modules that stay plain and may be taken for linear layers, with the head, tied or not.

    Raises:
        RefusedError: where no list can tell them from those that are quantised.
    """
    if ckpt.model_type in OWN_CLASS:
        raise RefusedError(f"quantize: transformers has linear layers of its own for {ckpt.model_type}, without FP8.")
    quantized = set(chosen)
    plain = [HEAD, *filter(None, [HEADS.get(ckpt.model_type)])]
    for name, tensor in ckpt.tensors.items():
        if name in quantized or len(tensor.shape) < 2:
            continue
        module, role = name.removesuffix(WEIGHT), ckpt.roles[name]
        before, inside, _ = name.partition(EXPERTS)
        if inside:
            plain.append(before + inside.rstrip("."))
        elif role.group == "expert":
            # transformers and vLLM call them `experts` whatever the file does.
            plain += [module, module.rpartition(".")[0] + EXPERTS.rstrip(".")]
        elif name.endswith(WEIGHT):
            plain.append(module)
    plain = list(dict.fromkeys(plain))
    raise_all(RefusedError, _confused(plain, [name.removesuffix(WEIGHT) for name in chosen]))
    return plain


def _confused(plain: Sequence[str], quantized: Sequence[str]) -> Iterator[str]:
    """Yield the modules that stay plain and whose names stand for quantised ones too."""
    forwards, backwards = sorted(quantized), sorted(name[::-1] for name in quantized)
    for name in plain:
        found = _beginning(name, forwards) or _beginning(name[::-1], backwards)[::-1]
        if found:
            yield (
                f"quantize: {name} stays plain, and engines then take {found} for plain as well; skip both, or neither."
            )


def _beginning(prefix: str, names: Sequence[str]) -> str:
    """Return the first of sorted names that begins with something, or nothing."""
    place = bisect_left(names, prefix)
    return names[place] if place < len(names) and names[place].startswith(prefix) else ""


def engine_warnings(ckpt: Checkpoint, chosen: Collection[str], block: BlockSize) -> Iterator[str]:
    """Yield what a user should know of how engines read the result."""
    yield from _stacked(ckpt)
    yield from _fused(ckpt, chosen, block)
    ragged = [name for name in chosen if any(size % each for size, each in zip(ckpt[name].shape, block, strict=True))]
    if ragged:
        fitting = "x".join(str(math.gcd(*(ckpt[name].shape[axis] for name in chosen))) for axis in range(2))
        yield (
            f"quantize: {_some(ragged)}: {list(ckpt[ragged[0]].shape)} is no whole number of {_text(block)} blocks; "
            f"transformers (5.19) does not decode such weights, or wrongly. A block of {fitting} would fit all."
        )


def _stacked(ckpt: Checkpoint) -> Iterator[str]:
    stacked = [name for name, role in ckpt.roles.items() if role.group == "expert" and role.layout.startswith("expert")]
    if stacked:
        share = sum(math.prod(ckpt[name].shape) for name in stacked) / sum(
            math.prod(it.shape) for it in ckpt.tensors.values()
        )
        yield (
            f"quantize: {_some(stacked)}: experts that are stacked in one tensor stay plain, {share:.0%} of all "
            "weights; vLLM takes FP8 experts one by one."
        )


def _fused(ckpt: Checkpoint, chosen: Collection[str], block: BlockSize) -> Iterator[str]:
    """Yield what vLLM cannot fuse: matrices with blocks across their borders, and quantised ones with plain ones."""
    together: dict[str, dict[str, str]] = {}
    for name, role in ckpt.roles.items():
        if role.kind == "weight" and len(ckpt[name].shape) == 2:
            together.setdefault(name.removesuffix(WEIGHT).rpartition(".")[0], {})[role.part] = name
    broken, split, mixed = [], [], []
    quantized = set(chosen)
    for parts in together.values():
        for wanted in FUSED:
            names = [parts[part] for part in wanted if part in parts]
            inside = [name for name in names if name in quantized]
            if len(names) > 1 and inside and len(inside) < len(names):
                mixed.append(next(name for name in names if name not in quantized))
            if len(inside) > 1:
                uneven = [name for name in inside if ckpt[name].shape[0] % block[0]]
                experts = ckpt.roles[inside[0]].group == "expert"
                broken += [name for name in uneven if experts or name != inside[-1]][:1]
                split += [name for name in uneven if name == inside[-1] and wanted[-1] != "kv_a"]
    for name in chosen:
        sizes = _partitions(ckpt, name)
        broken += [name] if any(size % block[0] for size in sizes[:-1]) else []
        split += [name] if sizes and sizes[-1] % block[0] else []
    if broken:
        yield (
            f"quantize: {_some(broken)}: vLLM fuses this with its neighbours, and its rows are no multiple of "
            f"{block[0]}: it does not load the model, or scales rows with what belongs to others. Choose another block."
        )
    elif split:
        yield f"quantize: {_some(split)}: rows are no multiple of {block[0]}, so vLLM cannot split it among devices."
    if mixed:
        yield f"quantize: {_some(mixed)}: stays plain, but not all that vLLM fuses it with: it does not load that."


def _partitions(ckpt: Checkpoint, name: str) -> list[int]:
    """Return the outputs of each part of a matrix that is fused on disk; nothing of any other."""
    role = ckpt.roles[name]
    if len(parts_of(role)) == 1 or role.fused != "blocks" or role.part == "kv_a":
        return []
    grid = grid_of(role, ckpt[name].shape, ckpt.text_config)
    try:
        slots = slots_of(role, grid, ckpt.text_config)
    except RefusedError:
        return []
    return [it.share(grid.outputs) for it in slots.values()]


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _text(block: BlockSize) -> str:
    return f"{block[0]}x{block[1]}"
