"""The worker that evaluates in vLLM: one process for all that a test module asks, as pytest never imports vLLM.

usage: evaluating.py JOBS ANSWERS

JOBS holds `suite`, a file; `models`, directories by name; `adapters`, base and adapter by name; `prompts`, tokens;
`refused`, directories that vLLM is not to take, by name; and `command`, words. The command's own output is all that
this process may write to standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tensorsurgeon.cli import main as command_line
from tensorsurgeon.errors import EngineError
from tensorsurgeon.evaluate.asking import ask
from tensorsurgeon.evaluate.choosing import make_engine
from tensorsurgeon.evaluate.engine import Engine, Sampling, Settings
from tensorsurgeon.evaluate.questionnaire import Questionnaire
from tensorsurgeon.evaluate.suite import load_suite
from tensorsurgeon.evaluate.tokens import Tokens

LENGTH = 512


def measured(engine: Engine, suite: str, directory: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Return all that an interface gives of the loaded model: records, logits, scores, and continuations."""
    records: list[dict[str, Any]] = []
    tokens = Tokens(directory)
    ask(engine, Questionnaire(load_suite(suite), tokens, LENGTH), {"model_name": directory.name}, records.append)
    return {
        "records": records,
        "logits": [row.tolist() for row in engine.next_logits(prompts)],
        "scores": [[it.logprobs.tolist(), it.greedy.tolist()] for it in engine.score(prompts)],
        "generated": [it.tokens for it in engine.generate(prompts, Sampling(8), tokens.ends)],
        "sampled": [it.tokens for it in engine.generate(prompts, Sampling(12, 2.0, seed=7), tokens.ends)],
        "sampled otherwise": [it.tokens for it in engine.generate(prompts, Sampling(12, 2.0, seed=8), tokens.ends)],
    }


def main(jobs: str, answers: str) -> None:
    """Do all jobs in one process, the command last."""
    given = json.loads(Path(jobs).read_text())
    engine = make_engine("vllm", Settings())
    done: dict[str, Any] = {}
    for name, directory in given["models"].items():
        engine.load(Path(directory), LENGTH)
        done[name] = measured(engine, given["suite"], Path(directory), given["prompts"])
    for name, (base, adapter) in given["adapters"].items():
        engine.load(Path(base), LENGTH, Path(adapter))
        done[name] = measured(engine, given["suite"], Path(base), given["prompts"])
    done["refused"] = {}
    for name, directory in given["refused"].items():
        try:
            engine.load(Path(directory), LENGTH)
            done["refused"][name] = None
        except EngineError as problem:
            done["refused"][name] = str(problem)
    engine.close()
    done["status"] = command_line(given["command"])
    Path(answers).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
