"""Files of prompts: one on each line as text, or as JSON with a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon.errors import SurgeonError, UsageError, raise_all
from tensorsurgeon.format import load_json

KEYS = ("prompt", "group", "system")


class GivenPrompt(NamedTuple):
    """A prompt of a file: its text, the group that it belongs to, and a system prompt where it is a chat."""

    text: str
    group: str = ""
    system: str | None = None


def read_prompts(path: Path) -> list[GivenPrompt]:
    """Read a file of prompts: `.jsonl` with an object on each line, `{"prompt": …, "group": …}`, or plain lines.

    Raises:
        UsageError: with every line that cannot be understood, and for a file without prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}.") from None
    told = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not told:
        raise UsageError(f"{path}: holds no prompts; put one on each line.")
    if path.suffix != ".jsonl":
        return [GivenPrompt(line) for _, line in told]
    read = [(number, _parsed(line)) for number, line in told]
    problems = [f"{path}, line {number}: {text}" for number, it in read for text in _problems(it)]
    raise_all(UsageError, problems)
    return [GivenPrompt(it["prompt"], it.get("group", ""), it.get("system")) for _, it in read]


def _parsed(line: str) -> Any:
    try:
        return load_json(line)
    except (ValueError, SurgeonError):
        return None


def _problems(found: Any) -> Iterator[str]:
    if not isinstance(found, Mapping):
        yield 'is no JSON object such as {"prompt": "…", "group": "en"}.'
        return
    if not isinstance(found.get("prompt"), str) or not found["prompt"]:
        yield "has no text as its prompt."
    for key in found:
        if key not in KEYS:
            yield f"{key!r} is none of {', '.join(KEYS)}."
        elif not isinstance(found[key], str):
            yield f"{key} is no text."
