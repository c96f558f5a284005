"""The loop over rounds: cohort, engine, checks, aggregate, evaluate, checkpoint, records."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedss.config import Config, variant
from fedss.core.algorithm import (
    Engine,
    Failure,
    ServerState,
    check_finite_state,
    check_growth,
    draw_cohort,
    run_round,
    spread_rows_out,
    without_deltas,
)
from fedss.core.class_rows import create_class_rows, grow, newest_write, read, with_sums
from fedss.core.client import ClientUpdate, RoundPlan
from fedss.core.optimizers import ServerOptimizer
from fedss.data import Dataset, RetrievalTask, index_clients
from fedss.data.augment import AUGMENTATIONS, preview
from fedss.distributed import ALONE, Ranks, join
from fedss.engines.allocator import keep_freed_memory
from fedss.engines.local import LocalEngine, intra_op_threads, local_engine
from fedss.errors import ConfigError, DivergedError, QuorumError, RunFolderError
from fedss.evaluation.baselines import (
    Floors,
    backbone_floors,
    data_floors,
    floor,
)
from fedss.evaluation.evaluate import Evaluation, check_tellable, embed_task, findings, judge
from fedss.evaluation.intervals import ClassScores, interval
from fedss.files import write_file
from fedss.losses.methods import METHODS
from fedss.losses.softmax import Objective
from fedss.models import Embedder, fingerprint, flatten_, load_embedder, save_embedder
from fedss.report import write_report
from fedss.runs.checkpoint import load_checkpoint, newest_round, save_checkpoint
from fedss.runs.findings import read_scores, write_findings, write_scores
from fedss.runs.folder import (
    check_same_round,
    lock_folder,
    with_absolute_paths,
    write_comparison_config,
    write_run_config,
)
from fedss.runs.progress import show_progress
from fedss.runs.records import (
    FailedClient,
    Record,
    new_record,
    open_records,
    read_records,
    records_to_disk,
)
from fedss.runs.summaries import Summary, read_summaries, summarize, write_summaries
from fedss.runs.tensorboard import add_neighbours, add_projection, add_scalars, open_writer
from fedss.sampling.samplers import Sampler
from fedss.seeds import generator
from fedss.training.build import (
    build_model,
    check_objective,
    check_trainable,
    compute_device,
    evaluation_task,
    load_data,
    pool_pictures,
    round_plan,
    sample_size,
    server_optimizer,
    wire_format,
)
from fedss.training.summary import describe, describe_model

OnRound = Callable[[Record], None]
PlanOf = Callable[[int, int], RoundPlan]
"""``plan_of(num_classes, round)``: what the clients of a round (0-based) are told."""


@dataclass(frozen=True)
class Federation:
    """Who takes part in a run, where they train and how the model is judged.

    Attributes:
        engine: where clients train.
        num_classes: n, from a round (0-based) on; it may grow.
        num_clients: number of clients that a round's cohort is drawn from.
        cohort_size: clients per round.
        client_name: a client's name for people.
        evaluate: retrieval under a backbone, after so many rounds; None at all ranks but the first.
        floors: what the test gives for nothing, under the first backbone's weights; likewise.
        task: the test pictures that ``evaluate`` embeds, to be looked at; None: they are not here.
        preview: training pictures as clients see them, see :func:`fedss.data.augment.preview`; None
            where they see them as they are, or nobody here may.
        quorum: the part of a cohort without whose updates there is no step.
        attempts: how often a round is begun before the run ends for want of a quorum.
        pause: seconds between two of them.
    """

    engine: Engine
    num_classes: Callable[[int], int]
    num_clients: Callable[[int], int]
    cohort_size: int
    client_name: Callable[[int], str]
    evaluate: Callable[[torch.Tensor, int], Evaluation | None]
    floors: Callable[[torch.Tensor], Floors | None]
    task: RetrievalTask | None
    preview: bytes | None = None
    quorum: float = 1.0
    attempts: int = 1
    pause: float = 0.0


Lap = Callable[[str], None]
Known = dict[tuple[object, ...], Floors]
"""Floors that several runs share, by what they depend on."""
Federate = Callable[[Embedder, ServerOptimizer, Lap], AbstractContextManager[Federation]]
"""Opens a federation for a model and a server optimizer. It may tell ``lap`` of its phases."""


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
    summary: Summary
    already_done: bool


def train(
    config: Config,
    out: str | Path,
    *,
    data: Dataset | None = None,
    backbone: nn.Module | None = None,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Train one model, or go on with it where ``out`` holds a part of the same run.

    Started by torchrun, its processes train the model together (:mod:`fedss.distributed`): ``out``
    and the pictures must be there on every host, and any number of processes may go on.

    Args:
        config: what to do.
        out: the run folder; made if it is not there.
        data: pictures; None: those that ``config`` names.
        backbone: a module of your own, [B, C, H, W] float pixels to [B, features] vectors, in
            place of ``config.backbone``. Where its output is not of size ``embedding_size``, a
            linear layer is added.
        sampler: a way to draw negatives of your own, in place of ``config.sampler``.
        objective: a loss of your own, in place of the softmax of ``full``, ``fedss``, ``pos-only``
            and ``central``; see :data:`fedss.losses.softmax.Objective`. A run that goes on needs
            one of the same name.
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
    # Absolute: whoever is called in between may change the working directory.
    folder = Path(out).absolute()
    with join() as ranks:
        return _train(
            config, folder, label, data, backbone, sampler, objective, on_round, ranks, {}
        )


def _train(
    config: Config,
    folder: Path,
    label: str,
    data: Dataset | None,
    backbone: nn.Module | None,
    sampler: Sampler | None,
    objective: Objective | None,
    on_round: OnRound | None,
    ranks: Ranks,
    known: Known,
) -> Run:
    data, config = data or load_together(config), with_absolute_paths(config)
    check_trainable(data)
    sample_size(config, len(data.train.class_names))
    check_tellable(evaluation_task(config, data), data.name, config.test_classes)
    compute_device(config)
    if objective is not None:
        check_objective(config, objective)
    return train_federation(
        config,
        folder,
        build_model(config, data, backbone),
        describe(config, data),
        partial(local_federation, config, data, ranks, known),
        label=label,
        backbone=backbone,
        sampler=sampler,
        objective=objective,
        on_round=on_round,
        ranks=ranks,
    )


def train_federation(
    config: Config,
    folder: Path,
    embedder: Embedder,
    data: Mapping[str, Any],
    federate: Federate,
    *,
    label: str,
    backbone: nn.Module | None = None,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
    on_round: OnRound | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    """Train one model wherever its clients are, or go on with it.

    Args:
        config: what to do; settings of local training are told to the clients.
        folder: the run folder.
        embedder: the model, with its first weights.
        data: what to write down of the data; a run that goes on must have the same.
        federate: opens the federation.
        label: the run's name, where progress is shown.
        backbone: as in :func:`train`.
        sampler: as in :func:`train`.
        objective: as in :func:`train`.
        on_round: as in :func:`train`.
        ranks: the processes that train together here.

    Raises:
        As :func:`train`, and QuorumError: too few clients gave an update, time and again.
    """
    if config.keep_memory:
        keep_freed_memory()
    plan_of = partial(round_plan, config, sampler=sampler, objective=objective)
    with lock_folder(folder) if ranks.first else nullcontext():
        write_run_config(folder, config, data, describe_model(embedder, sampler, objective), ranks)
        already_done = ranks.gather(bool(read_summaries(folder)))[0]
        if not already_done:
            with _observer(label, config, on_round, ranks) as see:
                done = _train_rounds(config, embedder, federate, plan_of, folder, see, ranks)
        if ranks.first:
            if not already_done:
                about = {"method": config.method, "data": data["name"]}
                save_embedder(embedder, folder / "model", about)
                run = {name: getattr(config, name) for name in ("method", "seed", "rounds")}
                run |= {"sample_size": sample_size(config, done.num_classes), "folder": "."}
                ends = None if done.by_class is None else interval([done.by_class])
                summary = summarize(run, done.records, done.floors.map_at_10, ends)
                write_summaries(folder, [summary])
            # One that was written while it was under way says so.
            if not already_done or not (folder / "report.html").exists():
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
    label: str, config: Config, on_round: OnRound | None, ranks: Ranks
) -> AbstractContextManager[OnRound]:
    if not ranks.first:
        return nullcontext(lambda record: None)
    return nullcontext(on_round) if on_round else show_progress(label, config)


def compare(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    data: Dataset | None = None,
    backbone: nn.Module | None = None,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
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
        objective: as in :func:`train`.
        on_round: as in :func:`train`.

    Returns:
        The summaries, in the order of methods and seeds.

    Raises:
        ConfigError, DataError, RunFolderError, DivergedError: as :func:`train`.
    """
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values) or not values:
            raise ConfigError(f"{name}: expected one or more, each once, got {list(values)}")
    variant_of = {label: variant(config, label) for label in methods}
    folder, summaries = Path(out).absolute(), []
    with join() as ranks:
        data, config = data or load_together(config), with_absolute_paths(config)
        check_trainable(data)
        known: Known = {}
        runs = [
            (label, with_absolute_paths(replace(variant_of[label], seed=seed)))
            for label in methods
            for seed in seeds
        ]
        for _, run in runs:
            check_tellable(evaluation_task(run, data), data.name, run.test_classes)
            sample_size(run, len(data.train.class_names))
            compute_device(run)
            if objective is not None:
                check_objective(run, objective)
        with lock_folder(folder) if ranks.first else nullcontext():
            if ranks.first:
                write_comparison_config(folder, config, list(methods), list(seeds))
            for number, (label, run) in enumerate(runs, start=1):
                name = f"{re.sub('[^a-zA-Z0-9_.=-]+', '-', label)}-seed{run.seed}"
                title = f"run {number} of {len(runs)}: {label} seed {run.seed}"
                done = _train(
                    run,
                    folder / name,
                    title,
                    data,
                    backbone,
                    sampler,
                    objective,
                    on_round,
                    ranks,
                    known,
                )
                summaries.append({**done.summary, "label": label, "folder": name})
            if ranks.first:
                now = {summary["folder"] for summary in summaries}
                earlier = [s for s in read_summaries(folder) if s["folder"] not in now]
                write_summaries(folder, [*earlier, *summaries])
                write_report(folder)
    return summaries


@dataclass(frozen=True)
class _Trained:
    """What the rounds leave besides weights and files."""

    num_classes: int
    records: list[Record]
    floors: Floors
    by_class: ClassScores | None


def _train_rounds(
    config: Config,
    embedder: Embedder,
    federate: Federate,
    plan_of: PlanOf,
    folder: Path,
    on_round: OnRound,
    ranks: Ranks,
) -> _Trained:
    """Train from the last checkpoint to the end; leaves the weights in ``embedder``.

    Every rank has the same state throughout; only the first writes.
    """
    optimizer, clock = server_optimizer(config), _Clock()
    theta_P = flatten_(embedder).theta_P
    with federate(embedder, optimizer, clock.lap) as federation:
        state = _first_state(config, federation, plan_of, theta_P, folder)
        check_same_round(folder, ranks.gather(state.round))
        records = read_records(folder / "records.jsonl", state.round)
        floors = _floors(federation, theta_P, folder, ranks)
        for record in records:
            on_round(record)
        if ranks.first and federation.preview is not None:
            write_file(folder / "augmentation.npz", federation.preview)
        failed = any(record.get("failures") for record in records)
        found, done_before = None, state.round == config.rounds
        with (
            open_records(folder, records) if ranks.first else nullcontext() as add_record,
            open_writer(folder, state.round + 1) if ranks.first else nullcontext() as board,
        ):
            if board and not state.round and "untrained" in floors.map_at_10:
                board.add_scalar("test/map_at_10", floors.map_at_10["untrained"], 0)
            clock.restart()
            try:
                while state.round < config.rounds:
                    first_loss = records[0]["loss"] if records else None
                    state, record, found = _next_round(
                        config, federation, plan_of, state, clock, ranks, first_loss
                    )
                    due = _due(state.round, config.checkpoint_every, config.rounds)
                    failed = failed or bool(record.get("failures"))
                    if add_record:
                        add_record(record, due)
                    records.append(record)
                    if board:
                        add_scalars(board, record, failed)
                        if federation.task and found and found.embedded:
                            seen = federation.task, found.embedded, config.data_seed
                            add_neighbours(board, *seen, state.round)
                            clock.lap("evaluate")
                    on_round(record)
                    if due and ranks.first:
                        save_checkpoint(folder / "checkpoint", state)
                        clock.lap("checkpoint")
                    elif due:
                        state.class_rows.changed.clear()
            except BaseException:
                if ranks.first:
                    _keep_what_was_learnt(folder, state, len(records))
                raise
            if done_before and federation.task:
                # It was stopped before its pictures were written.
                found = federation.evaluate(state.backbone_P, state.round)
            last = None
            if board and federation.task and found and found.embedded:
                last = federation.task, found.embedded, config.data_seed
                add_projection(board, *last, state.round)
        theta_P.copy_(state.backbone_P)
    if last is not None:
        # Outside, where torch may use all cores again.
        write_findings(folder, findings(*last))
    by_class = found.by_class if found else None
    if by_class is not None:
        write_scores(folder / "by_class.json", floor("trained", by_class))
    return _Trained(state.class_rows.num_classes, records, floors, by_class)


def _floors(federation: Federation, theta_P: torch.Tensor, folder: Path, ranks: Ranks) -> Floors:
    """What a run's test gives for nothing: measured once, before its first round."""
    path, floors = folder / "floors.json", None
    if ranks.first and path.exists():
        # What cannot be read is measured again.
        with suppress(RunFolderError):
            floors = read_scores(path)
    floors = ranks.gather(floors)[0]
    if floors is None:
        floors = federation.floors(theta_P) or Floors()
        if ranks.first:
            write_scores(path, floors)
    return floors


def _keep_what_was_learnt(folder: Path, state: ServerState, recorded: int) -> None:
    """A checkpoint of a run that ends too early, of its last complete round.

    Whatever ended it (an error, Ctrl-C, too few clients), the state is that of the last record
    while no row of the next round is written. There is none where a step was bad or half done: its
    rows are in the table.
    """
    whole = newest_write(state.class_rows) <= state.round == recorded
    if whole and state.round > newest_round(folder / "checkpoint"):
        records_to_disk(folder)
        save_checkpoint(folder / "checkpoint", state)


def _next_round(
    config: Config,
    federation: Federation,
    plan_of: PlanOf,
    state: ServerState,
    clock: "_Clock",
    ranks: Ranks,
    first_loss: float | None,
) -> tuple[ServerState, Record, Evaluation | None]:
    """The state after one more round, the round's record, and its evaluation if it has one."""
    round, optimizer = state.round, server_optimizer(config)
    plan = plan_of(state.class_rows.num_classes, round)
    method = plan.method
    state, updates, failures, attempts = _attempt_round(
        config, federation, optimizer, state, plan, clock
    )
    if method.spread_out:
        spread_rows_out(
            optimizer,
            state,
            config.spread_out_weight,
            config.spread_out_margin,
            config.spread_out_neighbours,
        )
        check_finite_state(state, torch.arange(state.class_rows.num_classes))
    state = _with_classes(config, state, federation.num_classes(state.round), plan.sampler)
    clock.lap("aggregate")
    found = None
    if _due(state.round, config.eval_every, config.rounds):
        found = federation.evaluate(state.backbone_P, state.round)
        clock.lap("evaluate")
    updates = [u for part in ranks.gather([without_deltas(u) for u in updates]) for u in part]
    if first_loss is not None:
        check_growth([update.loss for update in updates], first_loss, plan)
    named = [
        FailedClient(client=federation.client_name(failure.client), reason=failure.reason)
        for failure in failures
    ]
    record = new_record(
        plan,
        updates,
        federation.num_clients(round),
        clock.restart(),
        found.metrics if found else None,
        named,
        attempts,
    )
    return state, record, found


def _attempt_round(
    config: Config,
    federation: Federation,
    optimizer: ServerOptimizer,
    state: ServerState,
    plan: RoundPlan,
    clock: "_Clock",
) -> tuple[ServerState, list[ClientUpdate], list[Failure], int]:
    """Algorithm 1, begun as often as the federation allows: state, updates, failures, attempts."""
    number, size = federation.num_clients(plan.round), federation.cohort_size
    cohort, failures = draw_cohort(number, size, config.seed, plan.round), list[Failure]()
    everyone, all_diverged = set(cohort.tolist()), True
    for attempt in count(1):
        try:
            state, updates, failed = run_round(
                federation.engine,
                optimizer,
                state,
                cohort,
                plan,
                config.row_mean or plan.method.row_mean,
                federation.quorum,
                clock.lap,
            )
            break
        except QuorumError as error:
            failures += error.failures
            diverged = {f.client for f in error.failures if f.reason == "not finite"}
            all_diverged = all_diverged and diverged == everyone
            if attempt >= federation.attempts:
                why = f"{error}, {attempt} times" if attempt > 1 else str(error)
                if all_diverged:
                    raise DivergedError(
                        f"{why}: as the weights are, no client comes to finite numbers. What was "
                        "learnt before is kept; start in another folder with a lower client_lr, "
                        "class_row_lr or server_lr"
                    ) from error
                raise QuorumError(
                    f"{why}. What was learnt before is kept; see to the clients and start the "
                    "same run again: it goes on from there",
                    failures,
                ) from error
            time.sleep(federation.pause)
            clock.lap("pause")
        except DivergedError as error:
            if error.client is None:
                raise
            name = federation.client_name(error.client)
            raise DivergedError(f"{error} (client {error.client} is {name!r})") from error
    return state, updates, failures + failed, attempt


def _first_state(
    config: Config,
    federation: Federation,
    plan_of: PlanOf,
    theta_P: torch.Tensor,
    folder: Path,
) -> ServerState:
    """The last checkpoint's state, or the first of all."""
    optimizer, checkpoints = server_optimizer(config), folder / "checkpoint"
    rows = create_class_rows(
        federation.num_classes(newest_round(checkpoints)),
        config.embedding_size,
        optimizer.of_rows.slots,
        config.seed,
        config.row_dtype,
        folder if config.row_store == "file" else None,
    )
    state = load_checkpoint(checkpoints, rows)
    if state is None:
        if METHODS[config.method].moments:
            rows = with_sums(rows)
        slots = {name: torch.zeros_like(theta_P) for name in optimizer.slots}
        state = ServerState(theta_P.clone(), slots, rows, round=0)
    plan = plan_of(rows.num_classes, state.round)
    return _with_index(config, state, plan.sampler)


def _with_classes(
    config: Config, state: ServerState, num_classes: int, sampler: Sampler
) -> ServerState:
    """The state with the classes that were registered in the last round."""
    if num_classes == state.class_rows.num_classes:
        return state
    rows = grow(state.class_rows, num_classes)
    return _with_index(config, replace(state, class_rows=rows), sampler)


def _with_index(config: Config, state: ServerState, sampler: Sampler) -> ServerState:
    """The state with what the sampler keeps of the class rows."""
    if sampler.index is None:
        return state
    rows, rng = state.class_rows, generator(config.seed, "sampler index")
    index = sampler.index.build(read(rows, torch.arange(rows.num_classes))[0], rng)
    return replace(state, sampler_index=index)


@contextmanager
def local_federation(
    config: Config,
    data: Dataset,
    ranks: Ranks,
    known: Known,
    embedder: Embedder,
    optimizer: ServerOptimizer,
    lap: Lap,
) -> Iterator[Federation]:
    """All clients on this machine, or on those that torchrun has started ranks on."""
    images, cohort_size = data.train, config.clients_per_round
    if METHODS[config.method].pooled:
        images, cohort_size = pool_pictures(images, cohort_size, config.seed), 1
    clients, num_classes = index_clients(images), len(images.class_names)
    task = evaluation_task(config, data)
    changes, shown = AUGMENTATIONS.get(config.augment), None
    if changes is not None:
        # First of all: this needs a package that may not be there.
        shown = preview(changes, images.pixels, config.seed)
    with local_engine(
        embedder,
        clients,
        optimizer,
        wire_format(config, embedder, num_classes),
        config.workers,
        ranks,
        device=compute_device(config),
        precision=config.precision,
        stack=config.stack,
    ) as engine:

        def evaluate(backbone_P: torch.Tensor, round: int) -> Evaluation | None:
            embedded = embed_task(partial(_embed_there, engine, backbone_P), task)
            if not ranks.first:
                return None
            # Between rounds the workers of all ranks are idle and their cores free.
            with intra_op_threads(engine.workers.count * ranks.local_size):
                return judge(task, embedded)

        def floors(backbone_P: torch.Tensor) -> Floors | None:
            # All ranks embed: whether they need not must be the same at each.
            untrained = "untrained", config.eval_split, config.precision, fingerprint(embedder)
            if untrained not in known:
                found = evaluate(backbone_P, 0)
                by_class = found and found.by_class
                known[untrained] = floor("untrained", by_class) if by_class else Floors()
            if not ranks.first:
                return None
            plain = "data", config.eval_split
            frozen = "frozen", *plain, config.backbone, config.weights, config.embedding_size
            with intra_op_threads(engine.workers.count * ranks.local_size):
                if plain not in known:
                    known[plain] = data_floors(task)
                if frozen not in known:
                    known[frozen] = backbone_floors(
                        embedder, task, data.train, compute_device(config)
                    )
            return known[plain] | known[untrained] | known[frozen]

        yield Federation(
            engine=engine,
            num_classes=lambda round: num_classes,
            num_clients=lambda round: clients.num_clients,
            cohort_size=cohort_size,
            client_name=images.client_names.__getitem__,
            evaluate=evaluate,
            floors=floors,
            task=task,
            preview=shown,
        )


def _embed_there(engine: LocalEngine, backbone_P: torch.Tensor, pixels: np.ndarray) -> torch.Tensor:
    """Embeddings on the device where clients train, so that retrieval is computed there too."""
    return engine.embed(backbone_P, pixels).to(engine.workers.device)


def _due(round: int, every: int, rounds: int) -> bool:
    return round == rounds or (every > 0 and round % every == 0)


class _Clock:
    """Seconds by phase. After a round's record comes its checkpoint: it counts to the next."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to this phase."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def restart(self) -> dict[str, float]:
        """Seconds by phase since the last restart."""
        seconds, self._seconds = self._seconds, {}
        self._last = time.perf_counter()
        return seconds
