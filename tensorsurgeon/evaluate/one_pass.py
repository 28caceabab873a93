"""A study carried out in one pass over its models' layers: what variants share is read and computed once.

Every variant is streamed as it is planned, and asked by the same code, with the same records, as in any sweep. Answers
in words are left out: each of their tokens would take a pass. The variants that matter can be confirmed, by an ordinary
sweep with the study's own engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tensorsurgeon.errors import UsageError
from tensorsurgeon.evaluate.asking import ask, foreseen
from tensorsurgeon.evaluate.choosing import installed
from tensorsurgeon.evaluate.engine import Engine, Settings
from tensorsurgeon.evaluate.engines.stream import StreamEngine
from tensorsurgeon.evaluate.ledger import Ledger
from tensorsurgeon.evaluate.outcome_measures import outcomes_of
from tensorsurgeon.evaluate.outcomes import DAMAGE, DIVERGENCE, PERPLEXITY
from tensorsurgeon.evaluate.probing import Distributions
from tensorsurgeon.evaluate.results import read_results
from tensorsurgeon.evaluate.streaming import Streaming
from tensorsurgeon.evaluate.study import Study, Trial
from tensorsurgeon.evaluate.suite import Suite
from tensorsurgeon.evaluate.sweeping import Row, Sweep, run_sweep, told_of
from tensorsurgeon.forward.one_pass import Costs
from tensorsurgeon.running import running

CONFIRMED = "confirmed"
"""The directory among the results with the records of the variants that were confirmed."""


def without_answers(suite: Suite) -> Suite:
    """Return a suite without what is answered in words, and without benchmarks, many of whose answers are."""
    return suite.model_copy(update={"questions": (), "open": (), "prompts": (), "bilingual": None, "tasks": ()})


def require_streamable(study: Study, suite: Suite) -> None:
    """See that a study can be carried out in one pass.

    Raises:
        UsageError: for a suite that asks for answers in words or tasks, or for nothing else, and for adapters.
    """
    parts = {"questions": len(suite.questions), "open": len(suite.open), "prompts": len(suite.prompts),
             "bilingual": int(suite.bilingual is not None), "tasks": len(suite.tasks)}  # fmt: skip
    asked = [f"{name} ({count})" for name, count in parts.items() if count]
    problems = [
        f"{suite.name}: asks for answers, each token of which would take a pass: {', '.join(asked)}. Leave "
        "them out with --without-answers, or leave out --one-pass."
    ] * bool(asked)
    if not suite.probes and not suite.texts:
        problems.append(f"{suite.name}: has no probes and no texts, and one pass measures nothing else.")
    adapters = dict.fromkeys(it.variant for it in study.trials if it.base)
    if adapters:
        problems.append(
            f"{', '.join(adapters)}: layers are streamed without adapters; put them on by 'merge-lora' among the "
            "steps, or leave out --one-pass."
        )
    if problems:
        raise UsageError(*problems)


class Together:
    """Trials that are asked the same tokens, to be run together, and what each is asked still."""

    def __init__(self, sweep: Sweep, trials: Sequence[Trial], ledger: Ledger | None) -> None:
        study = sweep.study
        self.trials = trials
        self.subjects = [sweep.subject(it) for it in trials]
        models = []
        for trial, subject in zip(trials, self.subjects, strict=True):
            earlier = ledger.earlier(trial.variant, trial.repeat) if ledger else {}
            models.append((subject.ckpt, foreseen(sweep.form(trial), earlier, _is_base(study, trial), trial.seed)))
        self.settings = Settings(study.dtype, study.batch, study.seed, running().threads)
        self.streaming = Streaming(models, self.settings)


def _is_base(study: Study, trial: Trial) -> bool:
    return trial.variant == study.baseline and not trial.repeat


def _together(sweep: Sweep, ledger: Ledger | None = None) -> Iterator[Together]:
    """Yield the trials of which records are missing, with the baseline, those of one tokenizer together."""
    study = sweep.study
    missing = [it for it in study.trials if ledger is None or sweep.missing(it, ledger)]
    if not missing:
        return
    wanted = {(it.variant, it.repeat) for it in missing} | {(study.baseline, 0)}
    by_form: dict[int, list[Trial]] = defaultdict(list)
    for trial in study.trials:
        if (trial.variant, trial.repeat) in wanted:
            by_form[id(sweep.form(trial))].append(trial)
    for trials in by_form.values():
        yield Together(sweep, trials, ledger)


def costs_of(sweep: Sweep) -> list[Row]:
    """Return what a study takes in one pass; nothing is run, and spellings that will prove to matter are not in it."""
    return [_told(costs) for together in _together(sweep) for costs in together.streaming.costs]


def run_one_pass(sweep: Sweep, ledger: Ledger) -> list[Row]:
    """Run and ask all models of which records are missing; return what it took.

    Raises:
        RefusedError: for a model that cannot be run layer by layer.
        DestinationError: where the disk has no room for the states that do not fit into the memory.
    """
    study = sweep.study
    base: Distributions | None = None
    told: list[Row] = []
    for together in _together(sweep, ledger):
        engine = StreamEngine(together.settings)
        for number, known in together.streaming.answers(study.name):
            trial, subject = together.trials[number], together.subjects[number]
            is_base = _is_base(study, trial)
            engine.know(subject.ckpt, known)
            about = told_of(sweep, trial, subject, ledger, "streamed")
            earlier = ledger.earlier(trial.variant, trial.repeat)
            found = ask(
                engine, sweep.form(trial), about, ledger.keep, None if is_base else base, earlier, is_base, trial.seed
            )
            base = found if is_base else base
        told += map(_told, together.streaming.costs)
    return told


def _told(costs: Costs) -> Row:
    return {
        "models": costs.models,
        "passes": costs.passes,
        "layers read": costs.layers,
        "one by one": costs.naive_layers,
        "layer runs": costs.calls,
        "runs one by one": costs.naive,
        "states": costs.peak,
        "of them on disk": costs.filed,
    }


def confirm(sweep: Sweep, results: Path, count: int, engine: Engine, scratch: Path | None, force: bool) -> list[str]:
    """Make the least damaged variants and the baseline by an ordinary sweep; return what a user should know of it.

    Their records, with those of answers in words, go into a directory of their own, where others may follow.
    """
    study = sweep.study
    (read,) = read_results([results])
    chosen = [it.name for it in outcomes_of(read).by_damage if it.name != study.baseline][:count]
    trials = tuple(it for it in study.trials if it.variant in (study.baseline, *chosen))
    ledger = Ledger(results / CONFIRMED, sweep.recorded(installed(study.engine)), force)
    try:
        return run_sweep(replace(sweep, study=replace(study, trials=trials)), ledger, engine, scratch)
    finally:
        ledger.close()


def compared(results: Path) -> list[Row]:
    """Return each measure that was taken in one pass beside the same of the variants that were confirmed."""
    one, other = (outcomes_of(it) for it in read_results([results, results / CONFIRMED]))
    streamed = {it.name: it for it in one.outcomes}
    rows = []
    for outcome in other.by_damage:
        for measure in (it for it in outcome.measures if it in (DAMAGE, DIVERGENCE) or it.startswith(PERPLEXITY)):
            first, second = streamed[outcome.name].mean(measure), outcome.mean(measure)
            apart = None if first is None or second is None else second - first
            rows.append({"variant": outcome.name, "measure": measure, "one pass": first, CONFIRMED: second,
                         "difference": apart})  # fmt: skip
    return rows
