"""From a model and groups of prompts to activations, layer by layer: the file that `directions` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.derivations.destination import check_out, write_out
from tensorsurgeon.errors import UsageError
from tensorsurgeon.evaluate.prompts import GivenPrompt, read_prompts
from tensorsurgeon.parameters import Count, File, Layers
from tensorsurgeon.registry import Findings, derivation

GROUP = "all"
"""The group of prompts that name none."""


class Sample(NamedTuple):
    """A prompt: the group that it belongs to, and its tokens."""

    group: str
    tokens: list[int]


@derivation
def collect(
    ckpt: Checkpoint,
    prompts: File,
    out: File,
    site: Literal["residual", "attention", "mlp"] = "residual",
    position: Literal["last", "all", "mean"] = "last",
    layers: Layers | None = None,
    chat: bool = False,
    batch: Count = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Findings:
    """Collect what layers leave behind on groups of prompts, streamed from the disk, for `directions`.

    OUT holds an array in float32 of shape (samples, width) for each group and layer, named `en_L9`, in the order of the
    prompts. Residual states are those behind the layer, the last layer's before the final norm; of attention and MLP
    it is what the module gives, before any norm that may follow it. Each layer is read once and run on all prompts.

    Args:
        prompts: A file with a prompt on each line, or .jsonl with {"prompt": …, "group": …} on each.
        out: The file to write, .safetensors or .npz.
        site: The residual stream behind each layer, or what its attention or MLP writes.
        position: The last token of each prompt, all of its tokens as a sample each, or their mean.
        layers: Layers to collect, such as 9-26; else all.
        chat: Put each prompt into the model's chat template, up to where its answer begins.
        batch: Most prompts run together, filled up on the left; 1 gives the same bits whatever else is in the file.
        dtype: What the layers are computed in.

    Raises:
        UsageError: for prompts that cannot be used, and layers that are not there.
        RefusedError: for a model that cannot be run layer by layer, or has no such site.
        DestinationError: for a file that exists already or cannot be written.
    """
    from tensorsurgeon.forward.activations import Activations, as_file, joined

    place = Path(out)
    given = read_prompts(Path(prompts))
    check_out(place, "activations", (".safetensors", ".npz"))
    if layers:
        ckpt.layers.check(layers)
    samples = _samples(ckpt, given, chat)
    found = Activations(ckpt, [it.tokens for it in samples], site, position, batch, dtype).collect(layers)
    groups = list(dict.fromkeys(sample.group for sample in samples))
    arrays = {
        f"{group}_L{layer}": joined([row for row, it in zip(rows, samples, strict=True) if it.group == group])
        for layer, rows in found.items()
        for group in groups
    }
    told = {"model": ckpt.sources[0].name, "site": site, "position": position, "dtype": dtype, "chat": json.dumps(chat)}
    write_out(place, as_file(arrays, told, place.suffix))
    return Findings({"activations": list(_rows(arrays, found, groups))})


def _samples(ckpt: Checkpoint, given: Sequence[GivenPrompt], chat: bool) -> list[Sample]:
    from tensorsurgeon.evaluate.tokens import Tokens

    tokens = Tokens(ckpt.sources[0].directory)
    bare = [number for number, it in enumerate(given, 1) if not it.group]
    if len(bare) not in (0, len(given)):
        raise UsageError(
            f"prompts: {len(bare)} name no group, the first of them is prompt {bare[0]}; name all or none."
        )
    return [
        Sample(it.group or GROUP, tokens.chat(it.text, it.system, {})[0] if chat else tokens.encode(it.text))
        for it in given
    ]


def _rows(arrays: Mapping[str, Any], layers: Any, groups: Sequence[str]) -> Iterator[dict[str, Any]]:
    for layer in layers:
        for group in groups:
            array = arrays[f"{group}_L{layer}"]
            yield {
                "layer": layer,
                "group": group,
                "samples": array.shape[0],
                "width": array.shape[1],
                "rms": float((array.astype("float64") ** 2).mean() ** 0.5),
            }
