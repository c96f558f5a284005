"""The methods as values: which classes are asked for, which loss, what the server adds."""

from dataclasses import dataclass

from fedss.softmax import (
    Objective,
    Sampler,
    negatives_only_softmax,
    positive_hinge,
    sample_all,
    sample_own,
    sample_uniform,
    sampled_softmax,
    uncorrected_softmax,
)


@dataclass(frozen=True)
class Method:
    """A training method, put together from independent choices.

    Attributes:
        name: its name in configurations, tables and plots.
        summary: one line for people.
        sampler: which classes a client asks for.
        objective: the loss it trains on.
        spread_out: the server pushes near class rows apart after each round (FedAwS).
        pooled: pictures are pooled first: a reference, not federated learning.
    """

    name: str
    summary: str
    sampler: Sampler
    objective: Objective
    spread_out: bool = False
    pooled: bool = False


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "all class rows, softmax", sample_all, sampled_softmax),
        Method(
            "fedss",
            "own classes and uniform negatives, corrected sampled softmax",
            sample_uniform,
            sampled_softmax,
        ),
        Method(
            "fedss-uncorrected",
            "as fedss, without the correction",
            sample_uniform,
            uncorrected_softmax,
        ),
        Method("pos-only", "own classes alone, softmax over them", sample_own, sampled_softmax),
        Method(
            "neg-only",
            "each label against the sampled negatives alone",
            sample_uniform,
            negatives_only_softmax,
        ),
        Method(
            "fedaws",
            "own classes alone, squared hinge; the server spreads class rows out",
            sample_own,
            positive_hinge,
            spread_out=True,
        ),
        Method(
            "central",
            "pictures pooled, full softmax, plain SGD: a reference",
            sample_all,
            sampled_softmax,
            pooled=True,
        ),
    )
}
