"""Cost of a round against the number of classes; tables of ten and a hundred million classes.

    python benchmarks/scale.py            (--short: up to a million classes, in a minute)

Made-up clients, 16 a round, hold 32 classes each out of n and train conv4-32 on 64 images of
28 x 28 with |S| = 256, d = 64, FedAvgM. Tables of all sizes are there at once and their rounds
take turns, so that the machine's mood is the same for all. "again": every row of the table was
written before, as late in a long run. "first": a table as it is made; at a million classes and
more, nearly all rows of every round are read for the first time, so they are made from the seed
and their pages are new, while most of 10,000 are written after a few rounds.

Writes ``benchmarks/results/scale.txt`` (not with --short).
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from fedss.core.algorithm import aggregate, apply_update, select
from fedss.core.class_rows import ClassRows, create_class_rows, with_sums
from fedss.core.client import LocalTraining, draw_classes, limit_own_classes
from fedss.core.state import ServerState
from fedss.engines.allocator import keep_freed_memory
from fedss.engines.local import LocalEngine
from fedss.models import Embedder, build_embedder
from fedss.runs.checkpoint import load_checkpoint, save_checkpoint

SAMPLE, COHORT, IMAGES = 256, 16, 64
LOCAL = LocalTraining(1, None, 8, 0.05, 2.0)


@contextmanager
def started(num_classes: int) -> Iterator[tuple[LocalEngine, Embedder]]:
    """An engine with clients that hold a few of so many classes."""
    embedder = build_embedder(
        "conv4-32", channels=1, image_size=28, embedding_size=common.DIM, seed=0
    )
    labels = common.paired_labels(COHORT, IMAGES, num_classes, seed=num_classes)
    clients = common.clients_of(common.random_pixels(COHORT * IMAGES, 28), labels)
    # Not None: within an engine, torch has one thread, and another would take one worker.
    with common.engine_of(embedder, clients, num_classes, os.cpu_count()) as engine:
        yield engine, embedder


def one_round(engine: LocalEngine, state: ServerState) -> tuple[ServerState, dict[str, float]]:
    """A round as the driver runs it, and its seconds by part.

    select runs once more, alone, for as many random rows as all clients ask for together: of few
    classes they would ask for some twice, and the server reads those once.
    """
    rows, cohort = state.class_rows, np.arange(COHORT)
    plan = common.plan_of(rows.num_classes, SAMPLE, LOCAL, state.round)
    labels = engine.clients.images.labels
    seconds: dict[str, float] = {}

    def part(name: str, work: Callable[[], common.T]) -> common.T:
        result, spent = common.timed(work)
        seconds[name] = spent.wall
        return result

    own_K = [limit_own_classes(plan, k, labels[engine.clients.examples(k)]) for k in range(COHORT)]
    part("draw", lambda: [draw_classes(plan, k, own_P) for k, own_P in enumerate(own_K)])
    rng = np.random.default_rng(state.round)
    ids_U = torch.from_numpy(np.sort(rng.choice(rows.num_classes, COHORT * SAMPLE, replace=False)))
    part("select", lambda: select(common.OPTIMIZER, state, ids_U))
    updates = part("clients", lambda: list(engine.train(state, cohort, plan)))
    mean = part("aggregate", lambda: aggregate(updates, "cohort"))
    seconds["rows"] = len(mean.ids_U)
    return part("server step", lambda: apply_update(common.OPTIMIZER, state, mean)), seconds


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
        with ExitStack() as stack:
            engines = {n: stack.enter_context(started(n)) for n in sizes}
            states = {n: common.first_state(embedder, n) for n, (_, embedder) in engines.items()}
            for state in states.values() if again else ():
                fill_(state.class_rows)
            laps: dict[int, list[dict[str, float]]] = {n: [] for n in sizes}
            for round in range(rounds + 2):
                for n in common.rotated(sizes, round):
                    # The same client numbers draw other negatives in every round.
                    states[n], seconds = one_round(engines[n][0], replace(states[n], round=round))
                    if round >= 2:
                        laps[n].append(seconds)
        lines += ["", f"rows {'again' if again else 'first'}: ms a round, median of {rounds}"]
        lines.append(f"{'n':>12} {'rows':>6}" + "".join(f"{part:>14}" for part in PARTS))
        for n in sizes:
            line = f"{n:>12,} {_median(laps[n], 'rows'):>6.0f}"
            for part in PARTS:
                ratio = common.median_ratio(
                    *([lap[part] for lap in laps[m]] for m in (n, sizes[0]))
                )
                if part in ("aggregate", "server step"):
                    ratio *= _median(laps[sizes[0]], "rows") / _median(laps[n], "rows")
                line += f"{1000 * _median(laps[n], part):>8.1f} "
                line += f"{ratio:>4.2f}x" if again else " " * 5
            lines.append(line)
    return lines


def _median(laps: list[dict[str, float]], part: str) -> float:
    return statistics.median(lap[part] for lap in laps)


def huge(num_classes: int, dtype: Any, store: str, rounds: int, folder: Path) -> list[str]:
    """Making, training, saving and loading one large table: seconds and bytes."""
    place, checkpoint = folder if store == "file" else None, folder / "checkpoint"

    def make() -> ClassRows:
        slots = common.OPTIMIZER.slots
        return with_sums(create_class_rows(num_classes, common.DIM, slots, 0, dtype, place))

    before = common.resident_megabytes()
    rows, making = common.timed(make)
    whole = sum(t.nbytes for t in (rows.weight_ND, rows.updated_N, *rows.slots.values()))
    laps, saves = [], []
    with started(num_classes) as (engine, embedder):
        state = replace(common.first_state(embedder, 1), class_rows=rows)
        for _ in range(rounds):
            state, seconds = one_round(engine, state)
            laps.append(sum(seconds[part] for part in PARTS))
            if state.round % 10 == 0:
                saves.append(common.timed(partial(save_checkpoint, checkpoint, state))[1].wall)
    resident = common.resident_megabytes() - before
    touched = int((rows.updated_N > 0).sum())  # which makes all of updated_N resident
    on_disk = sum(f.stat().st_size for f in checkpoint.glob("rows-*"))
    fresh = make()
    loaded, loading = common.timed(lambda: load_checkpoint(checkpoint, fresh))
    assert loaded is not None
    assert torch.equal(loaded.class_rows.updated_N, rows.updated_N)
    return [
        "",
        f"{num_classes:,} classes in {dtype}, in {'a file' if store == 'file' else 'memory'}",
        f"the table in full                {whole / 1e9:>10.2f} GB",
        f"made in                          {1000 * making.wall:>10.2f} ms",
        f"a round, median of {rounds:<4}          {1000 * statistics.median(laps):>10.1f} ms",
        f"rows touched                     {touched:>10,} of {num_classes:,}",
        f"resident memory it added         {resident:>10.0f} MB",
        f"a checkpoint every 10 rounds     {1000 * statistics.median(saves):>10.1f} ms, median;"
        f" {1000 * max(saves):.0f} ms at most",
        f"its row files, all together      {on_disk / 1e6:>10.1f} MB",
        f"loaded again in                  {1000 * loading.wall:>10.1f} ms",
    ]


def main() -> None:
    options = common.parser(__doc__, short="up to a million classes, few rounds").parse_args()
    keep_freed_memory()
    sizes = [10**4, 10**5, 10**6] if options.short else [10**4, 10**5, 10**6, 10**7]
    report = common.Report("Cost of a round against the number of classes")
    report.add(
        f"{COHORT} clients a round of {IMAGES // 2} classes and {IMAGES} images, |S| = {SAMPLE}, "
        f"d = {common.DIM}, conv4-32, FedAvgM;",
        f"'x': against n = {sizes[0]:,}, median over pairs of rounds. 'clients' has local training",
        f"and select. 'select' is that of {COHORT * SAMPLE:,} random rows. Where classes are few,",
        "samples overlap: 'rows' is how many the round touches, and 'x' of aggregate and server",
        "step is for as many rows.",
        *flat_in_n(sizes, 5 if options.short else 21),
    )
    large = [(10**6, "float32", "memory"), (10**6, "bfloat16", "file")]
    if not options.short:
        large = [(10**7, "float32", "memory"), (10**7, "bfloat16", "memory")]
        large += [(10**8, "bfloat16", "file")]
    for num_classes, dtype, store in large:
        # Not in the system's temporary folder, which may lie in memory.
        with tempfile.TemporaryDirectory(dir=common.RESULTS) as folder:
            rounds = 20 if options.short else 100
            report.add(*huge(num_classes, dtype, store, rounds, Path(folder)))
    report.write(unless=options.short)


if __name__ == "__main__":
    main()
