"""Studies: what is done to a model in how many ways, and what each of the models that come of it is asked, as YAML.

    about: Which part of the layers carries the arithmetic?
    source: Qwen/Qwen3-8B
    variants:                          # as in recipes; a variant may have a source, steps and a base of its own
      - {variant: baseline, steps: []}
      - {layers: {window: 4, step: 2}}
    steps:
      - drop-layers: {layers: "{layers}"}
    variant: without {layers}          # what each is called; its values one after the other if not given
    damage: perplexity                 # or kl, or right: what tells of damage; the first that is measured if not given
    baseline: baseline                 # what the others are compared with; the first without steps if not given
    repeats: 1                         # each is made and asked so often, with the seeds `seed`, `seed` + 1, ...
    seed: 42                           # `{seed}` and `{repeat}` stand for them in steps
    suite: quick
    engine: vllm
    dtype: float32
    batch: 1
    results: results/windows           # a directory; results/NAME if not given

A variant that is an adapter is put on its `base`. Paths are relative to the working directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tensorsurgeon.checkpoint import Step
from tensorsurgeon.errors import UsageError, nearest, raise_all
from tensorsurgeon.evaluate.engine import Dtype, Kind
from tensorsurgeon.evaluate.records import Damage
from tensorsurgeon.recipe import depth_of, lay_over, read_steps
from tensorsurgeon.variants import expanded
from tensorsurgeon.yaml_lines import Reader

RESULTS = Path("results")


class _Data(BaseModel):
    """A study as it stands in its file."""

    model_config = ConfigDict(extra="forbid")

    about: str = ""
    source: str = Field(min_length=1)
    base: str | None = None
    steps: list[Any] = []
    variants: list[dict[str, Any]] = Field(min_length=1)
    variant: str | None = None
    damage: Damage | None = None
    baseline: str | None = None
    repeats: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    suite: str = "quick"
    engine: Kind | None = None
    dtype: Dtype = "float32"
    batch: int = Field(default=1, ge=1)
    results: str | None = None


@dataclass(frozen=True)
class Trial:
    """A variant in one repetition: what it is called, its values, how it is made, and its seed."""

    variant: str
    values: Mapping[str, Any]
    source: str
    steps: tuple[Step, ...]
    base: str | None
    repeat: int
    seed: int

    @property
    def made(self) -> tuple[Any, ...]:
        """What decides its weights; trials that are made alike are one model."""
        return self.source, repr(self.steps), self.base

    def recorded(self) -> dict[str, Any]:
        """Return the variant as plain data."""
        return {
            "name": self.variant,
            "values": dict(self.values),
            "source": self.source,
            "steps": [{step.name: dict(step.parameters)} for step in self.steps],
            "base": self.base,
        }


@dataclass(frozen=True)
class Study:
    """What is to be made and asked; the trials of a variant stand together, those of the baseline first."""

    name: str
    about: str
    source: str
    trials: tuple[Trial, ...]
    damage: Damage | None
    baseline: str | None
    repeats: int
    seed: int
    suite: str
    engine: Kind | None
    dtype: Dtype
    batch: int
    results: Path

    @property
    def locations(self) -> tuple[str, ...]:
        """The models that it begins with, and those that adapters are put on."""
        return tuple(dict.fromkeys(it for trial in self.trials for it in (trial.source, trial.base) if it))

    def recorded(self) -> dict[str, Any]:
        """Return all that decides what is found, as plain data; a seed of a step is that of the first repetition."""
        kept = ("name", "about", "source", "damage", "baseline", "repeats", "seed", "suite", "dtype")
        variants = [trial.recorded() for trial in self.trials if not trial.repeat]
        return {**{key: getattr(self, key) for key in kept}, "variants": variants}


def load_study(path: str | Path, settings: Iterable[str] = (), results: str | None = None) -> Study:
    """Read a study from a YAML file, with `settings` such as `source=DIR` or `variants.1.layers.window=2` laid over it.

    Raises:
        UsageError: with everything that is wrong in it.
    """
    reader = Reader(str(path))
    try:
        data = reader.read(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path}: cannot be read: {problem}.") from None
    if not isinstance(data, dict):
        raise UsageError(*reader.problems, f"{path}: a study has the keys {', '.join(_Data.model_fields)}.")
    for setting in settings:
        try:
            lay_over(data, setting)
        except UsageError as problem:
            reader.problems += problem.problems
    try:
        given = _Data(**data)
    except ValidationError as problem:
        raise UsageError(*reader.problems, *(_explain(reader, error) for error in problem.errors())) from None
    raise_all(UsageError, reader.problems)
    trials = _trials(given, reader)
    baseline = _baseline(given, trials, reader)
    name = Path(path).stem
    return Study(
        name,
        given.about,
        given.source,
        tuple(sorted(trials, key=lambda it: it.variant != baseline)),
        given.damage,
        baseline,
        given.repeats,
        given.seed,
        given.suite,
        given.engine,
        given.dtype,
        given.batch,
        Path(results or given.results or RESULTS / name),
    )


def _explain(reader: Reader, error: Any) -> str:
    where = reader.at(*error["loc"])
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no key {key!r} in a study.{nearest(key, _Data.model_fields)}"
    return f"{where}: {key} is missing." if error["type"] == "missing" else f"{where}: {key}: {error['msg']}."


def _trials(given: _Data, reader: Reader) -> list[Trial]:
    """Return the trials: each variant's repetitions together, in order."""
    shared = {"source": given.source, "steps": given.steps, "base": given.base, "variants": given.variants}
    problems: dict[str, None] = {}
    rounds = [list(_round(given, shared, repeat, reader, problems)) for repeat in range(given.repeats)]
    names = Counter(trial.variant for trial in rounds[0])
    for other in (it.variant for again in rounds[1:2] for it in again if it.variant not in names):
        what = "a variant has one name in all repetitions; leave '{seed}' and '{repeat}' out of it"
        problems[f"{reader.name}: variant: {other!r}: {what}."] = None
    for name, times in names.items():
        if times > 1:
            what = "variants are called so; name what differs in braces, in 'variant'"
            problems[f"{reader.name}: variant: {name!r}: {times} {what}."] = None
    raise_all(UsageError, problems)
    return [trial for trials in zip(*rounds, strict=True) for trial in trials]


def _round(
    given: _Data, shared: Mapping[str, Any], repeat: int, reader: Reader, problems: dict[str, None]
) -> Iterator[Trial]:
    """Yield the trials of one repetition."""
    seed = given.seed + repeat
    try:
        variants = expanded({**shared, "variant": given.variant or ""}, depth_of, {"seed": seed, "repeat": repeat})
    except UsageError as problem:
        problems |= dict.fromkeys(f"{reader.name}: {text}" for text in problem.problems)
        return
    for values, recipe in variants:
        name = recipe["variant"] or "-".join(map(str, values.values())) or "as it is"
        steps: tuple[Step, ...] = ()
        try:
            steps = read_steps(recipe["steps"], reader)
        except UsageError as problem:
            problems |= dict.fromkeys(problem.problems)
        yield Trial(str(name), values, str(recipe["source"]), steps, recipe["base"], repeat, seed)


def _baseline(given: _Data, trials: Iterable[Trial], reader: Reader) -> str | None:
    names = list(dict.fromkeys(it.variant for it in trials))
    if given.baseline and given.baseline not in names:
        raise UsageError(
            f"{reader.at('baseline')}: there is no variant {given.baseline!r}.{nearest(given.baseline, names)}"
        )
    plain = (it.variant for it in trials if not it.steps and not it.base and it.source == given.source)
    return given.baseline or next(plain, None)
