"""Tell which layers change little: the exam that pruning by similarity starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.evaluate.prompts import read_prompts
from tensorsurgeon.parameters import Count, File
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.registry import Findings, exam
from tensorsurgeon.running import running

SHOWN = {"distances": ("role", "layer", "last", "angular distance", "cka")}


@exam
def similarity(
    ckpt: Checkpoint,
    prompts: File,
    position: Literal["last", "all"] = "all",
    block: Count | None = None,
    chat: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Findings:
    """Tell how much each layer, and each block of layers, changes the residual stream, streamed from the disk.

    The influence of a layer is `1 - cosine` of the states before and after it (Men et al., 2024). A block is told by
    the angular distance `arccos(cosine) / pi` of the states before its first layer and after its last (Gromov et al.,
    2024), and by CKA, which does not mind rotations. The states behind the last layer are those before the final norm.
    For each number of layers the block of the least distance is the one that pruning by similarity would remove.

    Args:
        prompts: A file with a prompt on each line, or .jsonl with {"prompt": …} on each.
        position: All positions of each prompt, or the last alone.
        block: Tell only of blocks of so many layers.
        chat: Put each prompt into the model's chat template, up to where its answer begins.
        dtype: What the layers are computed in.
    """
    from tensorsurgeon.evaluate.tokens import Tokens
    from tensorsurgeon.forward.nearness import KERNEL, angular_distance, centred_kernel, cka, influence
    from tensorsurgeon.forward.snapshots import snapshots

    given = read_prompts(Path(prompts))
    tokens = Tokens(ckpt.sources[0].directory)
    asked = [tokens.chat(it.text, it.system, {})[0] if chat else tokens.encode(it.text) for it in given]
    depth = ckpt.layers.count
    if block is not None and block > depth:
        ckpt.layers.check([block - 1])
    with progress_bar(depth + 1, "similarity", running().quiet, "layer") as advance:
        shelf, count = snapshots(ckpt, asked, dtype, position == "last", advance)
    every = -(-count // KERNEL)
    layers = [
        {"layer": layer, "role": "layer", "influence": influence(shelf.get(layer), shelf.get(layer + 1)),
         "angular distance": angular_distance(shelf.get(layer), shelf.get(layer + 1)),
         "rms after": float(shelf.get(layer + 1).double().square().mean().sqrt())}
        for layer in range(depth)
    ]  # fmt: skip
    kernels = [centred_kernel(shelf.get(place)[::every]) for place in range(depth + 1)]
    pairs: list[dict[str, Any]] = []
    for size in range(1, depth + 1) if block is None else (block,):
        for first in range(depth - size + 1):
            before, after = shelf.get(first), shelf.get(first + size)
            distance, alike = angular_distance(before, after), cka(kernels[first], kernels[first + size])
            pairs.append({"layer": first, "role": f"{size} layers", "last": first + size - 1,
                          "angular distance": distance, "cka": alike})  # fmt: skip
    facts = {"name": ckpt.sources[0].name, "layers": depth, "prompts": len(asked), "samples": count,
             "samples in cka": len(kernels[0]), "dtype": dtype}  # fmt: skip
    tables = {"model": [facts], "layers": layers, "least": list(_least(pairs, depth)), "distances": pairs}
    return Findings(tables, shown=SHOWN)


def _least(pairs: list[dict[str, Any]], depth: int) -> Iterator[dict[str, Any]]:
    """Yield for each number of layers the block that changes least; without it some layer has to be left."""
    for role in dict.fromkeys(pair["role"] for pair in pairs):
        least = min((pair for pair in pairs if pair["role"] == role), key=lambda pair: pair["angular distance"])
        first, last = least["layer"], least["last"]
        if last - first + 1 < depth:
            drop = str(first) if first == last else f"{first}-{last}"
            yield {"removes": last - first + 1, "drop-layers": drop,
                   "angular distance": least["angular distance"], "cka": least["cka"]}  # fmt: skip
