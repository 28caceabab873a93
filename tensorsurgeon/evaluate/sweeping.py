"""A study carried out: each of its models made, asked, and let go, with a record of every answer as it comes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint import Checkpoint, all_sources, open_checkpoint
from tensorsurgeon.errors import DestinationError, OutOfMemoryError, SurgeonError, UsageError
from tensorsurgeon.evaluate.asking import ask
from tensorsurgeon.evaluate.benchmarks import task_files
from tensorsurgeon.evaluate.choosing import make_engine
from tensorsurgeon.evaluate.described import damage, layers_of
from tensorsurgeon.evaluate.engine import Engine, Kind, Pictured, Prompt, Settings
from tensorsurgeon.evaluate.installing import Built, Installer, Subject
from tensorsurgeon.evaluate.ledger import Ledger
from tensorsurgeon.evaluate.probing import Distributions
from tensorsurgeon.evaluate.questionnaire import Questionnaire
from tensorsurgeon.evaluate.study import Study, Trial
from tensorsurgeon.evaluate.suite import Suite, files_in, load_suite
from tensorsurgeon.evaluate.tokens import Tokens
from tensorsurgeon.plan import make_plan
from tensorsurgeon.progress import progress_bar
from tensorsurgeon.registry import apply_steps
from tensorsurgeon.running import run_under, running
from tensorsurgeon.sizes import format_size

Row = dict[str, Any]
TOLD = 5
"""Variants that are told one by one where they take too much disk."""
PROVING = 4
"""Prompts that prove that a model whose weights were put into an engine answers as the same one written."""
ANYTHING = "Once upon a time"
"""What is asked for that proof where a suite has no prompts of its own, but tasks alone."""


@dataclass(frozen=True)
class Sweep:
    """A study with all that it is about: its suite, the models that it begins with, and the suite in their tokens."""

    study: Study
    suite: Suite
    forms: dict[Path, Questionnaire] = field(default_factory=dict)

    def recorded(self, engine: Kind) -> Row:
        """Return the study as plain data, with all that is asked, and of whom: of files their digests."""
        asked = self.suite.model_dump(mode="json")
        for entry, key in files_in(asked):
            files = task_files(entry[key]) if key == "task" else [Path(entry[key])]
            entry[key] = hashlib.sha256(b"".join(it.read_bytes() for it in files)).hexdigest()
        return {**self.study.recorded(), "engine": engine, "asked": asked}

    def subject(self, trial: Trial) -> Subject:
        """Return the model of a trial; its tensors are not computed yet, but for what an operation reads at once."""
        ckpt = apply_steps(_opened(trial.source), trial.steps)
        if ckpt.is_adapter != bool(trial.base):
            wrong = "is an adapter; name the model that it is put on as 'base'" if ckpt.is_adapter else "is no adapter"
            raise UsageError(f"{wrong}.")
        return Subject(ckpt, _opened(trial.base).sources[0].directory if trial.base else None)

    def form(self, trial: Trial) -> Questionnaire:
        """Return the suite in the tokens of the model that a trial begins with, or is put on."""
        ckpt = _opened(trial.base or trial.source)
        directory = ckpt.sources[0].directory
        if directory not in self.forms:
            most = ckpt.text_config.get("max_position_embeddings")
            self.forms[directory] = Questionnaire(
                self.suite, Tokens(directory), most if isinstance(most, int) else None
            )
        return self.forms[directory]

    def missing(self, trial: Trial, ledger: Ledger) -> int:
        """Return how many records of a trial there are not yet."""
        return self.form(trial).number - len(ledger.earlier(trial.variant, trial.repeat))


@cache
def _opened(location: str) -> Checkpoint:
    return open_checkpoint(location)


def prepare(study: Study, suite: Suite | None = None) -> tuple[Sweep, list[Row]]:
    """Return a study with all that it is about, and a row for each variant: its layers, and its bytes where it is made.

    Raises:
        SurgeonError: with all steps that a model does not take.
    """
    _opened.cache_clear()
    sweep = Sweep(study, suite or load_suite(study.suite))
    _check_damage(study, sweep.suite)
    problems: list[SurgeonError] = []
    rows: dict[str, Row] = {}
    with run_under(running()._replace(planned=True)):
        for trial in study.trials:
            try:
                row = _row(sweep, trial)
            except SurgeonError as problem:
                if trial.variant not in rows:
                    problems.append(_named(trial, problem))
                row = {}
            rows.setdefault(trial.variant, row)
    if problems:
        raise type(problems[0])(*dict.fromkeys(text for problem in problems for text in problem.problems))
    return sweep, list(rows.values())


def _check_damage(study: Study, suite: Suite) -> None:
    """See that the suite asks what the study's damage is told by: a report would be without it."""
    told = {
        "perplexity": ("texts", bool(suite.texts)),
        "kl": ("probes and a baseline", bool(suite.probes and study.baseline)),
        "right": ("questions", bool(suite.questions or suite.bilingual)),
    }
    needed, there = told.get(study.damage or "", ("", True))
    if not there:
        raise UsageError(f"damage: {study.damage} is told by {needed}, and there are none (suite {study.suite}).")


def _named(trial: Trial, problem: SurgeonError) -> SurgeonError:
    """Return what is wrong with the name of the variant that it is wrong with."""
    return type(problem)(*(f"{trial.variant}: {text}" for text in problem.problems))


def _row(sweep: Sweep, trial: Trial) -> Row:
    subject = sweep.subject(trial)
    size = 0 if subject.is_source else make_plan(subject.ckpt, None, running().memory).size
    stack = None if subject.ckpt.is_adapter else subject.ckpt.layers.count
    asked = sweep.form(trial).number * sweep.study.repeats
    return {"variant": trial.variant, **trial.values, "layers": stack, "bytes": size, "records": asked}


def check_room(rows: Iterable[Row], scratch: Path | None, budget: int | None) -> None:
    """See that each variant, of which one is on disk at a time, fits into the scratch directory and the budget.

    Raises:
        DestinationError: with all that do not.
    """
    place = scratch or Path(tempfile.gettempdir())
    existing = next(it for it in (place.absolute(), *place.absolute().parents) if it.exists())
    free = shutil.disk_usage(existing).free
    for what, room, way in (("--budget allows", budget, "--budget"), (f"free in {place} are", free, "--scratch")):
        large = [f"{it['variant']} takes {format_size(it['bytes'])}" for it in rows if room and it["bytes"] > room]
        if large:
            listed = "; ".join(large[:TOLD]) + (f"; and {len(large) - TOLD} more" if len(large) > TOLD else "")
            raise DestinationError(f"{what} {format_size(room or 0)}, and {listed}; give more with {way}.")


def run_sweep(sweep: Sweep, ledger: Ledger, engine: Engine, scratch: Path | None = None) -> list[str]:
    """Make and ask all models of a study of which records are missing; return what a user should know of it."""
    study = sweep.study
    lengths: dict[int | None, int] = {}
    for form in map(sweep.form, study.trials):
        # Models with as many positions are given the same length, but none more than it has positions.
        lengths[form.most] = max(form.length, lengths.get(form.most, 0))
    total = sum(sweep.form(trial).number for trial in study.trials)
    missing = sum(sweep.missing(trial, ledger) for trial in study.trials)
    base: Distributions | None = None
    notes: list[str] = []
    made: tuple[tuple[Any, ...], Subject] | None = None
    with (
        Installer(engine, scratch) as installer,
        progress_bar(total, study.name, running().quiet, "record") as advance,
    ):
        advance(total - missing)
        for trial in study.trials:
            is_base = trial.variant == study.baseline and not trial.repeat
            # The distributions of the baseline are not kept: they are found again where any other is still missing.
            if not sweep.missing(trial, ledger) and not (is_base and missing):
                continue
            for batch in _lower(engine.settings.batch):
                try:
                    if made is None or made[0] != trial.made:
                        made = trial.made, sweep.subject(trial)  # an extraction is not done again for each repetition
                    engine.settings = engine.settings._replace(batch=batch)
                    length = lengths[sweep.form(trial).most]
                    found = _try(sweep, trial, made[1], length, ledger, installer, base, is_base, advance)
                    break
                except SurgeonError as problem:
                    if not isinstance(problem, OutOfMemoryError) or batch == 1:
                        raise _named(trial, problem) from problem
                    notes.append(f"{trial.variant}: {problem}; the batch of {batch} is halved.")
                    installer.forget()
            base = found if is_base else base
    return [*dict.fromkeys([*notes, *installer.notes])]


def _lower(batch: int) -> Iterator[int]:
    """Yield sizes of a batch, each half of the one before, to one."""
    while batch:
        yield batch
        batch //= 2


def _try(
    sweep: Sweep,
    trial: Trial,
    subject: Subject,
    length: int,
    ledger: Ledger,
    installer: Installer,
    base: Distributions | None,
    is_base: bool,
    advance: Any,
) -> Distributions:
    engine, form = installer.engine, sweep.form(trial)
    # Those with pictures first: they go through all of the model.
    those = sorted((*form.prompts.values(), *form.translated.values()), key=lambda it: it.pictured is None)
    windows: list[Prompt | Pictured] = []
    for texts in form.windows.values():
        windows += [prompt for held in texts for prompt in held.prompts]
    prompts = [it.given for it in those[:PROVING]] or windows[:1] or [form.tokens.encode(ANYTHING)]
    built = installer.install(subject, length, lambda: b"".join(it.tobytes() for it in engine.next_logits(prompts)))

    def keep(record: Row) -> None:
        ledger.keep(record)
        advance(1)

    earlier = ledger.earlier(trial.variant, trial.repeat)
    about = told_of(sweep, trial, subject, ledger, built)
    return ask(engine, form, about, keep, None if is_base else base, earlier, is_base, trial.seed)


def told_of(sweep: Sweep, trial: Trial, subject: Subject, ledger: Ledger, built: Built) -> Row:
    """Return what each record says of the model of a trial."""
    source = _opened(trial.source)
    locations = {_opened(it).sources[0].directory: it for it in (trial.source, trial.base) if it}
    # All that answers depend on: donors of layers, and what an adapter is put on, too.
    models = all_sources(subject.ckpt, *map(_opened, locations.values()))
    read = [
        {"name": it.name, "digest": ledger.digest(locations.get(it.directory, str(it.directory)), it)} for it in models
    ]
    return {
        "study": sweep.study.name,
        "variant": trial.variant,
        "values": dict(trial.values),
        "model_name": source.sources[0].name,
        "digest": ledger.digest(trial.source, source.sources[0]),
        "read": read,
        "repeat_index": trial.repeat,
        "seed": trial.seed,
        "source_layers": None if source.is_adapter else source.layers.count,
        "layers": None if subject.ckpt.is_adapter else layers_of(source, trial.steps),
        "built": built,
        **damage(trial.steps, trial.values),
    }


def engine_for(study: Study, threads: int) -> Engine:
    """Return the engine that a study asks for."""
    return make_engine(study.engine, Settings(study.dtype, study.batch, study.seed, threads))
