"""The digest of a checkpoint: which bytes were asked."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tensorsurgeon.running import running
from tensorsurgeon.source import Source

PIECE = 4 * 2**20
BESIDE = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "added_tokens.json", "special_tokens_map.json", "chat_template*",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files beside config and weights that decide what a model is asked, and where it stops."""


def digested_files(source: Source) -> list[str]:
    """Return the names of the files that decide what a model answers."""
    names = {*source.headers, source.layout.config}
    names |= {path.name for pattern in BESIDE for path in source.directory.glob(pattern) if path.is_file()}
    return sorted(names)


def checkpoint_digest(source: Source) -> str:
    """Return a SHA-256, in hexadecimal, of the name and SHA-256 of each file that decides what a model answers.

    Every weight is read: the digest tells what was asked, not what a receipt says of it.
    """
    listed = digested_files(source)
    with ThreadPoolExecutor(running().workers) as pool:
        digests = list(pool.map(lambda name: _sha256(source.directory / name), listed))
    lines = "".join(f"{digest}  {name}\n" for name, digest in zip(listed, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
