import pytest
import torch
from torch.nn import functional as F

from fedss.core.class_rows import create_class_rows
from fedss.core.optimizers import ServerOptimizer, current_rows, step, step_rows_
from tests.reference import whole

N, D, ROUNDS = 9, 3, 40


def dense_peer(optimizer: ServerOptimizer, weight: torch.Tensor) -> torch.optim.Optimizer:
    lr, b1, b2 = optimizer.lr, optimizer.momentum, optimizer.second_momentum
    return {
        "sgd": lambda: torch.optim.SGD([weight], lr=lr),
        "momentum": lambda: torch.optim.SGD([weight], lr=lr, momentum=b1),
        "adam": lambda: torch.optim.Adam([weight], lr=lr, betas=(b1, b2), eps=optimizer.epsilon),
    }[optimizer.kind]()


OPTIMIZERS = [
    ServerOptimizer("sgd", 0.7, normalize_rows=False),
    ServerOptimizer("sgd", 0.7),
    ServerOptimizer("momentum", 0.7, 0.9, normalize_rows=False),
    ServerOptimizer("momentum", 0.7, 0.9),
    ServerOptimizer("momentum", 1.0, 0.0, normalize_rows=False),
    ServerOptimizer("adam", 0.1, 0.9, 0.99, 1e-3),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_dense_steps_are_torch_optims(optimizer):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5, generator=g, dtype=torch.float64)
    slots = {name: torch.zeros_like(weight) for name in optimizer.slots}
    theirs = weight.clone().requires_grad_()
    peer = dense_peer(optimizer, theirs)
    for round in range(ROUNDS):
        update = torch.randn(5, generator=g, dtype=torch.float64)
        before = weight.clone(), {name: slot.clone() for name, slot in slots.items()}
        new, new_slots = step(optimizer, weight, slots, update, round)
        assert torch.equal(weight, before[0])
        assert all(torch.equal(slots[name], slot) for name, slot in before[1].items())
        weight, slots = new, new_slots
        theirs.grad = -update
        peer.step()
        assert (weight - theirs).abs().max() < 1e-12


def sparse_history(seed: int):
    g = torch.Generator().manual_seed(seed)
    for round in range(ROUNDS):
        ids = torch.unique(torch.randint(0, N, (3,), generator=g))
        yield round, ids, torch.randn(len(ids), D, generator=g)


OF_ROWS = [
    *(optimizer for optimizer in OPTIMIZERS if optimizer.kind != "adam"),
    ServerOptimizer("momentum", 30.0, 0.9, row_lr=0.7),
    ServerOptimizer("momentum", 30.0, 0.9, row_lr=0.7, row_kind="sgd"),
]


@pytest.mark.parametrize("optimizer", OF_ROWS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_lazy_rows_equal_the_dense_optimizer(optimizer, seed):
    rows = create_class_rows(N, D, optimizer.of_rows.slots, seed)
    dense = whole(rows).double().requires_grad_()
    peer = dense_peer(optimizer.of_rows, dense)
    for round, ids, update in sparse_history(seed):
        everything, _ = current_rows(optimizer, rows, torch.arange(N), round)
        assert (everything - dense).abs().max() < 2e-6 * dense.abs().max()
        step_rows_(optimizer, rows, ids, update, round)
        dense.grad = torch.zeros(N, D, dtype=torch.float64)
        dense.grad[ids] = -update.double()
        peer.step()
        if optimizer.normalize_rows:
            with torch.no_grad():
                dense[ids] = F.normalize(dense[ids], dim=1)


def test_adam_on_rows_is_sparse_adam():
    # A tiny epsilon: torch adds it before the bias correction in SparseAdam, after it in Adam.
    optimizer = ServerOptimizer("adam", 0.1, 0.9, 0.99, 1e-12, normalize_rows=False)
    rows = create_class_rows(N, D, optimizer.slots, 0)
    theirs = whole(rows).requires_grad_()
    peer = torch.optim.SparseAdam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for round, ids, update in sparse_history(0):
        step_rows_(optimizer, rows, ids, update, round)
        theirs.grad = torch.sparse_coo_tensor(
            ids[None], -update, (N, D), is_coalesced=True, check_invariants=True
        )
        peer.step()
        everything, _ = current_rows(optimizer, rows, torch.arange(N), round + 1)
        assert (everything - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_untouched_rows_do_not_change_by_one_bit(optimizer):
    rows = create_class_rows(N, D, optimizer.slots, 0)
    for round, ids, update in sparse_history(1):
        before = [whole(rows), rows.updated_N.clone()]
        before += [slot.clone() for slot in rows.slots.values()]
        current_rows(optimizer, rows, torch.arange(N), round)
        step_rows_(optimizer, rows, ids, update, round)
        after = [whole(rows), rows.updated_N, *rows.slots.values()]
        untouched = torch.ones(N, dtype=torch.bool)
        untouched[ids] = False
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[untouched], new[untouched])
        assert not torch.equal(before[0][ids], after[0][ids])
