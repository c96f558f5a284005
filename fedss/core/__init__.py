"""Algorithm 1 of FedSS: what a round computes, wherever its clients are.

An :class:`Engine` trains the clients of a cohort; :func:`run_round` does the rest. Class rows and
their optimizer can be used alone: a step costs as much as the rows that it touches.
"""

from fedss.core.algorithm import (
    MeanUpdate,
    Server,
    aggregate,
    apply_update,
    broadcast,
    draw_cohort,
    run_round,
    select,
)
from fedss.core.class_rows import ClassRows, create_class_rows
from fedss.core.client import (
    Broadcast,
    ClassRequest,
    ClientUpdate,
    LocalTraining,
    RoundPlan,
    Submodel,
    Trainable,
    draw_classes,
    limit_own_classes,
    request_classes,
    train_client,
)
from fedss.core.defence import Defence
from fedss.core.engine import Engine, Failure
from fedss.core.optimizers import ServerOptimizer, current_rows, step, step_rows_
from fedss.core.state import ServerState

__all__ = [
    "Broadcast",
    "ClassRequest",
    "ClassRows",
    "ClientUpdate",
    "Defence",
    "Engine",
    "Failure",
    "LocalTraining",
    "MeanUpdate",
    "RoundPlan",
    "Server",
    "ServerOptimizer",
    "ServerState",
    "Submodel",
    "Trainable",
    "aggregate",
    "apply_update",
    "broadcast",
    "create_class_rows",
    "current_rows",
    "draw_classes",
    "draw_cohort",
    "limit_own_classes",
    "request_classes",
    "run_round",
    "select",
    "step",
    "step_rows_",
    "train_client",
]
