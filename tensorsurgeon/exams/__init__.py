"""Exams: functions from a checkpoint to findings; they look, and write nothing."""

from tensorsurgeon.exams.inspect import inspect
from tensorsurgeon.exams.verify import verify

__all__ = ["inspect", "verify"]
