"""What is in a data set, and what each method would move: before any training."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedss.choices import RowRequests
from fedss.config import Config
from fedss.core.client import (
    Broadcast,
    ClientUpdate,
    RoundPlan,
    limit_own_classes,
    num_negatives,
    shared_classes,
)
from fedss.data import (
    Dataset,
    RetrievalTask,
    count_own_classes,
    data_fingerprint,
    seen_classes,
)
from fedss.evaluation.intervals import weakness
from fedss.evaluation.task import count_classes
from fedss.losses.methods import METHODS
from fedss.losses.softmax import ClassSample, Objective
from fedss.models import Embedder, frozen_fingerprint
from fedss.runs.about import DataFacts
from fedss.sampling.samplers import Sampler
from fedss.seeds import generator
from fedss.settings import problem_of, resolve
from fedss.text import counted
from fedss.training.build import (
    num_parameters,
    round_plan,
    sample_size,
    task_in_training,
    wire_format,
)
from fedss.training.objective import objective_name
from fedss.training.private import check_private, outlook
from fedss.wire.messages import (
    WireFormat,
    encode_answer,
    encode_broadcast,
    encode_request,
    encode_update,
    traffic,
)


def describe(config: Config, data: Dataset) -> DataFacts:
    """What is in a data set, as a run writes it down."""
    images, own_K = data.train, count_own_classes(data.train)
    untested = data.test is None and config.eval_split == "test"
    task = None if untested else task_in_training(config, data)
    return {
        "name": data.name,
        "fingerprint": data_fingerprint(data),
        "train_images": len(images),
        "train_classes": len(images.class_names),
        "train_clients": len(images.client_names),
        "own_classes": [int(own_K.min()), float(np.median(own_K)), int(own_K.max())],
        "test_queries": 0 if task is None else len(task.query),
        "test_gallery": None if task is None or task.gallery is None else len(task.gallery),
        "test_classes": 0 if task is None else len(np.unique(task.query.labels)),
        "test_classes_seen": seen_classes(data),
        "image_shape": list(images.pixels.shape[1:]),
        "skipped_pictures": len(data.skipped),
        "unpaired_pictures": len(data.unpaired),
    }


def overview(config: Config, data: Dataset) -> list[str]:
    """What there is to train on and to test with, in three lines of up to 80 columns."""
    about, test = describe(config, data), task_in_training(config, data)
    channels, height, width = about["image_shape"]
    name = data.name if len(data.name) <= 20 else f"{data.name[:19]}…"
    low, median, high = about["own_classes"]
    own = f"{low}" if low == high else f"{low} to {high}, median {median:g}"
    images = counted(about["train_images"], "image")
    images += f" of {counted(about['train_classes'], 'class')}"
    return [
        f"data     {name}: {images}, {width} x {height} x {channels}",
        f"clients  {about['train_clients']:,}; own classes of a client: {own}",
        f"test     {_tested(config, data, test)}",
    ]


def _tested(config: Config, data: Dataset, test: RetrievalTask | None) -> str:
    if test is None:
        return "none: no class is held out (test_classes 0)"
    gallery = "the others" if test.gallery is None else counted(len(test.gallery), "gallery image")
    seen, count = 0, len(np.unique(test.query.labels))
    if config.eval_split == "test":
        seen = seen_classes(data)
    classes = "one class" if count == 1 else counted(count, "class")
    held_out = f"{seen:,} of them trained on" if seen else "all held out"
    return f"{counted(len(test.query), 'query')} of {classes}, {held_out}; each among {gallery}"


def why_not_own(run: str, data: DataFacts, name: str) -> str:
    """Why a run folder is not judged on the images that its configuration names; and what to do.

    ``data`` is what its ``config.json`` says of them, ``name`` what the data set is called now.
    """
    if "evaluated_at" in data:
        why = "its images are at the sites, or at the server"
    elif data.get("name") != name:
        why = f"it was trained on {data.get('name')!r}, given as data=, not on {name!r}"
    else:
        why = f"the images of {name!r} are not those that it was trained and tested on any more"
    return (
        f"{run}: no images of its own to judge it on: {why}. Name the images to judge it on "
        "(--data, --data-path), or use fedss.evaluate in Python"
    )


def notes(config: Config, data: Dataset) -> list[str]:
    """What is easily overlooked in a run; each in a line of up to 80 columns."""
    classes, own_K = len(data.train.class_names), count_own_classes(data.train)
    told, _ = resolve(config, problem_of(data))
    size = sample_size(told, classes)
    task = task_in_training(config, data)
    weak = "" if task is None else weakness(len(count_classes(task.query)))
    lines = [weak] if weak else []
    if METHODS[config.method].negatives == "sampled":
        # Of a set that is common to all, own classes are a part.
        own_K = own_K * (config.requests != "common")
        crowded = int((2 * own_K > size).sum())
        if size >= classes:
            lines.append(f"|S| = {size} is all of the {classes} classes: this is the full softmax")
        elif crowded:
            lines.append(
                f"own classes fill more than half of |S| = {size} at {crowded:,} of "
                f"{len(own_K):,} clients"
            )
    if METHODS[config.method].local_rows and (alone := int((own_K == 1).sum())):
        lines.append(
            f"one class at {alone:,} of {len(own_K):,} clients, which with {config.method} learn "
            "nothing"
        )
    check_private(told, len(data.train.client_names))
    return [*lines, *outlook(told, len(data.train.client_names))]


_OF_SERVER_ROWS = ("rows_init", "row_mean", "normalize_rows", "row_dtype", "row_store")


def unused_settings(config: Config) -> set[str]:
    """Settings of another method, or of sampling, that were changed for nothing."""
    method, usual = METHODS[config.method], Config()
    groups = {
        ("sampler", "correction"): method.negatives == "sampled",
        ("cover",): method.negatives == "cover",
        ("moments_rank",): method.moments,
        _OF_SERVER_ROWS: not method.local_rows,
        **{other.server_settings: other.name == method.name for other in METHODS.values()},
    }
    unused = {name for names, used in groups.items() if not used for name in names}
    return {name for name in unused if getattr(config, name) != getattr(usual, name)}


def describe_model(
    embedder: Embedder,
    sampler: Sampler | None,
    objective: Objective | None,
    start: str | None = None,
) -> dict[str, Any]:
    """A run's record of its model's structure, initial and frozen weights, sampler and loss."""
    shapes = [(name, tuple(p.shape)) for name, p in embedder.named_parameters()]
    return {
        "backbone": type(embedder.backbone).__name__,
        "parameters": num_parameters(embedder),
        "structure": hashlib.sha256(f"{embedder}{shapes}".encode()).hexdigest()[:16],
        "weights_file": embedder.spec.weights,
        "frozen": frozen_fingerprint(embedder),
        "sampler": sampler and sampler.name,
        "objective": objective and objective_name(objective),
        # Of the model of another run, from which it starts.
        **({} if start is None else {"start": start}),
    }


@dataclass(frozen=True)
class Cost:
    """What a method moves each way per client and round, on average over clients.

    ``bytes_down`` and ``bytes_up`` are whole messages as serialized, ``row_bytes`` the class rows
    and moments going down; None where images are pooled.
    """

    method: str
    class_rows: float
    share: float
    row_bytes: float | None
    bytes_down: float | None
    bytes_up: float | None


def costs(config: Config, data: Dataset, embedder: Embedder) -> list[Cost]:
    """What each method would move, worked out on messages of zeros, before any training.

    Raises:
        ConfigError: ``sample_size`` is above the number of classes.
    """
    num_classes = len(data.train.class_names)
    own, clients = np.unique(count_own_classes(data.train), return_counts=True)
    result = []
    for method in METHODS.values():
        requests: RowRequests = config.requests if method.negatives == "sampled" else "own"
        of_method = replace(config, method=method.name, requests=requests)
        of_method, _ = resolve(of_method, problem_of(data))
        plan = round_plan(of_method, num_classes, 0)
        wire = wire_format(of_method, embedder, num_classes)
        sent = [message_bytes(plan, wire, int(count), num_parameters(embedder)) for count in own]
        mean = {
            name: float(np.average([m[name] for m in sent], weights=clients)) for name in sent[0]
        }
        rows = mean["class_rows"]
        row_bytes = mean["class_row_bytes_down"] + mean["moment_bytes_down"]
        sent_bytes = (row_bytes, mean["bytes_down"], mean["bytes_up"])
        sizes = (None, None, None) if method.pooled else sent_bytes
        result.append(Cost(method.name, rows, rows / num_classes, *sizes))
    return result


def message_bytes(
    plan: RoundPlan, wire: WireFormat, num_own: int, parameters: int
) -> dict[str, int]:
    """Bytes of the messages of a client with that many own classes, and its class rows."""
    own_P, shared_R = limit_own_classes(plan, 0, np.arange(num_own)), shared_classes(plan)
    count = len(own_P) + num_negatives(plan, len(own_P)) if shared_R is None else len(shared_R)
    ids_S, dim, clipping = torch.arange(count), wire.dim, plan.clipping
    zeros_SD, backbone_P = torch.zeros(count, dim), torch.zeros(parameters)
    payload = plan.method.payload(torch.eye(dim + 1).double()) if plan.method.payload else {}
    dealt, requested = None, ids_S
    if plan.sampler.drawn_by == "server":
        requested = ids_S[: len(own_P)]
        # Dummies: one q for all, or one each.
        log_q_S = -ids_S.float() if plan.sampler.q_each else -torch.ones(count)
        dealt = ClassSample(ids_S, log_q_S, ids_S < len(own_P))
    down = {
        **encode_broadcast(
            wire, Broadcast(backbone_P, payload, clipping.norm if clipping else None)
        ),
        **encode_answer(wire, ids_S, zeros_SD, dealt),
    }
    update = ClientUpdate(0, backbone_P, ids_S, zeros_SD, 1, 0.0)
    if clipping is not None and clipping.adaptive:
        update = replace(update, within=True)
    up = encode_update(wire, update, generator(0, "costs"))
    return {**traffic(down, encode_request(wire, requested), up), "class_rows": count}
