"""Derivations: functions that read a file and write another, and tell what they found. No model takes part."""

from tensorsurgeon.derivations.subspaces import directions

__all__ = ["directions"]
