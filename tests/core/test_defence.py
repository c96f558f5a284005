"""Each defence by the attack that breaks a round without it."""

import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedss.core.algorithm import Server, aggregate, aggregate_middle, draw_cohort, run_round
from fedss.core.client import ClientUpdate
from fedss.core.defence import ROUNDS, TRIM, Defence, cap_weights, middle, refuse_large
from fedss.core.engine import Failure
from fedss.distributed import ALONE, Ranks
from fedss.errors import DivergedError, QuorumError
from fedss.runs.checkpoint import load_checkpoint, save_checkpoint
from tests.core.test_algorithm import MOMENTUM, cohorts, engine, plan, start
from tests.reference import whole

NORM = Defence(norm_bound=3.0)
ALL = np.arange(6)


@dataclass(frozen=True)
class Attacked:
    """An engine whose clients in ``attackers`` send what ``attack`` makes of their updates."""

    attack: Any
    attackers: frozenset[int] = frozenset({2})
    ranks: Ranks = ALONE

    def num_clients(self, round):
        return len(ALL)

    def train(self, state, cohort, plan):
        for update in engine(MOMENTUM).train(state, cohort, plan):
            yield self.attack(update) if update.client in self.attackers else update


def scaled(factor):
    return lambda update: replace(
        update,
        backbone_delta_P=factor * update.backbone_delta_P,
        rows_delta_SD=factor * update.rows_delta_SD,
    )


def only(part, factor):
    return lambda update: replace(update, **{part: factor * getattr(update, part)})


def left_out(update):
    return Failure(update.client, "left out")


def a_round(attack, defence=NORM, quorum=0.5, **more):
    server = Server(MOMENTUM, quorum=quorum, defence=defence)
    return run_round(server, Attacked(attack, **more), start(MOMENTUM), plan("full"), ALL)


def same_bits(state, other):
    return torch.equal(state.backbone_P, other.backbone_P) and torch.equal(
        whole(state.class_rows), whole(other.class_rows)
    )


@pytest.mark.parametrize("where", ["backbone_delta_P", "rows_delta_SD"])
@pytest.mark.parametrize("factor", [30.0, 1e20])
def test_a_long_update_is_refused_in_the_first_round(where, factor):
    state, updates, failures = a_round(only(where, factor))
    assert [update.client for update in updates] == [0, 1, 3, 4, 5]
    assert [(f.client, f.reason) for f in failures] == [(2, "norm")]
    part = "the backbone" if where == "backbone_delta_P" else "class rows"
    assert part in failures[0].detail
    assert "norm_bound is 3" in failures[0].detail
    assert same_bits(state, a_round(left_out)[0])
    # Without the bound it is believed.
    state, updates, failures = a_round(only(where, factor), Defence())
    assert not failures
    moved = (state.backbone_P - start(MOMENTUM).backbone_P).norm()
    usual = (a_round(left_out)[0].backbone_P - start(MOMENTUM).backbone_P).norm()
    assert (where == "rows_delta_SD") or moved > 4 * usual


def test_where_nothing_is_refused_no_bit_changes():
    state, *_ = a_round(lambda update: update, Defence())
    guarded, _, failures = a_round(lambda update: update, Defence(3.0, 10.0))
    assert not failures
    assert same_bits(state, guarded)
    assert state.norms == ()
    assert len(guarded.norms) == 1


def test_an_update_that_is_not_finite_is_left_out_of_a_simulated_round():
    state, updates, failures = a_round(scaled(float("nan")), Defence())
    assert [(f.client, f.reason) for f in failures] == [(2, "not finite")]
    assert len(updates) == 5
    assert same_bits(state, a_round(left_out, Defence())[0])
    most = frozenset({0, 1, 2, 3})
    with pytest.raises(DivergedError, match="round 1, client 0: expected a finite loss"):
        a_round(scaled(float("nan")), Defence(), attackers=most)


def test_a_round_of_which_most_is_refused_says_which_setting_it_was():
    state = replace(start(MOMENTUM), norms=(((1e-9, 1.0),) * 2,) * ROUNDS)
    with pytest.raises(QuorumError, match=r"got 0 \(6 norm; a change of the .*norm_bound is 3\)"):
        run_round(Server(MOMENTUM, defence=NORM), Attacked(None, frozenset()), state, plan(), ALL)


def update(client, backbone, rows=1.0, num_examples=1):
    return ClientUpdate(
        client,
        torch.tensor([backbone]),
        torch.tensor([0]),
        torch.tensor([[rows]]),
        num_examples,
        0.0,
    )


def refused(updates, known=(), ranks=ALONE):
    kept, failures, known = refuse_large(updates, known, NORM, ranks)
    assert {u.client for u in kept} | {f.client for f in failures} == {u.client for u in updates}
    return [failure.client for failure in failures], known


def cohort_of(*norms):
    return [update(client, norm) for client, norm in enumerate(norms)]


def test_a_majority_in_one_round_is_held_by_the_rounds_before():
    known: tuple[Any, ...] = ()
    for _ in range(5):
        out, known = refused(cohort_of(1.0, 1.1, 0.9), known)
        assert not out
    assert refused(cohort_of(1.0, 50.0, 50.0, 50.0), known)[0] == [1, 2, 3]
    # And what is usual does not creep after those that stay below the bound.
    for _ in range(50):
        out, known = refused(cohort_of(1.0, 1.0, 1.0, 2.9, 2.9), known)
    assert known == (((1.0, 1.0),) * 2,) * ROUNDS


def test_what_is_usual_follows_the_learning_rate():
    known: tuple[Any, ...] = ()
    for round in range(100):
        size = 0.9**round
        out, known = refused(cohort_of(size, 1.5 * size, 0.7 * size), known)
        assert not out
    assert refused(cohort_of(1.0, size, size), known)[0] == [0]


def test_norms_that_lie_far_apart_are_usual_there():
    """Most of what a client had to learn is learnt, but for an image here and there."""
    rng, out = np.random.default_rng(0), 0
    known: tuple[Any, ...] = ()
    for _ in range(100):
        of_round, known = refused(cohort_of(*np.exp(1.5 * rng.standard_normal(20)).tolist()), known)
        out += len(of_round)
    assert out < 0.02 * 100 * 20
    assert refused(cohort_of(*[1.0] * 19, 1e5), known)[0] == [19]


def test_who_says_nothing_of_a_part_says_nothing_of_what_is_usual():
    """Clients without a class of the round answer with zeros."""
    assert refused([update(k, 1.0, 0.0) for k in range(5)] + [update(5, 1.0, 9.0)])[0] == []
    few = [update(k, 1.0, 1.0) for k in range(3)] + [update(3, 1.0, 9.0)]
    assert refused([update(k, 1.0, 0.0) for k in range(4, 9)] + few)[0] == [3]


def test_of_two_clients_nobody_knows_which_to_believe():
    assert refused(cohort_of(1.0, 1e9))[0] == []
    assert refused(cohort_of(1.0, 1e9), (((1.0, 1.0),) * 2,))[0] == [1]


@dataclass(frozen=True)
class WithOther(Ranks):
    """A rank that hears from another one."""

    other: Any = None

    def gather(self, value):
        return [value, self.other]


def test_what_is_usual_is_that_of_all_ranks():
    mine = [update(0, 9.0), update(1, 9.0)]
    out, known = refused(mine, (), WithOther(size=2, other=[(1.0, 1.0)] * 5))
    assert out == [0, 1]
    assert known == (((1.0, 1.0),) * 2,)
    assert [u.num_examples for u in cap_weights([update(0, 1.0, 1.0, 99)], 3.0)] == [99]
    other = WithOther(size=2, other=[1, 2, 2])
    assert [u.num_examples for u in cap_weights([update(0, 1.0, 1.0, 99)], 3.0, other)] == [6]


def test_norms_survive_a_checkpoint(tmp_path):
    state = a_round(lambda update: update)[0]
    save_checkpoint(tmp_path, state)
    found = load_checkpoint(tmp_path, start(MOMENTUM).class_rows)
    assert found is not None
    assert found.norms == state.norms != ()


def test_who_says_it_has_all_images_weighs_no_more_than_ten():
    attack = lambda u: replace(u, num_examples=10**9)  # noqa: E731
    honest = a_round(lambda u: u, Defence())[0].backbone_P
    usual = (honest - start(MOMENTUM).backbone_P).norm()
    believed = (a_round(attack, Defence())[0].backbone_P - honest).norm()
    capped, updates, _ = a_round(attack, Defence(weight_cap=2.0))
    counts = sorted(update.num_examples for update in updates)
    assert counts[-1] == 2 * statistics.median_low(counts)
    assert (capped.backbone_P - honest).norm() < believed / 2
    assert believed > usual / 4


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=2), min_size=1))
def test_the_middle_against_a_loop(values):
    columns = [sorted(column) for column in zip(*values, strict=True)]
    out = int(TRIM * len(values))
    trimmed = [statistics.fmean(column[out : len(values) - out]) for column in columns]
    given = torch.tensor(values)
    assert middle(given, "trimmed").tolist() == pytest.approx(trimmed)
    assert middle(given, "median").tolist() == pytest.approx([*map(statistics.median, columns)])


@given(cohorts(), st.sampled_from(["cohort", "holders"]))
def test_medians_of_rows_are_those_of_their_holders(updates, row_mean):
    means = aggregate_middle(updates, row_mean, "median")
    assert means.ids_U.tolist() == sorted({i for u in updates for i in u.ids_S.tolist()})
    for i, row in zip(means.ids_U.tolist(), means.rows_delta_UD.tolist(), strict=True):
        held = [
            u.rows_delta_SD[u.ids_S.tolist().index(i)].tolist() for u in updates if i in u.ids_S
        ]
        share = len(held) / len(updates) if row_mean == "cohort" else 1.0
        expected = [share * statistics.median(column) for column in zip(*held, strict=True)]
        assert row == pytest.approx(expected, abs=1e-6)
    changes = zip(*(update.backbone_delta_P.tolist() for update in updates), strict=True)
    backbone = [*map(statistics.median, changes)]
    assert means.backbone_delta_P.tolist() == pytest.approx(backbone, abs=1e-6)


@given(cohorts(), st.sampled_from(["cohort", "holders"]))
def test_the_middle_of_all_is_the_mean_of_clients_alike(updates, row_mean):
    alike = [replace(update, num_examples=1) for update in updates]
    one, other = aggregate(alike, row_mean), aggregate_middle(updates, row_mean, "mean")
    assert torch.allclose(one.backbone_delta_P, other.backbone_delta_P, atol=1e-6)
    assert torch.allclose(one.rows_delta_UD, other.rows_delta_UD, atol=1e-6)
    assert one.rows_held == pytest.approx(other.rows_held)


@pytest.mark.parametrize("kind", ["trimmed", "median"])
def test_robust_means_hold_what_the_mean_does_not(kind):
    """One of six, with any weight and length."""
    attack = lambda u: replace(scaled(1e6)(u), num_examples=10**9)  # noqa: E731
    before, told = start(MOMENTUM).backbone_P, Defence(aggregate=kind)
    usual = (a_round(lambda u: u, told)[0].backbone_P - before).norm()
    held = (a_round(attack, told)[0].backbone_P - before).norm()
    assert held < 3 * usual
    assert (a_round(attack, Defence())[0].backbone_P - before).norm() > 1e3 * usual


def test_clients_that_are_away_are_not_drawn():
    away = np.array([0, 2, 4])
    for round in range(20):
        drawn = draw_cohort(6, 2, 0, round, away)
        assert len(drawn) == 2
        assert not {*drawn.tolist()} & {*away.tolist()}
        assert np.array_equal(
            draw_cohort(6, 2, 0, round, np.array([], int)), draw_cohort(6, 2, 0, round)
        )
    assert draw_cohort(6, 9, 0, 0, away).tolist() == [1, 3, 5]
    assert draw_cohort(2, 2, 0, 0, np.arange(2)).tolist() == [0, 1]
