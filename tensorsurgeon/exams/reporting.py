"""Tell what sweeps found: the exam that reads their results."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tensorsurgeon.durable import replace_file
from tensorsurgeon.errors import DestinationError
from tensorsurgeon.evaluate.outcome_measures import outcomes_of
from tensorsurgeon.evaluate.result_charts import charts_of
from tensorsurgeon.evaluate.result_tables import SHOWN, pivots_of, tables_of
from tensorsurgeon.evaluate.result_words import problems_of, summary_of
from tensorsurgeon.evaluate.results import Results, raw_records, read_results
from tensorsurgeon.parameters import Directories, File
from tensorsurgeon.registry import Findings, exam


@exam
def report(results: Directories, array: File | None = None) -> Findings:
    """Tell what a sweep found, from the directory that it left, or several sweeps together.

    Variants are sorted by damage: how far the log perplexity of a text lies above the baseline's (nats a token), of
    several texts the one that the baseline reads best; without texts, the divergence of the probes from the
    baseline's, or the share of right answers that was lost. Of every measure the mean over repetitions is told, its
    standard deviation (n - 1), and their number. With `--html` a page shows measures by level, the importance of
    layers, windows of layers, and answers side by side. A sweep may still be at work; what is missing is said. Numbers
    that are none are a problem (exit status 3).

    Args:
        array: A file that gets all records as one JSON array, with the fields of the degradation study in each.
    """
    if array:
        _check_array(Path(array))
    read = read_results(results)
    studies = [outcomes_of(it) for it in read]
    if array:
        _write_array(Path(array), read)
    return Findings(
        tables_of(studies),
        tuple(problems_of(studies)),
        shown=SHOWN,
        summary=summary_of(studies),
        charts=charts_of(studies),
        pivots=pivots_of(studies),
    )


def _check_array(path: Path) -> None:
    directory = path.absolute().parent
    if path.is_dir():
        raise DestinationError(f"{path}: is a directory; name a file.")
    if not directory.is_dir():
        raise DestinationError(f"{path}: there is no directory {path.parent}; make it first.")
    if not os.access(directory, os.W_OK):
        raise DestinationError(f"{path}: {path.parent} cannot be written to.")


def _write_array(path: Path, read: list[Results]) -> None:
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for it in read for record in raw_records(it)]
    try:
        replace_file(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
    except OSError as problem:
        raise DestinationError(f"{path}: {problem.strerror or problem}.") from problem
