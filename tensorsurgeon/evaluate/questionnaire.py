"""A suite in the tokens of a model: its prompts, its texts in windows, and how much room they take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tensorsurgeon.errors import UsageError, raise_all
from tensorsurgeon.evaluate.benchmarks import ROOM, check_tasks
from tensorsurgeon.evaluate.bilingual import LANGUAGES, problems
from tensorsurgeon.evaluate.engine import Picture, Pictured, Prompt
from tensorsurgeon.evaluate.labels import find_variants
from tensorsurgeon.evaluate.pictures import Processor, read_picture
from tensorsurgeon.evaluate.suite import Suite
from tensorsurgeon.evaluate.suite_parts import Form, Prompted, Text
from tensorsurgeon.evaluate.tokens import Tokens


class Asked(NamedTuple):
    """A prompt as the model sees it: its tokens, its form, and what more there is to it where it has a picture."""

    tokens: list[int]
    form: str
    pictured: Pictured | None = None

    @property
    def given(self) -> Prompt | Pictured:
        """What an engine is asked."""
        return self.pictured or self.tokens


class Windows(NamedTuple):
    """A text cut for scoring, and how many bytes it has."""

    prompts: list[list[int]]
    bytes: int


class Questionnaire:
    """A suite in the tokens of a model, and how much room it takes."""

    def __init__(self, suite: Suite, tokens: Tokens, most: int | None = None) -> None:
        self.suite, self.tokens, self.most = suite, tokens, most
        self.variants = find_variants(tokens, suite.labels)
        self.prompts = {it.id: self._ask(it) for it in (*suite.probes, *suite.questions)}
        self.prompts |= self._ask_open()
        # An engine makes a token more even where only the prompt is scored.
        room = most - 1 if most else 2**31
        self.windows = {it.id: list(self._windows(it, min(it.window, room))) for it in suite.texts}
        raise_all(UsageError, (
            f"{name}: the text has fewer than two tokens, and no perplexity."
            for name, texts in self.windows.items() if not any(held.prompts for held in texts)
        ))  # fmt: skip
        test = suite.bilingual
        self.problems = problems(test.seed, test.each) if test else []
        self.translated: dict[tuple[int, str], Asked] = {}
        if test:
            for place, problem in enumerate(self.problems):
                for language in LANGUAGES:
                    text = problem.text(test.wordings[language])
                    self.translated[place, language] = self._put(text, None, test.form)
        needed = dict(self._needed())
        # A task's prompts are not known before they are asked, and are cut to what there is room for.
        check_tasks(suite.tasks)
        self.room = min(most or ROOM, ROOM) if suite.tasks else 0
        self.length = max([*needed.values(), self.room])
        if most:
            raise_all(UsageError, (
                f"{name}: takes {length} tokens with its answer, and the model has {most} positions."
                for name, length in needed.items() if length > most
            ))  # fmt: skip

    @property
    def number(self) -> int:
        """How many records there will be."""
        return len(self.suite.asked) + len(self.translated)

    def _ask(self, it: Prompted) -> Asked:
        return self._put(it.text, it.system, it.form)

    def _ask_open(self) -> dict[str, Asked]:
        """Return the prompts whose answers are kept; a picture is read once, whatever is asked about it."""
        pictures: dict[str, Picture] = {}
        problems: list[str] = []
        for file in dict.fromkeys(it.image for it in self.suite.all_open if it.image):
            try:
                pictures[file] = read_picture(file)
            except UsageError as problem:
                problems += problem.problems
        raise_all(UsageError, problems)
        processor = Processor(self.tokens.directory) if pictures else None
        found = {}
        for it in self.suite.all_open:
            if processor and it.image:
                put, form = processor.chat(it.text, it.system, pictures[it.image], self.suite.template)
                found[it.id] = Asked(put.tokens, form, put)
            else:
                found[it.id] = self._ask(it)
        return found

    def _put(self, text: str, system: str | None, form: Form) -> Asked:
        if form == "chat":
            return Asked(*self.tokens.chat(text, system, self.suite.template))
        return Asked(self.tokens.encode("\n\n".join(filter(None, [system, text]))), "completion")

    def _windows(self, it: Text, window: int) -> Iterator[Windows]:
        """Yield each text in windows; what a tokenizer puts before every text stands before every window."""
        if it.file is None:
            texts = list(it.texts)
        else:
            try:
                whole = Path(it.file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as problem:
                raise UsageError(f"{it.id}: {it.file} cannot be read: {problem}") from None
            texts = whole.splitlines() if it.split == "lines" else [whole]
        for text in filter(str.strip, texts):
            ids, plain = self.tokens.encode(text), self.tokens.encode(text, special=False)
            head = ids[: len(ids) - len(plain)] if ids[len(ids) - len(plain) :] == plain else []
            body, step = ids[len(head) :], window - len(head)
            cut = [[*head, *body[start : start + step]] for start in range(0, len(body), step)]
            yield Windows([it for it in cut if len(it) > 1], len(text.encode()))

    def _needed(self) -> Iterator[tuple[str, int]]:
        suite = self.suite
        longest = max((len(it.tokens) for it in self.variants), default=1)
        answers = {it.id: longest for it in suite.probes}
        answers |= {it.id: it.tokens for it in suite.questions} | {it.id: it.tokens for it in suite.all_open}
        for name, more in answers.items():
            yield name, len(self.prompts[name].tokens) + more
        for name, texts in self.windows.items():
            yield name, max((len(prompt) for held in texts for prompt in held.prompts), default=1) + 1
        longest = suite.bilingual.tokens if suite.bilingual else 0
        for (place, language), asked in self.translated.items():
            yield f"bilingual {place} {language}", len(asked.tokens) + longest
