"""Sampled objectives, and the methods that are made of them.

All of it works without the rest of fedss: an objective gets embeddings, class rows and a
:class:`ClassSample`, and gives the loss of each image, to be differentiated.
"""

from fedss.losses.methods import METHODS, Method
from fedss.losses.moments import Moments, absent_classes, moments_of, row_sums
from fedss.losses.softmax import (
    AbsentClasses,
    ClassSample,
    Objective,
    Scoring,
    completed_softmax,
    logits,
    moments_softmax,
    negatives_only_softmax,
    positive_hinge,
    sampled_softmax,
    spread_out,
    uncorrected_softmax,
)

__all__ = [
    "METHODS",
    "AbsentClasses",
    "ClassSample",
    "Method",
    "Moments",
    "Objective",
    "Scoring",
    "absent_classes",
    "completed_softmax",
    "logits",
    "moments_of",
    "moments_softmax",
    "negatives_only_softmax",
    "positive_hinge",
    "row_sums",
    "sampled_softmax",
    "spread_out",
    "uncorrected_softmax",
]
