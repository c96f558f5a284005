"""The loop over rounds: cohort, engine, checks, aggregate, evaluate, checkpoint, records."""

import dataclasses
import importlib.metadata
import io
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedss.algorithm import (
    LocalTraining,
    RoundPlan,
    ServerState,
    draw_cohort,
    run_round,
    spread_rows_out,
)
from fedss.checkpoint import (
    load_checkpoint,
    read_json,
    save_checkpoint,
    write_file,
    write_json,
    writing,
)
from fedss.class_rows import create_class_rows
from fedss.config import Config
from fedss.data import (
    Dataset,
    Images,
    RetrievalTask,
    fingerprint,
    index_clients,
    load_dataset,
    own_classes,
)
from fedss.engines.local import local_engine
from fedss.errors import ConfigError, RunFolderError
from fedss.methods import METHODS
from fedss.models import (
    Embedder,
    build_embedder,
    embed_pixels,
    flatten_,
    load_embedder,
    save_embedder,
)
from fedss.optimizers import ServerOptimizer
from fedss.records import Record, open_records, read_records, summarise, traffic
from fedss.report import write_report
from fedss.retrieval import RetrievalMetrics, evaluate_retrieval, nearest
from fedss.seeds import generator
from fedss.softmax import Scoring

OnRound = Callable[[Record], None]

# What may differ between a run and its continuation: nothing that decides the weights.
_FREE_FIELDS = ("workers", "checkpoint_every", "data_path", "skip_broken")
_PANEL_QUERIES, _PANEL_NEIGHBOURS = 48, 5


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


def load_data(config: Config) -> Dataset:
    """The data set that a configuration names.

    Raises:
        DataError: it cannot be found or read, or does not fit together.
    """
    return load_dataset(
        config.data,
        config.data_path,
        image_size=config.image_size,
        channels=config.channels,
        test_classes=config.test_classes,
        skip_broken=config.skip_broken,
        seed=config.data_seed,
        glyphs_classes=config.glyphs_classes,
        glyphs_clients=config.glyphs_clients,
    )


def train(
    config: Config,
    out: str | Path,
    *,
    data: Dataset | None = None,
    backbone: nn.Module | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Train one model, or go on with it where ``out`` holds a part of the same run.

    Args:
        config: what to do.
        out: the run folder; made if it is not there.
        data: pictures; None: those that ``config`` names.
        backbone: a module of your own, [B, C, H, W] float pixels to [B, features] vectors, in
            place of ``config.backbone``. Where its output is not of size ``embedding_size``, a
            linear layer is added.
        on_round: called with each round's record, those of an interrupted run first.

    Raises:
        ConfigError: settings that cannot be, or do not fit the data.
        DataError: pictures that cannot be read or do not fit together.
        RunFolderError: ``out`` belongs to another configuration, is damaged or cannot be written.
        DivergedError: a loss or update became NaN or infinite; the last checkpoint is kept.
    """
    data, folder = data or load_data(config), Path(out)
    _num_classes(config, data)
    embedder = _build(config, data, backbone)
    summary_file = folder / "summary.json"
    with writing(folder):
        _claim(folder, config, data, embedder)
        if summary_file.exists():
            (summary,) = read_json(summary_file)
            return Run(folder, load_embedder(folder / "model", backbone), summary, True)
        records = _train_rounds(config, data, embedder, folder, on_round or (lambda _: None))
        save_embedder(embedder, folder / "model", {"method": config.method, "data": data.name})
        run = {name: getattr(config, name) for name in ("method", "seed", "rounds", "sample_size")}
        summary = summarise({**run, "folder": "."}, records)
        write_json(summary_file, [summary])
        write_report(folder)
    return Run(folder, embedder, summary, False)


def compare(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    data: Dataset | None = None,
    backbone: nn.Module | None = None,
    on_run: Callable[[Config], OnRound] | None = None,
) -> list[dict[str, Any]]:
    """Train each method with each seed under the same settings, and report on all.

    Each run has a folder ``<method>-seed<seed>`` in ``out``; finished ones are not run again.
    Cohorts depend on the seed alone, so the methods of one seed see the same clients.

    Args:
        config: settings of all runs; its ``method`` and ``seed`` are not used.
        methods: names in ``METHODS``.
        seeds: seeds of each method.
        out: the folder; gets ``summary.json`` and ``report.html``.
        data: pictures; None: those that ``config`` names.
        backbone: as in :func:`train`.
        on_run: called before each run, gives the ``on_round`` for it.

    Returns:
        The summaries, in the order of methods and seeds.

    Raises:
        ConfigError, DataError, RunFolderError, DivergedError: as :func:`train`.
    """
    runs = [replace(config, method=method, seed=seed) for method in methods for seed in seeds]
    data, folder, summaries = data or load_data(config), Path(out), []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "config.json",
            {"config": dataclasses.asdict(config), "methods": list(methods), "seeds": list(seeds)},
        )
        for run in runs:
            name = f"{run.method}-seed{run.seed}"
            on_round = on_run(run) if on_run else None
            done = train(run, folder / name, data=data, backbone=backbone, on_round=on_round)
            summaries.append({**done.summary, "folder": name})
        write_json(folder / "summary.json", summaries)
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
    raise RunFolderError(
        f"{folder}: expected a finished run with model/model.safetensors, found none; "
        "start its fedss train command again to finish it"
    )


@dataclass(frozen=True)
class Cost:
    """What a method moves each way per client and round, on average over clients.

    ``bytes`` and ``class_row_bytes`` are the tensors' bytes (class ids in the former) without
    headers; None where pictures are pooled.
    """

    method: str
    class_rows: float
    share: float
    class_row_bytes: float | None
    bytes: float | None


def costs(config: Config, data: Dataset) -> list[Cost]:
    """What each method would move, worked out from class counts, before any training.

    Raises:
        ConfigError: ``sample_size`` is above the number of classes, or no such backbone.
    """
    num_classes = _num_classes(config, data)
    backbone = 4 * _num_trainable(_build(config, data, None))
    own, clients = np.unique(own_classes(data.train), return_counts=True)
    result = []
    for method in METHODS.values():
        rng = generator(config.seed, "costs")
        sizes = [
            len(method.sampler(np.arange(count), num_classes, config.sample_size, rng).ids_S)
            for count in own
        ]
        rows = float(np.average(sizes, weights=clients))
        row_bytes = 4 * config.embedding_size * rows
        ids = 0 if rows == num_classes else 8 * rows
        moved = (None, None) if method.pooled else (row_bytes, backbone + row_bytes + ids)
        result.append(Cost(method.name, rows, rows / num_classes, *moved))
    return result


def describe(config: Config, data: Dataset) -> dict[str, Any]:
    """What is in a data set, as a run writes it down."""
    images, task, own_K = data.train, evaluation_task(config, data), own_classes(data.train)
    return {
        "name": data.name,
        "fingerprint": fingerprint(images),
        "train_images": len(images),
        "train_classes": len(images.class_names),
        "train_clients": len(images.client_names),
        "own_classes": [int(own_K.min()), float(np.median(own_K)), int(own_K.max())],
        "test_queries": len(task.query),
        "test_gallery": None if task.gallery is None else len(task.gallery),
        "test_classes": len(np.unique(task.query.labels)),
        "image_shape": list(images.pixels.shape[1:]),
        "skipped_pictures": len(data.skipped),
    }


def _num_classes(config: Config, data: Dataset) -> int:
    num_classes = len(data.train.class_names)
    if config.sample_size > num_classes:
        raise ConfigError(
            f"sample_size: expected 2 to n = {num_classes}, the number of training classes "
            f"(n means full), got {config.sample_size}"
        )
    return num_classes


def _build(config: Config, data: Dataset, backbone: nn.Module | None) -> Embedder:
    _, channels, image_size, _ = data.train.pixels.shape
    return build_embedder(
        backbone if backbone is not None else config.backbone,
        channels=channels,
        image_size=image_size,
        embedding_size=config.embedding_size,
        seed=config.seed,
        pretrained=config.pretrained,
    )


def _num_trainable(embedder: Embedder) -> int:
    return sum(p.numel() for p in embedder.parameters() if p.requires_grad)


def _train_rounds(
    config: Config, data: Dataset, embedder: Embedder, folder: Path, on_round: OnRound
) -> list[Record]:
    """Train from the last checkpoint to the end; leaves the weights in ``embedder``."""
    method, images, cohort_size = METHODS[config.method], data.train, config.clients_per_round
    optimizer = server_optimizer(config)
    if method.pooled:
        images, cohort_size = pool_pictures(images, cohort_size, config.seed), 1
    clients, num_classes = index_clients(images), _num_classes(config, data)
    task = evaluation_task(config, data)
    theta_P = flatten_(embedder).theta_P
    state = load_checkpoint(folder / "checkpoint") or ServerState(
        theta_P.clone(),
        {name: torch.zeros_like(theta_P) for name in optimizer.slots},
        create_class_rows(
            num_classes,
            config.embedding_size,
            optimizer.slots,
            generator(config.seed, "class rows"),
        ),
        round=0,
    )
    records = read_records(folder / "records.jsonl", state.round)
    for record in records:
        on_round(record)
    with (
        local_engine(embedder, clients, optimizer, config.workers) as engine,
        open_records(folder, records) as add_record,
    ):
        while state.round < config.rounds:
            clock = _Clock()
            plan = round_plan(config, num_classes, state.round)
            cohort = draw_cohort(clients.num_clients, cohort_size, config.seed, state.round)
            state, updates = run_round(engine, optimizer, state, cohort, plan, config.row_mean)
            if method.spread_out:
                spread_rows_out(
                    optimizer,
                    state,
                    config.spread_out_weight,
                    config.spread_out_margin,
                    config.spread_out_neighbours,
                )
            clock.lap("train")
            metrics = None
            if _due(state.round, config.eval_every, config.rounds):
                metrics = dataclasses.asdict(
                    _evaluate(partial(engine.embed, state.backbone_P), task)
                )
                clock.lap("evaluate")
            moved = traffic(state, updates, num_classes)
            record = {
                "round": state.round,
                "loss": sum(update.loss for update in updates) / len(updates),
                "clients": len(updates),
                "examples": sum(update.num_examples for update in updates),
                **(dict.fromkeys(moved) if method.pooled else moved),
                "seconds": clock.seconds,
                "metrics": metrics,
            }
            records.append(record)
            add_record(record)
            on_round(record)
            if _due(state.round, config.checkpoint_every, config.rounds):
                save_checkpoint(folder / "checkpoint", state)
        theta_P.copy_(state.backbone_P)
        embed = partial(engine.embed, state.backbone_P)
        _save_panels(embed, task, folder / "retrieval.npz", config.data_seed)
    return records


def server_optimizer(config: Config) -> ServerOptimizer:
    """The configuration's server optimizer; pooled training is its one client's SGD alone."""
    if METHODS[config.method].pooled:
        return ServerOptimizer("sgd", lr=1.0)
    return ServerOptimizer(
        config.server_optimizer,
        config.server_lr,
        config.server_momentum,
        config.server_second_momentum,
        config.server_epsilon,
    )


def round_plan(config: Config, num_classes: int, round: int) -> RoundPlan:
    """What the clients of a round (0-based) are told; learning rates decay over the rounds.

    Before ``lr_decay_start`` the factor is 1; then, with x from 0 to 1 over the rest of the
    rounds, it is ``1 - x`` (linear) or ``(1 + cos(pi x)) / 2`` (cosine).
    """
    start = config.lr_decay_start * config.rounds
    x = max(0.0, (round - start) / max(config.rounds - start, 1))
    factor = {"constant": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}
    decay = factor[config.lr_schedule]
    return RoundPlan(
        round,
        config.seed,
        METHODS[config.method],
        num_classes,
        config.sample_size,
        Scoring(config.scale, config.margin_kind, config.margin),
        LocalTraining(
            config.local_epochs,
            config.local_steps,
            config.batch_size,
            decay * config.client_lr,
            decay * config.class_row_lr,
        ),
    )


def pool_pictures(images: Images, cohort_size: int, seed: int) -> Images:
    """Pictures dealt at random to as few clients as there are cohorts.

    One of them a round, trained from the last one's weights, is central SGD, with as many
    pictures a round as a cohort holds on average.
    """
    shards = max(1, len(images.client_names) // cohort_size)
    order = generator(seed, "pool").permutation(len(images))
    return replace(
        images, clients=order % shards, client_names=[f"pool {k}" for k in range(shards)]
    )


def evaluation_task(config: Config, data: Dataset) -> RetrievalTask:
    """The retrieval task that ``config.eval_split`` names.

    Raises:
        ConfigError: the data set has no validation task.
    """
    if config.eval_split == "test":
        return data.test
    if data.validation is None:
        raise ConfigError(
            f"eval_split: data set {data.name!r} has no validation pictures; use test, or give "
            "rows of the manifest the split 'validation'"
        )
    return data.validation


def evaluate(embedder: Embedder, task: RetrievalTask) -> RetrievalMetrics:
    """Retrieval with a trained model; see :func:`fedss.evaluate_retrieval`."""
    return _evaluate(partial(embed_pixels, embedder), task)


Embed = Callable[[np.ndarray], Tensor]


def _evaluate(embed: Embed, task: RetrievalTask) -> RetrievalMetrics:
    query, gallery = task.query, task.gallery
    if gallery is None:
        return evaluate_retrieval(embed(query.pixels), torch.from_numpy(query.labels))
    # Labels are numbers within each set; names hold across both.
    number = {name: i for i, name in enumerate(gallery.class_names)}
    renumbered = np.array([number.get(name, -1 - i) for i, name in enumerate(query.class_names)])
    return evaluate_retrieval(
        embed(query.pixels),
        torch.from_numpy(renumbered[query.labels]),
        embed(gallery.pixels),
        torch.from_numpy(gallery.labels),
    )


def _save_panels(embed: Embed, task: RetrievalTask, path: Path, seed: int) -> None:
    """Some queries and their nearest pictures, for the report; the same queries for every run."""
    query, gallery = task.query, task.gallery or task.query
    neighbours = min(_PANEL_NEIGHBOURS, len(gallery) - (task.gallery is None))
    chosen = generator(seed, "panels").permutation(len(query))[:_PANEL_QUERIES]
    query_QD = embed(query.pixels)
    gallery_GD = None if task.gallery is None else embed(gallery.pixels)
    scores_QK, index_QK = nearest(query_QD, gallery_GD, neighbours)
    found = index_QK.numpy()[chosen]
    pixels = np.concatenate([query.pixels[chosen][:, None], gallery.pixels[found]], axis=1)
    labels = np.concatenate([query.labels[chosen][:, None], gallery.labels[found]], axis=1)
    names = [
        [query.class_names[q], *(gallery.class_names[g] for g in others)]
        for q, *others in labels.tolist()
    ]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        pixels=pixels,
        labels=labels,
        class_names=np.array(names),
        scores=scores_QK.numpy()[chosen],
        query_index=chosen,
    )
    write_file(path, buffer.getvalue())


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


def _claim(folder: Path, config: Config, data: Dataset, embedder: Embedder) -> None:
    """Write the run's configuration, or check that the folder was made with the same one.

    Raises:
        RunFolderError: it was made with another; names the fields that differ.
    """
    path = folder / "config.json"
    content: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "data": describe(config, data),
        "model": {
            "backbone": type(embedder.backbone).__name__,
            "parameters": _num_trainable(embedder),
        },
        "fedss": importlib.metadata.version("fedss"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
        return
    found = read_json(path)
    different = [
        f"{name}: {found.get(part, {}).get(name)!r} there, {value!r} now"
        for part in ("config", "data", "model")
        for name, value in content[part].items()
        if name not in _FREE_FIELDS and found.get(part, {}).get(name) != value
    ]
    if different:
        raise RunFolderError(
            f"{folder} holds a run made with other settings ({'; '.join(different)}); choose "
            "another folder, or the settings of its config.json (--config)"
        )
