"""The engine on a GPU: against a plain loop, against one big batch, and a run of the paper's size.

    python benchmarks/gpu.py                        (--parts: some; --append: to the results)
    python benchmarks/gpu.py --device cpu --short   (a tiny version of every part; writes nothing)

``throughput``: images per second of ``LocalEngine`` for several ``--stack`` and ``--precision``,
of a plain loop over clients written by hand, and of central SGD of the same network on one big
batch that lies in the GPU's memory, which is the ceiling. They take turns, a round each.

``paper-96`` and ``paper-224``: seconds a round where 64 of 1,262 clients train MobileNetV3-Large on
164,172 images of 2,028 classes, at 96 and 224 pixels a side, as in Waghmare et al. 2022. Images are
random and read from memory, so neither disk nor decoding is in it; nor are evaluation and
checkpoints. Each setting does two rounds first, and the quickest goes on.

Writes ``benchmarks/results/gpu.txt``. Needs ``pip install "fedss[timm]"``.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.config import Config
from fedss.core.algorithm import Server, run_round
from fedss.core.client import LocalTraining, RoundPlan
from fedss.core.state import ServerState
from fedss.data import ClientIndex
from fedss.engines.local import LocalEngine
from fedss.errors import FedssError
from fedss.models import Embedder, build_embedder
from fedss.training.build import compute_device

SAMPLE, BATCH, LR, ROW_LR, SCALE = 256, 32, 0.01, 0.1, 10.0
SETTINGS = [(stack, name) for name in ("float32", "bfloat16") for stack in (1, 8, 32)]
ROUNDS_IN_ALL = 5000


@dataclass(frozen=True)
class Job:
    """Made-up clients and the network that they train."""

    backbone: str
    channels: int
    side: int
    num_clients: int
    images: int
    classes: int
    cohort: int
    rounds: int
    ragged: bool


MOBILENET = "timm:mobilenetv3_large_100"
THROUGHPUT = [
    Job("conv4", 1, 28, 64, 64 * 64, 2028, 64, 5, False),
    Job(MOBILENET, 3, 96, 64, 64 * 64, 2028, 64, 5, False),
    Job(MOBILENET, 3, 224, 64, 64 * 64, 2028, 64, 5, False),
]
PAPER = {
    f"paper-{side}": Job(MOBILENET, 3, side, 1262, 164_172, 2028, 64, 50, True)
    for side in (96, 224)
}
SHORT = Job("conv4-8", 1, 16, 12, 12 * 40, 300, 6, 2, True)


class Repeated:
    """As many images as one likes, of which only some thousands differ: they fit into memory."""

    def __init__(self, count: int, channels: int, side: int) -> None:
        self.pool = common.random_pixels(min(count, 4096), side, channels)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.pool[index if isinstance(index, slice) else index % len(self.pool)]


def clients_of(job: Job) -> ClientIndex:
    """Clients of equal size; ragged ones of at least 30 images, log-normal beyond.

    A client has a class for every five of its images, 200 at most.
    """
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 1, job.num_clients) if job.ragged else np.ones(job.num_clients)
    least = 30 if job.ragged else 0
    bounds = np.cumsum(weight) / weight.sum() * (job.images - least * job.num_clients)
    bounds = np.round(bounds).astype(int) + least * np.arange(1, job.num_clients + 1)
    starts = np.concatenate([[0], bounds])
    labels = np.concatenate(
        [
            rng.choice(rng.choice(job.classes, min(1 + size // 5, 200), replace=False), size)
            for size in np.diff(starts)
        ]
    )
    return common.clients_of(Repeated(job.images, job.channels, job.side), labels, starts)


def plan_of(job: Job, round: int) -> RoundPlan:
    return common.plan_of(job.classes, SAMPLE, LocalTraining(1, None, BATCH, LR, ROW_LR), round)


def embedder_of(job: Job) -> Embedder:
    return build_embedder(
        job.backbone, channels=job.channels, image_size=job.side, embedding_size=common.DIM, seed=0
    )


def engine_of(
    job: Job, clients: ClientIndex, device: torch.device, stack: int, precision: str
) -> AbstractContextManager[LocalEngine]:
    more = {"device": device, "precision": precision, "stack": stack}
    return common.engine_of(embedder_of(job), clients, job.classes, None, **more)


def on(device: torch.device, precision: Any, job: Job) -> Embedder:
    embedder = embedder_of(job).train().to(device)
    embedder.precision = precision
    return embedder


def loss_of(embedder: Embedder, pixels: Tensor, rows_SD: Tensor, target_B: Tensor) -> Tensor:
    return F.cross_entropy(SCALE * embedder(pixels) @ F.normalize(rows_SD, dim=1).T, target_B)


def plain_loop(
    job: Job, clients: ClientIndex, device: torch.device, precision: Any
) -> Callable[[], int]:
    """A round as one would write it: a module, torch.optim.SGD, a loop over clients and batches."""
    embedder, rng = on(device, precision, job), np.random.default_rng(0)
    start = [p.detach().clone() for p in embedder.parameters()]
    rows_ND = torch.nn.functional.normalize(torch.randn(job.classes, common.DIM), dim=1)

    def round() -> int:
        used = 0
        for client in range(job.cohort):
            with torch.no_grad():
                for p, first in zip(embedder.parameters(), start, strict=True):
                    p.copy_(first)
            rows_SD = rows_ND[: min(SAMPLE, job.classes)].to(device).requires_grad_()
            parameters: list[Tensor] = [*embedder.parameters(), rows_SD]
            sgd = torch.optim.SGD(parameters, lr=LR)
            order = rng.permutation(clients.examples(client))
            target_N = torch.arange(len(order)) % len(rows_SD)
            for b in range(0, len(order), BATCH):
                pixels = torch.from_numpy(clients.images.pixels[order[b : b + BATCH]]).to(device)
                loss = loss_of(embedder, pixels, rows_SD, target_N[b : b + BATCH].to(device))
                sgd.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                sgd.step()
            for p, first in zip(embedder.parameters(), start, strict=True):
                (p.detach() - first).cpu()
            used += len(order)
        return used

    return round


def one_batch(
    job: Job, clients: ClientIndex, device: torch.device, precision: Any, batch: int
) -> Callable[[], int]:
    """Central SGD: two steps on one big batch that lies on the device."""
    embedder = on(device, precision, job)
    pixels = torch.from_numpy(clients.images.pixels[np.arange(batch)]).to(device)
    rows_SD = torch.randn(min(SAMPLE, job.classes), common.DIM, device=device, requires_grad=True)
    target_B = torch.arange(batch, device=device) % len(rows_SD)
    parameters: list[Tensor] = [*embedder.parameters(), rows_SD]
    sgd = torch.optim.SGD(parameters, lr=LR)

    def round() -> int:
        for _ in range(2):
            loss = loss_of(embedder, pixels, rows_SD, target_B)
            sgd.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
        return 2 * batch

    return round


def fits(round: Callable[[], int], device: torch.device) -> bool:
    """Whether a round runs; not if the device has too little memory for it."""
    try:
        round()
        return True
    except torch.OutOfMemoryError:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return False


def seconds(work: Callable[[], int], device: torch.device) -> tuple[float, int]:
    def waited_for() -> int:
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    result, spent = common.timed(waited_for)
    return spent.wall, result


def throughput(job: Job, device: torch.device, settings: list[tuple[int, str]]) -> list[str]:
    """Images per second of everyone on one job, interleaved."""
    clients, cohort = clients_of(job), np.arange(job.cohort)
    state, plan = common.first_state(embedder_of(job), job.classes), plan_of(job, 0)
    rounds: dict[str, Callable[[], int]] = {}
    with ExitStack() as engines:
        for stack, precision in settings:
            engine = engines.enter_context(engine_of(job, clients, device, stack, precision))
            rounds[f"engine, stack {stack:>2}, {precision}"] = lambda engine=engine: sum(  # type: ignore[misc]
                update.num_examples for update in engine.train(state, cohort, plan)
            )
        for precision in dict.fromkeys(precision for _, precision in settings):
            rounds[f"plain loop, {precision}"] = plain_loop(job, clients, device, precision)
            for batch in (b for b in (4096, 2048, 1024, 512, 256) if b <= job.images):
                central = one_batch(job, clients, device, precision, batch)
                if fits(central, device):
                    rounds[f"one batch of {batch}, {precision}"] = central
                    break
        runs = {name: round for name, round in rounds.items() if fits(round, device)}
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(job.rounds):
            for name, round in runs.items():
                took, count = seconds(round, device)
                speeds[name].append(count / took)
    lines = [
        "",
        f"{job.backbone}, {job.side} px, {job.cohort} clients a round, batches of {BATCH}, "
        f"|S| = {min(SAMPLE, job.classes)}: images/s, median of {job.rounds}",
    ]
    best = max(statistics.median(values) for values in speeds.values())
    for name in rounds:
        if name in speeds:
            speed = statistics.median(speeds[name])
            lines.append(f"  {name:<30} {speed:>10,.0f}  {speed / best:>5.2f} of the fastest")
        else:
            lines.append(f"  {name:<30} out of memory")
    return lines


@dataclass(frozen=True)
class Watched(common.WrappedEngine):
    """An engine, and how long its clients' training took in each round."""

    laps: list[float] = field(default_factory=list)

    def train(self, state: ServerState, cohort: np.ndarray, plan: RoundPlan) -> Iterator[Any]:
        """The engine's updates, all of them waited for."""
        updates, spent = common.timed(lambda: list(self.engine.train(state, cohort, plan)))
        self.laps.append(spent.wall)
        return iter(updates)


def paper(job: Job, device: torch.device, settings: list[tuple[int, str]]) -> list[str]:
    """Seconds a round of a whole federation: cohorts, clients, messages, server."""
    clients = clients_of(job)

    def rounds_of(stack: int, precision: str, count: int) -> tuple[list[float], list[float]]:
        state, laps = common.first_state(embedder_of(job), job.classes), []
        with engine_of(job, clients, device, stack, precision) as engine:
            server, watched = Server(common.OPTIMIZER, job.cohort), Watched(engine)
            for round in range(count):
                work = partial(run_round, server, watched, state, plan_of(job, round))
                (state, _, _), spent = common.timed(work)
                laps.append(spent.wall)
        return laps, watched.laps

    lines = [
        "",
        f"{job.backbone}, {job.side} px: {job.num_clients:,} clients, {job.images:,} images, "
        f"{job.classes:,} classes, {job.cohort} clients a round, batches of {BATCH}",
    ]
    tried: dict[tuple[int, str], float] = {}
    for stack, precision in settings:
        name = f"  stack {stack:>2}, {precision:<9}"
        try:
            tried[stack, precision] = rounds_of(stack, precision, 2)[0][-1]
            lines.append(f"{name} {tried[stack, precision]:>8.2f} s for its second round")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            lines.append(f"{name} out of memory")
    if not tried:
        return lines
    stack, precision = min(tried, key=tried.__getitem__)
    laps, training = rounds_of(stack, precision, job.rounds)
    mean = statistics.mean(laps)
    return [
        *lines,
        f"  {job.rounds} rounds with stack {stack}, {precision}: {mean:.2f} s a round on average "
        f"(clients {statistics.mean(training):.2f} s), median {statistics.median(laps):.2f} s",
        f"  EXTRAPOLATED, not run: {ROUNDS_IN_ALL:,} such rounds would take "
        f"{mean * ROUNDS_IN_ALL / 3600:.1f} hours",
    ]


def main() -> int:
    parser = common.parser(__doc__, short="tiny jobs, to see that all works; write no file")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parts = ("throughput", *PAPER)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all")
    parser.add_argument("--append", action="store_true", help="keep what is in the results file")
    options = parser.parse_args()
    try:
        device = compute_device(Config(device=options.device))
    except FedssError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    on_gpu = device.type == "cuda"
    if not (on_gpu or options.short):
        print("gpu.py: on a CPU there is only --short, which measures nothing", file=sys.stderr)
        return 2
    settings = SETTINGS[::2] if options.short else SETTINGS
    jobs: Mapping[str, Job] = dict.fromkeys(PAPER, SHORT) if options.short else PAPER
    gpu = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if on_gpu else "no GPU"
    report = common.Report("The engine on a GPU", hardware=gpu)
    report.add(
        f"d = {common.DIM}, one local epoch, FedAvgM; random images in memory, no evaluation.",
        "float32: convolutions may round to TF32, which is torch's default.",
    )
    for part in options.parts:
        if part == "throughput":
            for job in [SHORT] if options.short else THROUGHPUT:
                report.add(*throughput(job, device, settings))
        else:
            report.add(*paper(jobs[part], device, settings))
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device) / 1e9
            report.add(f"  most GPU memory in this part: {peak:.1f} GB")
            torch.cuda.reset_peak_memory_stats(device)
    report.write(unless=options.short, append=options.append)
    return 0


if __name__ == "__main__":
    sys.exit(main())
