"""The parts of a suite: what can be asked of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tensorsurgeon.evaluate.bilingual import EACH, POOL, SEED
from tensorsurgeon.evaluate.grading import Match

Form = Literal["chat", "completion"]


def is_yaml(name: str) -> bool:
    """Tell whether a name is that of a YAML file."""
    return name.endswith((".yaml", ".yml"))


class Part(BaseModel):
    """What has no keys but its own, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompted(Part):
    """What is asked in words: in a group, as a chat, perhaps with a system prompt, or as a text to go on with."""

    id: str = Field(min_length=1)
    group: str = Field(min_length=1)
    text: str = Field(min_length=1)
    system: str | None = None
    form: Form = "chat"


class Probe(Prompted):
    """A prompt whose next token is measured: all labels, and one set of them against another."""

    contrast: tuple[str, str] = ("affirm", "deny")


class Question(Prompted):
    """A prompt whose greedy answer is right or wrong."""

    answers: tuple[str, ...] = Field(min_length=1)
    match: Match = "number"
    tokens: int = Field(default=32, ge=1)


class Open(Prompted):
    """A prompt whose answer is kept as it is: greedy, or by chance from the seed, else from that of the run.

    An `image` is a file with a picture, which stands before the text of a chat.
    """

    image: str | None = None
    tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    seed: int | None = None


class Prompts(Part):
    """A group of prompts that are answered alike, numbered from 1: `dreams-1`, `dreams-2` and so on.

    All of them are about the same `image`, where there is one.
    """

    group: str = Field(min_length=1)
    texts: tuple[str, ...] = Field(min_length=1)
    system: str | None = None
    form: Form = "chat"
    image: str | None = None
    tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    seed: int | None = None

    @property
    def each(self) -> Iterator[Open]:
        """Each of them by itself."""
        shared = self.model_dump(exclude={"texts"})
        return (Open(id=f"{self.group}-{place}", text=text, **shared) for place, text in enumerate(self.texts, 1))


class Text(Part):
    """A text, or several, whose perplexity is measured, in windows of so many tokens.

    `split: lines` takes each line of a file by itself.
    """

    id: str = Field(min_length=1)
    file: str | None = None
    texts: tuple[str, ...] = ()
    split: Literal["none", "lines"] = "none"
    window: int = Field(default=512, ge=2)


class Task(Part):
    """A task of lm-evaluation-harness: a name of the harness's or of this package's, or a YAML file of a user's.

    Of its documents so many are asked, else all; `chat` puts each into the model's template.
    """

    task: str = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    chat: bool = False

    @property
    def id(self) -> str:
        """What it is called."""
        return Path(self.task).stem if is_yaml(self.task) else self.task


class Bilingual(Part):
    """Problems in English and Chinese from a seed, in wordings for each language and kind.

    What extends the suite `bilingual` has its wordings.
    """

    seed: int = SEED
    each: int = Field(default=EACH, ge=1, le=POOL)
    tokens: int = Field(default=128, ge=1)
    form: Form = "completion"
    wordings: Mapping[str, Mapping[str, str]]
