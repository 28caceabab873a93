"""Asks vLLM what a checkpoint says, for tests that compare it with transformers or with another checkpoint.

vLLM runs in a process of its own, so that pytest never imports it, and neither a crash nor a hang of it can
take the tests along. Importing it takes several seconds: give `answers` all the models of a test at once.

vLLM does not notice a missing Linear, embedding or lm_head: that it answers proves nothing yet, what it
answers must be compared.

The same file is the worker: `python serving.py JOBS ANSWERS`.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default it takes a share of all memory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the worker: real exceptions, fewer processes
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else the first request for logprobs compiles for seconds
    "OMP_NUM_THREADS": "1",  # sums in one order, whatever the machine
}

# vLLM for CPU requires these three, whose wheels on PyPI need CUDA and break the import of every model.
HIDE_CUDA_WHEELS = """\
import sys
for name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(name, None)
"""

# An exception as a traceback or vLLM's log ends it, with the indented lines that belong to its message.
EXCEPTION = re.compile(
    r"^(?:\(.+\) ERROR .*?\] )?((?:\w+\.)*\w+(?:Error|Exception)(?::.*(?:\n +\S.*)*)?)$", re.MULTILINE
)

RANK = re.compile(r"^(?:\[rank0\]: )+", re.MULTILINE)  # torch.distributed puts it before a traceback's lines


class ServingError(Exception):
    """vLLM refused a checkpoint or died of it. Says which, vLLM's first exception, and how its log ends."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to score, and how many tokens to append greedily (at least 1: vLLM refuses 0)."""

    prompt_token_ids: list[int]
    max_tokens: int = 1


@dataclasses.dataclass(frozen=True)
class Answer:
    """The appended tokens, exactly `max_tokens` as an end-of-sequence token does not end them, and the log
    probability of every prompt token but the first, given those before it."""

    token_ids: list[int]
    prompt_logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class Job:
    """What to ask one checkpoint. vLLM serves block FP8 and INT4 in bfloat16, not in float32.

    With `adapters`, each is asked in turn instead of the model by itself."""

    directory: Path
    requests: list[Request]
    dtype: str = "float32"
    adapters: list[Path] = dataclasses.field(default_factory=list)
    max_lora_rank: int = 64


def installed() -> bool:
    """Whether vLLM is there to be asked, found out without importing it."""
    return importlib.util.find_spec("vllm") is not None


def answer(directory: Path, requests: Sequence[Request], dtype: str = "float32") -> list[Answer]:
    """Answers of one checkpoint, one for each request."""
    return answers([Job(directory, list(requests), dtype)])[0]


def answers(jobs: Sequence[Job], timeout: float = 1200) -> list[list[Answer]]:
    """Answers of several checkpoints, served one after the other by one process."""
    return [[Answer(**fields) for fields in job] for job in _done(jobs, timeout)]


def adapter_answers(job: Job, timeout: float = 1200) -> list[list[Answer] | str]:
    """Answers of a checkpoint with each of the job's adapters, or what vLLM said where it refused one."""
    (done,) = _done([job], timeout)
    return [each if isinstance(each, str) else [Answer(**fields) for fields in each] for each in done]


def _done(jobs: Sequence[Job], timeout: float) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
        jobs_file, answers_file, log_file = (Path(scratch, name) for name in ("jobs", "answers", "log"))
        jobs_file.write_text(json.dumps([dataclasses.asdict(job) for job in jobs], default=str))
        answers_file.touch()
        Path(scratch, "sitecustomize.py").write_text(HIDE_CUDA_WHEELS)  # reaches vLLM's children too
        command = [sys.executable, __file__, str(jobs_file), str(answers_file)]
        status = _run(command, scratch, log_file, timeout)
        done = [json.loads(line) for line in answers_file.read_text().splitlines()]
        if len(done) < len(jobs):
            cause = _explain(status, RANK.sub("", log_file.read_text(errors="replace")), timeout)
            raise ServingError(f"{jobs[len(done)].directory}: {cause}")
    return done


def _run(command: list[str], python_path: str, log_file: Path, timeout: float) -> int | None:
    """The exit status; None past the timeout, when it is killed with its children."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": python_path}
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _explain(status: int | None, log: str, timeout: float) -> str:
    """The first exception of the log, as later ones only say that something failed, and the log's end."""
    exception = EXCEPTION.search(log)
    if status is None:
        cause = f"vLLM did not end within {timeout:g} s"
    elif exception:
        cause = exception[1]
    else:
        cause = f"vLLM ended with status {status}"
    return "\n".join([cause, *log.splitlines()[-20:]])


def _serve(jobs_file: Path, answers_file: Path) -> None:
    """The worker. Writes the answers to each job, on one line, before the next: a failure is the next job's.

    Imports vLLM by name because mypy would read all of it, or miss it where it is not installed."""
    vllm: Any = importlib.import_module("vllm")
    distributed: Any = importlib.import_module("vllm.distributed")
    with answers_file.open("w") as sink:
        for job in json.loads(jobs_file.read_text()):
            engine = _engine(vllm, **job)
            done: list[Any] = [_ask_adapter(vllm, engine, path, job["requests"]) for path in job["adapters"]]
            done = done or [dataclasses.asdict(_ask(vllm, engine, **request)) for request in job["requests"]]
            print(json.dumps(done), file=sink, flush=True)
            del engine
            gc.collect()
            distributed.cleanup_dist_env_and_memory()


def _ask_adapter(vllm: Any, engine: Any, path: str, requests: list[dict[str, Any]]) -> Any:
    """Load an adapter first, as one that fails while a request is under way leaves the engine stuck."""
    lora: Any = importlib.import_module("vllm.lora.request")
    adapter = lora.LoRARequest(Path(path).name, abs(hash(path)) % 10**6 + 1, path)
    try:
        engine.llm_engine.add_lora(adapter)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    done = [dataclasses.asdict(_ask(vllm, engine, **request, adapter=adapter)) for request in requests]
    engine.llm_engine.remove_lora(adapter.lora_int_id)
    return done


def _engine(
    vllm: Any, directory: str, requests: list[dict[str, Any]], dtype: str, adapters: list[str], max_lora_rank: int
) -> Any:
    """Set for answers that repeat bit for bit: one request at a time, nothing compiled, nothing cached."""
    return vllm.LLM(
        directory,
        dtype=dtype,
        seed=0,
        enforce_eager=True,
        max_num_seqs=1,
        enable_prefix_caching=False,
        logprobs_mode="raw_logprobs",
        skip_tokenizer_init=True,  # requests are token ids
        max_model_len=max(len(request["prompt_token_ids"]) + request["max_tokens"] for request in requests),
        model_loader_extra_config={"enable_weights_track": True},  # refuses some missing FP8 scales by name
        **({"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank} if adapters else {}),
    )


def _ask(vllm: Any, engine: Any, prompt_token_ids: list[int], max_tokens: int, adapter: Any = None) -> Answer:
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    (output,) = engine.generate({"prompt_token_ids": prompt_token_ids}, sampling, use_tqdm=False, lora_request=adapter)
    scored = zip(prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    logprobs = [candidates[token].logprob for token, candidates in scored]
    if not adapter and not all(map(math.isfinite, logprobs)):  # NaN would slip through the comparisons of a test
        raise FloatingPointError(f"log probabilities of the prompt are not finite: {logprobs[:3]} …")
    return Answer(list(output.outputs[0].token_ids), logprobs)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
