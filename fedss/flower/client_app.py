"""A site's side: a Flower ClientApp that reads the site's own images and answers the server.

Flower starts it anew for each message. ``flower-supernode --node-config`` takes:

- ``data``: a folder ``client/class/image``, or a manifest (see :func:`fedss.data.locate`).
- ``site``: a name to put before the names of clients, where other sites have the same ones.
- ``secret-file``: a secret that all sites have and the server has not. Names are sent as
  pseudonyms, and the draws of clients are keyed by it.
- ``own-secret-file``: a secret of this site alone, which then keys the draws in place of the other.
  With ``data``, one of the two is needed.
- ``device``: where to train; cpu by default. ``workers``: threads; all cores by default.
- ``weights``: the file of pretrained weights, if not where the server has it.

Without ``data``, Flower's simulation gives ``partition-id`` and ``num-partitions``: then the site
holds a share of the clients of the data set that the server's configuration names.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedss.config import Config, config_from_dict
from fedss.core.client import ClientUpdate, RoundPlan, client_generator, request_classes
from fedss.core.features import feature_sums
from fedss.data import ClientIndex, Dataset, Images, index_clients, locate
from fedss.data.augment import find_augmentation
from fedss.data.names import composed
from fedss.engines.allocator import keep_freed_memory
from fedss.engines.local import Work, Workers, start_workers
from fedss.errors import ConfigError
from fedss.evaluation.baselines import data_floors
from fedss.evaluation.task import count_classes, embed_task, score
from fedss.flower.messages import (
    Tensors,
    buffer,
    by_client,
    log_line,
    log_traceback,
    of_clients,
    pack,
    unpack,
)
from fedss.flower.registry import digest, row_numbers, token
from fedss.log import show_on_stderr
from fedss.models import Embedder, Whitening, frozen_fingerprint
from fedss.own_code import code_names, find_code
from fedss.secret import draw_key, proof, read_secret
from fedss.training.build import (
    build_model,
    compute_device,
    load_data,
    resolved,
    round_plan,
    wire_format,
)
from fedss.training.floors import frozen_floors
from fedss.wire.downlink import receive
from fedss.wire.messages import (
    WireFormat,
    decode_broadcast,
    decode_whitening,
    encode_feature_sums,
    encode_request,
    encode_update,
)

app = ClientApp()

_NODE_CONFIG = (
    *("data", "site", "secret-file", "own-secret-file", "device", "workers", "weights"),
    *("partition-id", "num-partitions"),
)

Metadata = Mapping[str, Any]
Buffers = Mapping[str, Tensors]
Answer = tuple[dict[str, Any], dict[str, Tensors]]
Handler = Callable[["SiteImages", Metadata, Buffers], Answer]


@dataclass(frozen=True)
class SiteImages:
    """What a site holds, and under which names the server knows it.

    Attributes:
        data: the site's images.
        clients: its training images by client.
        names: of classes and of clients, both sorted, each once; and which secret they were made
            with, empty where they are plain.
        class_of: for each label, the place of its class's name.
        client_of: for each client's name, the number of the client in ``clients``.
        key: of the draws of its clients; None in Flower's simulation, where nobody has secrets.
    """

    data: Dataset
    clients: ClientIndex
    names: dict[str, Any]
    class_of: np.ndarray
    client_of: np.ndarray
    key: bytes | None = field(repr=False)


@app.query("register")
def answer_register(message: Message, context: Context) -> Message:
    """The site's names, to a server that does not know it yet."""
    return _answer(message, context, lambda site, metadata, buffers: (site.names, {}))


@app.query("features")
def answer_features(message: Message, context: Context) -> Message:
    """Before the first round: sums over the features of the site's clients."""
    return _answer(message, context, _features)


@app.query("classes")
def answer_request(message: Message, context: Context) -> Message:
    """Line 2 of Algorithm 1: what the site's clients ask for."""
    return _answer(message, context, _request)


@app.train()
def answer_train(message: Message, context: Context) -> Message:
    """Lines 3 and 4: the site's clients train."""
    return _answer(message, context, _train)


@app.evaluate()
def answer_evaluate(message: Message, context: Context) -> Message:
    """Retrieval among the site's own images."""
    return _answer(message, context, _evaluate)


def _answer(message: Message, context: Context, handler: Handler) -> Message:
    show_on_stderr()  # The process is the app's own.
    try:
        content = _checked(message, context.node_config, handler)
    except Exception as error:
        # Its text may hold names of images or people: it stays in the site's log.
        log_traceback()
        content = pack({"error": "raised", "detail": type(error).__name__})
    return Message(content, reply_to=message)


def _checked(message: Message, node: Mapping[str, Any], handler: Handler) -> RecordDict:
    metadata, buffers = unpack(message)
    ours, theirs, round = version("fedss"), metadata["version"], metadata["round"]
    if "refused" in metadata:
        log_line(f"the server does not let this site take part: {metadata['refused']}")
    if theirs != ours:
        detail = f"the server has fedss {theirs}, the site {ours}"
        log_line(detail)
        return pack({"error": "version", "detail": detail})
    if detail := _other_code(metadata):
        log_line(detail)
        return pack({"error": "code", "detail": detail})
    local = {name: node[name] for name in ("device", "workers", "weights") if name in node}
    config = replace(config_from_dict(metadata["config"]), **local)
    site = _open(config, node)
    stamp = digest(site.names["classes"], site.names["clients"])
    if metadata.get("stamp", stamp) != stamp:
        return pack({"round": round, "changed": site.names})
    reply, parts = handler(site, {**metadata, "config": config}, buffers)
    return pack({"round": round, **reply}, **{name: buffer(of) for name, of in parts.items()})


def _other_code(metadata: Metadata) -> str:
    """What this site lacks of the code that the settings name; nothing of it is imported yet."""
    for name in code_names(metadata["config"]).values():
        theirs = str(metadata.get("code", {}).get(name))
        try:
            ours = find_code(name).sha256
        except ConfigError as error:
            log_line(str(error))
            return f"the settings name {name}, which is not installed at the site"
        if ours != theirs:
            return f"the file of {name} has SHA-256 {theirs:.12} at the server, {ours:.12} here"
    return ""


def _open(config: Config, node: Mapping[str, Any]) -> SiteImages:
    """The site's images, with the names under which the server knows them."""
    for name in node:
        if name not in _NODE_CONFIG:
            expected = ", ".join(_NODE_CONFIG)
            raise ConfigError(f"node-config: {name!r} is unknown; expected {expected}")
    secret, own_secret = (_secret(node, name) for name in ("secret-file", "own-secret-file"))
    if "data" in node:
        if not (secret or own_secret):
            raise ConfigError(
                "node-config: expected secret-file, which all sites share, or own-secret-file, of "
                "this site alone: without a secret the server could repeat what clients draw, and "
                "tell their own classes; make one with: fedss secret FILE"
            )
        name, path = locate(str(node["data"]))
        data = load_data(replace(config, data=name, data_path=str(path)), at_site=True)
    elif "partition-id" in node:
        data = _share(load_data(config), int(node["partition-id"]), int(node["num-partitions"]))
    else:
        raise ConfigError(
            'node-config: expected data="<folder or manifest>", the site\'s images; start '
            "flower-supernode with --node-config 'data=\"/data/photos\"'"
        )
    prefix = f"{node['site']}/" if "site" in node else ""

    def known_as(kind: str, name: str) -> str:
        name = composed(name)  # Names of published sets come as the file system writes them.
        return name if secret is None else token(secret, kind, name)

    images = data.train
    classes = [known_as("class", name) for name in images.class_names]
    clients = [known_as("client", prefix + name) for name in images.client_names]
    if len(set(clients)) < len(clients):
        raise ConfigError("two clients of this site have one name but for outer spaces and accents")
    unique = sorted(set(classes))
    names = {
        "classes": unique,
        "clients": sorted(clients),
        "secret": "" if secret is None else proof(secret),
    }
    rows, places = row_numbers(unique, classes), row_numbers(clients, names["clients"])
    draws = own_secret or secret
    key = draws and draw_key(draws)
    return SiteImages(data, index_clients(images), names, rows, places, key)


def _secret(node: Mapping[str, Any], name: str) -> bytes | None:
    return read_secret(Path(str(node[name])), f"node-config: {name}") if name in node else None


def _share(data: Dataset, part: int, parts: int) -> Dataset:
    """Every ``parts``-th client of a data set, with the classes that these hold."""
    images = data.train
    mine_N = images.clients % parts == part
    labels, labels_N = np.unique(images.labels[mine_N], return_inverse=True)
    clients, clients_N = np.unique(images.clients[mine_N], return_inverse=True)
    if not len(clients):
        raise ConfigError(
            f"the data set has {len(images.client_names)} clients, fewer than the {parts} nodes"
        )
    train = Images(
        images.pixels[mine_N],
        labels_N.astype(np.int64),
        clients_N.astype(np.int64),
        [images.class_names[i] for i in labels.tolist()],
        [images.client_names[i] for i in clients.tolist()],
        [images.names[i] for i in np.flatnonzero(mine_N).tolist()],
    )
    return replace(data, train=train)


def _plan(site: SiteImages, metadata: Metadata, buffers: Buffers) -> tuple[RoundPlan, np.ndarray]:
    """The round's plan, and the class ids (int64) of the site's training images: rows of W."""
    row_of_class = buffers["classes"]["classes"].numpy().astype(np.int64)
    labels_N = row_of_class[site.class_of[site.data.train.labels]]
    n, round = metadata["num_classes"], metadata["round"]
    return round_plan(metadata["config"], n, round, secret=site.key), labels_N


def _each_client(
    site: SiteImages,
    plan: RoundPlan,
    labels_N: np.ndarray,
    listed: Sequence[Sequence[int]],
    do: Callable[[int, np.ndarray], Any],
) -> tuple[dict[int, Any], dict[str, str]]:
    """What ``do(client, its images)`` gives for each; the kind of error for those that fail.

    Classes that were registered in the midst of a round have their rows from the next one on.
    """
    done, failed = {}, {}
    for client, place in listed:
        try:
            example_N = site.clients.examples(int(site.client_of[place]))
            example_N = example_N[labels_N[example_N] < plan.num_classes]
            if not len(example_N):
                raise ValueError("all classes of this client are new in this round")
            done[client] = do(client, example_N)
        except Exception as error:
            log_traceback()
            failed[str(client)] = type(error).__name__
    return done, failed


def _requests(
    site: SiteImages, plan: RoundPlan, wire: WireFormat, labels_N: np.ndarray, listed: Any
) -> tuple[dict[int, Any], dict[str, str]]:
    def ask(client: int, example_N: np.ndarray) -> Tensors:
        return encode_request(wire, request_classes(plan, client, labels_N[example_N]).ids_S)

    return _each_client(site, plan, labels_N, listed, ask)


def _request(site: SiteImages, metadata: Metadata, buffers: Buffers) -> Answer:
    plan, labels_N = _plan(site, metadata, buffers)
    wire = WireFormat((), resolved(metadata["config"].embedding_size), plan.num_classes)
    requests, failed = _requests(site, plan, wire, labels_N, metadata["clients"])
    return {"failed": failed}, {"requests": of_clients(requests)}


def _features(site: SiteImages, metadata: Metadata, buffers: Buffers) -> Answer:
    config, (plan, labels_N) = metadata["config"], _plan(site, metadata, buffers)
    embedder = _model(site, metadata, {})
    wire = wire_format(config, embedder, plan.num_classes)
    backbone_P = decode_broadcast(wire, buffers["broadcast"]).backbone_P
    with _workers(config, embedder, site) as workers:
        inputs = workers.inputs(site.data.train.pixels)

        def tell(client: int, example_N: np.ndarray) -> Tensors:
            features_NF = workers.features_of(backbone_P, inputs[example_N])
            label_N = torch.from_numpy(labels_N[example_N])
            return encode_feature_sums(feature_sums(features_NF, label_N, metadata["by_class"]))

        sums, failed = _each_client(site, plan, labels_N, metadata["clients"], tell)
    return {"failed": failed}, {"sums": of_clients(sums)}


def _model(site: SiteImages, metadata: Metadata, buffers: Buffers) -> Embedder:
    """The model, whose frozen part, which no message holds, is the server's."""
    embedder = build_model(metadata["config"], site.data, None)
    ours, theirs = frozen_fingerprint(embedder), metadata["frozen"]
    if ours != theirs:
        raise ConfigError(
            "weights: what is not trained must be the same at the server and at every site, but "
            f"its fingerprint is {theirs or 'none':.16} at the server and {ours or 'none':.16} "
            "here. Give this site the server's file (--node-config 'weights=\"/path\"'); without "
            "a file, the same versions of torch and timm"
        )
    if isinstance(embedder.whitening, Whitening) and "whitening" in buffers:
        embedder.whitening.set_(*decode_whitening(buffers["whitening"]))
    return embedder


def _train(site: SiteImages, metadata: Metadata, buffers: Buffers) -> Answer:
    config, (plan, labels_N) = metadata["config"], _plan(site, metadata, buffers)
    embedder = _model(site, metadata, buffers)
    wire = wire_format(config, embedder, plan.num_classes)
    sent = decode_broadcast(wire, buffers["broadcast"])
    to_all, answers = buffers["broadcast"], by_client(buffers["answers"])

    def prepare_work(client: int, example_N: np.ndarray) -> Work:
        request = request_classes(plan, client, labels_N[example_N])
        answer = {**to_all, **answers.get(client, {})}
        submodel, sample = receive(wire, request, sent, answer)
        return client, submodel, sample, example_N, labels_N[example_N]

    work, failed = _each_client(site, plan, labels_N, metadata["clients"], prepare_work)
    updates = {}
    with _workers(config, embedder, site) as workers:
        stack = workers.stack
        parts = [list(work.values())[i : i + stack] for i in range(0, len(work), stack)]

        def train_part(part: Sequence[Work]) -> list[ClientUpdate] | Exception:
            try:
                return workers.train(plan, part)
            except Exception as error:
                log_traceback()
                return error

        for part, result in zip(parts, workers.pool.map(train_part, parts), strict=True):
            if isinstance(result, Exception):
                failed |= {str(client): type(result).__name__ for client, *_ in part}
                continue
            for update in result:
                rng = client_generator(plan, "wire", update.client)
                updates[update.client] = encode_update(wire, update, rng)
    coming = replace(plan, round=plan.round + 1)
    requests, _ = _requests(site, coming, wire, labels_N, metadata["next"])
    reply = {"failed": failed, "next": list(requests)}
    return reply, {"updates": of_clients(updates), "requests": of_clients(requests)}


def _workers(
    config: Config, embedder: Embedder, site: SiteImages
) -> AbstractContextManager[Workers]:
    if config.keep_memory:
        keep_freed_memory()
    device = compute_device(config)
    count = config.workers or (torch.get_num_threads() if device.type == "cpu" else 1)
    return start_workers(
        embedder,
        site.data.train.pixels,
        count,
        device=device,
        precision=config.precision,
        stack=config.stack,
        frozen_once=config.cache_activations,
        augmented=find_augmentation(config.augment) is not None,
    )


def _evaluate(site: SiteImages, metadata: Metadata, buffers: Buffers) -> Answer:
    config = metadata["config"]
    task = site.data.test if config.eval_split == "test" else site.data.validation
    if task is None or len(count_classes(task.gallery or task.query)) < 2:
        # Within one class any answer is right.
        return {"metrics": None}, {}
    embedder = _model(site, metadata, buffers)
    wire = replace(wire_format(config, embedder, 1), backbone_down="float32")
    backbone_P = decode_broadcast(wire, buffers["broadcast"]).backbone_P
    with _workers(config, embedder, site) as workers:
        embedded = embed_task(partial(workers.embed, backbone_P), task)
        floors = None
        if not metadata["round"]:
            model = embedder.spec, workers, backbone_P
            floors = data_floors(task) | frozen_floors(config, site.data, task, *model)
    reply: dict[str, Any] = {"metrics": dataclasses.asdict(score(task, *embedded))}
    if floors is not None:
        reply["floors"] = dict(floors.map_at_10)
    return reply, {}
