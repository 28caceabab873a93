"""Operations, exams and derivations, declared once: a typed function with a docstring.

From signature and docstring come the checks of its parameters, the options of the command line, the keys of a
recipe, the JSON schema of recipes, and the reference page. An operation maps a Checkpoint to a Checkpoint and
moves no data; an exam looks at one, and returns Findings; a derivation reads a file and writes another.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any, NamedTuple, ParamSpec, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tensorsurgeon.charts import Chart, Pivot
from tensorsurgeon.checkpoint import Checkpoint, Step, open_checkpoint
from tensorsurgeon.errors import UsageError, nearest, raise_all
from tensorsurgeon.notation import NamedLayer, format_layers, format_named_layers
from tensorsurgeon.parameters import Directories, File, Location
from tensorsurgeon.signature import Parameter, parse_docstring

P = ParamSpec("P")


class Findings(NamedTuple):
    """What an exam or derivation found: `tables` of rows by title, and `problems`, of which a sound model has none.

    `details` holds what no cell of a table can: of a tensor, by its `name` (and `model`, where there are two), a
    `histogram` or several `histograms` by what they are of, the largest magnitudes of its `rows` and `columns`, its
    `spectrum`. `shown` names the columns of a table that a terminal has room for, where it has more. `summary` says in
    words what was found; `charts` and `pivots` are other views of the tables, for pages and pictures.
    """

    tables: Mapping[str, list[dict[str, Any]]]
    problems: tuple[str, ...] = ()
    details: Sequence[Mapping[str, Any]] = ()
    shown: Mapping[str, Sequence[str]] = {}
    summary: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    pivots: Sequence[Pivot] = ()


@dataclass(frozen=True)
class Spec:
    """What is known of an operation, exam or derivation: its name wherever it is called, and its parameters.

    `function` checks its parameters itself; an operation also records its step. `subject` is what the command line
    calls the model or file that it is about.
    """

    name: str
    function: Callable[..., Any]
    summary: str
    description: str
    parameters: tuple[Parameter, ...]
    takes_location: bool = False
    subject: str = "model"
    several: bool = False
    """Whether it may be about several of them at once."""

    @property
    def operands(self) -> tuple[Parameter, ...]:
        """The parameters without a default: of all but operations, what the command line takes by its place."""
        return tuple(parameter for parameter in self.parameters if parameter.required)

    @property
    def options(self) -> tuple[Parameter, ...]:
        """The parameters with a default."""
        return tuple(parameter for parameter in self.parameters if not parameter.required)

    @cached_property
    def model(self) -> type[BaseModel]:
        """The pydantic model of its parameters."""
        fields: dict[str, Any] = {
            parameter.name: (
                parameter.annotation,
                Field(
                    ... if parameter.required else parameter.default, alias=parameter.word, description=parameter.help
                ),
            )
            for parameter in self.parameters
        }
        config = ConfigDict(extra="forbid", title=self.name, populate_by_name=True)
        return create_model(self.name, __config__=config, **fields)

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters, parsed and with defaults.

        Raises:
            UsageError: with all that is wrong, and the nearest name for an unknown one.
        """
        given = {str(key).replace("-", "_"): value for key, value in parameters.items()}
        try:
            return dict(self.model(**given))
        except ValidationError as problem:
            raise UsageError(*(self._explain(error) for error in problem.errors())) from None

    def _explain(self, error: Any) -> str:
        key = str(error["loc"][0])
        known = [parameter.name for parameter in self.parameters]
        if error["type"] == "extra_forbidden":
            return f"{self.name}: there is no parameter {key!r}.{nearest(key, known)}"
        if error["type"] == "missing":
            return f"{self.name}: {key} is missing."
        message = error["msg"].removeprefix("Value error, ")
        return f"{self.name}: {message}" if message.startswith(f"{key}:") else f"{self.name}: {key}: {message}."

    def recorded(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return checked parameters as they stand in a recipe: one spelling for one meaning, unset ones left out."""
        unset = {parameter.name for parameter in self.parameters if parameter.default in (None, False)}
        return {key.rstrip("_"): _recorded(it) for key, it in parameters.items() if it or key not in unset}


OPERATIONS: dict[str, Spec] = {}
EXAMS: dict[str, Spec] = {}
DERIVATIONS: dict[str, Spec] = {}


def operation(function: Callable[P, Checkpoint]) -> Callable[P, Checkpoint]:
    """Declare an operation: its parameters are checked at each call, and the call is recorded as a step."""
    spec = _declare(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Checkpoint:
        ckpt, parameters = _bind(spec, args, kwargs)
        changed = function(ckpt, **parameters)
        return changed.replace(steps=(*ckpt.steps, Step(spec.name, spec.recorded(parameters))))

    OPERATIONS[spec.name] = replace(spec, function=call)
    return call


def exam(function: Callable[P, Findings]) -> Callable[P, Findings]:
    """Declare an exam: its parameters are checked at each call."""
    return _declare_finder(function, EXAMS)


def derivation(function: Callable[P, Findings]) -> Callable[P, Findings]:
    """Declare a derivation: its first parameter is the file that it reads, and all are checked at each call."""
    return _declare_finder(function, DERIVATIONS)


def _declare_finder(function: Callable[P, Findings], registry: dict[str, Spec]) -> Callable[P, Findings]:
    spec = _declare(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Findings:
        subject, parameters = _bind(spec, args, kwargs)
        return function(subject, **parameters)

    registry[spec.name] = replace(spec, function=call)
    return call


def open_model(model: str | Mapping[str, Any] | Checkpoint) -> Checkpoint:
    """Open a further model of an operation, and apply its steps."""
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, str):
        return open_checkpoint(model)
    written = [step if isinstance(step, Mapping) else {step: {}} for step in model.get("steps") or ()]
    steps = [Step(name, options or {}) for step in written for name, options in step.items()]
    return apply_steps(open_checkpoint(model["source"]), steps)


def apply_steps(ckpt: Checkpoint, steps: Iterable[Step]) -> Checkpoint:
    """Apply operations one after the other; no tensor is read."""
    for step in steps:
        parameters = {key.replace("-", "_"): value for key, value in step.parameters.items()}
        ckpt = find_operation(step.name).function(ckpt, **parameters)
    return ckpt


def find_operation(name: str) -> Spec:
    """Return an operation by its name in recipes.

    Raises:
        UsageError: with the nearest name, for an unknown one.
    """
    known = name.replace("_", "-")
    if known not in OPERATIONS:
        raise UsageError(f"there is no operation {name!r}.{nearest(known, OPERATIONS)}")
    return OPERATIONS[known]


def _recorded(value: Any) -> Any:
    if isinstance(value, Checkpoint):
        steps = [{step.name: dict(step.parameters)} for step in value.steps]
        return {"source": value.sources[0].name, "steps": steps} if steps else value.sources[0].name
    if isinstance(value, dict):
        return {key: _recorded(item) for key, item in value.items()}
    if isinstance(value, tuple):
        if not all(isinstance(item, int | NamedLayer) for item in value):
            return [_recorded(item) for item in value]
        named = all(isinstance(item, NamedLayer) for item in value)
        return format_named_layers(value) if named else format_layers(value)
    return value


def _declare(function: Callable[..., Any]) -> Spec:
    description, arguments = parse_docstring(inspect.getdoc(function) or "")
    hints = get_type_hints(function, include_extras=True)
    subject, *signature = inspect.signature(function).parameters.values()
    missing = [parameter.name for parameter in signature if parameter.name not in arguments]
    if missing:
        raise TypeError(f"{function.__name__}: its docstring does not explain {', '.join(missing)}.")
    parameters = tuple(Parameter(each.name, hints[each.name], each.default, arguments[each.name]) for each in signature)
    name = function.__name__.replace("_", "-")
    if any(name in registry for registry in (OPERATIONS, EXAMS, DERIVATIONS)):
        raise TypeError(f"{function.__name__}: there is an operation, exam or derivation of that name already.")
    summary = description.split("\n\n")[0]
    # A subject that is a file goes by its own name; any other is a model.
    kind = hints[subject.name]
    called = subject.name if kind in (File, Directories) else "model"
    located, several = kind in (Location, File, Directories), kind is Directories
    return Spec(name, function, summary, description, parameters, located, called, several)


def _bind(spec: Spec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model or file that a call is about, and its other parameters, checked."""
    if not args:
        raise UsageError(f"{spec.name}: give the {'checkpoint' if spec.subject == 'model' else spec.subject} first.")
    subject = (args[0],) if spec.several and isinstance(args[0], str | os.PathLike) else args[0]
    subjects = subject if spec.several and isinstance(subject, list | tuple) else [subject]
    if not all(isinstance(it, (str, os.PathLike) if spec.takes_location else Checkpoint) for it in subjects):
        location = "a directory or hub id" if spec.subject == "model" else "directories" if spec.several else "a file"
        wanted = location if spec.takes_location else "a Checkpoint, as tensorsurgeon.open gives"
        raise UsageError(f"{spec.name}: the first argument is {type(args[0]).__name__}, not {wanted}.")
    names = [parameter.name for parameter in spec.parameters]
    if len(args) - 1 > len(names):
        raise UsageError(f"{spec.name}: takes {len(names)} parameters: {', '.join(names)}.")
    placed = dict(zip(names, args[1:], strict=False))
    raise_all(UsageError, (f"{spec.name}: {name} is given twice." for name in placed if name in kwargs))
    return subject, spec.check({**placed, **kwargs})
