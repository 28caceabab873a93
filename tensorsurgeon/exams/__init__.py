"""Exams: functions from a checkpoint to findings; they look, and write nothing."""

from tensorsurgeon.exams.integrity import verify
from tensorsurgeon.exams.overview import inspect

__all__ = ["inspect", "verify"]
