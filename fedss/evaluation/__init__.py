"""Retrieval, verification, and what an evaluation is worth."""

from fedss.evaluation.task import (
    Evaluation,
    check_tellable,
    embed_task,
    evaluate,
    findings,
    judge,
    score,
    verify,
)

__all__ = [
    "Evaluation",
    "check_tellable",
    "embed_task",
    "evaluate",
    "findings",
    "judge",
    "score",
    "verify",
]
