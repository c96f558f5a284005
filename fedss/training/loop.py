"""The loop over rounds: Algorithm 1, evaluation, records, checkpoints."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedss.config import Config
from fedss.core.algorithm import Server, run_round, without_deltas
from fedss.core.checks import check_growth
from fedss.core.class_rows import create_class_rows, grow, newest_write, write_
from fedss.core.client import ClientUpdate, RoundPlan
from fedss.core.engine import Failure
from fedss.core.optimizers import ServerOptimizer
from fedss.core.state import ServerState
from fedss.distributed import Ranks
from fedss.errors import DivergedError, QuorumError, RunFolderError
from fedss.evaluation.baselines import Floors, floor
from fedss.evaluation.intervals import interval
from fedss.evaluation.task import Evaluation, findings
from fedss.files import write_file
from fedss.models import Embedder, flatten_, save_embedder
from fedss.runs.checkpoint import load_checkpoint, newest_round, save_checkpoint
from fedss.runs.findings import VERIFICATION, read_scores, write_findings, write_scores
from fedss.runs.folder import check_same_round
from fedss.runs.records import (
    FailedClient,
    Record,
    best_evaluated,
    new_record,
    open_records,
    out_of_patience,
    private_record,
    read_records,
    records_to_disk,
)
from fedss.runs.summaries import Summary, summarize
from fedss.runs.tensorboard import (
    add_metrics,
    add_neighbours,
    add_projection,
    add_scalars,
    open_writer,
)
from fedss.text import printable
from fedss.training.build import (
    defence,
    num_parameters,
    resolved,
    sample_size,
    server_optimizer,
    wire_format,
)
from fedss.training.federation import Federate, Federation
from fedss.training.phases import PhaseTimer
from fedss.training.private import check_private, spent, used_up
from fedss.training.start import Start
from fedss.training.summary import message_bytes
from fedss.training.warm import restore_whitening_, warm_up_

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOG = logging.getLogger("fedss.training")


class Stop(Enum):
    """What ``on_round`` returns to end a run at its round."""

    STOP = "stop"


STOP = Stop.STOP
OnRound = Callable[[Record], object]
"""Called with a round's record; if it returns ``STOP``, the run is done, with this round its last.

A value of its own, since callbacks return this and that without a thought.
"""
PlanOf = Callable[[int, int], RoundPlan]
"""``plan_of(num_classes, round)``: the plan of a round (0-based)."""


@dataclass(frozen=True)
class _Job:
    """What is the same in all rounds."""

    config: Config
    federation: Federation
    server: Server
    plan_of: PlanOf
    folder: Path
    timer: PhaseTimer
    ranks: Ranks
    on_round: OnRound
    start: Start | None
    keep_best: Callable[[torch.Tensor, Sequence[Record]], None]
    embedder: Embedder
    warm: dict[str, int] | None = None


def train_rounds(
    config: Config,
    embedder: Embedder,
    federate: Federate,
    plan_of: PlanOf,
    folder: Path,
    on_round: OnRound,
    ranks: Ranks,
    start: Start | None = None,
) -> Summary:
    """Train from the last checkpoint to the end, or until ``on_round`` says stop.

    Leaves the weights in ``embedder``, which has the first ones; ``start`` has class rows for it.

    Returns the run's summary. Every rank has the same state throughout; only the first writes.
    """
    optimizer, timer = server_optimizer(config), PhaseTimer()
    theta_P = flatten_(embedder).theta_P

    def keep_best(backbone_P: torch.Tensor, records: Sequence[Record]) -> None:
        """Write the model down if the last of these rounds is the best so far."""
        best = best_evaluated(records)
        if config.patience is not None and ranks.first and best and best is records[-1]:
            theta_P.copy_(backbone_P)
            about = {"method": config.method, "round": best["round"], "metrics": best["metrics"]}
            # What was measured of the one before would be taken for this one's.
            (folder / "best" / VERIFICATION).unlink(missing_ok=True)
            save_embedder(embedder, folder / "best", about)

    with federate(embedder, optimizer, timer.end_phase) as federation:
        job = _Job(
            config,
            federation,
            _server(config, federation, optimizer, timer),
            plan_of,
            folder,
            timer,
            ranks,
            on_round,
            start,
            keep_best,
            embedder,
        )
        state, warm = _first_state(job, theta_P)
        job = replace(job, warm=warm)
        check_same_round(folder, ranks.gather(state.round))
        records = read_records(folder / "records.jsonl", state.round)
        floors = _floors(federation, theta_P, folder, ranks)
        said = [on_round(record) for record in records]
        # What it said of earlier ones came to nothing: rounds behind them are trained.
        stops = said[-1:] == [STOP] or _is_over(job, records)
        stops = ranks.gather(stops)[0]
        keep_best(state.backbone_P, records)
        check_private(config, federation.engine.num_clients(state.round))
        if ranks.first and federation.preview is not None:
            write_file(folder / "augmentation.npz", federation.preview)
        state, evaluation = _to_the_end(job, state, records, floors, stops)
        theta_P.copy_(state.backbone_P)
    if ranks.first and federation.task and evaluation and evaluation.embedded:
        # Outside, where torch may use all cores again.
        write_findings(folder, findings(federation.task, evaluation.embedded, config.data_seed))
    by_class = evaluation.by_class if evaluation else None
    if by_class is not None:
        write_scores(folder / "by_class.json", floor("trained", by_class))
    run = {"method": config.method, "seed": config.seed, "rounds": state.round}
    if config.noise:
        run |= {"noise": config.noise, "delta": config.delta}
    size = sample_size(config, state.class_rows.num_classes)
    ends = None if by_class is None else interval([by_class])
    return summarize({**run, "sample_size": size, "folder": "."}, records, floors.map_at_10, ends)


def _server(
    config: Config, federation: Federation, optimizer: ServerOptimizer, timer: PhaseTimer
) -> Server:
    return Server(
        optimizer,
        federation.cohort_size,
        resolved(config.row_mean),
        federation.quorum,
        on_phase=timer.end_phase,
        defence=defence(config),
        absent=federation.absent,
        noise=federation.noise,
    )


def _to_the_end(
    job: _Job, state: ServerState, records: list[Record], floors: Floors, stops: bool
) -> tuple[ServerState, Evaluation | None]:
    """All rounds that are left, none if it ``stops``; their records are appended to ``records``."""
    config, task, timer, first = job.config, job.federation.task, job.timer, job.ranks.first
    failed = any(record.get("failures") for record in records)
    begun, evaluation = state.round, None
    with (
        open_records(job.folder, records) if first else nullcontext() as add_record,
        open_writer(job.folder, state.round + 1) if first else nullcontext() as writer,
    ):

        def add_images(add: Callable[..., None]) -> None:
            if writer and task and evaluation and evaluation.embedded:
                add(writer, task, evaluation.embedded, config.data_seed, state.round)
                timer.end_phase("evaluate")

        if writer and not state.round and "untrained" in floors.map_at_10:
            writer.add_scalar("test/map_at_10", floors.map_at_10["untrained"], 0)
        timer.restart()
        try:
            while state.round < config.rounds and not stops:
                state, record, evaluation = _next_round(job, state, records)
                # What noise hides is shown once: a round trained again would show it twice.
                every = 1 if job.server.noise else config.checkpoint_every
                due = _due(state.round, every, config.rounds)
                failed = failed or bool(record.get("failures"))
                if add_record:
                    add_record(record, due)
                records.append(record)
                if writer:
                    add_scalars(writer, record, failed)
                add_images(add_neighbours)
                job.keep_best(state.backbone_P, records)
                stops = job.on_round(record) is STOP or _is_over(job, records)
                stops = job.ranks.gather(stops)[0]
                if due and first:
                    save_checkpoint(job.folder / "checkpoint", state)
                    timer.end_phase("checkpoint")
                elif due:
                    state.class_rows.changed.clear()
            judged = state.round > begun and _due(
                state.round, resolved(config.eval_every), config.rounds
            )
            if not judged and (task or job.ranks.gather(records[-1]["metrics"] is None)[0]):
                # It ends at a round that was not to be its last, or before its images were written.
                evaluation = job.federation.evaluate(state.backbone_P, state.round)
                if add_record and writer:
                    _complete_last_record(records, evaluation, add_record, writer)
                job.keep_best(state.backbone_P, records)
            if first:
                _save_last_round(job.folder, state, len(records))
        except BaseException:
            if first:
                _save_last_round(job.folder, state, len(records))
            raise
        add_images(add_projection)
    return state, evaluation


def _is_over(job: _Job, records: Sequence[Record]) -> bool:
    """Whether a run ends before its last round: for want of patience, or of privacy to spend."""
    if out_of_patience(records, job.config.patience):
        return True
    coming = job.federation.engine.num_clients(len(records))
    return bool(records) and used_up(job.config, [*_drawn_from(records), coming])


def _drawn_from(records: Sequence[Record]) -> list[int]:
    """From how many clients the cohort of each round was drawn."""
    return [record["num_clients"] or 1 for record in records]


def _complete_last_record(
    records: list[Record],
    evaluation: Evaluation | None,
    add_record: Callable[[Record, bool], None],
    writer: "SummaryWriter",
) -> None:
    """The retrieval figures of a round that nobody knew to be the last when it was recorded."""
    if records[-1]["metrics"] is None and evaluation and evaluation.metrics:
        records[-1] = {**records[-1], "metrics": evaluation.metrics}
        add_record(records[-1], True)
        add_metrics(writer, records[-1])


def _floors(federation: Federation, theta_P: torch.Tensor, folder: Path, ranks: Ranks) -> Floors:
    """Baselines of the test: measured once, before the first round."""
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


def _save_last_round(folder: Path, state: ServerState, recorded: int) -> None:
    """A checkpoint of the last complete round of a run that ends too early, whatever ended it.

    There is none where a row of the next round is written already.
    """
    whole = newest_write(state.class_rows) <= state.round == recorded
    if whole and state.round > newest_round(folder / "checkpoint"):
        records_to_disk(folder)
        save_checkpoint(folder / "checkpoint", state)


def _next_round(
    job: _Job, state: ServerState, records: Sequence[Record]
) -> tuple[ServerState, Record, Evaluation | None]:
    """The state after one more round, the round's record, and its evaluation if it has one."""
    config, federation, round, clip = job.config, job.federation, state.round, state.clip
    plan = job.plan_of(state.class_rows.num_classes, round)
    # As they are drawn: some may come back meanwhile.
    present = federation.engine.num_clients(round) - len(federation.absent(round))
    state, updates, failures, attempts = _attempt_round(job, state, plan)
    num_classes, evaluation = federation.num_classes(state.round), None
    if num_classes != state.class_rows.num_classes:
        # Classes were registered in this round.
        state = replace(state, class_rows=grow(state.class_rows, num_classes))
    job.timer.end_phase("aggregate")
    if _due(state.round, resolved(config.eval_every), config.rounds):
        evaluation = federation.evaluate(state.backbone_P, state.round)
        job.timer.end_phase("evaluate")
    updates = [u for part in job.ranks.gather([without_deltas(u) for u in updates]) for u in part]
    first_loss, name = records[0]["loss"] if records else None, federation.client_name
    if first_loss is not None:
        check_growth([update.loss for update in updates], first_loss, plan)
    metrics = evaluation.metrics if evaluation else None
    if plan.private:
        # Cohorts are drawn from all, whoever is absent.
        drawn_from = federation.engine.num_clients(round)
        wire = wire_format(config, job.embedder, plan.num_classes)
        size = min(job.server.cohort_size, drawn_from)
        told = message_bytes(plan, wire, 1, num_parameters(job.embedder))
        epsilon = spent(config, [*_drawn_from(records), drawn_from])
        record = private_record(plan, size, told, drawn_from, job.timer.restart(), metrics, epsilon)
    else:
        failed = [FailedClient(client=name(f.client), reason=f.reason) for f in failures]
        record = new_record(plan, updates, present, job.timer.restart(), metrics, failed, attempts)
    if clip is not None:
        record["clip"] = clip
    if job.warm and record["round"] == 1:
        record["warm_start"] = job.warm
    return state, record, evaluation


def _attempt_round(
    job: _Job, state: ServerState, plan: RoundPlan
) -> tuple[ServerState, list[ClientUpdate], list[Failure], int]:
    """Algorithm 1, begun as often as the federation allows: state, updates, failures, attempts."""
    engine, failures, all_diverged = job.federation.engine, list[Failure](), True
    present = engine.num_clients(plan.round) - len(job.federation.absent(plan.round))
    cohort_size = min(job.server.cohort_size, present)
    for attempt in count(1):
        try:
            state, updates, failed = run_round(job.server, engine, state, plan)
            break
        except QuorumError as error:
            failures += error.failures
            _tell(job, plan, error.failures)
            diverged = {f.client for f in error.failures if f.reason == "not finite"}
            all_diverged = all_diverged and len(diverged) == cohort_size
            if attempt >= job.federation.attempts:
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
            time.sleep(job.federation.pause)
            job.timer.end_phase("pause")
        except DivergedError as error:
            if error.client is None:
                raise
            name = job.federation.client_name(error.client)
            raise DivergedError(f"{error} (client {error.client} is {name!r})") from error
    _tell(job, plan, failed)
    return state, updates, failures + failed, attempt


def _tell(job: _Job, plan: RoundPlan, failures: Sequence[Failure]) -> None:
    """How many clients gave nothing that could be used, and of one of them why, in the log."""
    if failures and job.ranks.first:
        counts = Counter(failure.reason for failure in failures).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        example = next((f for f in failures if f.detail), failures[0])
        name = job.federation.client_name(example.client)
        detail = f"{name}: {example.detail or example.reason}"
        _LOG.info("round %d: without %s (%s)", plan.round + 1, reasons, printable(detail))


def _first_state(job: _Job, theta_P: torch.Tensor) -> tuple[ServerState, dict[str, int] | None]:
    """The last checkpoint's state, or the first of all, and what :func:`warm_up_` says of it."""
    config, optimizer, checkpoints = job.config, job.server.optimizer, job.folder / "checkpoint"
    rows = create_class_rows(
        job.federation.num_classes(newest_round(checkpoints)),
        job.embedder.spec.embedding_size,
        optimizer.of_rows.slots,
        config.seed,
        config.row_dtype,
        job.folder if config.row_store == "file" else None,
    )
    state, warm, engine = load_checkpoint(checkpoints, rows), None, job.federation.features
    if state is not None:
        restore_whitening_(engine, job.embedder, checkpoints / "first")
    else:
        if job.start is None:
            warm = warm_up_(config, engine, job.embedder, theta_P, rows)
        if job.ranks.first and (warm or not (checkpoints / "first" / "config.json").exists()):
            # A checkpoint is of use with it alone: the model, and what of it does not train.
            save_embedder(job.embedder, checkpoints / "first", {})
        if (start := job.start) is not None and len(start.ids_U):
            slots = {name: torch.zeros_like(start.rows_UD) for name in rows.slots}
            write_(rows, start.ids_U, start.rows_UD, slots, -1)
        slots = {name: torch.zeros_like(theta_P) for name in optimizer.slots}
        state = ServerState(theta_P.clone(), slots, rows, round=0)
    plan = job.plan_of(rows.num_classes, state.round)
    if plan.clipping is not None and state.clip is None:
        state = replace(state, clip=plan.clipping.norm)
    if plan.method.moments and state.round and state.class_rows.sums_EE is None:
        raise RunFolderError(
            f"{job.folder} was begun when method {config.method} had no moments (it is "
            f"{config.method}-published now): start another run, or go on with that version"
        )
    return state, warm


def _due(round: int, every: int, rounds: int) -> bool:
    return round == rounds or (every > 0 and round % every == 0)
