"""The methods as values: which classes are asked for, which loss, what the server adds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedss.choices import METHOD_SUMMARIES, RowMean
from fedss.losses.moments import absent_from, balance, payload
from fedss.losses.softmax import (
    AbsentClasses,
    Objective,
    completed_softmax,
    moments_softmax,
    negatives_only_softmax,
    positive_hinge,
    sampled_softmax,
    spread_out_step,
    uncorrected_softmax,
)

RowSteps = Callable[[Tensor, float, int], Tensor]
"""``row_steps(rows_UD, absent, num_classes)``: the steps of the touched rows [U, D], made of their
mean changes, of the share of all rows that a client does not hold, and of n."""


@dataclass(frozen=True)
class Method:
    """A training method, put together from independent choices.

    Attributes:
        negatives: beside own classes a client gets ``"all"`` the others; ``"sampled"`` ones, up
            to the sample size; a ``"cover"``, of any number, that its loss does not need; or
            ``"none"``. Which ones, a sampler says.
        objective: the loss it trains on.
        payload: what every client gets beside the backbone, by name: vectors [D] and symmetric
            matrices [D, D], made of :func:`fedss.losses.moments.row_sums` of all class rows.
        absent: what the loss gets of a payload: ``absent(payload, num_classes, rows_SD)``.
        row_steps: what the server makes of the mean changes of class rows; None: it takes them.
        row_optimizer: kind of the server optimizer of class rows; None: as the backbone's.
        server_step: what the server does to all class rows [N, D] after each round; gets the
            fields of the configuration in ``server_settings`` as keyword arguments.
        local_rows: class rows stay with the clients, which make those of their own classes anew at
            each visit.
        pooled: images are pooled first: a reference, not federated learning.
        row_mean, class_row_lr: what ``auto`` is for this method; None: see
            :func:`fedss.settings.resolve`.
    """

    name: str
    summary: str
    negatives: Literal["all", "sampled", "cover", "none"]
    objective: Objective
    payload: Callable[[Tensor], Mapping[str, Tensor]] | None = None
    absent: Callable[[Mapping[str, Tensor], int, Tensor], AbsentClasses | None] | None = None
    row_steps: RowSteps | None = None
    row_optimizer: Literal["sgd", "momentum", "adam"] | None = None
    server_step: Callable[..., Tensor] | None = None
    server_settings: tuple[str, ...] = ()
    local_rows: bool = False
    pooled: bool = False
    row_mean: RowMean = "cohort"
    class_row_lr: float = 1.0

    @property
    def moments(self) -> bool:
        """Whether the server keeps the sums of all class rows, for a payload."""
        return self.payload is not None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", METHOD_SUMMARIES["full"], "all", sampled_softmax),
        Method(
            "fedss",
            METHOD_SUMMARIES["fedss"],
            "sampled",
            completed_softmax,
            payload=payload,
            absent=absent_from,
        ),
        Method(
            "moments",
            METHOD_SUMMARIES["moments"],
            "cover",
            moments_softmax,
            payload=payload,
            absent=absent_from,
            row_steps=balance,
            row_optimizer="sgd",
            row_mean="holders",
        ),
        Method(
            "fedss-uncorrected",
            METHOD_SUMMARIES["fedss-uncorrected"],
            "sampled",
            uncorrected_softmax,
        ),
        Method("pos-only", METHOD_SUMMARIES["pos-only"], "none", sampled_softmax),
        Method(
            "neg-only",
            METHOD_SUMMARIES["neg-only"],
            "sampled",
            negatives_only_softmax,
        ),
        Method(
            "fedaws",
            METHOD_SUMMARIES["fedaws"],
            "none",
            positive_hinge,
            server_step=spread_out_step,
            server_settings=("spread_out_weight", "spread_out_margin", "spread_out_neighbours"),
        ),
        Method(
            "fedss-published",
            METHOD_SUMMARIES["fedss-published"],
            "sampled",
            sampled_softmax,
        ),
        Method(
            "local-heads",
            METHOD_SUMMARIES["local-heads"],
            "none",
            sampled_softmax,
            local_rows=True,
            class_row_lr=4.0,
        ),
        Method(
            "central",
            METHOD_SUMMARIES["central"],
            "all",
            sampled_softmax,
            pooled=True,
            class_row_lr=2.0,
        ),
    )
}
