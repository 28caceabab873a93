"""The worker that runs a model in memory that is limited, in a process of its own.

usage: streaming.py MODE DIRECTORY MEGABYTES

MODE is `stream`, `engine` for the engine that streams, or `whole` for transformers' own way. Prints the highest
resident memory that was not backed by files, in megabytes above what it was before the model, and the seconds.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path

import torch
import transformers

import tensorsurgeon as ts
from tensorsurgeon.evaluate.engine import Foreseen, Settings
from tensorsurgeon.evaluate.engines.stream import StreamEngine
from tensorsurgeon.forward.batches import make_batches
from tensorsurgeon.forward.head import Head
from tensorsurgeon.forward.stream import Stream

PROMPTS = [[(7 * place + row) % 1000 for place in range(16)] for row in range(2)]


def anonymous() -> int:
    """Return the resident memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def streamed(directory: str) -> list[float]:
    """Return the mean of the logits of each prompt, from the streamed model."""
    stream = Stream(ts.open(directory), make_batches(PROMPTS))
    for _, left in stream.walk():
        states = left
    head = Head(stream)
    with head.held():
        return [float(head.logits(head.normed(it)).mean()) for it in states]


def asked(directory: str) -> list[float]:
    """Return the same of the engine that streams, after it has scored the prompts too."""
    engine = StreamEngine(Settings())
    engine.load(Path(directory), 64)
    engine.foresee(Foreseen(PROMPTS, PROMPTS))
    assert all(len(it.logprobs) == len(prompt) - 1 for it, prompt in zip(engine.score(PROMPTS), PROMPTS, strict=True))
    return [float(it.mean()) for it in engine.next_logits(PROMPTS)]


def whole(directory: str) -> list[float]:
    """Return the same from the model in memory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return [float(model(torch.tensor([it]), use_cache=False).logits.mean()) for it in PROMPTS]


def main(mode: str, directory: str, megabytes: str) -> None:
    """Run a model under a limit."""
    import tensorsurgeon.forward.parts  # noqa: F401  # what is imported later would be counted as the model's

    resource.setrlimit(resource.RLIMIT_DATA, (int(megabytes) * 10**6,) * 2)
    before, most, ended = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        means = {"stream": streamed, "engine": asked, "whole": whole}[mode](directory)
    finally:
        ended.set()
    print(json.dumps({"megabytes": (most[0] - before) / 1e6, "seconds": time.perf_counter() - started, "means": means}))


if __name__ == "__main__":
    main(*sys.argv[1:])
