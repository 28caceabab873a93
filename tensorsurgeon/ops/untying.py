"""Give a model whose head is tied to its embedding a head of its own."""

from __future__ import annotations

from tensorsurgeon.checkpoint import Checkpoint
from tensorsurgeon.config import Config, edit_parts
from tensorsurgeon.errors import RefusedError

TIE = "tie_word_embeddings"

HEADS = {
    "gpt_neox.": "embed_out.weight",
    "language_model.": "language_model.lm_head.weight",
    "model.": "lm_head.weight",
    "transformer.": "lm_head.weight",
    "backbone.": "lm_head.weight",
}
"""What the head is called in files, by how the names of layers begin."""


def untied(ckpt: Checkpoint) -> Config:
    """Return the config with head and embedding apart."""
    return edit_parts(ckpt.config.value, ckpt.text_config_path, lambda part: {**part, TIE: False})


def head_name(ckpt: Checkpoint, operation: str) -> str:
    """Return the name that the head has in files where it is not tied."""
    prefix = ckpt.layers.prefix
    for beginning, name in HEADS.items():
        if prefix.startswith(beginning):
            return name
    raise RefusedError(
        f"{operation}: the head of {ckpt.sources[0].name} is tied to its embeddings, and how it is called by itself is "
        f"not known for layers named {prefix}N; leave both tied."
    )
