"""Where a checkpoint lies: a directory or a hub id; its index, headers and side files, checked.

Nothing in it is executed, pickle is never read, and the names in its index cannot reach outside its
directory; links in the directory are followed, as the hub's cache is made of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tensorsurgeon import document
from tensorsurgeon.document import Document
from tensorsurgeon.errors import CheckpointError, FormatError, UsageError, raise_all
from tensorsurgeon.format import Header, Span, is_plain_file_name, load_json, read_header
from tensorsurgeon.metadata import merged
from tensorsurgeon.tensor import LazyTensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECEIPT = "tensorsurgeon.json"


class Layout(NamedTuple):
    """What files of a kind of checkpoint are called: its config, its weights, or the index where they are in shards."""

    config: str
    weights: str
    shards: str


MODEL = Layout(CONFIG, SINGLE, INDEX)
ADAPTER = Layout("adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json")
"""A PEFT adapter, which is never cut into shards."""

_OTHER_WEIGHTS = (
    "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "onnx_data", "ot", "tflite", "npz", "pdparams",
)  # fmt: skip
_WEIGHTS = re.compile(rf"\.(safetensors|{'|'.join(_OTHER_WEIGHTS)})(\.index\.json)?$")
"""Weights in any format, and their indexes: they never travel along, as they would contradict what is written."""

_PREFERRED_BY_VLLM = re.compile(r"^(consolidated.*|params\.json)$")
"""Mistral's own files: vLLM prefers them to config.json and model*.safetensors, so a stale copy wins."""

_HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?$")

SideFile = Path | bytes
"""A file that travels along: where it lies, or what it holds."""


class Source(NamedTuple):
    """A directory that a checkpoint was opened from; `name` is the hub id or the directory's name."""

    name: str
    directory: Path
    headers: Mapping[str, Header]
    config: Document
    layout: Layout = MODEL

    def fingerprint(self) -> str:
        """Return a SHA-256 of the config and of every header, in hexadecimal."""
        digest = hashlib.sha256(self.config.text.encode())
        for file, header in self.headers.items():
            digest.update(repr((file, header)).encode())
        return digest.hexdigest()

    def stamp(self) -> dict[str, tuple[int, int]]:
        """Return size and modification time, in nanoseconds, of each file, which tell whether it was changed."""
        stats = {file: os.stat(self.directory / file) for file in (*self.headers, self.layout.config)}
        return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


class Contents(NamedTuple):
    """What a source holds, and what a user should know about it."""

    source: Source
    tensors: dict[str, LazyTensor]
    files: dict[str, SideFile]
    metadata: dict[str, str]
    warnings: tuple[str, ...]


def read_source(location: str | os.PathLike[str]) -> Contents:
    """Read the headers and the JSON of a checkpoint.

    Raises:
        UsageError: for a location that is neither a directory nor a hub id.
        CheckpointError: for a directory that holds no sound safetensors checkpoint, with all that is wrong.
    """
    name, directory = _locate(location)
    layout = ADAPTER if _is_adapter(directory) else MODEL
    config = _read_config(directory, layout.config)
    shards, listed = _read_index(directory, layout)
    headers, problems = _read_headers(directory, shards)
    tensors, unlisted, conflicts = _collect(directory, headers, listed)
    raise_all(CheckpointError, problems or conflicts)
    files, left = _side_files(directory, {*headers, *layout})
    metadata, clashes = merged(headers)
    behind = [f"left behind, as they hold or describe other weights: {', '.join(left)}."] if left else []
    source = Source(name, directory, headers, config, layout)
    return Contents(source, tensors, files, metadata, (*unlisted, *behind, *clashes))


def _is_adapter(directory: Path) -> bool:
    return not (directory / CONFIG).exists() and (directory / ADAPTER.config).exists()


def _locate(location: str | os.PathLike[str]) -> tuple[str, Path]:
    path = Path(location)
    if path.is_dir():
        return path.resolve().name, path.resolve()
    if path.exists():
        raise UsageError(f"{path}: is a file; name the directory that holds the checkpoint.")
    match = _HUB_ID.match(str(location))
    if not match:
        raise UsageError(f"{path}: there is no such directory, and it is not a hub id such as org/name.")
    return str(location), _fetch(match["repo"], match["revision"])


def _fetch(repo: str, revision: str | None) -> Path:
    """Fetch what is needed of a hub repository: first all but weights, then the shards that the index names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        needless = ["*.safetensors", "consolidated*", *(f"*.{ending}" for ending in _OTHER_WEIGHTS)]
        snapshot = Path(snapshot_download(repo, revision=revision, ignore_patterns=needless))
        shards = _read_index(snapshot, ADAPTER if _is_adapter(snapshot) else MODEL, fetching=True)[0]
        # The snapshot is named after its commit: the shards come from the same one.
        return Path(snapshot_download(repo, revision=snapshot.name, allow_patterns=list(shards)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise CheckpointError(f"{repo}: not a directory here, and not to be had from the hub: {first}") from None


def _read_config(directory: Path, name: str) -> Document:
    try:
        return document.parse((directory / name).read_bytes().decode())
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: there is no {name}; this is not a checkpoint directory.") from None
    except (ValueError, OSError) as problem:
        raise CheckpointError(f"{directory / name}: {problem}; it is damaged.") from None


def _read_index(directory: Path, layout: Layout, fetching: bool = False) -> tuple[list[str], Mapping[str, str] | None]:
    """Return the shards in order and, where there is an index, the shard that it gives for each tensor."""
    path = directory / layout.shards
    if not path.exists():
        if not fetching and not (directory / layout.weights).exists():
            raise CheckpointError(_why_no_weights(directory))
        return [layout.weights], None
    try:
        index = load_json(path.read_bytes().decode())
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not (weight_map and isinstance(weight_map, dict) and all(isinstance(it, str) for it in weight_map.values())):
            raise ValueError("'weight_map' is not a map from tensor names to file names")
    except (ValueError, OSError) as problem:
        raise CheckpointError(f"{path}: {problem}; it is not an index of shards.") from None
    shards = list(dict.fromkeys(weight_map.values()))
    raise_all(
        CheckpointError,
        (f"{INDEX}: {file!r} is not a plain file name; it could reach outside {directory}, refused."
         for file in shards if not is_plain_file_name(file)),
    )  # fmt: skip
    return sorted(shards), weight_map


def _why_no_weights(directory: Path) -> str:
    weights = sorted(file.name for file in directory.iterdir() if _WEIGHTS.search(file.name))
    safe = [file for file in weights if file.endswith(".safetensors")]
    if safe:
        return (
            f"{directory}: holds {', '.join(safe[:4])} but neither {SINGLE} nor {INDEX}; "
            "which of them belong to the model cannot be known."
        )
    if weights:
        return (
            f"{directory}: holds {', '.join(weights[:4])} but no safetensors; other formats, pickle above all, "
            "are never read. Convert it with the library that wrote it."
        )
    return f"{directory}: holds neither {SINGLE} nor {INDEX}; weights in other formats are never read."


def _read_headers(directory: Path, shards: list[str]) -> tuple[dict[str, Header], list[str]]:
    headers: dict[str, Header] = {}
    problems: list[str] = []
    for shard in shards:
        try:
            headers[shard] = read_header(directory / shard)
        except FileNotFoundError:
            problems.append(f"{INDEX}: names the shard {shard}, which is not in {directory}; fetch it.")
        except (FormatError, OSError) as problem:
            problems.append(str(problem))
    return headers, problems


def _collect(
    directory: Path, headers: Mapping[str, Header], listed: Mapping[str, str] | None
) -> tuple[dict[str, LazyTensor], list[str], list[str]]:
    """Return the tensors of all shards, what a user should know, and what contradicts the index."""
    tensors: dict[str, LazyTensor] = {}
    homes: dict[str, str] = {}
    problems: list[str] = []
    for shard, header in headers.items():
        path = directory / shard
        for name, entry in header.entries.items():
            if name in homes:
                problems.append(f"tensor {name!r} is in {homes[name]} and in {shard}; which one counts is not known.")
            homes[name] = shard
            span = Span(path, header.data_offset + entry.begin, entry.end - entry.begin)
            tensors[name] = LazyTensor(entry.dtype, entry.shape, span)
    if listed is None:
        return tensors, [], problems
    for name, shard in listed.items():
        if shard in headers and homes.get(name) is None:
            problems.append(f"{INDEX}: puts {name!r} in {shard}, which does not hold it.")
        elif shard in headers and homes[name] != shard:
            problems.append(f"{INDEX}: puts {name!r} in {shard}, but it is in {homes[name]}.")
    unlisted = [name for name in tensors if name not in listed]
    warnings = [f"{INDEX}: does not list {name!r}, which {homes[name]} holds; it travels along." for name in unlisted]
    return tensors, warnings, problems


def _side_files(directory: Path, own: set[str]) -> tuple[dict[str, SideFile], list[str]]:
    """Return the files that travel along, and the names of those left behind; hidden ones are not looked at."""
    files: dict[str, SideFile] = {}
    left: list[str] = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        left += [f"{name}/ (a link)" for name in subfolders if Path(folder, name).is_symlink()]
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            if relative in own or relative == RECEIPT or name.startswith("."):
                continue
            # A module of its own, such as 2_Dense/model.safetensors, is no other copy of the weights.
            module = folder != str(directory) and name.endswith(".safetensors")
            if (_WEIGHTS.search(name) and not module) or _PREFERRED_BY_VLLM.match(name):
                left.append(relative)
            elif not path.is_file():
                raise CheckpointError(f"{path}: is a broken link or not a file; mend or remove it.")
            elif not relative.isprintable():
                raise CheckpointError(f"{os.fsencode(path)!r}: is not a name in UTF-8; rename the file.")
            else:
                files[relative] = path
    return files, left
