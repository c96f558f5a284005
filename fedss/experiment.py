"""The loop over rounds: cohort, engine, checks, aggregate, evaluate, checkpoint, records."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedss.algorithm import (
    ServerState,
    check_finite_state,
    draw_cohort,
    run_round,
    spread_rows_out,
    without_deltas,
)
from fedss.allocator import keep_freed_memory
from fedss.build import (
    build_model,
    class_counts,
    compute_device,
    evaluation_task,
    load_data,
    pool_pictures,
    round_plan,
    server_optimizer,
    wire_format,
)
from fedss.checkpoint import load_checkpoint, save_checkpoint
from fedss.class_rows import ClassRows, create_class_rows, read
from fedss.config import Config, variant
from fedss.data import Dataset, index_clients
from fedss.describe import describe, describe_model
from fedss.engines.local import LocalEngine, intra_op_threads, local_engine
from fedss.errors import ConfigError, DivergedError, RunFolderError
from fedss.evaluation import embed_task, panels, score
from fedss.files import write_file, write_json
from fedss.methods import METHODS
from fedss.models import Embedder, flatten_, load_embedder, save_embedder
from fedss.optimizers import with_history
from fedss.progress import show_progress
from fedss.ranks import Ranks, join
from fedss.records import Record, open_records, read_records, round_traffic, summarise
from fedss.report import write_report
from fedss.run_folder import (
    check_same_round,
    claim_comparison,
    claim_run,
    hold,
    read_summaries,
)
from fedss.samplers import Sampler
from fedss.seeds import generator

OnRound = Callable[[Record], None]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: the run folder: configuration, records, checkpoint, model, report data.
        embedder: the trained network: pixels to unit-norm embeddings.
        summary: what ``summary.json`` says of the run: retrieval, bytes, seconds.
        already_done: the folder held the finished run; nothing was trained.
    """

    folder: Path
    embedder: Embedder
    summary: dict[str, Any]
    already_done: bool


def train(
    config: Config,
    out: str | Path,
    *,
    data: Dataset | None = None,
    backbone: nn.Module | None = None,
    sampler: Sampler | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Train one model, or go on with it where ``out`` holds a part of the same run.

    Started by torchrun, its processes train the model together (:mod:`fedss.ranks`): ``out`` and
    the pictures must be there on every host, and any number of processes may go on.

    Args:
        config: what to do.
        out: the run folder; made if it is not there.
        data: pictures; None: those that ``config`` names.
        backbone: a module of your own, [B, C, H, W] float pixels to [B, features] vectors, in
            place of ``config.backbone``. Where its output is not of size ``embedding_size``, a
            linear layer is added.
        sampler: a way to draw negatives of your own, in place of ``config.sampler``.
        on_round: called with each round's record, those of an interrupted run first, at the first
            rank alone; None: progress is shown on stderr.

    Raises:
        ConfigError: settings that cannot be, or do not fit the data.
        DataError: pictures that cannot be read or do not fit together.
        RunFolderError: ``out`` belongs to another configuration, is damaged or cannot be written.
        DivergedError: a loss or update became NaN or infinite; the last checkpoint is kept.
        FedssError: another process of the run failed or is gone; the last checkpoint is kept.
    """
    label = f"{config.method} seed {config.seed}"
    with join() as ranks:
        return _train(config, Path(out), label, data, backbone, sampler, on_round, ranks)


def _train(
    config: Config,
    folder: Path,
    label: str,
    data: Dataset | None,
    backbone: nn.Module | None,
    sampler: Sampler | None,
    on_round: OnRound | None,
    ranks: Ranks,
) -> Run:
    if config.keep_memory:
        keep_freed_memory()
    data = data or load_together(config)
    _, sample_size = class_counts(config, data)
    compute_device(config)
    embedder = build_model(config, data, backbone)
    with hold(folder) if ranks.first else nullcontext():
        facts = describe_model(embedder, sampler)
        claim_run(folder, config, describe(config, data), facts, ranks)
        already_done = ranks.gather(bool(read_summaries(folder)))[0]
        if not already_done:
            with _observer(label, config.rounds, on_round, ranks) as see:
                records = _train_rounds(config, data, embedder, sampler, folder, see, ranks)
        if ranks.first:
            if not already_done:
                about = {"method": config.method, "data": data.name}
                save_embedder(embedder, folder / "model", about)
                run = {name: getattr(config, name) for name in ("method", "seed", "rounds")}
                summary = summarise({**run, "sample_size": sample_size, "folder": "."}, records)
                write_json(folder / "summary.json", [summary])
            if not (folder / "report.html").exists():
                write_report(folder)
        (summary,) = ranks.gather(read_summaries(folder))[0]
        return Run(folder, load_embedder(folder / "model", backbone), summary, already_done)


def load_together(config: Config) -> Dataset:
    """The data set that ``config`` names, at every rank.

    On each host one rank goes first and makes the cache of decoded pictures, which others read.

    Raises:
        ConfigError: there is no such device, which is better known before pictures are decoded.
        DataError: they cannot be found or read, or do not fit together.
    """
    compute_device(config)
    with join() as ranks:
        for turn in (ranks.local_rank == 0, ranks.local_rank > 0):
            if turn:
                data = load_data(config)
            ranks.gather(None)
    return data


def _observer(
    label: str, rounds: int, on_round: OnRound | None, ranks: Ranks
) -> AbstractContextManager[OnRound]:
    if not ranks.first:
        return nullcontext(lambda record: None)
    return nullcontext(on_round) if on_round else show_progress(label, rounds)


def compare(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    data: Dataset | None = None,
    backbone: nn.Module | None = None,
    sampler: Sampler | None = None,
    on_round: OnRound | None = None,
) -> list[dict[str, Any]]:
    """Train each method with each seed under the same settings, and report on all.

    Each run has a folder ``<method>-seed<seed>`` in ``out``; finished ones are not run again, and
    those of an earlier comparison with the same settings stay in the summary and the report.
    Cohorts depend on the seed alone, so the methods of one seed see the same clients.

    Args:
        config: settings of all runs; its ``method`` and ``seed`` are not used.
        methods: names in ``METHODS``, or variants of them with settings of their own, such as
            ``"fedss:sampler=uniform,rows_up=int8"``.
        seeds: seeds of each method.
        out: the folder; gets ``summary.json`` and ``report.html``.
        data: pictures; None: those that ``config`` names.
        backbone: as in :func:`train`.
        sampler: as in :func:`train`.
        on_round: as in :func:`train`.

    Returns:
        The summaries, in the order of methods and seeds.

    Raises:
        ConfigError, DataError, RunFolderError, DivergedError: as :func:`train`.
    """
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values) or not values:
            raise ConfigError(f"{name}: expected one or more, each once, got {list(values)}")
    runs = [
        (label, replace(variant(config, label), seed=seed)) for label in methods for seed in seeds
    ]
    folder, summaries = Path(out), []
    with join() as ranks:
        data = data or load_together(config)
        for _, run in runs:
            class_counts(run, data)
            compute_device(run)
        with hold(folder) if ranks.first else nullcontext():
            if ranks.first:
                claim_comparison(folder, config, list(methods), list(seeds))
            for label, run in runs:
                name = f"{re.sub('[^a-zA-Z0-9_.=-]+', '-', label)}-seed{run.seed}"
                title = f"{label} seed {run.seed}"
                done = _train(run, folder / name, title, data, backbone, sampler, on_round, ranks)
                summaries.append({**done.summary, "label": label, "folder": name})
            if ranks.first:
                now = {summary["folder"] for summary in summaries}
                earlier = [s for s in read_summaries(folder) if s["folder"] not in now]
                write_json(folder / "summary.json", earlier + summaries)
                write_report(folder)
    return summaries


def load(folder: str | Path, backbone: nn.Module | None = None) -> Embedder:
    """The trained model of a run folder (or of its ``model`` folder).

    Args:
        folder: a run folder.
        backbone: if the run was trained with a module of your own: one of the same structure.

    Raises:
        RunFolderError: there is no finished run.
        ConfigError: a damaged model, or a backbone missing.
    """
    for place in (Path(folder), Path(folder) / "model"):
        if (place / "model.safetensors").exists():
            return load_embedder(place, backbone)
    done = (Path(folder) / "summary.json").exists()
    raise RunFolderError(
        f"{folder}: expected a finished run with model/model.safetensors, found none; "
        + ("delete its summary.json and " if done else "")
        + "start its fedss train command again: it goes on from the last checkpoint"
    )


def _train_rounds(
    config: Config,
    data: Dataset,
    embedder: Embedder,
    sampler: Sampler | None,
    folder: Path,
    on_round: OnRound,
    ranks: Ranks,
) -> list[Record]:
    """Train from the last checkpoint to the end; leaves the weights in ``embedder``.

    Every rank has the same state throughout; only the first writes.
    """
    method, images, cohort_size = METHODS[config.method], data.train, config.clients_per_round
    optimizer = server_optimizer(config)
    if method.pooled:
        images, cohort_size = pool_pictures(images, cohort_size, config.seed), 1
    clients = index_clients(images)
    num_classes, sample_size = class_counts(config, data)
    task = evaluation_task(config, data)
    theta_P = flatten_(embedder).theta_P
    rows = create_class_rows(
        num_classes,
        config.embedding_size,
        optimizer.slots,
        config.seed,
        config.row_dtype,
        folder if config.row_store == "file" else None,
    )
    state = load_checkpoint(folder / "checkpoint", rows) or _start(config, theta_P, rows)
    plan = round_plan(config, num_classes, sample_size, state.round, sampler)
    if plan.sampler.index is not None:
        rng = generator(config.seed, "sampler index")
        index = plan.sampler.index.build(read(rows, torch.arange(num_classes))[0], rng)
        state = replace(state, sampler_index=index)
    check_same_round(folder, ranks.gather(state.round))
    wire = wire_format(config, embedder, num_classes)
    records = read_records(folder / "records.jsonl", state.round)
    for record in records:
        on_round(record)
    with (
        local_engine(
            embedder,
            clients,
            optimizer,
            wire,
            config.workers,
            ranks,
            device=compute_device(config),
            precision=config.precision,
            stack=config.stack,
        ) as engine,
        open_records(folder, records) if ranks.first else nullcontext() as add_record,
    ):
        while state.round < config.rounds:
            clock = _Clock()
            plan = round_plan(config, num_classes, sample_size, state.round, sampler)
            cohort = draw_cohort(clients.num_clients, cohort_size, config.seed, state.round)
            try:
                state, updates = run_round(engine, optimizer, state, cohort, plan, config.row_mean)
            except DivergedError as error:
                if error.client is None:
                    raise
                name = images.client_names[error.client]
                raise DivergedError(f"{error} (client {error.client} is {name!r})") from error
            if method.spread_out:
                spread_rows_out(
                    optimizer,
                    state,
                    config.spread_out_weight,
                    config.spread_out_margin,
                    config.spread_out_neighbours,
                )
                check_finite_state(state, torch.arange(num_classes))
            clock.lap("train")
            metrics = None
            if _due(state.round, config.eval_every, config.rounds):
                embedded = embed_task(partial(_embed_there, engine, state.backbone_P), task)
                if ranks.first:
                    # Between rounds the workers of all ranks are idle and their cores free.
                    with intra_op_threads(engine.workers * ranks.local_size):
                        metrics = dataclasses.asdict(score(task, *embedded))
                clock.lap("evaluate")
            updates = [
                u for part in ranks.gather([without_deltas(u) for u in updates]) for u in part
            ]
            moved = round_traffic(updates)
            record = {
                "round": state.round,
                "loss": sum(update.loss for update in updates) / len(updates),
                "clients": len(updates),
                "examples": sum(update.num_examples for update in updates),
                **(dict.fromkeys(moved) if method.pooled else moved),
                "seconds": clock.seconds,
                "metrics": metrics,
            }
            due = _due(state.round, config.checkpoint_every, config.rounds)
            records.append(record)
            if add_record:
                add_record(record, due)
            on_round(record)
            if due and ranks.first:
                save_checkpoint(folder / "checkpoint", state)
            elif due:
                state.class_rows.changed.clear()
        theta_P.copy_(state.backbone_P)
        shown = panels(partial(engine.embed, state.backbone_P), task, config.data_seed)
        if ranks.first:
            write_file(folder / "retrieval.npz", shown)
    return records


def _start(config: Config, theta_P: torch.Tensor, rows: ClassRows) -> ServerState:
    optimizer = server_optimizer(config)
    if METHODS[config.method].moments:
        rows = with_history(rows)
    slots = {name: torch.zeros_like(theta_P) for name in optimizer.slots}
    return ServerState(theta_P.clone(), slots, rows, round=0)


def _embed_there(engine: LocalEngine, backbone_P: torch.Tensor, pixels: np.ndarray) -> torch.Tensor:
    """Embeddings on the device where clients train, so that retrieval is computed there too."""
    return engine.embed(backbone_P, pixels).to(engine.device)


def _due(round: int, every: int, rounds: int) -> bool:
    return round == rounds or (every > 0 and round % every == 0)


class _Clock:
    """Seconds by phase since the last lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now
