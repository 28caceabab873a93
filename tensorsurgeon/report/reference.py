"""The reference page of all operations, exams and derivations, read off their declarations."""

from __future__ import annotations

from tensorsurgeon.registry import DERIVATIONS, EXAMS, OPERATIONS, Spec
from tensorsurgeon.signature import Parameter


def reference_text() -> str:
    """Return the reference as Markdown."""
    parts = [
        "### Operations",
        *map(_section, OPERATIONS.values()),
        "### Exams",
        *map(_section, EXAMS.values()),
        "### Derivations",
        *map(_section, DERIVATIONS.values()),
    ]
    return "\n\n".join(parts)


def _section(spec: Spec) -> str:
    subject = f"{spec.subject.upper()}{'...' * spec.several}"
    placed = " ".join([subject, *(it.word.upper() for it in spec.operands)])
    operands = "SRC DEST" if spec.name in OPERATIONS else placed
    lines = [f"#### `{spec.name} {operands}`", "", spec.description]
    if spec.parameters:
        lines += ["", "| parameter | default | meaning |", "|---|---|---|"]
        lines += [f"| `{each.name}` | {_default(each)} | {_meaning(each)} |" for each in spec.parameters]
    return "\n".join(lines)


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.default, bool):
        return "yes" if parameter.default else "no"
    return "-" if parameter.default is None else f"`{parameter.default}`"


def _meaning(parameter: Parameter) -> str:
    choices = f" One of {', '.join(f'`{choice}`' for choice in parameter.choices)}." if parameter.choices else ""
    return parameter.help + choices
