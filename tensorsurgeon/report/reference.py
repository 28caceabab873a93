"""The reference page of all operations and exams, read off their declarations."""

from __future__ import annotations

from tensorsurgeon.registry import EXAMS, OPERATIONS, Parameter, Spec


def reference_text() -> str:
    """Return the reference as Markdown."""
    parts = [
        "### Operations",
        *map(_section, OPERATIONS.values()),
        "### Exams",
        *map(_section, EXAMS.values()),
    ]
    return "\n\n".join(parts)


def _section(spec: Spec) -> str:
    operands = " ".join(["MODEL", *(it.word.upper() for it in spec.operands)]) if spec.name in EXAMS else "SRC DEST"
    lines = [f"#### `{spec.name} {operands}`", "", spec.description]
    if spec.parameters:
        lines += ["", "| parameter | default | meaning |", "|---|---|---|"]
        lines += [f"| `{each.name}` | {_default(each)} | {_meaning(each)} |" for each in spec.parameters]
    return "\n".join(lines)


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    words = {"None": "-", "False": "no", "True": "yes"}
    return words.get(str(parameter.default), f"`{parameter.default}`")


def _meaning(parameter: Parameter) -> str:
    choices = f" One of {', '.join(f'`{choice}`' for choice in parameter.choices)}." if parameter.choices else ""
    return parameter.help + choices
