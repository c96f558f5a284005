"""A loss of your own: the sampled softmax with smoothed labels.

A loss gets unit-norm embeddings, class rows and a class sample, and gives one number per image.
It runs at the clients, in place of the softmax of `full`, `fedss`, `pos-only` or `central`.

    python examples/own_loss.py
"""

import tempfile

import torch
from torch import Tensor

import fedss
from fedss.losses.softmax import AbsentClasses, ClassSample, Objective, Scoring, logits


def smoothed_softmax(smoothing: float) -> Objective:
    """`L = (1 - e) L_y + e mean_i L_i` over all n classes, `L_i = -o_i + log sum_j exp(o_j)`.

    Label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7), where a client holds a
    sample of the classes only: with weights 1 for own classes and 1/q for negatives, both the sum
    of exp(o_j) and the mean of o_i are estimated from the sample.
    """

    def smoothed_loss(
        h_BD: Tensor,  # embeddings of B images, of length 1
        rows_SD: Tensor,  # rows of the S classes of the sample
        target_B: Tensor,  # each image's class, as a position in S
        sample: ClassSample,  # ids_S, log_q_S (0 for own classes), own_S
        scoring: Scoring,  # scale and margin
        absent: AbsentClasses | None,  # for `moments` alone
    ) -> Tensor:
        o_BS = logits(h_BD, rows_SD, target_B, scoring)
        weight_S = torch.exp(-sample.log_q_S)
        log_z_B = torch.logsumexp(o_BS - sample.log_q_S, dim=1)
        label_B = o_BS.gather(1, target_B[:, None])[:, 0]
        mean_B = o_BS @ weight_S / weight_S.sum()
        return log_z_B - (1 - smoothing) * label_B - smoothing * mean_B

    # By its name a run knows its loss again.
    smoothed_loss.__name__ = f"smoothed_loss({smoothing})"
    return smoothed_loss


def main(rounds: int = 30, classes: int = 320) -> dict[str, float | None]:
    """Train on glyphs with and without it; MAP@10 on unseen classes."""
    config = fedss.Config(rounds=rounds, glyphs_classes=classes, glyphs_clients=64, eval_every=0)
    data, scores = fedss.load_data(config), {}
    for name, loss in (("softmax", None), ("smoothed by 0.1", smoothed_softmax(0.1))):
        with tempfile.TemporaryDirectory() as folder:
            run = fedss.train(config, folder, data=data, objective=loss)
            scores[name] = run.summary["map_at_10"]
    return scores


if __name__ == "__main__":
    for name, map_at_10 in main().items():
        print(f"{name:<16} MAP@10 on unseen classes: {map_at_10:.3f}")
