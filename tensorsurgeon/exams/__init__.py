"""Exams: functions from a checkpoint to findings; they look, and write nothing."""

from tensorsurgeon.exams.cancellation import noise
from tensorsurgeon.exams.changes import diff
from tensorsurgeon.exams.evaluation import evaluate
from tensorsurgeon.exams.health import autopsy
from tensorsurgeon.exams.integrity import verify
from tensorsurgeon.exams.lensing import lens
from tensorsurgeon.exams.overview import inspect
from tensorsurgeon.exams.reporting import report
from tensorsurgeon.exams.resemblance import similarity
from tensorsurgeon.exams.sweeping import sweep

__all__ = ["autopsy", "diff", "evaluate", "inspect", "lens", "noise", "report", "similarity", "sweep", "verify"]
