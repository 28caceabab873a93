"""Suites: what is asked of a model, as YAML.

    extends: quick                     # all that another suite asks, too
    template: {enable_thinking: false} # options of the chat template; those that it does not know do nothing
    least: 1.0e-6                      # spellings of several tokens are left out where even the first has less
    labels: {affirm: ["yes", yep], deny: ["no", nope]} # YAML takes a bare yes for a truth value
    probes: [{id: fault, group: binary, text: "Is something wrong with you?", contrast: [affirm, deny]}]
    texts: [{id: neutral, file: neutral.txt}]
    questions: [{id: sum, group: math, text: "What is 17 + 25?", answers: ["42"]}]
    open: [{id: walk, group: long-form, text: Describe a walk in the rain., tokens: 256}]
    prompts: [{group: dreams, texts: [Tell me of a dream., Describe a dream.], tokens: 350, temperature: 1.0}]
             # `image: FILE` in `open` and `prompts` shows a picture before the text, to models that take pictures
    tasks: [{task: arc_easy, limit: 200}] # of lm-evaluation-harness: by name, or a YAML file with its data
    bilingual: {seed: 7}               # with the wordings of the suite bilingual, which is to be extended then

Files are found beside the suite. All that is wrong in a suite is said at once.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from tensorsurgeon.errors import UsageError, nearest, raise_all
from tensorsurgeon.evaluate.bilingual import unworded
from tensorsurgeon.evaluate.suite_parts import (
    Bilingual,
    Open,
    Part,
    Probe,
    Prompted,
    Prompts,
    Question,
    Task,
    Text,
    is_yaml,
)
from tensorsurgeon.yaml_lines import Reader

PACKAGED = files("tensorsurgeon.evaluate") / "suites"


class Suite(Part):
    """What is asked of a model.

    A spelling of several tokens is scored where its first token has at least the probability `least`; of others it is
    only known that they have no more than that token. Each takes a pass through the model.
    """

    name: str = ""
    about: str = ""
    template: Mapping[str, Any] = Field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    least: float = Field(default=0.0, ge=0, le=1)
    probes: tuple[Probe, ...] = ()
    texts: tuple[Text, ...] = ()
    questions: tuple[Question, ...] = ()
    open: tuple[Open, ...] = ()
    prompts: tuple[Prompts, ...] = ()
    tasks: tuple[Task, ...] = ()
    bilingual: Bilingual | None = None

    @property
    def asked(self) -> tuple[Prompted | Text | Task, ...]:
        """All that has an id."""
        return (*self.probes, *self.texts, *self.questions, *self.all_open, *self.tasks)

    @property
    def all_open(self) -> tuple[Open, ...]:
        """All whose answers are kept as they are, those of groups too."""
        return (*self.open, *(it for group in self.prompts for it in group.each))


def packaged() -> list[str]:
    """Return the names of the suites that come with the package."""
    return sorted(it.name.removesuffix(".yaml") for it in PACKAGED.iterdir() if it.name.endswith(".yaml"))


def files_in(data: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each part of a suite, as plain data, that names a file, and the key under which it does."""
    for part, key in (("texts", "file"), ("open", "image"), ("prompts", "image"), ("tasks", "task")):
        entries = data.get(part)
        for entry in entries if isinstance(entries, list) else ():
            name = entry.get(key) if isinstance(entry, dict) else None
            if isinstance(name, str) and (key != "task" or is_yaml(name)):
                yield entry, key


def load_suite(name: str) -> Suite:
    """Return a suite by its name, or from a YAML file.

    Raises:
        UsageError: with all that is wrong in it.
    """
    data, label = _read(name)
    try:
        suite = Suite(**data)
    except ValidationError as problem:
        raise UsageError(*(_explain(label, error) for error in problem.errors())) from None
    raise_all(UsageError, (f"{label}: {text}" for text in _problems(suite)))
    return suite


def _read(name: str, within: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    """Return the data of a suite, with those that it extends laid under it, and its label."""
    path = Path(name)
    is_file = is_yaml(name) or path.is_file()
    if not is_file and name not in packaged():
        raise UsageError(
            f"suite: there is none of the name {name!r}; there are {', '.join(packaged())}, or name a YAML file."
            f"{nearest(name, packaged())}"
        )
    if name in within:
        raise UsageError(f"{name}: extends itself, through {', '.join(within)}.")
    try:
        text = path.read_text(encoding="utf-8") if is_file else (PACKAGED / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{name}: cannot be read: {problem}.") from None
    reader = Reader(name)
    data = reader.read(text)
    raise_all(UsageError, reader.problems)
    if not isinstance(data, dict):
        raise UsageError(f"{name}: is no mapping of what is asked; see 'quick' for one.")
    for entry, key in files_in(data):
        entry[key] = _beside(entry[key], path if is_file else None)
    data.setdefault("name", path.stem)
    under = data.pop("extends", None)
    if isinstance(under, str) and is_yaml(under):
        under = os.path.normpath(path.parent / under)
    return (_laid(_read(str(under), (*within, name))[0], data) if under else data), name


def _beside(file: str, suite: Path | None) -> str:
    if suite is not None:
        return str(suite.parent / file)
    with as_file(PACKAGED / file) as path:
        return str(path)


def _laid(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return two suites in one: lists one after the other, mappings with the second's values over the first's."""
    made = dict(under)
    for key, value in over.items():
        before = made.get(key)
        if isinstance(before, list) and isinstance(value, list):
            made[key] = [*before, *value]
        elif isinstance(before, dict) and isinstance(value, dict):
            made[key] = {**before, **value}
        else:
            made[key] = value
    return made


def _explain(label: str, error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{label}: {place}: there is no such key."
    if error["type"] == "missing":
        return f"{label}: {place}: is missing."
    return f"{label}: {place}: {error['msg']}."


def _problems(suite: Suite) -> Iterator[str]:
    """Yield what no single part can know to be wrong."""
    ids = [it.id for it in suite.asked]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    yield from (f"the id {name!r} is given {ids.count(name)} times." for name in twice)
    for probe in suite.probes:
        for name in probe.contrast:
            if name not in suite.labels:
                yield f"{probe.id}: there are no labels {name!r}.{nearest(name, suite.labels)}"
    for text in suite.texts:
        if (text.file is None) == (not text.texts):
            yield f"{text.id}: a text has a file or texts, one of the two."
        elif text.file is not None and not Path(text.file).is_file():
            yield f"{text.id}: there is no file {text.file}."
    shown = [(it.id, it.image, it.form) for it in suite.open] + [(it.group, it.image, it.form) for it in suite.prompts]
    for name, image, form in shown:
        if image is not None and not Path(image).is_file():
            yield f"{name}: there is no file {image}."
        if image is not None and form != "chat":
            yield f"{name}: an image is shown in a chat; leave out 'form: {form}'."
    if suite.bilingual:
        yield from unworded(suite.bilingual.seed, suite.bilingual.wordings)
    if not suite.asked and not suite.bilingual:
        yield "asks nothing."
