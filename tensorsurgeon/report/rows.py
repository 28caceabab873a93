"""Findings as CSV files (RFC 4180), one for each table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorsurgeon.registry import Findings
from tensorsurgeon.report.destination import file_stem, make_directory, write_report


def write_csv(findings: Findings, directory: Path) -> list[Path]:
    """Write one CSV file for each table, and `problems.csv` where there are problems; return their paths.

    The header holds every key of a table's rows. A list is written as JSON, and a missing value as nothing.

    Raises:
        DestinationError: where the directory cannot be made or written.
    """
    make_directory(directory)
    taken = {"problems"}
    tables = {file_stem(title, taken): rows for title, rows in findings.tables.items()}
    if findings.problems:
        tables["problems"] = [{"problem": text} for text in findings.problems]
    return [write_report(directory / f"{stem}.csv", _csv(rows).encode()) for stem, rows in tables.items()]


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return every key of some rows, in the order of their first mention."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows))
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value
