"""Retrieval, verification, and what an evaluation is worth."""

from typing import Any

from fedss.evaluation import task


def __getattr__(name: str) -> Any:
    """What was here before 0.3, for one release: functions of :mod:`fedss.evaluation.task`."""
    return getattr(task, name)
