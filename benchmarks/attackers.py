"""What clients that misbehave do to a run, and what the defences leave of it.

    python benchmarks/faults.py --attackers           (all shares and seeds)
    python benchmarks/faults.py --attackers --short   (two minutes: a tenth of the clients attacks)

Attackers take part in a simulation: an engine that wraps the local one changes their updates, and
nothing of it is in the library. Which clients attack is drawn from the seed. Sites that register
too much, or leave, are those of a federation in this process, with Flower's own messages.

Writes ``benchmarks/results/attackers.txt``.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import numpy as np
import torch
from flwr.app import Message

import fedss
from fedss.core.client import ClientUpdate, RoundPlan
from fedss.core.engine import Engine, Failure
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.data import Dataset
from fedss.distributed import ALONE
from fedss.errors import FedssError
from fedss.flower.messages import REGISTER
from fedss.models import Embedder
from fedss.runs.records import Record, read_all_records
from fedss.settings import problem_of
from fedss.training.build import build_model, load_data
from fedss.training.experiment import RunPlan, train_federation
from fedss.training.federation import Federation, OnPhase, local_federation
from fedss.training.summary import describe
from tests.flower_grid import ProcessGrid
from tests.sites import federate, flood, nodes, settings, write_photos

CONFIG = fedss.Config(
    glyphs_classes=160,
    glyphs_clients=100,
    backbone="conv4-8",
    rounds=24,
    eval_every=0,
    checkpoint_every=24,
)
SHARES = (0.1, 0.3, 0.01)
OFF: dict[str, Any] = {"norm_bound": 0.0, "weight_cap": 0.0}
DEFENCES: dict[str, dict[str, Any]] = {
    "none": OFF,
    "default": {},
    "trimmed": {"aggregate": "trimmed"},
    "median": {"aggregate": "median"},
}
BAR = 0.97


def scaled(update: ClientUpdate, factor: float) -> ClientUpdate:
    return replace(
        update,
        backbone_delta_P=update.backbone_delta_P * factor,
        rows_delta_SD=update.rows_delta_SD * factor,
    )


ATTACKS: dict[str, tuple[str, bool, Callable[[ClientUpdate], ClientUpdate], str]] = {
    "scaling": ("update times 100", False, lambda u: scaled(u, 100.0), "default"),
    "huge": ("update times 1e30", False, lambda u: scaled(u, 1e30), "default"),
    "NaN": ("not a number", False, lambda u: scaled(u, torch.nan), "default"),
    "inflation": (
        "says 10^9 images",
        False,
        lambda u: replace(u, num_examples=10**9),
        "default",
    ),
    "sign flip": ("update times -1", False, lambda u: scaled(u, -1.0), ""),
    "label flip": ("labels are those of other own classes", True, lambda u: u, ""),
    "flip, inflation": (
        "labels flipped, and says 10^9 images",
        True,
        lambda u: replace(u, num_examples=10**9),
        "",
    ),
}
"""By name: what it is, whether labels are flipped, what becomes of an update, and what claims to
undo it."""


@dataclass(frozen=True)
class Attacked(common.WrappedEngine):
    """An engine in which some clients send what ``attack`` makes of their updates."""

    attackers: frozenset[int]
    attack: Callable[[ClientUpdate], ClientUpdate]

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate | Failure]:
        """The updates, as they arrive."""
        for result in self.engine.train(state, cohort, plan):
            attacks = isinstance(result, ClientUpdate) and result.client in self.attackers
            yield self.attack(result) if attacks else result  # type: ignore[arg-type]


def train_wrapped(
    config: fedss.Config,
    folder: Path,
    data: Dataset,
    wrap: Callable[[Engine], Engine],
    **federation: Any,
) -> None:
    """Training on this machine, with what ``wrap`` makes of the engine."""

    @contextmanager
    def opened(
        embedder: Embedder, optimizer: ServerOptimizer, on_phase: OnPhase
    ) -> Iterator[Federation]:
        with local_federation(config, data, ALONE, {}, embedder, optimizer, on_phase) as local:
            yield replace(local, engine=wrap(local.engine), **federation)

    def ignore(record: Record) -> None:
        pass

    model, about = build_model(config, data, None), describe(config, data)
    plan = RunPlan(config, problem_of(data), model, about, opened)
    train_federation(plan, folder, "", on_round=ignore)


def flipped(data: Dataset, attackers: frozenset[int]) -> Dataset:
    """The data with each attacker's labels moved on to the next of its own classes."""
    images = data.train
    labels = images.labels.copy()
    for k in attackers:
        (which,) = np.nonzero(images.clients == k)
        own, place = np.unique(labels[which], return_inverse=True)
        labels[which] = np.roll(own, -1)[place]
    return replace(data, train=replace(images, labels=labels))


def attackers_of(data: Dataset, share: float, seed: int) -> frozenset[int]:
    clients = len(data.train.client_names)
    rng = np.random.default_rng([seed, 1])
    return frozenset(rng.permutation(clients)[: round(share * clients)].tolist())


def accuracy(
    config: fedss.Config, data: Dataset, attack: str | None, share: float
) -> tuple[float, float]:
    """MAP@10 at the end, and updates refused of a hundred; no accuracy where the run has ended."""
    attackers = attackers_of(data, share, config.seed) if attack else frozenset()
    change: Callable[[ClientUpdate], ClientUpdate] = lambda update: update  # noqa: E731
    if attack:
        _, flips, change, _ = ATTACKS[attack]
        data = flipped(data, attackers) if flips else data
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        try:
            train_wrapped(config, out, data, lambda engine: Attacked(engine, attackers, change))
        except FedssError:
            return float("nan"), float("nan")
        records = read_all_records(out / "records.jsonl", finished=True)
    refused = sum(len(record.get("failures", ())) for record in records)
    asked = refused + sum(int(record["clients"]) for record in records)
    metrics = records[-1]["metrics"]
    assert metrics is not None
    return metrics["map_at_10"], 100 * refused / asked


def table(report: common.Report, short: bool, seeds: Sequence[int]) -> bool:
    """The accuracy under each attack; whether what is claimed holds."""
    config, holds = CONFIG, True
    names = ["none", "default"] if short else [*DEFENCES]
    data = load_data(config)

    def mean(defence: str, attack: str | None, share: float) -> tuple[float, float]:
        told = [
            accuracy(replace(config, seed=seed, **DEFENCES[defence]), data, attack, share)
            for seed in seeds
        ]
        return statistics.fmean(m for m, _ in told), statistics.fmean(r for _, r in told)

    usual = {name: mean(name, None, 0.0)[0] for name in names}
    report.add(
        f"MAP@10 on {config.test_classes:.0%} of {config.glyphs_classes} generated classes, "
        f"{config.glyphs_clients} clients, {config.rounds} rounds of {config.clients_per_round}, "
        f"seeds {', '.join(map(str, seeds))}",
        "none: no bound, no cap; default: norm_bound 20, weight_cap 10; the others: these, and",
        "aggregate; (refused: % of updates, by default); -: the run ended with an error;",
        f"*: claimed, and at least {BAR:g} of undisturbed",
        "",
        f"{'attack':<16}{'share':>6}" + "".join(f"{n:>9}" for n in names) + "  refused",
        f"{'undisturbed':<16}{'':>6}" + "".join(f"{usual[n]:>9.3f}" for n in names),
    )
    for share in SHARES[:1] if short else SHARES:
        for attack, (what, _, _, claims) in ATTACKS.items():
            line, refused = f"{attack:<16}{share:>6.0%}", 0.0
            if short and attack in ("huge", "flip, inflation"):
                continue
            for name in names:
                found, part = mean(name, attack, share)
                refused = part if name == "default" else refused
                kept = found >= BAR * usual["none"]
                claimed = name == claims and share <= 0.1
                holds = holds and (kept or not claimed)
                mark = "*" if claimed and kept else "!" if claimed else " "
                line += f"{'-' if np.isnan(found) else f'{found:.3f}':>8}{mark}"
            report.add(f"{line}  {refused:4.1f} %  {what}")
    return holds


# Sites, in a federation in this process.

FLOOD = 400


def flooded(folder: Path, limits: Mapping[str, int]) -> str:
    """Three sites, and one that registers clients without end, and never trains."""
    write_photos(folder)
    known = nodes(folder)
    evil = max(known) + 1

    def silent(node: int, message: Message, reply: Message) -> list[Message]:
        return [] if node == evil and message.metadata.message_type != REGISTER else [reply]

    return end(ProcessGrid({**known, evil: flood(folder, FLOOD)}, silent), folder, **limits)


def absence(folder: Path, rounds: int) -> str:
    """One of three sites leaves in round 2, and is back in round 9."""
    write_photos(folder)
    known = nodes(folder)
    gone = dict([max(known.items())])
    here = {node: config for node, config in known.items() if node not in gone}
    grid = ProcessGrid(dict(known))

    def visit(trained: int) -> None:
        grid.nodes = dict(here) if 1 <= trained < 8 else dict(known)

    grid.visit = visit
    return end(grid, folder, absence=rounds, sites=3)


def end(grid: ProcessGrid, folder: Path, sites: int = 3, **deployment: Any) -> str:
    config = settings(folder, rounds=12, eval_every=0)
    patience = {"deadline": 2.0, "grace": 0, "attempts": 2, "pause": 0, "quorum": 0.25}
    try:
        federate(grid, config, folder / "run", sites=sites, **{**patience, **deployment})
    except FedssError as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    records = read_all_records(folder / "run" / "records.jsonl", finished=True)
    failed = [len(record.get("failures", ())) for record in records]
    return f"12 rounds; clients without an update, by round: {' '.join(map(str, failed))}"


def run(short: bool, seeds: Sequence[int] = (0,)) -> int:
    """All of it; 1 if something that is claimed does not hold."""
    report = common.Report("Clients and sites that misbehave", name="attackers")
    holds = table(report, short, seeds)
    report.add("", f"a site registers {FLOOD} clients that never answer (Flower, in one process)")
    for label, limits in (
        ("limits as by default", {}),
        ("site-clients 50", {"site_clients": 50}),
    ):
        with TemporaryDirectory() as place:
            report.add(f"  {label:<22}{flooded(Path(place), limits)}")
    report.add("a site of three is away in rounds 2 to 8")
    for label, rounds in (("absence 0 (never)", 0), ("absence 2", 2)):
        with TemporaryDirectory() as place:
            report.add(f"  {label:<22}{absence(Path(place), rounds)}")
    report.write(unless=short)
    return int(not holds)
