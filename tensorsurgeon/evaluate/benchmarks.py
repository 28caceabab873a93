"""Tasks of lm-evaluation-harness on the engines of this package: one engine for all tasks, and all models of a sweep.

A task is one of the harness's names, whose data it fetches, one of those that come with this package, or a YAML file of
a user. Data files of the last two are found beside the YAML, so that they need no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tensorsurgeon.errors import UsageError, raise_all
from tensorsurgeon.evaluate.engine import Engine, Foreseen, Sampling
from tensorsurgeon.evaluate.suite_parts import Task, is_yaml
from tensorsurgeon.evaluate.tokens import Tokens

PACKAGED = files("tensorsurgeon.evaluate") / "tasks"
ANSWER = 256
"""Tokens of an answer where a task does not say how many, as the harness has it."""
ROOM = 4096
"""Tokens that a prompt of a task and its answer may take together, where the model has as many positions."""


def packaged_tasks() -> list[str]:
    """Return the names of the tasks that come with the package."""
    return sorted(it.name.removesuffix(".yaml") for it in PACKAGED.iterdir() if it.name.endswith(".yaml"))


def check_tasks(tasks: Iterable[Task]) -> None:
    """See that the harness is there, and that it has all of some tasks.

    Raises:
        UsageError: with all that is wrong.
    """
    given = list(tasks)
    if given and not find_spec("lm_eval"):
        raise UsageError('tasks need lm-evaluation-harness: pip install "tensorsurgeon[lm-eval]".')
    problems: list[str] = []
    for it in given:
        try:
            named = _task(it.task)
        except UsageError as problem:
            problems += problem.problems
            continue
        if isinstance(named, str) and named not in _manager(True).all_tasks:
            ours = ", ".join(packaged_tasks())
            problems.append(f"tasks: there is none of the name {named!r}; of this package there are {ours}.")
    raise_all(UsageError, problems)


def run_task(engine: Engine, tokens: Tokens, task: Task, room: int) -> list[dict[str, Any]]:
    """Run a task on the model that an engine has loaded, and return a score for each of its metrics.

    `room` is what a prompt with its answer may take; longer prompts lose their beginning, as in the harness.
    """
    import datasets
    from lm_eval import simple_evaluate

    datasets.disable_progress_bars()
    named = _task(task.task)
    found = simple_evaluate(
        _model(engine, tokens, room), tasks=[named], task_manager=_manager(isinstance(named, str)), limit=task.limit,
        bootstrap_iters=0, log_samples=False, apply_chat_template=task.chat,
    )  # fmt: skip
    return list(_scores(found or {}))


def task_files(task: str) -> list[Path]:
    """Return the files of a task that is one: its own, and its data."""
    data = _read(Path(task))
    held = (data.get("dataset_kwargs") or {}).get("data_files") or {}
    return [Path(task), *(Path(it) for it in (held.values() if isinstance(held, dict) else ()))]


@cache
def _manager(defaults: bool) -> Any:
    """Return what finds tasks; that of the harness's own reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _task(name: str) -> str | dict[str, Any]:
    """Return a task's name, or its configuration with its data files found beside it."""
    if name in packaged_tasks():
        with as_file(PACKAGED / f"{name}.yaml") as path:
            return _read(path)
    return _read(Path(name)) if is_yaml(name) else name


def _read(path: Path) -> dict[str, Any]:
    try:
        # Only plain data: `!function` of the harness would run code that lies beside the file.
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise UsageError(f"{path}: is no task of plain YAML: {' '.join(str(problem).split())}.") from None
    if not isinstance(data, dict) or not isinstance(data.get("task"), str):
        raise UsageError(f"{path}: is no task; it needs at least 'task', its name.")
    held = (data.get("dataset_kwargs") or {}).get("data_files") or {}
    for split, file in held.items() if isinstance(held, dict) else ():
        held[split] = str(path.parent / file)
        if not Path(held[split]).is_file():
            raise UsageError(f"{path}: there is no data file {held[split]}.")
    return data


def _scores(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    samples = found.get("n-samples", {})
    for task, metrics in found.get("results", {}).items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                yield {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "value": float(value),
                    "documents": samples.get(task, {}).get("effective"),
                }


def _model(engine: Engine, tokens: Tokens, room: int) -> Any:
    """Return an engine as the harness's interface has models; its class is made here, where the harness is there."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):  # type: ignore[misc]
        tokenizer_name = tokens.directory.name

        @property
        def eot_token_id(self) -> int:
            return tokens.ends[0]

        @property
        def prefix_token_id(self) -> int:
            start = tokens.tokenizer.bos_token_id
            return self.eot_token_id if start is None else int(start)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            # A chat template writes the token that begins a text itself; the tokenizer would put a second before it.
            begun = string.startswith(tokens.tokenizer.decode(self.prefix_token_id))
            return tokens.encode(string, special=not begun if add_special_tokens is None else add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                tokens.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            given = [(context, answer) for _, context, answer in requests]
            engine.foresee(Foreseen(scores=[self._cut(*it) for it in given if it[1]]))
            return [self._scored(*it) for it in given]

        def _scored(self, context: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
            if not answer:
                return 0.0, True
            (scores,) = engine.score([self._cut(context, answer)])
            return float(scores.logprobs[-len(answer) :].sum()), bool(scores.greedy[-len(answer) :].all())

        def _cut(self, context: Sequence[int], answer: Sequence[int]) -> list[int]:
            # The engine makes a token behind the prompt, which needs a place too.
            return [*context, *answer][-(room - 1) :]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [self._rolled(text) for (text,) in (request.args for request in requests)]

        def _rolled(self, text: str) -> float:
            windows = get_rolling_token_windows(
                token_list=tokens.encode(text, special=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=room - 2,
                context_len=1,
            )
            return sum(self._scored(*make_disjoint_window(window))[0] for window in windows)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._generated(*request.args) for request in requests]

        def _generated(self, context: str, options: dict[str, Any]) -> str:
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            wanted = min(int(options.get("max_gen_toks") or ANSWER), room - 1)
            temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
            prompt = self.tok_encode(context)[-(room - wanted) :]
            sampling = Sampling(wanted, temperature, engine.settings.seed)
            (made,) = engine.generate([prompt], sampling, tokens.ends)
            text = tokens.decode(made.tokens)
            return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]

    return Adapter()
