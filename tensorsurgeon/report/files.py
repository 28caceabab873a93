"""What an exam found, as files: one page, pictures, CSV; and as JSON."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorsurgeon.errors import DestinationError, UsageError, raise_all
from tensorsurgeon.registry import Findings


def check_report(html: Path | None = None, csv: Path | None = None, plot: Path | None = None) -> None:
    """Raise, before the long work, where a report could not be written at its end.

    Raises:
        UsageError: for a library that is not installed.
        DestinationError: for a page in a directory that does not exist, and for a directory that is a file.
    """
    needed = {"--html": (html, "plotly"), "--plot": (plot, "matplotlib")}
    missing = [(option, library) for option, (place, library) in needed.items() if place and not find_spec(library)]
    raise_all(UsageError, (f'{option} needs {it}: pip install "tensorsurgeon[report]"' for option, it in missing))
    places = [it for it in (html, csv, plot) if it]
    problems = [f"{it}: there is no directory {it.parent}; make it first." for it in places
                if not it.absolute().parent.is_dir()]  # fmt: skip
    problems += [f"{it}: {it.parent} cannot be written to." for it in places
                 if it.absolute().parent.is_dir() and not os.access(it.absolute().parent, os.W_OK)]  # fmt: skip
    problems += [f"{it}: is a directory; name a file." for it in (html,) if it and it.is_dir()]
    problems += [f"{it}: is a file; name a directory." for it in (csv, plot) if it and it.is_file()]
    raise_all(DestinationError, problems)


def write_report(
    findings: Findings, title: str, html: Path | None = None, csv: Path | None = None, plot: Path | None = None
) -> None:
    """Write findings wherever a place is given."""
    if html:
        from tensorsurgeon.report.page import write_page

        write_page(findings, title, html)
    if plot:
        from tensorsurgeon.report.figures import write_figures

        write_figures(findings, plot)
    if csv:
        from tensorsurgeon.report.rows import write_csv

        write_csv(findings, csv)


def findings_json(findings: Findings) -> dict[str, Any]:
    """Return all that was found, as JSON has it."""
    details = {"details": list(findings.details)} if findings.details else {}
    summary = {"summary": list(findings.summary)} if findings.summary else {}
    return {**summary, **findings.tables, "problems": findings.problems, **details}
