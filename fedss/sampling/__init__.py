"""How negatives are drawn, and the class samples that they make with own classes.

All of it works without the rest of fedss: ids and probabilities are NumPy arrays.
"""

from fedss.sampling.samplers import (
    SAMPLERS,
    Deal,
    Draw,
    Negatives,
    Sampler,
    ServerRows,
    check_negatives,
    class_sample,
    deal_deck,
    draw_common,
    draw_first,
    draw_uniform,
    limit,
    own_budget,
    rest_of_common,
    whole_sample,
)

__all__ = [
    "SAMPLERS",
    "Deal",
    "Draw",
    "Negatives",
    "Sampler",
    "ServerRows",
    "check_negatives",
    "class_sample",
    "deal_deck",
    "draw_common",
    "draw_first",
    "draw_uniform",
    "limit",
    "own_budget",
    "rest_of_common",
    "whole_sample",
]
