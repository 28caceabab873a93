"""Derivations: functions that read a file or a model, write another file, and tell what they found."""

from tensorsurgeon.derivations.collecting import collect
from tensorsurgeon.derivations.subspaces import directions

__all__ = ["collect", "directions"]
