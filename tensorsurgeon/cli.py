"""The command line: one command for each exam, operation and derivation, read off their declarations, and `run`.

Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import tensorsurgeon.derivations
import tensorsurgeon.exams.integrity
from tensorsurgeon._version import __version__
from tensorsurgeon.checkpoint import Checkpoint, Step, open_checkpoint
from tensorsurgeon.engines import Engine
from tensorsurgeon.errors import RefusedError, SurgeonError, nearest, raise_all
from tensorsurgeon.evaluate.engine import DTYPES, Dtype, Settings
from tensorsurgeon.evaluate.serving import serving
from tensorsurgeon.options import json_option, operand, option, report_options, writing_options
from tensorsurgeon.plan import make_plan
from tensorsurgeon.recipe import Recipe, load_recipes, recipe_schema
from tensorsurgeon.registry import DERIVATIONS, EXAMS, OPERATIONS, Spec
from tensorsurgeon.report.files import check_report, findings_json, write_report
from tensorsurgeon.report.reference import reference_text
from tensorsurgeon.report.text import findings_text, plan_text, written_text
from tensorsurgeon.running import Running, run_under
from tensorsurgeon.writer import check_destination, write_plan

EXIT_STATUS = "Exit status: 0 done, 1 failed, 2 not understood, 3 an exam found something wrong, 130 interrupted."
WRONG, INTERRUPTED = 3, 130


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    # A large model is a million small objects that are all kept: to look for garbage among them often is in vain.
    gc.set_threshold(200_000)
    try:
        return commands().main(arguments, prog_name="tensorsurgeon", standalone_mode=False) or 0
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except SurgeonError as error:
        for text in error.problems:
            print(f"error: {text}", file=sys.stderr)
        return error.exit_status
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except OSError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return SurgeonError.exit_status


class _Group(click.Group):
    """Suggests the nearest command for one that does not exist."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"there is no command {args[0]!r}.{nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def commands() -> click.Group:
    """Return the command line: a command for each exam, operation and derivation, `run`, and `reference`."""
    group = _Group(help="Operate on LLM checkpoints where they lie.", epilog=EXIT_STATUS)
    click.version_option(__version__, message="%(version)s")(group)
    for spec in (*EXAMS.values(), *DERIVATIONS.values()):
        group.add_command(_finding_command(spec))
    for spec in OPERATIONS.values():
        group.add_command(_operation_command(spec))
    group.add_command(_run_command())
    group.add_command(_serve_command())
    group.add_command(_reference_command())
    return group


def _command(name: str, callback: Callable[..., int], summary: str, params: list[click.Parameter]) -> click.Command:
    return click.Command(name, callback=callback, help=summary, params=params, epilog=EXIT_STATUS)


def _finding_command(spec: Spec) -> click.Command:
    own = {parameter.name for parameter in spec.parameters}

    def find(as_json: bool, memory: int, threads: int | None, quiet: bool, **given: Any) -> int:
        places = {name: Path(given[name]) for name in ("html", "csv", "plot") if given[name]}
        check_report(**places)
        location = given[spec.subject]
        subject: Any = location if spec.takes_location else open_checkpoint(location)
        with run_under(Running(memory, threads or 0, quiet=quiet or as_json)):
            findings = spec.function(subject, **_present({name: given[name] for name in own}))
        _print(findings_json(findings) if as_json else findings_text(findings))
        operands = [*(location if spec.several else [location]), *(str(given[it.name]) for it in spec.operands)]
        write_report(findings, " ".join([spec.name, *operands]), **places)
        return WRONG if findings.problems else 0

    subject_argument = click.Argument([spec.subject], nargs=-1 if spec.several else 1, required=True)
    params = [subject_argument, *map(operand, spec.operands), *map(option, spec.options)]
    params += report_options()
    meanings = [f"{it.word.upper()}: {it.help}" for it in spec.operands]
    return _command(spec.name, find, "\n\n".join([spec.description, *meanings]), params)


def _operation_command(spec: Spec) -> click.Command:
    own = {parameter.name for parameter in spec.parameters}

    def operate(src: str, dest: str, **given: Any) -> int:
        parameters = spec.check(_present({name: given[name] for name in own}))
        options = {name: value for name, value in given.items() if name not in own}
        return _write((Recipe(src, dest, (Step(spec.name, parameters),)),), **options)

    params = [click.Argument(["src"]), click.Argument(["dest"]), *map(option, spec.parameters)]
    params += [it for it in writing_options() if it.name not in own]
    return _command(spec.name, operate, spec.description, params)


def _run_command() -> click.Command:
    def run(recipe: str, dest: str | None, settings: tuple[str, ...], **options: Any) -> int:
        return _write(load_recipes(recipe, settings, dest), **options)

    meaning = "Lay a value over the recipe, such as steps.1.layers=10-12."
    setting = click.Option(["--set", "settings"], multiple=True, metavar="KEY=VALUE", help=meaning)
    params = [click.Argument(["recipe"]), click.Argument(["dest"], required=False), setting, *writing_options()]
    summary = "Run a recipe: a YAML file with source, dest and steps, or a mergekit config that passes layers through."
    return _command("run", run, summary, params)


def _reference_command() -> click.Command:
    def reference(as_json: bool) -> int:
        _print(recipe_schema() if as_json else reference_text())
        return 0

    summary = "Print the reference of all operations, exams and derivations; with --json the JSON schema of recipes."
    return _command("reference", reference, summary, [json_option()])


def _serve_command() -> click.Command:
    def serve(model: str, port: int, dtype: Dtype, batch: int, threads: int | None, more: tuple[str, ...]) -> int:
        ckpt = open_checkpoint(model)
        raise_all(RefusedError, tensorsurgeon.exams.integrity.faults(ckpt))
        settings = Settings(dtype, batch, threads=threads or 0)
        # Who ends this process by its number means the server too, which would outlive it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with serving(ckpt.sources[0].directory, settings, port, more) as server:
            click.echo(f"{ckpt.sources[0].name} is served at {server.url}/v1; end it with Ctrl-C.")
            server.wait()
        return 0

    summary = (
        "Serve a model in vLLM on this machine, set for exact answers, until it is interrupted.\n\n"
        "A checkpoint that vLLM would serve wrongly is refused; where vLLM does not start, its first reason is told. "
        "Options of 'vllm serve' follow behind --."
    )
    params = [
        click.Argument(["model"]),
        click.Option(["--port"], type=int, default=8000, show_default=True, help="The port."),
        click.Option(["--dtype"], type=click.Choice(DTYPES), default="float32", show_default=True,
                     help="What is computed in; the head always in float32."),
        click.Option(["--batch"], type=click.IntRange(min=1), default=1, show_default=True,
                     help="Most requests computed together."),
        click.Option(["--threads"], type=click.IntRange(min=1), help="Threads of the processor."),
        click.Argument(["more"], nargs=-1, type=click.UNPROCESSED),
    ]  # fmt: skip
    return _command("serve", serve, summary, params)


def _write(
    recipes: Sequence[Recipe],
    dry_run: bool,
    as_json: bool,
    memory: int,
    threads: int | None,
    shards: tuple[int, int] | None,
    overwrite: bool,
    quiet: bool,
    max_shard_size: int | None = None,
    target: Engine | None = None,
) -> int:
    plans = []
    for recipe in recipes:
        with run_under(Running(memory, threads or 0, dry_run, quiet or as_json)):
            ckpt: Checkpoint = recipe.checkpoint()
        plan = make_plan(ckpt, max_shard_size or recipe.max_shard_size, memory, threads, target or recipe.target)
        check_destination(plan, Path(recipe.dest), overwrite)
        plans.append((plan, Path(recipe.dest)))
    results = []
    for plan, dest in plans:
        if not as_json and (dry_run or not quiet):
            _print(plan_text(plan, dest))
        if dry_run:
            results.append(plan.summary())
            continue
        started = time.perf_counter()
        receipt = write_plan(plan, dest, overwrite=overwrite, part=shards or (1, 1), quiet=quiet or as_json)
        seconds = time.perf_counter() - started
        results.append({"plan": plan.summary(), "receipt": receipt, "seconds": round(seconds, 3)})
        if not as_json and not quiet:
            unfinished = f"wrote a part of the shards; run without --shards to complete {dest}."
            _print(written_text(plan, dest, seconds) if receipt else unfinished)
    if as_json:
        _print(results[0] if len(results) == 1 else results)
    return 0


def _present(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value not in (None, ())}


def _print(result: Any) -> None:
    click.echo(result if isinstance(result, str) else json.dumps(result, indent=2, ensure_ascii=False))
