"""Checkpoint: an immutable, ordered mapping from tensor name to LazyTensor, with its config and side files.

Opening one reads headers and JSON and nothing else. Nothing in a checkpoint is executed, pickle is never read,
and the names in its index cannot reach outside its directory; links in the directory are followed, as the
hub's cache is made of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon import document
from tensorsurgeon.document import Document
from tensorsurgeon.errors import CheckpointError, FormatError, UsageError, raise_all
from tensorsurgeon.format import Header, Span, is_plain_file_name, load_json, read_header
from tensorsurgeon.names import LayerStack, find_stack, matching
from tensorsurgeon.tensor import LazyTensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECEIPT = "tensorsurgeon.json"

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|ot|tflite|npz|pdparams)(\.index\.json)?$"
)
"""Weights in any format, and their indexes: they never travel along, as they would contradict what is written."""

_PREFERRED_BY_VLLM = re.compile(r"^(consolidated.*|params\.json)$")
"""Mistral's own files: vLLM prefers them to config.json and model*.safetensors, so a stale copy wins."""

_HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?$")

SideFile = Path | bytes
"""A file that travels along: where it lies, or what it holds."""


class Step(NamedTuple):
    """One operation that was applied: its name and its parameters as they stand in a recipe."""

    name: str
    parameters: Mapping[str, Any]


class Source(NamedTuple):
    """A directory that a checkpoint was opened from; `name` is the hub id or the directory's name."""

    name: str
    directory: Path
    headers: Mapping[str, Header]
    config: Document

    def fingerprint(self) -> str:
        """Return a SHA-256 of the config and of every header, in hexadecimal."""
        digest = hashlib.sha256(self.config.text.encode())
        for file, header in self.headers.items():
            digest.update(repr((file, header)).encode())
        return digest.hexdigest()

    def stamp(self) -> dict[str, tuple[int, int]]:
        """Return size and modification time, in nanoseconds, of each file, which tell whether it was changed."""
        stats = {file: os.stat(self.directory / file) for file in (*self.headers, CONFIG)}
        return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A model as a mapping of lazy tensors; every change makes a new one.

    `steps` records the operations that led here, `warnings` what a user should know before writing, and
    `shard_size` the largest shard in bytes where an operation chose one.
    """

    tensors: Mapping[str, LazyTensor]
    config: Document
    files: Mapping[str, SideFile]
    metadata: Mapping[str, str]
    sources: tuple[Source, ...]
    steps: tuple[Step, ...] = ()
    warnings: tuple[str, ...] = ()
    shard_size: int | None = None

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def names(self, pattern: str = "*") -> list[str]:
        """Return the names that a glob matches, in order.

        Raises:
            UsageError: where it matches none.
        """
        found = matching(pattern, self.tensors)
        if not found:
            raise UsageError(f"tensors: nothing matches {pattern!r}; 'inspect --tensors \"*\"' lists the names.")
        return found

    def replace(self, **changes: Any) -> Checkpoint:
        """Return a checkpoint with other fields; `config` may be given as a plain mapping."""
        config = changes.get("config")
        if isinstance(config, Mapping):
            changes["config"] = self.config.replace(config)
        return replace(self, **changes)

    def map(self, function: Callable[[LazyTensor], LazyTensor], pattern: str = "*") -> Checkpoint:
        """Return a checkpoint in which `function` was applied to the tensors that a glob matches."""
        chosen = set(self.names(pattern))
        return self.replace(tensors={name: function(it) if name in chosen else it for name, it in self.tensors.items()})

    def warn(self, *texts: str) -> Checkpoint:
        """Return the checkpoint with more warnings."""
        return self.replace(warnings=(*self.warnings, *texts))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model: a nested one, or all of it."""
        part: Any = self.config.value
        for key in self.text_config_path:
            part = part[key]
        return part  # type: ignore[no-any-return]

    @property
    def text_config_path(self) -> tuple[str, ...]:
        """The keys that lead to the language model's config; empty where it is not nested."""
        return text_config_path(self.config.value)

    @cached_property
    def layers(self) -> LayerStack:
        """The stack of decoder layers.

        Raises:
            CheckpointError: where the tensor names and the config do not agree on one.
        """
        return find_stack(self.tensors, layer_count(self.text_config), extra_layers(self.text_config))


COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys under which a config counts its decoder layers."""

EXTRA_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Keys under which a config counts the multi-token prediction layers that follow the stack."""

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


def text_config_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that lead from a model's config to its language model's; empty where it is not nested."""
    for key in _TEXT_CONFIGS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return (key, *text_config_path(nested))
    return ()


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Return the number of decoder layers that a config states, if it does."""
    return next((config[key] for key in COUNT_KEYS if isinstance(config.get(key), int)), None)


def extra_layers(config: Mapping[str, Any]) -> int:
    """Return the number of multi-token prediction layers that a config states."""
    return next((config[key] for key in EXTRA_KEYS if isinstance(config.get(key), int)), 0)


def open_checkpoint(location: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint: a directory, or a hub id such as `Qwen/Qwen3-8B-FP8` or `org/name@revision`.

    Only headers and JSON are read. A hub id is fetched through huggingface_hub, into and from its cache, with
    its offline mode; only files that are needed are fetched.

    Raises:
        UsageError: for a location that is neither.
        CheckpointError: for a directory that holds no sound safetensors checkpoint, with all that is wrong.
    """
    name, directory = _locate(location)
    config = _read_config(directory)
    shards, listed = _read_index(directory)
    headers, problems = _read_headers(directory, shards)
    tensors, warnings, conflicts = _collect(directory, headers, listed)
    raise_all(CheckpointError, problems or conflicts)
    files, left = _side_files(directory, set(headers))
    metadata, clashes = _merge_metadata(headers)
    if left:
        warnings.append(f"left behind, as they hold or describe other weights: {', '.join(left)}.")
    source = Source(name, directory, headers, config)
    return Checkpoint(tensors, config, files, metadata, (source,), warnings=(*warnings, *clashes))


def find_directory(location: str | os.PathLike[str]) -> Path:
    """Return the directory of a checkpoint, fetching it from the hub where `location` is a hub id."""
    return _locate(location)[1]


def _locate(location: str | os.PathLike[str]) -> tuple[str, Path]:
    path = Path(location)
    if path.is_dir():
        return path.resolve().name, path
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
        other_weights = [f"*.{end}" for end in _WEIGHTS.pattern[3:].split(")")[0].split("|")]
        directory = snapshot_download(repo, revision=revision, ignore_patterns=[*other_weights, "consolidated*"])
        shards = _read_index(Path(directory), fetching=True)[0]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(shards)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise CheckpointError(f"{repo}: not a directory here, and not to be had from the hub: {first}") from None


def _read_config(directory: Path) -> Document:
    try:
        return document.parse((directory / CONFIG).read_bytes().decode())
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: there is no {CONFIG}; this is not a checkpoint directory.") from None
    except (ValueError, OSError) as problem:
        raise CheckpointError(f"{directory / CONFIG}: {problem}; it is damaged.") from None


def _read_index(directory: Path, fetching: bool = False) -> tuple[list[str], Mapping[str, str] | None]:
    """Return the shards in order and, where there is an index, the shard that it gives for each tensor."""
    path = directory / INDEX
    if not path.exists():
        if not fetching and not (directory / SINGLE).exists():
            raise CheckpointError(_why_no_weights(directory))
        return [SINGLE], None
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
    return f"{directory}: holds no weights, neither {SINGLE} nor {INDEX}."


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


def _side_files(directory: Path, shards: set[str]) -> tuple[dict[str, SideFile], list[str]]:
    """Return the files that travel along, and the names of those left behind; hidden ones are not looked at."""
    files: dict[str, SideFile] = {}
    left: list[str] = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            if relative in shards or relative in (CONFIG, INDEX, RECEIPT) or name.startswith("."):
                continue
            if _WEIGHTS.search(name) or _PREFERRED_BY_VLLM.match(name):
                left.append(relative)
            elif path.is_file():
                files[relative] = path
            else:
                raise CheckpointError(f"{path}: is a broken link or not a file; mend or remove it.")
    return files, left


def _merge_metadata(headers: Mapping[str, Header]) -> tuple[dict[str, str], list[str]]:
    merged: dict[str, str] = {}
    clashes: list[str] = []
    for shard, header in headers.items():
        for key, value in header.metadata.items():
            if merged.setdefault(key, value) != value:
                clashes.append(f"{shard}: __metadata__ {key!r} differs from an earlier shard's, which is kept.")
    return merged, clashes
