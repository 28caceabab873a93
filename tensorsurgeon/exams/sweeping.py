"""Carry out a study: the exam that makes many models and asks each of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorsurgeon.checkpoint import open_checkpoint
from tensorsurgeon.errors import RefusedError, UsageError, raise_all
from tensorsurgeon.exams.integrity import faults
from tensorsurgeon.exams.reporting import report
from tensorsurgeon.parameters import Count, File, Location, Settings, Size
from tensorsurgeon.registry import Findings, exam
from tensorsurgeon.running import running

if TYPE_CHECKING:
    from tensorsurgeon.evaluate.study import Study


@exam
def sweep(
    study: File,
    set_: Settings = (),
    results: Location | None = None,
    force: bool = False,
    dry_run: bool = False,
    scratch: Location | None = None,
    budget: Size | None = None,
    one_pass: bool = False,
    without_answers: bool = False,
    confirm: Count | None = None,
) -> Findings:
    """Make every variant of a study, ask each what its suite asks, and record every answer.

    One variant is there at a time: as it lies, as other weights in the engine that ran the one before, or written to a
    scratch directory and removed. Records are lines of JSON, each in the file before the next is asked for: what was
    interrupted goes on where it stopped, and what there is a record of is not asked again. A study that changed is
    refused, with the differences. Where memory runs out the batch is halved. At the end stands what `report` tells.

    With `--one-pass` no variant is made: all are streamed together as they are planned, and each layer is read once for
    all that have it, and run once for all that are the same before it. That gives probes and perplexities, in the same
    records, but no answers in words.

    Args:
        set_: Lay a value over the study, such as source=DIR or variants.1.layers.window=2.
        results: Where the records go.  [default: what the study says, else results/NAME]
        force: Do all anew, in place of the records that there are.
        dry_run: Tell what would be made, and how many records there are to be, and make nothing.
        scratch: Where variants are written for the time in which they are asked.  [default: the system's]
        budget: Most bytes of disk that a variant may take.
        one_pass: Stream all variants in one pass over the layers, on a processor, whatever engine the study names.
        without_answers: In one pass, leave out what the suite asks to be answered in words.
        confirm: After one pass, make so many of the least damaged variants, and the baseline, and ask them all that the
            suite asks, in the study's engine; the records go into RESULTS/confirmed.
    """
    from tensorsurgeon.evaluate.choosing import installed
    from tensorsurgeon.evaluate.ledger import Ledger
    from tensorsurgeon.evaluate.study import load_study
    from tensorsurgeon.evaluate.sweeping import check_room, engine_for, prepare, run_sweep

    if not one_pass and (without_answers or confirm):
        raise UsageError(f"{'without-answers' if without_answers else 'confirm'}: goes with --one-pass only.")
    given = load_study(study, set_, results)
    for location in given.locations:
        raise_all(RefusedError, (f"{location}: {fault}" for fault in faults(open_checkpoint(location))))
    place = Path(scratch) if scratch else None
    if one_pass:
        return _in_one_pass(given, without_answers, dry_run, force, confirm, place, budget)
    sweep, rows = prepare(given)
    if dry_run:
        return Findings({"variants": rows})
    check_room(rows, place, budget)
    ledger = Ledger(given.results, sweep.recorded(installed(given.engine)), force)
    try:
        engine = engine_for(given, running().threads)
        try:
            notes = run_sweep(sweep, ledger, engine, place)
        finally:
            engine.close()
    finally:
        ledger.close()
    return _reported(given.results, {"notes": [{"note": it} for it in notes]})


def _in_one_pass(
    study: Study,
    without_answers: bool,
    dry_run: bool,
    force: bool,
    count: int | None,
    scratch: Path | None,
    budget: int | None,
) -> Findings:
    from tensorsurgeon.evaluate import one_pass
    from tensorsurgeon.evaluate.choosing import installed
    from tensorsurgeon.evaluate.ledger import Ledger
    from tensorsurgeon.evaluate.suite import load_suite
    from tensorsurgeon.evaluate.sweeping import check_room, engine_for, prepare

    whole = load_suite(study.suite)
    suite = one_pass.without_answers(whole) if without_answers else whole
    one_pass.require_streamable(study, suite)
    sweep, rows = prepare(study, suite)
    if dry_run:
        return Findings({"variants": rows, "one pass": one_pass.costs_of(sweep)})
    if count:
        installed(study.engine)
        check_room(rows, scratch, budget)
    ledger = Ledger(study.results, sweep.recorded("stream"), force)
    try:
        tables = {"one pass": one_pass.run_one_pass(sweep, ledger)}
    finally:
        ledger.close()
    if count:
        engine = engine_for(study, running().threads)
        try:
            entire, _ = prepare(study, whole)
            notes = one_pass.confirm(entire, study.results, count, engine, scratch, force)
        finally:
            engine.close()
        tables |= {"confirmed": one_pass.compared(study.results), "notes": [{"note": it} for it in notes]}
    return _reported(study.results, tables)


def _reported(results: Path, tables: Mapping[str, list[dict[str, Any]]]) -> Findings:
    """Return what `report` tells, with more tables, of which none is empty."""
    found = report((str(results),))
    return found._replace(tables={**found.tables, **{title: rows for title, rows in tables.items() if rows}})
