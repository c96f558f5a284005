"""Clipping, noise and cohorts of differential privacy: formulas, statistics and an attack."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedss.core.algorithm import Server, aggregate, draw_cohort, hide, no_update, run_round
from fedss.core.class_rows import create_class_rows
from fedss.core.client import ClientUpdate, RoundPlan, clip_update, shared_classes
from fedss.core.engine import Failure
from fedss.core.optimizers import ServerOptimizer
from fedss.core.privacy import Clipping, Noise, next_norm
from fedss.core.state import ServerState
from fedss.distributed import ALONE, Ranks
from fedss.errors import DivergedError
from fedss.privacy import epsilon_spent
from fedss.seeds import secret_normals
from fedss.wire.messages import WireFormat, decode_update, encode_update
from tests.core.test_algorithm import SGD, engine, plan, start

P, CLASSES, DIM, COHORT = 200, 30, 10, 5


def update(client: int = 0, scale: float = 1.0, seed: int = 0) -> ClientUpdate:
    rng = np.random.default_rng(seed)
    theta_P, rows_ND = rng.normal(size=P) * scale, rng.normal(size=(CLASSES, DIM)) * scale
    deltas = (torch.from_numpy(part).float() for part in (theta_P, rows_ND))
    backbone_P, rows_SD = deltas
    return ClientUpdate(client, backbone_P, torch.arange(CLASSES), rows_SD, 17, 2.5)


def length(one: ClientUpdate) -> float:
    parts = one.backbone_delta_P, one.rows_delta_SD
    return math.hypot(*(float(part.double().norm()) for part in parts))


@dataclass(frozen=True)
class Told:
    """Clients that tell what they are told to: zeros, but for some of them."""

    clients: int
    tell: dict[int, ClientUpdate]
    ranks: Ranks = ALONE

    def num_clients(self, round: int) -> int:
        return self.clients

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate | Failure]:
        for k in cohort.tolist():
            sent = self.tell.get(k) or update(k, 0.0)
            yield clip_update(replace(sent, client=k), plan.clipping, state.clip)


def server_state(norm: float) -> ServerState:
    """Rows that are all zero, and a step of which the change is all that there is."""
    rows = create_class_rows(CLASSES, DIM, (), 0)
    rows.updated_N.fill_(1)
    return ServerState(torch.zeros(P), {}, rows, 0, clip=norm)


def told_plan(clipping: Clipping, seed: int = 0, round: int = 0) -> RoundPlan:
    return replace(plan("full"), num_classes=CLASSES, seed=seed, round=round, clipping=clipping)


def changes(
    told: Told, clipping: Clipping, noise: Noise | None, seed: int = 0, round: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What a round changes: the backbone, and all class rows."""
    server = Server(SGD, COHORT, noise=noise)
    state = server_state(clipping.norm)
    after, _, _ = run_round(server, told, state, told_plan(clipping, seed, round))
    return after.backbone_P.numpy(), after.class_rows.weight_ND.numpy()


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("scale", [0.001, 1.0, 1e20])
def test_an_update_is_scaled_to_the_norm_and_turned_nowhere(scale, private):
    sent = update(scale=scale)
    clipped = clip_update(sent, Clipping(3.0, private=private), 3.0)
    assert length(clipped) <= 3.0 * (1 + 1e-6)
    factor = min(1.0, 3.0 / length(sent))
    for before, after in (
        (sent.backbone_delta_P, clipped.backbone_delta_P),
        (sent.rows_delta_SD, clipped.rows_delta_SD),
    ):
        assert torch.allclose(after.double(), before.double() * factor, rtol=1e-5)
    told = (clipped.num_examples, clipped.loss)
    assert told == ((1, 0.0) if private else (17, 2.5))
    again = clip_update(clipped, Clipping(3.0, private=private), 3.0)
    assert torch.allclose(again.backbone_delta_P, clipped.backbone_delta_P, rtol=1e-6)


def test_backbone_and_rows_are_clipped_apart():
    sent = update()
    clipped = clip_update(sent, Clipping(3.0, row_norm=0.5), 3.0)
    assert float(clipped.backbone_delta_P.norm()) == pytest.approx(3.0)
    assert float(clipped.rows_delta_SD.norm()) == pytest.approx(0.5)
    wide = clip_update(sent, Clipping(3.0, row_norm=1e9), 3.0)
    assert torch.equal(wide.rows_delta_SD, sent.rows_delta_SD)


def test_what_rounding_made_longer_is_clipped_at_the_server():
    wire = WireFormat((torch.Size([10, 20]),), DIM, CLASSES, rows_up="int4", backbone_up="int4")
    clipping = Clipping(0.1, private=True)
    sent = clip_update(update(), clipping, 0.1)
    longest = 0.0
    for seed in range(20):
        came = decode_update(wire, encode_update(wire, sent, np.random.default_rng(seed)), 0)
        longest = max(longest, length(came))
        assert length(clip_update(came, clipping, 0.1)) <= 0.1 * (1 + 1e-6)
    assert longest > 0.1 * 1.01
    # And by the round itself: a client that sends more than it should changes no more.
    loud = replace(update(scale=100.0), client=0)

    class Loud(Told):
        def train(self, state, cohort, plan):
            yield loud

    quiet = Noise(1e-9, COHORT)
    theta_P, rows_ND = changes(Loud(1, {}), clipping, quiet)
    assert math.hypot(np.linalg.norm(theta_P), np.linalg.norm(rows_ND)) == pytest.approx(
        0.1 / COHORT, rel=1e-5
    )


def test_a_private_update_that_is_not_finite_is_zero_and_ends_nothing():
    broken = replace(update(), backbone_delta_P=torch.full((P,), torch.nan))
    zero = clip_update(broken, Clipping(1.0, private=True), 1.0)
    assert not zero.backbone_delta_P.any()
    told, quiet = Told(1, {0: broken}), Noise(1e-9, COHORT)
    theta_P, _ = changes(told, Clipping(1.0, private=True), quiet)
    assert np.abs(theta_P).max() < 1e-6
    # Of a run without noise, a broken client is told of.
    with pytest.raises(DivergedError):
        changes(told, Clipping(1.0), None)


def test_sums_are_divided_by_the_expected_cohort_whoever_came():
    sent, quiet, clipping = update(), Noise(1e-9, COHORT), Clipping(3.0, private=True)
    expected = sent.backbone_delta_P.numpy() * 3.0 / length(sent)
    for clients in (1, 2, 4):  # each in every cohort: as many as are expected, or fewer
        theta_P, _ = changes(Told(clients, dict.fromkeys(range(clients), sent)), clipping, quiet)
        assert theta_P == pytest.approx(clients / COHORT * expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("clipping", "of_backbone", "of_rows"),
    [
        (Clipping(0.5, private=True), 0.5, 0.5),
        (Clipping(0.5, row_norm=4.0, private=True), 0.5 * 2**0.5, 4.0 * 2**0.5),
    ],
)
@pytest.mark.parametrize("told", [Told(100, {}), Told(0, {})])
def test_the_noise_has_the_variance_that_is_claimed(told, clipping, of_backbone, of_rows):
    """sigma C / K on each number of the mean, of all rows, also where nobody came."""
    told = replace(told, clients=max(told.clients, 1))
    z, parts = 1.5, ([], [])
    for round in range(60):
        made = changes(told, clipping, Noise(z, COHORT), round=round)
        for part, numbers in zip(parts, made, strict=True):
            part.append(numbers.ravel())
    for part, norm in zip(parts, (of_backbone, of_rows), strict=True):
        numbers = np.concatenate(part) / (z * norm / COHORT)
        low, high = stats.chi2.interval(1 - 1e-6, len(numbers)) / np.float64(len(numbers))
        assert low < np.mean(numbers**2) < high
        assert stats.kstest(numbers, "norm").pvalue > 1e-6
    rounds = np.stack(parts[0])
    # Of one round nothing is known by that of another.
    assert np.abs(np.corrcoef(rounds) - np.eye(len(rounds))).max() < 0.5


def test_the_noise_of_a_common_set_is_on_its_rows_alone():
    clipping, noise = Clipping(0.5, private=True), Noise(1.5, COHORT)
    common = replace(plan("fedss", size=8), num_classes=CLASSES, clipping=clipping)
    common = replace(common, requests="common")
    ids_R, made = shared_classes(common), []
    for seed in range(50):
        state, told = server_state(0.5), replace(common, seed=seed)
        ids_R = shared_classes(told)
        nobody = no_update(state)
        mean = aggregate([nobody], "cohort", ALONE, COHORT)
        _, hidden = hide(noise, state, told, mean, [(0, 0)])
        assert torch.equal(hidden.ids_U, ids_R)
        made.append(hidden.rows_delta_UD.numpy().ravel())
    assert len(ids_R) == 8
    numbers = np.concatenate(made) / (1.5 * 0.5 / COHORT)
    assert stats.kstest(numbers, "norm").pvalue > 1e-6


def test_noise_and_cohorts_follow_from_the_key_alone():
    one, other = Noise(1.0, COHORT, b"k" * 32), Noise(1.0, COHORT, b"l" * 32)
    told, clipping = Told(40, {}), Clipping(1.0, private=True)
    of_one = [changes(told, clipping, noise)[0] for noise in (one, one, other, Noise(1.0, COHORT))]
    assert np.array_equal(of_one[0], of_one[1])
    assert all(not np.allclose(of_one[0], different) for different in of_one[2:])
    drawn = [draw_cohort(1000, 100, 0, 0, noise=noise).tolist() for noise in (one, one, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_each_client_is_drawn_for_itself():
    noise = Noise(1.0, 20)
    drawn = np.zeros((3000, 100), bool)
    for round, of_round in enumerate(drawn):
        cohort = draw_cohort(100, 20, 7, round, noise=noise)
        assert (np.diff(cohort) > 0).all()
        of_round[cohort] = True
    assert drawn.mean() == pytest.approx(0.2, abs=0.005)
    assert np.abs(drawn.mean(axis=0) - 0.2).max() < 5 * math.sqrt(0.16 / 3000)
    # Their number is binomial: of a fixed one the variance would be 0.
    assert drawn.sum(axis=1).var() == pytest.approx(16, rel=0.15)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(100)).max() < 6 / math.sqrt(3000)
    assert draw_cohort(5, 20, 0, 0, noise=noise).tolist() == [0, 1, 2, 3, 4]
    assert len(draw_cohort(10**12, 20, 0, 0, noise=noise)) < 100


def test_normals_are_normal_and_never_infinite():
    numbers = secret_normals(3, "noise", 0, 200_001, None)
    assert len(numbers) == 200_001
    assert np.isfinite(numbers).all()
    assert stats.kstest(numbers, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(numbers[:100_000], numbers[100_001:])[0, 1]) < 0.02
    others = [
        secret_normals(4, "noise", 0, 1000, None),
        secret_normals(3, "other", 0, 1000, None),
        secret_normals(3, "noise", 1, 1000, None),
        secret_normals(3, "noise", 0, 1000, b"key"),
    ]
    assert all(abs(np.corrcoef(numbers[:1000], o)[0, 1]) < 0.2 for o in others)


@given(st.floats(0.1, 50), st.integers(1, 10_000))
def test_noise_of_count_and_sum_together_spend_what_was_said(multiplier, cohort):
    noise = Noise(multiplier, cohort)
    z = noise.of_sum(Clipping(1.0, adaptive=True, private=True))
    # One client changes the sum by 1 / z and the count by 1 / (2 s), in units of their noise.
    assert math.hypot(1 / z, 0.5 / noise.of_count) == pytest.approx(1 / multiplier)
    assert multiplier <= z <= 1.16 * multiplier
    assert noise.of_sum(Clipping(1.0, private=True)) == multiplier


def test_an_adaptive_norm_follows_the_paper():
    assert next_norm(2.0, 3, 4, None, 0, 0) == pytest.approx(2.0 * math.exp(-0.2 * (3 / 4 - 0.5)))
    noise, logs = Noise(1.0, 50), []
    for round in range(2000):
        logs.append(math.log(next_norm(2.0, 40, 60, noise, 0, round) / 2.0))
    # b = 1/2 + (40 - 60 / 2) / 50, with noise of s = max(50 / 20, 1) on the count.
    assert np.mean(logs) == pytest.approx(-0.2 * 10 / 50, abs=5 * 0.01 / math.sqrt(2000))
    assert np.std(logs) == pytest.approx(0.2 * 2.5 / 50, rel=0.1)


@pytest.mark.parametrize("first", [0.01, 100.0])
def test_an_adaptive_norm_finds_the_median(first):
    sizes = np.exp(np.random.default_rng(0).normal(size=40))
    tell = {k: update(scale=size) for k, size in enumerate(sizes)}
    median = np.median([length(sent) for sent in tell.values()])
    clipping, norm = Clipping(first, adaptive=True, private=True), first
    server, told = Server(SGD, 20, noise=Noise(0.5, 20)), Told(40, tell)
    state = server_state(norm)
    for round in range(150):
        state, _, _ = run_round(server, told, state, told_plan(clipping, 0, round))
    assert 0.6 * median < state.clip < 1.7 * median


def test_training_with_a_norm_and_without_noise_is_plain_but_for_the_norm():
    told = plan("full")
    loose = replace(told, clipping=Clipping(1e9))
    tight = replace(told, clipping=Clipping(1e-3))
    optimizer = ServerOptimizer("sgd", 1.0, normalize_rows=False)
    plain, _, _ = run_round(Server(optimizer, 4), engine(), start(), told)
    free, _, _ = run_round(Server(optimizer, 4), engine(), replace(start(), clip=1e9), loose)
    held, sent, _ = run_round(Server(optimizer, 4), engine(), replace(start(), clip=1e-3), tight)
    assert torch.equal(plain.backbone_P, free.backbone_P)
    assert max(map(length, sent)) <= 1e-3 * (1 + 1e-5)
    assert float((held.backbone_P - start().backbone_P).norm()) <= 1e-3 * (1 + 1e-3)


def lower_bound(seen: np.ndarray, unseen: np.ndarray, delta: float) -> float:
    """An epsilon that is exceeded with 99.9 %: of the best threshold that half of the runs choose,
    by Clopper and Pearson on the others (Jagielski et al. 2020, arXiv 2006.07709)."""
    half = len(seen) // 2

    def bounds(above: np.ndarray, below: np.ndarray) -> float:
        hits, alarms, n = int(above.sum()), int(below.sum()), len(above)
        tpr = stats.beta.ppf(0.0005, hits, n - hits + 1) if hits else 0.0
        fpr = stats.beta.ppf(0.9995, alarms + 1, n - alarms)
        return math.log((tpr - delta) / fpr) if tpr > delta else 0.0

    thresholds = np.quantile(seen[:half], np.linspace(0.05, 0.95, 19))
    best = max(thresholds, key=lambda t: bounds(seen[:half] > t, unseen[:half] > t))
    return bounds(seen[half:] > best, unseen[half:] > best)


@pytest.mark.parametrize("clients", [COHORT, 2 * COHORT])
def test_an_attack_finds_no_more_than_is_claimed(clients):
    """A client of one shot, known to the attacker, with all others: is it there or not?"""
    loud, z, delta = update(scale=50.0), 1.5, 0.01
    direction = np.concatenate([loud.backbone_delta_P.numpy(), loud.rows_delta_SD.numpy().ravel()])
    direction /= np.linalg.norm(direction)
    clipping = Clipping(1.0, private=True)

    def shots(tell: dict[int, ClientUpdate], noise: Noise, first_seed: int) -> np.ndarray:
        found = []
        for seed in range(first_seed, first_seed + 400):
            theta_P, rows_ND = changes(Told(clients, tell), clipping, noise, seed)
            found.append(direction @ np.concatenate([theta_P, rows_ND.ravel()]))
        return np.array(found)

    rate = min(1.0, COHORT / clients)
    claimed = epsilon_spent(z, [rate], delta)

    def audited(noise: Noise) -> float:
        return lower_bound(shots({0: loud}, noise, 0), shots({}, noise, 10_000), delta)

    found = audited(Noise(z, COHORT))
    assert found < claimed
    # The attack would notice too little noise.
    assert audited(Noise(z / 4, COHORT)) > claimed
