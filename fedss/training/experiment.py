"""Train one model, or compare several."""

import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedss.config import Config
from fedss.data import Dataset
from fedss.distributed import ALONE, Ranks, join
from fedss.engines.allocator import keep_freed_memory
from fedss.errors import ConfigError
from fedss.evaluation.task import check_tellable
from fedss.files import write_json
from fedss.losses.softmax import Objective
from fedss.models import Embedder, load_embedder, save_embedder
from fedss.own_code import is_code
from fedss.report import write_report
from fedss.report.notebook import Plot, ReportPage
from fedss.runs.about import DataFacts
from fedss.runs.folder import (
    first_rounds,
    lock_folder,
    with_absolute_paths,
    write_comparison_config,
    write_run_config,
)
from fedss.runs.progress import log_rounds
from fedss.runs.records import Record
from fedss.runs.summaries import Summary, read_summaries, write_summaries
from fedss.sampling.samplers import Sampler
from fedss.secret import draw_key, proof, read_secret
from fedss.settings import Problem, Setting, problem_of, resolve, small_images
from fedss.text import counted
from fedss.training.build import (
    build_model,
    check_own_classes,
    check_trainable,
    chosen_sampler,
    compute_device,
    load_data,
    round_plan,
    sample_size,
    task_in_training,
)
from fedss.training.federation import Federate, Known, local_federation
from fedss.training.floors import weights_side
from fedss.training.loop import OnRound, train_rounds
from fedss.training.objective import check_own_code
from fedss.training.private import check_private
from fedss.training.start import Start, start_from
from fedss.training.summary import describe, describe_model
from fedss.variants import variant

_LOG = logging.getLogger("fedss.training")


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

    def __repr__(self) -> str:
        score = self.summary["map_at_10"]
        shown = "not evaluated" if score is None else f"MAP@10 {score:.3f}"
        rounds = counted(self.summary["rounds"], "round")
        return f"Run({str(self.folder)!r}, {self.summary['method']}, {rounds}, {shown})"

    def report(self) -> ReportPage:
        """The run's report, ``report.html``: a notebook shows it below the cell."""
        path = self.folder / "report.html"
        return ReportPage(path if path.exists() else write_report(self.folder))

    def plot(self) -> Plot:
        """MAP@10 over rounds, as in the report: a notebook shows it below the cell."""
        from fedss.report.figures import rounds_figure  # it takes a large library

        return Plot(rounds_figure(self.folder))


@dataclass(frozen=True)
class OwnParts:
    """A user's own objects, in place of what the configuration names: see :func:`train`."""

    backbone: nn.Module | None = None
    sampler: Sampler | None = None
    objective: Objective | None = None

    def backbone_of(self, config: Config) -> nn.Module | str | None:
        """What makes a backbone of the user's own anew: the module, or the name of the code."""
        if self.backbone is not None:
            return self.backbone
        return config.backbone if is_code(config.backbone) else None


@dataclass(frozen=True)
class RunPlan:
    """What :func:`train_federation` trains, and with whom.

    Attributes:
        config: what to do; clients get its settings of local training.
        problem: what ``auto`` settings follow from; None if it is not known.
        embedder: the model, with its first weights.
        data: metadata of the data set; a run that goes on must have the same.
        federate: opens the federation.
        own: the user's own objects.
        class_names: of the class rows, where they are known before the first round.
        start: class rows of another run, with whose weights ``embedder`` begins.
    """

    config: Config
    problem: Problem | None
    embedder: Embedder
    data: DataFacts
    federate: Federate
    own: OwnParts = OwnParts()
    class_names: Sequence[str] | None = None
    start: Start | None = None


def train(
    config: Config,
    out: str | Path,
    *,
    data: Dataset | None = None,
    backbone: nn.Module | None = None,
    sampler: Sampler | None = None,
    objective: Objective | None = None,
    start: str | Path | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Train one model, or go on with it where ``out`` holds a part of the same run.

    A run may go on beyond its last round: ``config.rounds`` may be more than it had. Settings that
    are ``auto`` stay as they were resolved when it began.

    Started by torchrun, its processes train the model together (:mod:`fedss.distributed`): ``out``
    and the images must be there on every host, and any number of processes may go on.

    Args:
        config: what to do.
        out: the run folder; made if it is not there.
        data: images; None: those that ``config`` names.
        backbone: a module of your own, [B, C, H, W] float pixels to [B, features] vectors, in
            place of ``config.backbone``. Where its output is not of size ``embedding_size``, a
            linear layer is added.
        sampler: a way to draw negatives of your own, in place of ``config.sampler``.
        objective: a loss of your own, in place of the softmax of ``full``, ``fedss``, ``pos-only``
            and ``central``; see :data:`fedss.losses.softmax.Objective`. A run that goes on needs
            one of the same name.
        start: the folder of another run, with whose weights this one begins: the backbone, of the
            same architecture, and the rows of classes that both have, by their names. A run that
            goes on need not be told again.
        on_round: called with each round's record, those of an interrupted run first, at the first
            rank alone. If it returns ``fedss.STOP``, the run ends with this round, and is done.
            Progress is logged all the same (:func:`fedss.log.show_on_stderr`).

    Raises:
        ConfigError: settings that cannot be, or do not fit the data.
        DataError: images that cannot be read or do not fit together.
        RunFolderError: ``out`` belongs to another configuration, is damaged or cannot be written.
        DivergedError: a loss or update became NaN or infinite; the last checkpoint is kept.
        FedssError: another process of the run failed or is gone; the last checkpoint is kept.
    """
    with join() as ranks:
        data, config = data or load_together(config), with_absolute_paths(config)
        check_trainable(data)
        own = OwnParts(backbone, sampler, objective)
        _check([config], data, own)
        # Absolute: whoever is called in between may change the working directory.
        folder, begin = Path(out).absolute(), None if start is None else Path(start).absolute()
        label = f"{config.method} seed {config.seed}"
        return _Experiment(data, own, on_round, ranks, begin).train(config, folder, label)


def _check(configs: Sequence[Config], data: Dataset, own: OwnParts) -> None:
    """Whether the runs can be, before anything is written; and whether images are too small."""
    warnings: dict[str | None, None] = {}
    for config in configs:
        told, _ = resolve(config, problem_of(data))
        sample_size(told, len(data.train.class_names))
        check_own_classes(config, data)
        if (task := task_in_training(config, data)) is not None:
            check_tellable(task, data.name, config.test_classes, config.eval_split)
        compute_device(config)
        _secret(config)
        chosen_sampler(config, own.sampler)
        check_private(told, len(data.train.client_names))
        check_own_code(told, data.train.pixels.shape[1:], own.objective)
        if own.backbone is None:
            measured = task is not None and weights_side(config, data) is not None
            warnings[small_images(config, data.train.pixels.shape[2], measured)] = None
    for warning in filter(None, warnings):
        _LOG.warning("%s", warning)


def _secret(config: Config) -> bytes | None:
    """The secret of the simulated clients, if one is given."""
    named = config.secret_file
    return None if named is None else read_secret(Path(named), "secret_file")


@dataclass(frozen=True)
class _Experiment:
    """What the runs of an experiment share: images, the user's objects, processes.

    And floors: each run adds those that it was the first to need.
    """

    data: Dataset
    own: OwnParts
    on_round: OnRound | None
    ranks: Ranks
    start: Path | None = None
    floors: Known = field(default_factory=Known)

    def train(self, config: Config, folder: Path, label: str) -> Run:
        """Train one model with all clients on this machine, or wherever the ranks are."""
        about, problem = describe(config, self.data), problem_of(self.data)
        told, _ = _resolve_first(folder, config, problem)
        federate = partial(local_federation, told, self.data, self.ranks, self.floors)
        model = build_model(told, self.data, self.own.backbone)
        names, backbone = self.data.train.class_names, self.own.backbone_of(config)
        start = start_from(self.start, folder, told, model, names, backbone)
        plan = RunPlan(config, problem, model, about, federate, self.own, names, start)
        return train_federation(plan, folder, label, on_round=self.on_round, ranks=self.ranks)


def train_federation(
    plan: RunPlan,
    folder: Path,
    label: str,
    *,
    on_round: OnRound | None = None,
    show_progress: OnRound | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    """Train one model wherever its clients are, or go on with it.

    Args:
        plan: what to train, and with whom.
        folder: the run folder.
        label: the run's name, where progress is shown.
        on_round: as in :func:`train`.
        show_progress: called with each record, too; None: progress is logged.
        ranks: the processes that train together.

    Raises:
        As :func:`train`, and QuorumError: too few clients gave an update, time and again.
    """
    config, own = plan.config, plan.own
    if config.keep_memory:
        keep_freed_memory()
    told, settings = _resolve_first(folder, config, plan.problem)
    secret = _secret(config)
    key = secret and draw_key(secret)
    plan_of = partial(round_plan, told, sampler=own.sampler, objective=own.objective, secret=key)
    start = plan.start
    began_with, record = (None, None) if start is None else (start.weights, start.record)
    about = describe_model(plan.embedder, own.sampler, own.objective, began_with)
    about |= {"secret": secret and proof(secret)}
    with lock_folder(folder) if ranks.first else nullcontext():
        write_run_config(folder, config, settings, plan.data, about, record, ranks)
        already_done = ranks.gather(bool(read_summaries(folder)))[0]
        if not already_done:
            observe: OnRound = _ignore
            if ranks.first:
                observe = partial(_observe, show_progress or log_rounds(label, told), on_round)
                _keep_first(plan, folder / "checkpoint")
            model, federate = plan.embedder, plan.federate
            summary = train_rounds(told, model, federate, plan_of, folder, observe, ranks, start)
        if ranks.first:
            if not already_done:
                told_of = {"method": config.method, "data": plan.data["name"]}
                save_embedder(plan.embedder, folder / "model", told_of)
                write_summaries(folder, [summary])
            # One that was written during the run says so.
            if not already_done or not (folder / "report.html").exists():
                write_report(folder)
        (summary,) = ranks.gather(read_summaries(folder))[0]
        embedder = load_embedder(folder / "model", own.backbone_of(config))
        return Run(folder, embedder, summary, already_done)


def _resolve_first(
    folder: Path, config: Config, problem: Problem | None
) -> tuple[Config, dict[str, Setting]]:
    """``resolve``, as it was for the number of rounds that the run in a folder began with."""
    first = first_rounds(folder, config)
    told, settings = resolve(replace(config, rounds=first), problem)
    if first != config.rounds:
        kept = f"; as for the {counted(first, 'round')} that the run began with"
        settings = {name: replace(s, why=s.why + kept) for name, s in settings.items()}
    return replace(told, rounds=config.rounds), settings


def _keep_first(plan: RunPlan, checkpoints: Path) -> None:
    """Write what a checkpoint needs to be of use, beside the model: the rows' names."""
    if plan.class_names is not None and not (checkpoints / "classes.json").exists():
        checkpoints.mkdir(exist_ok=True)
        write_json(checkpoints / "classes.json", list(plan.class_names))


def _observe(show: OnRound, on_round: OnRound | None, record: Record) -> object:
    show(record)
    return on_round(record) if on_round else None


def _ignore(record: Record) -> None:
    """Of a rank that is not the first."""


def load_together(config: Config) -> Dataset:
    """The data set that ``config`` names, at every rank.

    On each host one rank goes first and makes the cache of decoded images, which others read.

    Raises:
        ConfigError: there is no such device; checked before images are decoded.
        DataError: they cannot be found or read, or do not fit together.
    """
    compute_device(config)
    with join() as ranks:
        for turn in (ranks.local_rank == 0, ranks.local_rank > 0):
            if turn:
                data = load_data(config)
            ranks.gather(None)
    return data


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
    start: str | Path | None = None,
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
        data: images; None: those that ``config`` names.
        backbone: as in :func:`train`.
        sampler: as in :func:`train`.
        objective: as in :func:`train`.
        start: as in :func:`train`, of every run; a comparison that goes on need not be told again.
        on_round: as in :func:`train`.

    Returns:
        The summaries, in the order of methods and seeds.

    Raises:
        ConfigError, DataError, RunFolderError, DivergedError: as :func:`train`.
    """
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values) or not values:
            given = ", ".join(map(str, values)) or "none"
            raise ConfigError(f"{name}: expected one or more, each once, got {given}")
    variant_of = {label: variant(config, label) for label in methods}
    folder, summaries = Path(out).absolute(), []
    with join() as ranks:
        data, config = data or load_together(config), with_absolute_paths(config)
        check_trainable(data)
        runs = [
            (label, with_absolute_paths(replace(variant_of[label], seed=seed)))
            for label in methods
            for seed in seeds
        ]
        own = OwnParts(backbone, sampler, objective)
        _check([run for _, run in runs], data, own)
        begin = None if start is None else Path(start).absolute()
        with lock_folder(folder) if ranks.first else nullcontext():
            if ranks.first:
                begin = write_comparison_config(folder, config, list(methods), list(seeds), begin)
            experiment = _Experiment(data, own, on_round, ranks, ranks.gather(begin)[0])
            for number, (label, run) in enumerate(runs, start=1):
                name = f"{re.sub('[^a-zA-Z0-9_.=-]+', '-', label)}-seed{run.seed}"
                title = f"run {number} of {len(runs)}: {label} seed {run.seed}"
                done = experiment.train(run, folder / name, title)
                summaries.append({**done.summary, "label": label, "folder": name})
            if ranks.first:
                folders = {summary["folder"] for summary in summaries}
                earlier = [s for s in read_summaries(folder) if s["folder"] not in folders]
                write_summaries(folder, [*earlier, *summaries])
                write_report(folder)
    return summaries
