"""What vLLM's exceptions say, in one line each."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from tensorsurgeon.errors import EngineError, OutOfMemoryError
from tensorsurgeon.evaluate.pictures import takes_pictures


def error_of(what: str, problem: Exception) -> EngineError:
    """Return what is to be raised for an exception of vLLM's; torch's and its own for want of memory say so."""
    text = f"{what}: {first_line(problem)}"
    wants = isinstance(problem, MemoryError) or re.search(r"out of memory|no available memory", str(problem), re.I)
    return OutOfMemoryError(text) if wants else EngineError(text)


def wanting(directory: Path) -> str:
    """Return what models of pictures may want: vLLM's reason says only that a class could not be inspected."""
    if not takes_pictures(directory) or find_spec("torchvision"):
        return ""
    return (
        " (most models of pictures need torchvision there, which is missing or broken: install the build that matches "
        "torch, or ask with --engine transformers)"
    )


def first_line(problem: BaseException) -> str:
    """Return what an exception says, in one line; vLLM's assertions often say nothing, its checks of settings much."""
    lines = str(problem).strip().splitlines()
    if not lines:
        return type(problem).__name__ + _place(problem)
    # pydantic's first line only counts; the one with what is wrong ends with its kind.
    line = next((it for it in lines if " [type=" in it), lines[0])
    return f"{type(problem).__name__}: {line.partition(' [type=')[0].strip()}"


def _place(problem: BaseException) -> str:
    trace = problem.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f" in {Path(trace.tb_frame.f_code.co_filename).name}, without a reason" if trace else ""
