"""Plans, findings and results as people read them in a terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from tensorsurgeon.plan import Plan
from tensorsurgeon.registry import Findings
from tensorsurgeon.sizes import format_size

ROWS_SHOWN = 12
"""Longer tables of shards are cut; --json has them whole."""
LINE = 110
"""Characters of a line of sentences."""
FACTS = ("model", "study")
"""Tables that are shown as facts where they have one row."""


def plan_text(plan: Plan, dest: Path) -> str:
    """Return what writing the plan to `dest` will do."""
    summary = plan.summary()
    steps = [f"{name} {_parameters(values)}".strip() for step in summary["steps"] for name, values in step.items()]
    place = next(parent for parent in (dest, *dest.absolute().parents) if parent.exists())
    facts = {
        "source": ", ".join(source.name for source in plan.checkpoint.sources),
        "steps": "; ".join(steps) or "none",
        "dest": str(dest),
        "tensors": f"{summary['tensors']:,}: {summary['copied']:,} copied, {summary['computed']:,} computed",
        "elements": f"{summary['elements']:,}",
        "read": format_size(summary["bytes_to_read"]),
        "write": f"{format_size(summary['bytes_to_write'])}, {format_size(shutil.disk_usage(place).free)} are free",
        "memory": f"up to {format_size(summary['memory'])} for blocks of tensors",
    }
    lines = [as_list(facts), "", as_table(summary["shards"][:ROWS_SHOWN])]
    lines += [f"and {len(summary['shards']) - ROWS_SHOWN} more shards"] if len(summary["shards"]) > ROWS_SHOWN else []
    for title, rows in summary["report"].items():
        lines += ["", f"{title}:", as_table(rows[:ROWS_SHOWN])]
        lines += [f"and {len(rows) - ROWS_SHOWN} more"] if len(rows) > ROWS_SHOWN else []
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    return "\n".join(lines)


def written_text(plan: Plan, dest: Path, seconds: float) -> str:
    """Return what was written, and how fast."""
    rate = format_size(plan.size / seconds) if seconds else "-"
    return f"wrote {dest}: {format_size(plan.size)} in {seconds:.1f} s ({rate}/s)"


def findings_text(findings: Findings) -> str:
    """Return what an exam found: in words, as tables, one of one row as lines of name and value, and its problems."""
    parts = [textwrap.fill(text, LINE) for text in findings.summary]
    for title, rows in findings.tables.items():
        columns = findings.shown.get(title)
        listed = [{key: row[key] for key in columns if key in row} for row in rows] if columns else rows
        shown = listed if title == "tensors" else listed[:ROWS_SHOWN]
        text = as_list(rows[0]) if title in FACTS and len(rows) == 1 else f"{title}:\n{as_table(shown)}"
        more = f"\nand {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
        parts.append(text + more)
    parts += ["\n".join(f"problem: {text}" for text in findings.problems)] if findings.problems else []
    return "\n\n".join(parts)


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an aligned table under their column names."""
    shown = [{column: _shown(value) for column, value in row.items()} for row in rows]
    columns = [[row.get(key) for row in rows] for key in rows[0]] if rows else []
    numeric = (any(isinstance(value, int | float) for value in column) for column in columns)
    alignment = ["right" if is_numeric else "left" for is_numeric in numeric]
    return tabulate(shown, headers="keys", tablefmt="simple", disable_numparse=True, colalign=alignment)


def as_list(row: Mapping[str, Any]) -> str:
    """Return one row as lines of name and value."""
    return tabulate([(name, _shown(value)) for name, value in row.items()], tablefmt="plain", disable_numparse=True)


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return "x".join(map(str, value)) or "scalar"
    return str(value).replace("\n", "⏎")


def _parameters(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not False)
