"""Cost of a round against the number of classes; tables of ten and a hundred million classes.

    python benchmarks/scale.py            (--short: up to a million classes, in a minute)

Made-up clients, 16 a round, hold 32 classes each out of n and train conv4-32 on 64 pictures of
28 x 28 with |S| = 256, d = 64, FedAvgM. Tables of all sizes are there at once and their rounds
take turns, so that the machine's mood is the same for all. "again": every row of the table was
written before, as late in a long run. "first": a table as it is made; at a million classes and
more, nearly all rows of every round are read for the first time, so they are made from the seed
and their pages are new, while most of 10,000 are written after a few rounds.

Writes ``benchmarks/results/scale.txt`` (not with --short).
"""

import argparse
import datetime
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from omniglot import processor

from fedss.core.algorithm import ServerState, aggregate, apply_update, choose_classes, select
from fedss.core.class_rows import ClassRows, create_class_rows
from fedss.core.client import LocalTraining, RoundPlan, own_classes
from fedss.core.optimizers import ServerOptimizer
from fedss.data import ClientIndex
from fedss.engines.allocator import keep_freed_memory
from fedss.engines.local import LocalEngine, local_engine
from fedss.losses.methods import METHODS
from fedss.losses.softmax import Scoring
from fedss.models import build_embedder, flatten_
from fedss.runs.checkpoint import load_checkpoint, save_checkpoint
from fedss.sampling.samplers import SAMPLERS
from fedss.wire.messages import WireFormat

RESULTS = Path(__file__).parent / "results" / "scale.txt"
DIM, SAMPLE, COHORT, OWN, PICTURES = 64, 256, 16, 32, 64
OPTIMIZER = ServerOptimizer("momentum")


@dataclass(frozen=True)
class Pictures:
    """As much of ``fedss.Images`` as an engine reads, without n names."""

    pixels: np.ndarray
    labels: np.ndarray


def clients_of(num_classes: int) -> ClientIndex:
    rng = np.random.default_rng(num_classes)
    pixels = rng.integers(0, 256, (COHORT * PICTURES, 1, 28, 28), dtype=np.uint8)
    labels = np.concatenate(
        [np.repeat(rng.choice(num_classes, OWN, replace=False), 2) for _ in range(COHORT)]
    )
    starts = np.arange(0, COHORT * PICTURES + 1, PICTURES)
    return ClientIndex(Pictures(pixels, labels), np.arange(len(labels)), starts)  # type: ignore[arg-type]


def plan_of(num_classes: int, round: int) -> RoundPlan:
    local = LocalTraining(1, None, 8, 0.05, 2.0)
    scoring, uniform = Scoring(10.0), SAMPLERS["uniform"]
    return RoundPlan(round, 0, METHODS["fedss"], uniform, num_classes, SAMPLE, 0, scoring, local)


@contextmanager
def engine_of(num_classes: int) -> Iterator[tuple[LocalEngine, torch.Tensor]]:
    embedder = build_embedder("conv4-32", channels=1, image_size=28, embedding_size=DIM, seed=0)
    layout = tuple(p.shape for p in embedder.parameters())
    theta_P = flatten_(embedder).theta_P.clone()
    wire = WireFormat(layout, DIM, num_classes)
    # Not None: within an engine, torch has one thread, and another would take one worker.
    workers = os.cpu_count()
    with local_engine(embedder, clients_of(num_classes), OPTIMIZER, wire, workers) as engine:
        yield engine, theta_P


def start(theta_P: torch.Tensor, rows: ClassRows) -> ServerState:
    return ServerState(theta_P, {"momentum": torch.zeros_like(theta_P)}, rows, 0)


def one_round(engine: LocalEngine, state: ServerState) -> tuple[ServerState, dict[str, float]]:
    """A round as the driver runs it, and its seconds by part.

    select runs once more, alone, for as many random rows as all clients ask for together: of few
    classes they would ask for some twice, and the server reads those once.
    """
    rows, cohort = state.class_rows, np.arange(COHORT)
    plan = plan_of(rows.num_classes, state.round)
    labels = engine.clients.images.labels
    seconds: dict[str, float] = {}

    def timed(part: str, work: Callable[[], object]) -> object:
        before = time.perf_counter()
        result = work()
        seconds[part] = time.perf_counter() - before
        return result

    own_K = [own_classes(plan, k, labels[engine.clients.examples(k)]) for k in cohort.tolist()]
    timed("draw", lambda: choose_classes(plan, state, cohort, own_K))
    rng = np.random.default_rng(state.round)
    ids_U = torch.from_numpy(np.sort(rng.choice(rows.num_classes, COHORT * SAMPLE, replace=False)))
    timed("select", lambda: select(OPTIMIZER, state, ids_U))
    updates = timed("clients", lambda: list(engine.train(state, cohort, plan)))
    mean = timed("aggregate", lambda: aggregate(updates, "cohort"))  # type: ignore[arg-type]
    seconds["rows"] = len(mean.ids_U)  # type: ignore[attr-defined]
    after = timed("server step", lambda: apply_update(OPTIMIZER, state, mean))  # type: ignore[arg-type]
    return after, seconds  # type: ignore[return-value]


def fill_(rows: ClassRows) -> None:
    """Every row as if it had been written in round 0."""
    for start in range(0, rows.num_classes, 1 << 16):
        block = rows.weight_ND[start : start + (1 << 16)]
        block.copy_(torch.nn.functional.normalize(torch.randn(block.shape), dim=1))
        for slot in rows.slots.values():
            slot[start : start + (1 << 16)] = 0
    rows.updated_N.fill_(1)


PARTS = ("draw", "select", "clients", "aggregate", "server step")


def flat_in_n(sizes: list[int], rounds: int) -> list[str]:
    """Milliseconds a round by part, for all sizes, first and again."""
    lines = []
    for again in (False, True):
        with _all_engines(sizes) as engines:
            states = {}
            for n, (_, theta_P) in engines.items():
                rows = create_class_rows(n, DIM, OPTIMIZER.slots, 0)
                if again:
                    fill_(rows)
                states[n] = start(theta_P, rows)
            laps: dict[int, list[dict[str, float]]] = {n: [] for n in sizes}
            for round in range(rounds + 2):
                first = round % len(sizes)
                for n in sizes[first:] + sizes[:first]:
                    engine = engines[n][0]
                    # The same client numbers draw other negatives in every round.
                    states[n], seconds = one_round(engine, replace(states[n], round=round))
                    if round >= 2:
                        laps[n].append(seconds)
            lines += ["", f"rows {'again' if again else 'first'}: ms a round, median of {rounds}"]
            lines.append(f"{'n':>12} {'rows':>6}" + "".join(f"{part:>14}" for part in PARTS))
            for n in sizes:
                line = f"{n:>12,} {_median(laps[n], 'rows'):>6.0f}"
                for part in PARTS:
                    pairs = zip(laps[n], laps[sizes[0]], strict=True)
                    ratio = statistics.median(a[part] / b[part] for a, b in pairs)
                    if part in ("aggregate", "server step"):
                        ratio *= _median(laps[sizes[0]], "rows") / _median(laps[n], "rows")
                    line += f"{1000 * _median(laps[n], part):>8.1f} "
                    line += f"{ratio:>4.2f}x" if again else " " * 5
                lines.append(line)
    return lines


@contextmanager
def _all_engines(
    sizes: list[int],
) -> Iterator[dict[int, tuple[LocalEngine, torch.Tensor]]]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield {n: stack.enter_context(engine_of(n)) for n in sizes}


def _median(laps: list[dict[str, float]], part: str) -> float:
    return statistics.median(lap[part] for lap in laps)


def huge(num_classes: int, dtype: str, store: str, rounds: int, folder: Path) -> list[str]:
    """Making, training, saving and loading one large table: seconds and bytes."""
    before, begin = _resident(), time.perf_counter()
    place = folder if store == "file" else None
    rows = create_class_rows(num_classes, DIM, OPTIMIZER.slots, 0, dtype, place)  # type: ignore[arg-type]
    made = time.perf_counter() - begin
    whole = sum(t.nbytes for t in (rows.weight_ND, rows.updated_N, *rows.slots.values()))
    laps, saves = [], []
    with engine_of(num_classes) as (engine, theta_P):
        state = start(theta_P, rows)
        for _ in range(rounds):
            state, seconds = one_round(engine, state)
            laps.append(sum(seconds[part] for part in PARTS))
            if state.round % 10 == 0:
                begin = time.perf_counter()
                save_checkpoint(folder / "checkpoint", state)
                saves.append(time.perf_counter() - begin)
    resident = _resident() - before
    touched = int((rows.updated_N > 0).sum())  # which makes all of updated_N resident
    on_disk = sum(f.stat().st_size for f in (folder / "checkpoint").glob("rows-*"))
    fresh = create_class_rows(num_classes, DIM, OPTIMIZER.slots, 0, dtype, place)  # type: ignore[arg-type]
    begin = time.perf_counter()
    loaded = load_checkpoint(folder / "checkpoint", fresh)
    load_seconds = time.perf_counter() - begin
    assert loaded is not None
    assert torch.equal(loaded.class_rows.updated_N, rows.updated_N)
    return [
        "",
        f"{num_classes:,} classes in {dtype}, in {'a file' if store == 'file' else 'memory'}",
        f"the table in full                {whole / 1e9:>10.2f} GB",
        f"made in                          {1000 * made:>10.2f} ms",
        f"a round, median of {rounds:<4}          {1000 * statistics.median(laps):>10.1f} ms",
        f"rows touched                     {touched:>10,} of {num_classes:,}",
        f"resident memory it added         {resident / 1e6:>10.0f} MB",
        f"a checkpoint every 10 rounds     {1000 * statistics.median(saves):>10.1f} ms, median;"
        f" {1000 * max(saves):.0f} ms at most",
        f"its row files, all together      {on_disk / 1e6:>10.1f} MB",
        f"loaded again in                  {1000 * load_seconds:>10.1f} ms",
    ]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="up to a million classes, few rounds")
    options = parser.parse_args()
    keep_freed_memory()
    sizes = [10**4, 10**5, 10**6] if options.short else [10**4, 10**5, 10**6, 10**7]
    lines = [
        "Cost of a round against the number of classes",
        f"command   python {' '.join(['benchmarks/scale.py', *sys.argv[1:]])}",
        f"date      {datetime.date.today().isoformat()}",
        f"hardware  {processor()}, {os.cpu_count()} cores, no GPU",
        f"software  fedss {version('fedss')}, torch {version('torch')}, "
        f"numpy {version('numpy')}, Python {platform.python_version()}",
        "",
        f"{COHORT} clients a round of {OWN} classes and {PICTURES} pictures, |S| = {SAMPLE}, "
        f"d = {DIM}, conv4-32, FedAvgM;",
        f"'x': against n = {sizes[0]:,}, median over pairs of rounds. 'clients' has local training",
        f"and select. 'select' is that of {COHORT * SAMPLE:,} random rows. Where classes are few,",
        "samples overlap: 'rows' is how many the round touches, and 'x' of aggregate and server",
        "step is for as many rows.",
    ]
    lines += flat_in_n(sizes, 5 if options.short else 21)
    large = [(10**6, "float32", "memory"), (10**6, "bfloat16", "file")]
    if not options.short:
        large = [(10**7, "float32", "memory"), (10**7, "bfloat16", "memory")]
        large += [(10**8, "bfloat16", "file")]
    for num_classes, dtype, store in large:
        # Not in the system's temporary folder, which may lie in memory.
        with tempfile.TemporaryDirectory(dir=RESULTS.parent) as folder:
            lines += huge(num_classes, dtype, store, 20 if options.short else 100, Path(folder))
    text = "\n".join(lines) + "\n"
    if not options.short:
        RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
