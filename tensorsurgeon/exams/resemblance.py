"""Tell which layers change little: the exam that pruning by similarity starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from tensorsurgeon.charts import Chart, Panel, Point, Series, scaled
from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.evaluate.prompts import read_prompts
from tensorsurgeon.parameters import Count, File
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.registry import Findings, exam
from tensorsurgeon.running import running

SHOWN = {"blocks": ("removes", "drop-layers", "angular distance", "cka")}
Row = dict[str, Any]


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
        {"layer": layer, "influence": influence(shelf.get(layer), shelf.get(layer + 1)),
         "angular distance": angular_distance(shelf.get(layer), shelf.get(layer + 1)),
         "rms after": float(shelf.get(layer + 1).double().square().mean().sqrt())}
        for layer in range(depth)
    ]  # fmt: skip
    kernels = [centred_kernel(shelf.get(place)[::every]) for place in range(depth + 1)]
    blocks: list[Row] = []
    for size in range(1, depth + 1) if block is None else (block,):
        for first in range(depth - size + 1):
            before, after = shelf.get(first), shelf.get(first + size)
            drop = str(first) if size == 1 else f"{first}-{first + size - 1}"
            blocks.append({"removes": size, "drop-layers": drop, "first": first,
                           "angular distance": angular_distance(before, after),
                           "cka": cka(kernels[first], kernels[first + size])})  # fmt: skip
    facts = {"name": ckpt.sources[0].name, "layers": depth, "prompts": len(asked), "samples": count,
             "samples in cka": len(kernels[0]), "dtype": dtype}  # fmt: skip
    tables = {"model": [facts], "least": list(_least(blocks, depth)), "layers": layers, "blocks": blocks}
    return Findings(tables, shown=SHOWN, charts=[*_layer_charts(layers), *_block_charts(blocks)])


def _least(blocks: Sequence[Row], depth: int) -> Iterator[Row]:
    """Yield for each number of layers the block that changes least; without it some layer has to be left."""
    for size in dict.fromkeys(it["removes"] for it in blocks if it["removes"] < depth):
        yield min((it for it in blocks if it["removes"] == size), key=lambda it: it["angular distance"])


def _layer_charts(layers: Sequence[Row]) -> Iterator[Chart]:
    ticks = [(row["layer"], str(row["layer"])) for row in layers]
    for measure in ("influence", "angular distance", "rms after"):
        points = [_point(row["layer"], f"layer {row['layer']}", measure, row[measure]) for row in layers]
        yield scaled("By layer", measure, "bars", "layer", [Panel("", [Series("", points)], ticks)])


def _block_charts(blocks: Sequence[Row]) -> Iterator[Chart]:
    """Yield blocks of several sizes as cells, a row for each size."""
    sizes = list(dict.fromkeys(row["removes"] for row in blocks))
    ticks = [(row["first"], str(row["first"])) for row in blocks if row["removes"] == sizes[0]]
    for measure in ("angular distance", "cka"):
        series = [
            Series(f"{size} layer{'s' * (size > 1)}", [
                _point(row["first"], f"layers {row['drop-layers']}", measure, row[measure])
                for row in blocks if row["removes"] == size
            ])
            for size in sizes
        ]  # fmt: skip
        kind: Literal["map", "bars"] = "map" if len(sizes) > 1 else "bars"
        yield scaled("By block of layers", measure, kind, "first layer", [Panel("", series, ticks)])


def _point(at: int, what: str, measure: str, value: float) -> Point:
    if not isfinite(value):
        return Point(at, None, None, f"{what}: {measure} is no number")
    return Point(at, value, None, f"{what}: {measure} {value:.4g}")
