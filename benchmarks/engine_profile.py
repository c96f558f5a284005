"""Where a round's time goes, against the floor in bytes and arithmetic. (``engine.py --profile``)

One thread. The floor of a kind of operation is the longer of two times: its arithmetic at the rate
of a large matrix product, and the bytes of its inputs and outputs at the rate of copying 2 MB,
about the size of the largest activation, over and over; both rates are measured just before.
"""

import cProfile
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.profiler
from job import COHORT, DIM, read_job
from network import network
from ours import dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedss.config import Config
from fedss.core.algorithm import Server, run_round
from fedss.core.class_rows import create_class_rows
from fedss.core.state import ServerState
from fedss.data import index_clients
from fedss.engines.allocator import keep_freed_memory
from fedss.engines.local import local_engine
from fedss.losses.methods import METHODS
from fedss.models import flatten_
from fedss.settings import problem_of, resolve
from fedss.training.build import build_model, round_plan, server_optimizer, wire_format

PHASES = {
    "class samples": ("request_classes", "deal_classes"),
    "rows read for the clients": ("select",),
    "messages encoded, decoded, counted": (
        *(
            f"{do}_{what}"
            for do in ("encode", "decode")
            for what in ("broadcast", "answer", "update")
        ),
        "traffic",
    ),
    "local training": ("train_client",),
    "checks": ("check_finite", "check_finite_state"),
    "weighted mean": ("aggregate",),
    "server's step": ("apply_update",),
}
KINDS = {
    "convolutions": ("conv",),
    "group norms": ("group_norm",),
    "pooling": ("max_pool2d",),
    "ReLU": ("relu", "threshold_backward", "clamp_min"),
    "matrix products": ("::mm", "::addmm"),
    "softmax": ("softmax", "nll_loss"),
    "adding, filling, copying": ("add_", "sub_", "fill_", "zero_", "copy_", "clone", "::sub"),
    "all else": ("",),
}


def kind(operation: str) -> str:
    return next(k for k, parts in KINDS.items() if any(part in operation for part in parts))


class Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the inputs and outputs of every operation that is not a view, by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, out))
            nbytes = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            self.counted[kind(func._schema.name)] += nbytes
        return out


def rates() -> tuple[float, float]:
    """Floating-point operations a second of a matrix product, and bytes a second of a copy."""
    a, b, small = torch.rand(1024, 1024), torch.rand(1024, 1024), torch.rand(2**19)
    target = torch.empty_like(small)
    return (
        2 * 1024**3 / min(laps(lambda: a @ b, 20)),
        2 * small.nbytes / min(laps(lambda: target.copy_(small), 200)),
    )


def laps(work: Callable[[], object], count: int) -> list[float]:
    """Seconds of this thread's CPU, each time."""
    seconds = []
    for _ in range(count):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return seconds


def profile(folder: Path, method: str, n: int) -> list[str]:
    """Two tables of a round of the job in ``folder``: by phase, and by kind of operation."""
    job = read_job(folder)
    data = dataset(job)
    config, _ = resolve(Config(**job.settings), problem_of(data))
    keep_freed_memory()
    embedder = build_model(config, data, network(job.theta))
    optimizer, wire = server_optimizer(config), wire_format(config, embedder, n)
    rows = create_class_rows(n, DIM, optimizer.slots, config.seed)
    state = ServerState(flatten_(embedder).theta_P.clone(), {}, rows, 0)
    server = Server(optimizer, COHORT, METHODS[method].row_mean)
    with local_engine(embedder, index_clients(data.train), optimizer, wire, 1) as engine:
        # In this thread, which all that measures looks at.
        inline: Any = SimpleNamespace(map=map)
        inline_engine = replace(engine, workers=replace(engine.workers, pool=inline))

        def one_round() -> None:
            run_round(server, inline_engine, state, round_plan(config, n, 0))

        one_round()
        peak, bandwidth = rates()
        seconds = statistics.median(laps(one_round, 5))
        calls = cProfile.Profile()
        calls.runcall(one_round)
        with torch.profiler.profile() as trace:
            one_round()
        with Bytes() as moved, FlopCounterMode(display=False) as arithmetic:
            one_round()
    lines = [f"{method}, n = {n:,}: {seconds:.3f} s of CPU a round", *phases(calls, seconds)]
    lines += ["", f"  {'':<28}{'s':>8}{'share':>8}{'GFLOP':>8}{'GB':>8}{'floor s':>9}"]
    spent, flops = Counter[str](), Counter[str]()
    for event in trace.key_averages():
        spent[kind(event.key)] += event.self_cpu_time_total
    for operation, count in arithmetic.get_flop_counts()["Global"].items():
        flops[kind(operation._qualified_op_name)] += count
    for name in KINDS:
        share = spent[name] / spent.total()
        floor = max(flops[name] / peak, moved.counted[name] / bandwidth)
        lines.append(
            f"  {name:<28}{seconds * share:>8.3f}{100 * share:>7.1f}%{flops[name] / 1e9:>8.2f}"
            f"{moved.counted[name] / 1e9:>8.2f}{floor:>9.3f}"
        )
    return [
        *lines,
        f"  rates: {peak / 1e9:.0f} GFLOP/s (matrix product), {bandwidth / 1e9:.0f} GB/s (copy)",
    ]


def phases(calls: cProfile.Profile, seconds: float) -> list[str]:
    """Each phase's part of a round, as cProfile has it: Python's own part looks too large."""
    cumulative: Counter[str] = Counter()
    for (file, _, name), (*_, total, _) in pstats.Stats(calls).stats.items():  # type: ignore[attr-defined]
        cumulative[name] += total if "fedss" in file else 0
    by_phase = {phase: sum(cumulative[name] for name in names) for phase, names in PHASES.items()}
    by_phase["all else"] = cumulative["run_round"] - sum(by_phase.values())
    total = sum(by_phase.values())
    return [
        f"  {phase:<36}{seconds * part / total:>8.4f} s{100 * part / total:>7.1f} %"
        for phase, part in by_phase.items()
    ]
