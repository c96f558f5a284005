"""The server's side: a Flower ServerApp that runs the driver with the engine of a federation."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedss.config import Config
from fedss.core.optimizers import ServerOptimizer
from fedss.data import RetrievalTask
from fedss.engines.local import Workers, intra_op_threads, start_workers
from fedss.errors import FedssError
from fedss.evaluation.baselines import Floors, data_floors, floor
from fedss.evaluation.task import Evaluation, check_tellable, embed_task, judge
from fedss.flower.engine import FlowerEngine
from fedss.flower.messages import Nodes, log_line
from fedss.flower.registry import Registry, load_registry
from fedss.flower.settings import Deployment, explicit, read_settings
from fedss.flower.sites import Sites
from fedss.log import show_on_stderr
from fedss.models import Embedder, Whitening, frozen_fingerprint
from fedss.own_code import code_names, find_code
from fedss.runs.about import DataFacts
from fedss.runs.checkpoint import newest_round
from fedss.runs.eta import TimeLeft
from fedss.runs.progress import estimate, loss_text
from fedss.runs.records import Record
from fedss.settings import resolve, small_images
from fedss.training.build import (
    compute_device,
    evaluation_task,
    load_data,
    model_for,
    noise_of,
    resolved,
    wire_format,
)
from fedss.training.experiment import Run, RunPlan, train_federation
from fedss.training.federation import Federation, OnPhase
from fedss.training.floors import frozen_floors
from fedss.training.objective import check_own_code
from fedss.training.private import check_private, server_key

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """What Flower starts when a run is submitted."""
    show_on_stderr()  # The process is the app's own.
    try:
        run = run_server(grid, context.run_config)
    except FedssError as error:
        log_line(str(error))
        # Flower makes the text of an exception that it catches the reason of the run's failure; an
        # exit it would not notice for a minute. What it shows of where it came from helps nobody.
        sys.tracebacklimit = 0
        raise error from None
    done = "the run was done before" if run.already_done else "done"
    log_line(f"{done}; report {run.folder / 'report.html'}")


def run_server(grid: Nodes, run_config: Mapping[str, Any]) -> Run:
    """Train with the sites that ``grid`` reaches, or go on with what ``out`` holds.

    Raises:
        FedssError: as :func:`fedss.training.experiment.train_federation`.
    """
    config, deployment = read_settings(run_config)
    config = explicit(config)
    assert config.channels is not None
    told, side = resolve(config, None)[0], resolved(config.image_size)
    embedder = model_for(config, config.channels, side)
    if warning := small_images(config, side):
        log_line(warning)
    shape = [config.channels, side, side]
    data: DataFacts = {
        "name": "federation",
        "image_shape": shape,
        "evaluated_at": deployment.evaluate_at,
    }
    check_private(told, None)
    folder, left = Path(deployment.out), estimate(config)
    check_own_code(told, tuple(shape), None)
    federate = partial(_federation, grid, told, deployment)
    return train_federation(
        RunPlan(config, None, embedder, data, federate),
        folder,
        f"{config.method} seed {config.seed}",
        show_progress=lambda record: log_line(line(record, config.rounds, left(record))),
    )


def line(record: Record, rounds: int, left: TimeLeft | None) -> str:
    """A round's record for whoever watches the log."""
    parts = [
        f"round {record['round']}/{rounds}",
        loss_text(record),
        f"{record['clients']} clients",
        f"{sum(record['seconds'].values()):.1f} s",
    ]
    if record["metrics"]:
        where = " in each site's gallery" if "sites" in record["metrics"] else ""
        parts.append(f"MAP@10 {record['metrics']['map_at_10']:.3f}{where}")
    return "  ".join([*parts, str(left)] if left else parts)


@contextmanager
def _federation(
    grid: Nodes,
    config: Config,
    deployment: Deployment,
    embedder: Embedder,
    optimizer: ServerOptimizer,
    on_phase: OnPhase,
) -> Iterator[Federation]:
    folder = Path(deployment.out)
    path, newest = folder / "registry.json", newest_round(folder / "checkpoint")
    # When the run ends and what is believed is the server's business alone, secrets are the sites'.
    apart = ("patience", "norm_bound", "weight_cap", "aggregate", "secret_file")
    told = {name: v for name, v in dataclasses.asdict(config).items() if name not in apart}
    metadata = {
        "version": version("fedss"),
        "config": told,
        "frozen": frozen_fingerprint(embedder),
        "code": {name: find_code(name).sha256 for name in code_names(told).values()},
    }
    # Before the first checkpoint nothing depends on the registry.
    registry = load_registry(path) if newest else Registry()
    sites = Sites(grid, metadata, deployment, path, registry, began=newest)
    wire = wire_format(config, embedder, 1)
    engine = FlowerEngine(sites, config.rounds, config.clients_per_round, optimizer, wire, on_phase)
    if isinstance(embedder.whitening, Whitening):
        engine.features = len(embedder.whitening.mean_F)
    task, data = None, None
    if deployment.evaluate_at == "server":
        data = load_data(config)
        task = evaluation_task(config, data)
        check_tellable(task, data.name, config.test_classes, config.eval_split)
    sites.start(deployment.sites, newest)
    with _judges(config, embedder, task) as workers, server_key(config, folder) as key:
        engine.judges, engine.noise = workers, noise_of(config, key)

        def evaluate(backbone_P: torch.Tensor, round: int) -> Evaluation:
            if task is None or workers is None:
                return Evaluation(engine.evaluate(backbone_P, round)[0])
            embedded = embed_task(partial(workers.embed, backbone_P), task)
            with intra_op_threads(workers.count):
                return judge(task, embedded)

        def measure_floors(backbone_P: torch.Tensor) -> Floors:
            if task is None or workers is None or data is None:
                return Floors(engine.evaluate(backbone_P, 0)[1])
            untrained = evaluate(backbone_P, 0).by_class
            with intra_op_threads(workers.count):
                model = embedder.spec, workers, backbone_P
                floors = data_floors(task) | frozen_floors(config, data, task, *model)
            return floors if untrained is None else floors | floor("untrained", untrained)

        yield Federation(
            engine=engine,
            features=engine,
            num_classes=lambda round: sites.registry.at(round).classes,
            cohort_size=config.clients_per_round,
            client_name=lambda client: sites.registry.clients[client],
            evaluate=evaluate,
            floors=measure_floors,
            task=task,
            quorum=deployment.quorum,
            attempts=deployment.attempts,
            pause=deployment.pause,
            absent=sites.absent,
            noise=engine.noise,
        )


def _judges(
    config: Config, embedder: Embedder, task: RetrievalTask | None
) -> AbstractContextManager[Workers | None]:
    """They embed the server's own test images, if it has any."""
    if task is None:
        return nullcontext()
    return start_workers(
        embedder,
        task.query.pixels,
        config.workers or torch.get_num_threads(),
        device=compute_device(config),
        frozen_once=config.cache_activations,
    )
