"""The options of the command line: those read off a parameter's declaration, and those that commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from tensorsurgeon.engines import ENGINES
from tensorsurgeon.errors import UsageError
from tensorsurgeon.signature import Parameter
from tensorsurgeon.sizes import parse_part, parse_size

FORMS = {
    "ranks": "PATTERN=RANK", "models": "NAME=MODEL", "thresholds": "FILE", "lines": "FILE", "beside": "MODEL",
    "against": "MODEL", "adapter": "LORA", "suite": "NAME|FILE", "text": "FILE", "tasks": "NAMES", "server": "URL",
    "records": "FILE", "array": "FILE", "set_": "KEY=VALUE", "results": "DIR", "scratch": "DIR", "budget": "SIZE",
}  # fmt: skip
"""What stands for the value of an option in its help, where its name does not say it."""


def _parsed_by(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    def parsed(ctx: click.Context, param: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else parse(text)
        except UsageError as problem:
            raise click.BadParameter(str(problem), ctx, param) from None

    return parsed


def operand(parameter: Parameter) -> click.Argument:
    """Return the command-line argument of a parameter that an exam or derivation cannot do without."""
    return click.Argument([parameter.name])


def option(parameter: Parameter) -> click.Option:
    """Return the command-line option of a parameter."""
    name = "--" + parameter.word.replace("_", "-")
    short = ["-n"] if parameter.name == "dry_run" else []
    note = "" if parameter.required or parameter.default in (None, False) else f"  [default: {parameter.default}]"
    if parameter.type is bool:
        return click.Option([*short, name, parameter.name], is_flag=True, help=parameter.help)
    kind = click.Choice(parameter.choices) if parameter.choices else None
    metavar = None if parameter.choices else FORMS.get(parameter.name, parameter.word.upper())
    return click.Option(
        [name, parameter.name],
        type=kind,
        required=parameter.required,
        multiple=parameter.repeated,
        metavar=metavar,
        help=parameter.help + note,
    )


def json_option() -> click.Option:
    """Return the option for results as JSON."""
    return click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON.")


def running_options() -> list[click.Parameter]:
    """Return the options of all that runs for a while."""
    return [
        json_option(),
        click.Option(["--memory"], callback=_parsed_by(parse_size), default="1GiB", show_default=True, metavar="SIZE",
                     help="Most memory for blocks of tensors."),
        click.Option(["--threads"], type=click.IntRange(min=1), help="Threads at work.  [default: the cores]"),
    ]  # fmt: skip


def report_options() -> list[click.Parameter]:
    """Return the options of what gives Findings."""
    return [
        *running_options(),
        click.Option(["--html"], metavar="FILE", help="Write a page of all tables and pictures, to look at offline."),
        click.Option(["--plot"], metavar="DIR", help="Write pictures as PNG and SVG."),
        click.Option(["--csv"], metavar="DIR", help="Write each table as CSV."),
        click.Option(["-q", "--quiet"], is_flag=True, help="Show no progress."),
    ]  # fmt: skip


def writing_options() -> list[click.Parameter]:
    """Return the options of what writes a checkpoint."""
    return [
        click.Option(["-n", "--dry-run"], is_flag=True, help="Print the plan and write nothing."),
        *running_options(),
        click.Option(["--max-shard-size"], callback=_parsed_by(parse_size), metavar="SIZE",
                     help="Most bytes of tensors in a shard.  [default: 5GB]"),
        click.Option(["--target"], type=click.Choice(ENGINES), help="Refuse what this engine would read otherwise."),
        click.Option(["--shards"], callback=_parsed_by(parse_part), metavar="I/N",
                     help="Write only part I of N; a run without it completes the work."),
        click.Option(["--overwrite"], is_flag=True, help="Replace an earlier output, and unfinished work."),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print no plan and show no progress."),
    ]  # fmt: skip
