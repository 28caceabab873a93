"""Carry out a study: the exam that makes many models and asks each of them."""

from __future__ import annotations

from pathlib import Path

from tensorsurgeon.checkpoint import open_checkpoint
from tensorsurgeon.errors import RefusedError, raise_all
from tensorsurgeon.exams.integrity import faults
from tensorsurgeon.exams.reporting import report
from tensorsurgeon.parameters import File, Location, Settings, Size
from tensorsurgeon.registry import Findings, exam
from tensorsurgeon.running import running


@exam
def sweep(
    study: File,
    set_: Settings = (),
    results: Location | None = None,
    force: bool = False,
    dry_run: bool = False,
    scratch: Location | None = None,
    budget: Size | None = None,
) -> Findings:
    """Make every variant of a study, ask each what its suite asks, and record every answer.

    One variant is there at a time: as it lies, as other weights in the engine that ran the one before, or written to a
    scratch directory and removed. Records are lines of JSON, each in the file before the next is asked for: what was
    interrupted goes on where it stopped, and what there is a record of is not asked again. A study that changed is
    refused, with the differences. Where memory runs out the batch is halved. At the end stands what `report` tells.

    Args:
        set_: Lay a value over the study, such as source=DIR or variants.1.layers.window=2.
        results: Where the records go.  [default: what the study says, else results/NAME]
        force: Do all anew, in place of the records that there are.
        dry_run: Tell what would be made, and how many records there are to be, and make nothing.
        scratch: Where variants are written for the time in which they are asked.  [default: the system's]
        budget: Most bytes of disk that a variant may take.
    """
    from tensorsurgeon.evaluate.ledger import Ledger
    from tensorsurgeon.evaluate.study import load_study
    from tensorsurgeon.evaluate.sweeping import check_room, engine_for, prepare, run_sweep

    given = load_study(study, set_, results)
    for location in given.locations:
        raise_all(RefusedError, (f"{location}: {fault}" for fault in faults(open_checkpoint(location))))
    sweep, rows = prepare(given)
    if dry_run:
        return Findings({"variants": rows})
    place = Path(scratch) if scratch else None
    check_room(rows, place, budget)
    ledger = Ledger(given.results, sweep.recorded(), force)
    try:
        engine = engine_for(given, running().threads)
        try:
            notes = run_sweep(sweep, ledger, engine, place)
        finally:
            engine.close()
    finally:
        ledger.close()
    found = report((str(given.results),))
    return found._replace(tables={**found.tables, **({"notes": [{"note": it} for it in notes]} if notes else {})})
