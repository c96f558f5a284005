"""What updates tell: those of the first rounds, which are trained again.

Shape suffixes: N images, S rows of an update, D embedding size, P own classes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedss.core.algorithm import select
from fedss.core.client import ClientUpdate, RoundPlan, limit_own_classes
from fedss.core.state import ServerState
from fedss.engines.local import LocalEngine
from fedss.log import Progress, progress_log
from fedss.losses.softmax import logits
from fedss.runs.audits import Finding
from fedss.seeds import generator
from fedss.training.build import server_optimizer
from fedss.trust import attacks
from fedss.trust.score import MARKS, Score
from fedss.trust.simulated import SimulatedRun, train_again

_IMAGES = 20  # of a client, that are looked for in each of its updates


@dataclass
class _Updates:
    """How far attacks on updates have come. ``used`` counts own classes where sizes differ;
    ``left`` are those that each client may still have, for all that it left unchanged.
    """

    simulated: SimulatedRun
    all: Score = field(default_factory=Score)
    norm: Score = field(default_factory=Score)
    direction: Score = field(default_factory=Score)
    size: Score = field(default_factory=Score)
    used: int = 0
    members: Score = field(default_factory=Score)
    left: dict[int, np.ndarray] = field(default_factory=dict)

    def hear(
        self,
        engine: LocalEngine,
        state: ServerState,
        plan: RoundPlan,
        updates: Sequence[ClientUpdate],
    ) -> None:
        """The updates of a round."""
        gains: list[tuple[np.ndarray, np.ndarray]] = []
        for update in sorted(updates, key=lambda update: update.client):
            k, labels_N = update.client, self.simulated.labels(update.client)
            ids_S, delta_SD = update.ids_S.numpy(), update.rows_delta_SD.numpy()
            own_P = self.simulated.own(k)
            self.all.add(ids_S, own_P)
            if plan.requests != "own":
                left = self.left.get(k, np.arange(plan.num_classes))
                self.left[k] = attacks.unchanged(left, ids_S, delta_SD)
                changed_S = delta_SD.any(axis=1)
                ids_S, delta_SD = ids_S[changed_S], delta_SD[changed_S]
            self.norm.add(attacks.update_norm(ids_S, delta_SD), own_P)
            self.direction.add(attacks.update_direction(ids_S, delta_SD), own_P)
            used_P = limit_own_classes(plan, k, labels_N)
            size_P = np.array([np.sum(labels_N == label) for label in used_P])
            if len(ids_S) and len(size_P) and size_P.min() < size_P.max():
                self.size.add(attacks.class_size(ids_S, delta_SD), used_P[size_P > size_P.mean()])
                self.used += len(used_P)
            pairs = _pairs(self.simulated, plan, k, used_P)
            if len(pairs) and (len(ids_S) > 1 or plan.method.local_rows):
                gain_N = _gain(self.simulated, engine, state, plan, update, pairs.ravel())
                gains.append((gain_N[::2], gain_N[1::2]))
        self._look_for_members(gains)

    def _look_for_members(self, gains: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Every other client is the server's own, by whom it knows how gains are spread."""
        if len(gains) > 1:
            inside, outside = map(np.concatenate, zip(*gains[::2], strict=True))
            for of_client in gains[1::2]:
                named = attacks.membership(np.concatenate(of_client), inside, outside)
                self.members.add(np.flatnonzero(named), np.arange(len(of_client[0])))

    def findings(self, rounds: int) -> list[Finding]:
        """What attacks have come to by now."""
        guess = self.all.precision
        found = []
        if self.all.named:
            found.append(self.norm.finding("update norm", rounds, guess))
            found.append(self.direction.finding("update direction", rounds, guess))
        if self.left:
            both = Score()
            for k, left in self.left.items():
                both.add(left, self.simulated.own(k))
            of_all = both.there / (both.count * self.simulated.num_classes)
            found.append(both.finding("unchanged rows", rounds, of_all, "all classes"))
        if self.used:
            share = self.size.there / self.used
            found.append(self.size.finding("class size", rounds, share, "own classes"))
        if self.members.there:
            found.append(self.members.finding("membership", rounds, 0.5, "images"))
        return found


def _pairs(simulated: SimulatedRun, plan: RoundPlan, client: int, used_P: np.ndarray) -> np.ndarray:
    """Images of a client, each with one of the same class that it does not have, int64 [N, 2]."""
    labels, clients = simulated.data.train.labels, simulated.data.train.clients
    rng, pairs = generator(plan.seed, "audit", plan.round, client), []
    example_N = simulated.clients.examples(client)
    example_N = rng.permutation(example_N[np.isin(labels[example_N], used_P)])
    for example in example_N[:_IMAGES].tolist():
        same_N = simulated.of_class(labels[example])
        other_N = same_N[clients[same_N] != client]
        if len(other_N):
            pairs.append((example, int(rng.choice(other_N))))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _gain(
    simulated: SimulatedRun,
    engine: LocalEngine,
    state: ServerState,
    plan: RoundPlan,
    update: ClientUpdate,
    example_N: np.ndarray,
) -> np.ndarray:
    """By how much an update raises the log odds of images' labels: more, the less loss is left.
    Of a backbone alone: how far it moves their embeddings.
    """
    images = simulated.data.train
    if plan.method.local_rows:
        after_P = state.backbone_P + update.backbone_delta_P
        before_ND, after_ND = (
            engine.embed(theta_P, images.pixels[example_N])
            for theta_P in (state.backbone_P, after_P)
        )
        moved_N: np.ndarray = (after_ND - before_ND).double().norm(dim=1).log().numpy()
        return moved_N
    target_N = torch.from_numpy(np.searchsorted(update.ids_S.numpy(), images.labels[example_N]))
    # A margin is part of training, not of what the model believes.
    scoring = replace(plan.scoring, margin_kind="none")

    def log_odds(theta_P: Tensor, rows_SD: Tensor) -> Tensor:
        h_ND = engine.embed(theta_P, images.pixels[example_N]).float()
        o_NS = logits(h_ND, rows_SD, target_N, scoring)
        label_N = o_NS.gather(1, target_N[:, None])[:, 0]
        return label_N - o_NS.scatter(1, target_N[:, None], -torch.inf).logsumexp(1)

    rows_SD = select(server_optimizer(simulated.config), state, update.ids_S)
    before_N = log_odds(state.backbone_P, rows_SD)
    after_N = log_odds(state.backbone_P + update.backbone_delta_P, rows_SD + update.rows_delta_SD)
    gain_N: np.ndarray = (after_N - before_N).double().numpy()
    return gain_N


def attack_updates(simulated: SimulatedRun, seconds: float) -> tuple[list[Finding], int, str]:
    """Train rounds again for so many seconds, and attack what clients send.

    Returns:
        Findings, of how many rounds, and why of no more.
    """
    updates, found, why = _Updates(simulated), dict[int, list[Finding]](), simulated.why_not
    begin, log, planned = time.monotonic(), progress_log(), len(simulated.records)
    for rounds, as_recorded in () if why else train_again(simulated, updates.hear):
        if not as_recorded:
            why = f"round {rounds} came out otherwise than recorded"
            break
        found[rounds] = updates.findings(rounds)
        if rounds < planned and time.monotonic() - begin > seconds:
            why = f"more than {seconds:g} seconds"
            break
        log(Progress("updates", rounds, planned, "rounds"), False)
    # However it ended: a bar on a terminal goes before the table comes.
    log(Progress("updates", planned, planned, "rounds"), False)
    kept = [r for r in found if r in MARKS or r == max(found)]
    return [finding for r in kept for finding in found[r]], max(found, default=0), why
