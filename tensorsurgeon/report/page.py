"""Findings as one HTML page that needs nothing else: no network, no other file.

What the page draws with (Plotly) and what it draws lie in it as gzip in base64, which its script unpacks. Text of a
checkpoint therefore never stands in the HTML itself; the script puts it into the page as text only, and the policy
of the page runs no script but the two whose digests it names, and fetches nothing.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from tensorsurgeon._version import __version__
from tensorsurgeon.errors import UsageError
from tensorsurgeon.registry import Findings
from tensorsurgeon.report.destination import write_report
from tensorsurgeon.report.grids import find_grids
from tensorsurgeon.report.rows import columns_of

SCRIPTS = ("plots.js", "tables.js", "charts.js", "pivots.js", "token_heatmaps.js", "page.js")


def write_page(findings: Findings, title: str, path: Path) -> None:
    """Write findings as one HTML page, to look at in a browser, offline too.

    Numbers of tables are kept in full, those of details to four digits: they are drawn, and are most of the page.

    Raises:
        UsageError: where plotly is not installed.
        DestinationError: where the directory is missing, or the page cannot be written.
    """
    plotly = _plotly()
    assets = files("tensorsurgeon.report") / "assets"
    script = "\n".join((assets / name).read_text() for name in SCRIPTS)
    page = Template((assets / "template.html").read_text()).substitute(
        policy=f"default-src 'none'; script-src {_digest(script)} {_digest(plotly)}; "
        "style-src 'unsafe-inline'; img-src data:",
        title=html.escape(title),
        style=(assets / "page.css").read_text(),
        script=script,
        plotly=_packed(plotly),
        data=_packed(json.dumps(_data(findings), allow_nan=False, separators=(",", ":"))),
        version=__version__,
    )
    write_report(path, page.encode())


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError('--html needs plotly: pip install "tensorsurgeon[report]"') from None
    return str(get_plotlyjs())


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _data(findings: Findings) -> dict[str, Any]:
    tables = [
        {"title": title, "columns": columns, "rows": [[_spelled(row.get(key)) for key in columns] for row in rows]}
        for title, rows in findings.tables.items()
        for columns in [columns_of(rows)]
    ]
    grids = [
        {
            **grid._asdict(),
            "statistics": [{**it._asdict(), "outliers": list(map(list, it.outliers))} for it in grid.statistics],
            "default": grid.default,
        }
        for grid in find_grids(findings.tables)
    ]
    return {
        "tables": tables,
        "problems": list(findings.problems),
        "grids": grids,
        "details": [_rounded(detail) for detail in findings.details],
        "summary": list(findings.summary),
        "charts": [_as_data(chart) for chart in findings.charts],
        "pivots": [pivot._asdict() for pivot in findings.pivots],
    }


def _as_data(value: Any) -> Any:
    """Return named tuples, all the way down, by the names of their fields."""
    if hasattr(value, "_asdict"):
        return {key: _as_data(item) for key, item in value._asdict().items()}
    return [_as_data(item) for item in value] if isinstance(value, list | tuple) else value


def _spelled(value: Any) -> Any:
    """Return a value of a table as JSON can hold it: NaN and infinities as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return [_spelled(item) for item in value] if isinstance(value, list | tuple) else value


def _rounded(value: Any) -> Any:
    """Return a value of a detail as it is drawn: to four digits, and nothing for what is no finite number."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value
