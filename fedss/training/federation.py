"""Who takes part in a run, where they train, and how the model is judged."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fedss.config import Config
from fedss.core.algorithm import NO_CLIENTS
from fedss.core.engine import Engine, FeatureEngine
from fedss.core.optimizers import ServerOptimizer
from fedss.core.privacy import Noise
from fedss.data import Dataset, Images, RetrievalTask, index_clients
from fedss.data.augment import find_augmentation, preview
from fedss.distributed import Ranks
from fedss.engines.local import LocalEngine, Workers, intra_op_threads, local_engine
from fedss.evaluation.baselines import Floors, data_floors, floor
from fedss.evaluation.task import Evaluation, embed_task, judge
from fedss.losses.methods import METHODS
from fedss.models import Embedder, EmbedderSpec, fingerprint
from fedss.training.build import (
    compute_device,
    noise_of,
    pool_images,
    task_in_training,
    wire_format,
)
from fedss.training.floors import frozen_floors
from fedss.training.private import simulation_key

QUORUM = 0.5
"""Share of a cohort without whose updates there is no step, if nothing else is said."""


@dataclass(frozen=True)
class Federation:
    """Who takes part in a run, where they train and how the model is judged.

    Attributes:
        engine: where clients train.
        features: whom to ask for the features of clients before the first round.
        num_classes: n, from a round (0-based) on; it may grow.
        cohort_size: clients per round.
        client_name: a client's name for people.
        evaluate: retrieval under a backbone, after so many rounds; None at all ranks but the first.
        floors: baselines of the test, under the first backbone's weights; likewise.
        task: the test images that ``evaluate`` embeds, to be shown; None where there are none.
        preview: training images as clients see them, see :func:`fedss.data.augment.preview`; None
            where they are not changed, or not to be shown.
        noise: what is to hide a client's part; None: nothing.
        quorum: share of a cohort without whose updates there is no step.
        attempts: how often a round is begun before the run ends for want of a quorum.
        pause: seconds between two of them.
        absent: clients that are not drawn in a round (0-based), sorted.
    """

    engine: Engine
    features: FeatureEngine
    num_classes: Callable[[int], int]
    cohort_size: int
    client_name: Callable[[int], str]
    evaluate: Callable[[torch.Tensor, int], Evaluation | None]
    floors: Callable[[torch.Tensor], Floors | None]
    task: RetrievalTask | None
    preview: bytes | None = None
    noise: Noise | None = None
    quorum: float = QUORUM
    attempts: int = 1
    pause: float = 0.0
    absent: Callable[[int], np.ndarray] = lambda round: NO_CLIENTS


OnPhase = Callable[[str], None]
Known = dict[tuple[object, ...], Floors]
"""Floors that several runs share, by what they depend on."""
Federate = Callable[[Embedder, ServerOptimizer, OnPhase], AbstractContextManager[Federation]]
"""Opens a federation for a model and a server optimizer; it reports the ends of phases."""


@contextmanager
def local_federation(
    config: Config,
    data: Dataset,
    ranks: Ranks,
    known: Known,
    embedder: Embedder,
    optimizer: ServerOptimizer,
    on_phase: OnPhase,
) -> Iterator[Federation]:
    """All clients on this machine, or on those that torchrun has started ranks on."""
    images, cohort_size = data.train, config.clients_per_round
    if METHODS[config.method].pooled:
        images, cohort_size = pool_images(images, cohort_size, config.seed), 1
    num_classes, task = len(images.class_names), task_in_training(config, data)
    changes = find_augmentation(config.augment)
    # Before all else: this needs a package that may not be installed.
    # Images of clients, which no noise hides.
    showing = changes if not config.noise else None
    shown = preview(showing, images.pixels, config.seed) if showing else None
    with _open_engine(config, embedder, images, optimizer, ranks) as engine:

        def embed(backbone_P: torch.Tensor, pixels: np.ndarray) -> torch.Tensor:
            # Retrieval is computed on the device where clients train, too.
            return engine.embed(backbone_P, pixels).to(engine.workers.device)

        def evaluate(backbone_P: torch.Tensor, round: int) -> Evaluation | None:
            if task is None:
                return None
            embedded = embed_task(partial(embed, backbone_P), task)
            if not ranks.first:
                return None
            # Between rounds the workers of all ranks are idle and their cores free.
            with intra_op_threads(engine.workers.count * ranks.local_size):
                return judge(task, embedded)

        def floors(backbone_P: torch.Tensor) -> Floors | None:
            if task is None:
                return None
            # All ranks embed: whether they need not must be the same at each.
            untrained = "untrained", config.eval_split, config.precision, fingerprint(embedder)
            if untrained not in known:
                evaluation = evaluate(backbone_P, 0)
                by_class = evaluation and evaluation.by_class
                known[untrained] = floor("untrained", by_class) if by_class else Floors()
            if not ranks.first:
                return None
            with intra_op_threads(engine.workers.count * ranks.local_size):
                model = embedder.spec, engine.workers, backbone_P
                plain, frozen = _measure_plain(config, data, task, *model, known)
            return plain | known[untrained] | frozen

        yield Federation(
            engine=engine,
            features=engine,
            num_classes=lambda round: num_classes,
            cohort_size=cohort_size,
            client_name=images.client_names.__getitem__,
            evaluate=evaluate,
            floors=floors,
            task=task,
            preview=shown,
            noise=noise_of(config, simulation_key(config, data)),
        )


def _open_engine(
    config: Config, embedder: Embedder, images: Images, optimizer: ServerOptimizer, ranks: Ranks
) -> AbstractContextManager[LocalEngine]:
    return local_engine(
        embedder,
        index_clients(images),
        optimizer,
        wire_format(config, embedder, len(images.class_names)),
        config.workers,
        ranks,
        device=compute_device(config),
        precision=config.precision,
        stack=config.stack,
        frozen_once=config.cache_activations,
        augmented=find_augmentation(config.augment) is not None,
    )


def _measure_plain(
    config: Config,
    data: Dataset,
    task: RetrievalTask,
    spec: EmbedderSpec,
    workers: Workers,
    backbone_P: torch.Tensor,
    known: Known,
) -> tuple[Floors, Floors]:
    """What the images give by themselves, and what frozen features give; each measured once."""
    plain = "data", config.eval_split
    frozen = "frozen", *plain, config.backbone, config.weights, config.embedding_size
    if plain not in known:
        known[plain] = data_floors(task)
    if frozen not in known:
        known[frozen] = frozen_floors(config, data, task, spec, workers, backbone_P)
    return known[plain], known[frozen]
