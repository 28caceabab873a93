"""Tell what models answer: the exam that runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint import Checkpoint, open_checkpoint
from tensorsurgeon.errors import DestinationError, RefusedError, UsageError, raise_all
from tensorsurgeon.evaluate.choosing import make_engine
from tensorsurgeon.evaluate.engine import Dtype, Engine, Kind, Settings
from tensorsurgeon.evaluate.suite import Suite, load_suite
from tensorsurgeon.evaluate.suite_parts import Task, Text
from tensorsurgeon.evaluate.tables import SHOWN, problems_of, tables_of
from tensorsurgeon.exams.integrity import faults
from tensorsurgeon.parameters import Count, File, Location, Words
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.registry import Findings, exam
from tensorsurgeon.running import running


class Subject(NamedTuple):
    """A model to ask: what it is called, its checkpoint, and an adapter of it."""

    name: str
    ckpt: Checkpoint
    adapter: Checkpoint | None = None

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return self.ckpt.sources[0].directory

    @property
    def adapter_directory(self) -> Path | None:
        """Where its adapter lies."""
        return self.adapter.sources[0].directory if self.adapter else None

    @property
    def most(self) -> int | None:
        """The positions that it has, where its config says so."""
        told = self.ckpt.text_config.get("max_position_embeddings")
        return told if isinstance(told, int) and told > 0 else None


@exam
def evaluate(
    model: Location,
    against: Location | None = None,
    adapter: Location | None = None,
    suite: File = "quick",
    text: File | None = None,
    tasks: Words | None = None,
    limit: Count | None = None,
    engine: Kind | None = None,
    server: Location | None = None,
    dtype: Dtype = "float32",
    batch: Count = 1,
    seed: int = 0,
    records: File | None = None,
) -> Findings:
    """Tell what a model answers, in vLLM, on a server or in transformers, and how it differs from another.

    Probes measure the whole distribution of the next token: the probability of every spelling of yes, no and other
    words, what these are worth together (`mass`), one set against another (`share`), entropy, the 20 most probable
    tokens, and the divergence from the other model (`kl`, in nats). Texts give perplexities, questions right answers.
    A checkpoint that an engine would serve wrongly is refused first. Numbers that are none are a problem (exit
    status 3).

    The engine `stream` has one layer in memory at a time. It reads the model once or twice for all probes and texts,
    and once more for each token of an answer.

    Args:
        against: A second model to compare with, such as the one that it was made from; it is asked first.
        adapter: A LoRA adapter to apply to the model, in an engine of its own.
        suite: What is asked: quick, full, bilingual, or a YAML file.
        text: A file of text whose perplexity is measured too.
        tasks: Tasks of lm-evaluation-harness instead of a suite: names, or YAML files, with commas between them.
        limit: Of each task, ask only so many documents.
        engine: What runs it; vLLM where it is installed, else transformers. `stream` is for models that are larger than
            the memory.
        server: The URL of a server that has the model, instead; the model given tells its tokenizer.
        dtype: What is computed in; the head always in float32.
        batch: Most requests computed together; 1 gives the same bits whatever else is asked.
        seed: Where the engine's own chance begins.
        records: A file that gets a line of JSON for each probe, text and answer, as they come.
    """
    if server and (engine or against):
        raise UsageError("server: has one model, and is its own engine: leave out --against and --engine.")
    if limit and not tasks:
        raise UsageError("limit: counts documents of tasks; name them with --tasks.")
    asked = _suite_of(tasks, limit) if tasks else load_suite(suite)
    asked = _with_text(asked, text)
    subjects = _subjects(model, against, adapter)
    raise_all(RefusedError, (f"{it.directory}: {fault}" for it in subjects for fault in _faults(it)))
    runner = make_engine(engine, Settings(dtype, batch, seed, running().threads), server)
    try:
        with _kept(records) as keep:
            return _ask_all(runner, subjects, asked, keep)
    finally:
        runner.close()


def _suite_of(tasks: Iterable[str], limit: int | None) -> Suite:
    return Suite(name="tasks", tasks=tuple(Task(task=it, limit=limit) for it in dict.fromkeys(tasks)))


def _with_text(suite: Suite, text: str | None) -> Suite:
    if text is None:
        return suite
    if not Path(text).is_file():
        raise UsageError(f"text: there is no file {text}.")
    name = Path(text).name
    if name in [it.id for it in suite.asked]:
        raise UsageError(f"text: the suite has one of the id {name!r}; give the file another name.")
    return suite.model_copy(update={"texts": (*suite.texts, Text(id=name, file=text))})


def _subjects(model: str, against: str | None, adapter: str | None) -> list[Subject]:
    """Return the models in the order in which they are asked: what is compared with first."""
    given = [(it, None) for it in (against,) if it] + [(model, adapter)]
    found = []
    for location, lora in given:
        ckpt, extra = open_checkpoint(location), open_checkpoint(lora) if lora else None
        if ckpt.is_adapter or (extra and not extra.is_adapter):
            wrong = ckpt if ckpt.is_adapter else extra
            what = "an adapter; give its base as the model, and it as --adapter" if ckpt.is_adapter else "no adapter"
            raise UsageError(f"{wrong.sources[0].name if wrong else location}: is {what}.")
        name = " with ".join(it.sources[0].name for it in (ckpt, extra) if it)
        found.append(Subject(name, ckpt, extra))
    if len({it.name for it in found}) < len(found):
        found = [it._replace(name=str(it.directory)) for it in found]
    if len({it.name for it in found}) < len(found):
        found = [it._replace(name=f"{it.name} ({place})") for place, it in enumerate(found, 1)]
    return found


def _faults(subject: Subject) -> Iterator[str]:
    yield from faults(subject.ckpt)
    if subject.adapter:
        yield from faults(subject.adapter)


@contextmanager
def _kept(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what writes a record as a line of JSON, at once, where a file is named."""
    if path and not Path(path).absolute().parent.is_dir():
        raise DestinationError(f"{path}: there is no directory {Path(path).parent}; make it first.")
    try:
        with open(path, "x", encoding="utf-8") if path else nullcontext() as file:

            def keep(record: dict[str, Any]) -> None:
                if file:
                    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                    file.flush()

            try:
                yield keep
            finally:
                if path and file and not file.tell():
                    Path(path).unlink()  # nothing was asked: it would only be in the way of the next try
    except FileExistsError:
        raise DestinationError(f"{path}: is there already; name another file for records, or remove it.") from None


def _ask_all(runner: Engine, subjects: list[Subject], suite: Suite, keep: Callable[[dict[str, Any]], None]) -> Findings:
    from tensorsurgeon.evaluate.asking import ask
    from tensorsurgeon.evaluate.probing import Distributions
    from tensorsurgeon.evaluate.questionnaire import Questionnaire
    from tensorsurgeon.evaluate.tokens import Tokens

    forms = [Questionnaire(suite, Tokens(it.directory), it.most) for it in subjects]
    records: list[dict[str, Any]] = []
    base: Distributions | None = None
    with progress_bar(sum(it.number for it in forms), suite.name, running().quiet, "record") as advance:

        def collect(record: dict[str, Any]) -> None:
            keep(record)
            records.append(record)
            advance(1)

        for subject, form in zip(subjects, forms, strict=True):
            runner.load(subject.directory, form.length, subject.adapter_directory)
            base = ask(runner, form, _about(subject), collect, base, seed=runner.settings.seed)
    return Findings(tables_of(records), tuple(problems_of(records)), shown=SHOWN)


def _about(subject: Subject) -> dict[str, Any]:
    from tensorsurgeon.evaluate.digest import checkpoint_digest

    adapter = {"adapter_digest": checkpoint_digest(subject.adapter.sources[0])} if subject.adapter else {}
    return {"model_name": subject.name, "digest": checkpoint_digest(subject.ckpt.sources[0]), **adapter}
