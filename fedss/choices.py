"""What a setting can be, by name. The command line's help needs these names and no more, so they
stand apart from what they stand for, which needs torch."""

import re
from typing import Literal

Aggregate = Literal["mean", "trimmed", "median"]
Augment = Literal["none", "photos", "drawings"]
BatchNormRule = Literal["auto", "freeze", "replace"]
ForwardPrecision = Literal["float32", "bfloat16"]
MarginKind = Literal["none", "cosface", "arcface"]
Precision = Literal["float32", "bfloat16", "int8", "int4"]
RowRequests = Literal["own", "all", "common"]
RowDtype = Literal["float32", "bfloat16"]
RowMean = Literal["cohort", "holders"]
ServerOptimizerKind = Literal["sgd", "momentum", "adam"]
ProjectionInit = Literal["random", "whitened"]
RowsInit = Literal["random", "means"]

METHOD_SUMMARIES = {
    "full": "softmax over all class rows",
    "fedss": "sampled softmax, with the mean and covariance of absent classes",
    "moments": "softmax over own classes, with the mean and covariance of all others",
    "fedss-uncorrected": "as fedss-published, but without the correction",
    "pos-only": "softmax over own classes alone",
    "neg-only": "softmax of each label against the sampled negatives alone",
    "fedaws": "squared hinge on own classes alone; the server spreads class rows out",
    "fedss-published": "sampled softmax, corrected by 1/q alone: FedSS as published",
    "local-heads": "softmax over own classes, whose rows never leave the client",
    "central": "images pooled, full softmax, plain SGD; a reference without federation",
}
"""The methods of :data:`fedss.losses.methods.METHODS`, with a line on each."""

MOMENT_METHODS = ("fedss", "moments")
"""Those of them for which the server keeps the moments of all class rows."""

SAMPLED_METHODS = ("fedss", "fedss-uncorrected", "neg-only", "fedss-published")
"""Those whose negatives are sampled."""

SAMPLER_NAMES = ("uniform", "deck", "sticky")
"""The samplers of :data:`fedss.sampling.samplers.SAMPLERS`."""


def is_trainable(text: str) -> bool:
    """Whether a text says which part of a backbone trains: ``all``, ``head``, ``last-<number>``."""
    return bool(re.fullmatch(r"all|head|last-[1-9]\d{0,3}", text))


def fault_of_requests(requests: str, method: str, row_mean: str, sampler: str) -> str:
    """Why these settings do not go together, where requests are the same for all clients of a
    round; empty if they do.
    """
    if requests == "own" or (requests, method) == ("all", "full"):
        return ""
    if method not in SAMPLED_METHODS:
        return (
            f"requests: {requests} is for methods that sample negatives "
            f"({', '.join(SAMPLED_METHODS)}), not for {method}; leave it out"
        )
    if row_mean == "holders":
        return f"row_mean: with requests {requests} nobody tells which rows it holds; take cohort"
    if requests == "common" and sampler != "uniform":
        return f"sampler: with requests common all clients have one set; leave out {sampler}"
    return ""
