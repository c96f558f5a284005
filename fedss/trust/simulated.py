"""A run simulated again from its folder: its requests, and the training of its first rounds."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedss.choices import RowMean
from fedss.config import Config, config_from_dict
from fedss.core.algorithm import Server, draw_cohort, run_round
from fedss.core.class_rows import create_class_rows
from fedss.core.client import ClientUpdate, RoundPlan
from fedss.core.privacy import Noise
from fedss.core.state import ServerState
from fedss.data import ClientIndex, Dataset, data_fingerprint, index_clients
from fedss.distributed import Ranks
from fedss.engines.local import LocalEngine, local_engine
from fedss.errors import ConfigError, RunFolderError
from fedss.losses.methods import METHODS
from fedss.models import flatten_
from fedss.own_code import OwnCode, check_code, code_names
from fedss.runs.about import AnyConfig, read_any_config
from fedss.runs.records import Record, read_all_records
from fedss.secret import draw_key, proof, read_secret
from fedss.training.build import (
    build_model,
    clipping,
    compute_device,
    defence,
    load_data,
    noise_of,
    resolved,
    round_plan,
    server_optimizer,
    wire_format,
)
from fedss.training.federation import QUORUM
from fedss.training.private import simulation_key
from fedss.training.summary import describe_model
from fedss.training.warm import warm_up_

_SAME = 0.01  # relative difference up to which a round's loss is the recorded one


@dataclass(frozen=True)
class SimulatedRun:
    """A run as it was: its settings, without ``auto``, its images, and the key of its draws.

    ``folder`` is that of the run. ``why_not`` says why its rounds cannot be trained again; empty
    where they can.
    """

    folder: Path
    config: Config
    data: Dataset
    clients: ClientIndex
    records: Sequence[Record]
    secret: bytes | None
    why_not: str

    @property
    def num_classes(self) -> int:
        """n."""
        return len(self.data.train.class_names)

    def plan(self, round: int) -> RoundPlan:
        """The plan of a round (0-based), as its clients had it."""
        return round_plan(self.config, self.num_classes, round, secret=self.secret)

    def cohort(self, round: int) -> list[int]:
        """Who trained in it."""
        seed, size = self.config.seed, self.config.clients_per_round
        count = self.clients.num_clients
        clients: list[int] = draw_cohort(count, size, seed, round, noise=self.noise).tolist()
        return clients

    @cached_property
    def noise(self) -> Noise | None:
        """What hid a client's part, if anything did."""
        return noise_of(self.config, simulation_key(self.config, self.data))

    def labels(self, client: int) -> np.ndarray:
        """The class of each image of a client."""
        labels_N: np.ndarray = self.data.train.labels[self.clients.examples(client)]
        return labels_N

    def own(self, client: int) -> np.ndarray:
        """Its classes, sorted."""
        return np.unique(self.labels(client))

    def of_class(self, label: int) -> np.ndarray:
        """The images of a class."""
        order_N, sorted_N = self._by_class
        begin, end = np.searchsorted(sorted_N, [label, label + 1])
        return order_N[begin:end]

    @cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray]:
        labels_N = self.data.train.labels
        order_N = np.argsort(labels_N, kind="stable")
        return order_N, labels_N[order_N]


def read_simulated(run: Path, changes: Mapping[str, Any], trust_code: bool) -> SimulatedRun:
    """The run of a folder; arguments and errors as for :func:`fedss.trust.audit.audit`."""
    about = _read_about(run)
    # Nothing is chosen here: the test will do for a run that had to have a validation split.
    told = {**about["config"], **about.get("resolved", {}), "patience": None, **changes}
    config = config_from_dict(told)
    for field, name in code_names(told).items():
        kept = about.get("code", {}).get(field, {})
        check_code(OwnCode(name, kept.get("sha256", "")), trust_code, run)
    secret = _read_secret(run, config, about.get("model", {}).get("secret"))
    data = load_data(config)
    if about.get("data", {}).get("fingerprint") != data_fingerprint(data):
        raise ConfigError(
            f"{run}: expected the images that it was trained on, got others of {config.data!r}; "
            "say where they are (--data-path)"
        )
    records = read_all_records(run / "records.jsonl", finished=False)
    if not records:
        raise RunFolderError(f"{run}: no round of it is recorded yet, so nothing was told")
    why_not = _why_not_trained(about, config, data)
    return SimulatedRun(run, config, data, index_clients(data.train), records, secret, why_not)


def _read_about(run: Path) -> AnyConfig:
    about = read_any_config(run)
    if "data" not in about or "evaluated_at" in about["data"]:
        what = "a model" if "data" not in about else "a federation, whose images are at the sites"
        raise ConfigError(
            f"{run}: expected the folder of a simulated run, got {what}; simulate it with fedss "
            "train to audit it"
        )
    if METHODS[about["config"]["method"]].pooled:
        raise ConfigError(f"{run}: its images were pooled, so there are no clients to attack")
    if sampler := about.get("model", {}).get("sampler"):
        raise ConfigError(
            f"{run}: its sampler {sampler!r} was given in Python, so its requests cannot be "
            "simulated again"
        )
    return about


def _read_secret(run: Path, config: Config, expected: str | None) -> bytes | None:
    """The key of the run's draws, of which ``expected`` is the proof; None: it has none."""
    if expected is None:
        return None
    if config.secret_file is None:
        raise ConfigError(f"{run}: its draws have a secret; name its file (--secret-file)")
    secret = read_secret(Path(config.secret_file), "secret_file")
    if proof(secret) != expected:
        raise ConfigError(
            f"secret_file {config.secret_file}: expected the secret that {run} began with, got "
            "another"
        )
    return draw_key(secret)


def _why_not_trained(about: AnyConfig, config: Config, data: Dataset) -> str:
    model = about.get("model", {})
    if "start" in about:
        return "the run began with the weights of another"
    if model.get("objective"):
        return "its loss was given in Python"
    embedder = build_model(config, data, None)
    same = describe_model(embedder, None, None)["structure"] == model.get("structure")
    return "" if same else "its network was given in Python"


Listener = Callable[[LocalEngine, ServerState, RoundPlan, Sequence[ClientUpdate]], None]
"""Gets the updates of a round, and the state that they are changes of."""


@dataclass(frozen=True)
class _Overheard:
    """An engine whose updates are listened to before the server takes its step."""

    engine: LocalEngine
    listen: Listener

    @property
    def ranks(self) -> Ranks:
        return self.engine.ranks

    def num_clients(self, round: int) -> int:
        return self.engine.num_clients(round)

    def train(
        self, state: ServerState, cohort: np.ndarray, plan: RoundPlan
    ) -> Iterator[ClientUpdate]:
        updates = list(self.engine.train(state, cohort, plan))
        self.listen(self.engine, state, plan, updates)
        return iter(updates)


def train_again(simulated: SimulatedRun, listen: Listener) -> Iterator[tuple[int, bool]]:
    """Train rounds again, from the first on, as the run did.

    Yields:
        How many are done, and whether the loss of the last is the recorded one.
    """
    config, n = simulated.config, simulated.num_classes
    embedder, optimizer = build_model(config, simulated.data, None), server_optimizer(config)
    theta_P = flatten_(embedder).theta_P
    rows = create_class_rows(
        n, embedder.spec.embedding_size, optimizer.of_rows.slots, config.seed, config.row_dtype
    )
    slots = {name: torch.zeros_like(theta_P) for name in optimizer.slots}
    bound = clipping(config)
    state = ServerState(theta_P.clone(), slots, rows, 0, clip=bound.norm if bound else None)
    row_mean: RowMean = resolved(config.row_mean)
    server = Server(
        optimizer,
        config.clients_per_round,
        row_mean,
        QUORUM,
        defence=defence(config),
        noise=simulated.noise,
    )
    with local_engine(
        embedder,
        simulated.clients,
        optimizer,
        wire_format(config, embedder, n),
        config.workers,
        device=compute_device(config),
        precision=config.precision,
        stack=config.stack,
    ) as engine:
        warm_up_(config, engine, embedder, theta_P, rows)
        overheard = _Overheard(engine, listen)
        for record in simulated.records:
            state, updates, _ = run_round(server, overheard, state, simulated.plan(state.round))
            yield state.round, _same_loss(updates, record["loss"])


def _same_loss(updates: Sequence[ClientUpdate], recorded: float | None) -> bool:
    """Whether it is the recorded one; of a private run none is."""
    if recorded is None:
        return True
    loss = sum(update.loss for update in updates) / len(updates)
    return math.isclose(loss, recorded, rel_tol=_SAME, abs_tol=_SAME)
