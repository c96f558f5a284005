"""Checks of replies, before anything is decoded or added up: sites may be broken or malicious.

What is not exactly as asked for is refused whole for the client that it concerns: every check
raises a :class:`RefusedError`.
"""

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

import torch
from flwr.app import Message
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedss.core.client import ClientUpdate, RoundPlan, shared_classes
from fedss.core.engine import Failure
from fedss.core.features import FeatureSums
from fedss.evaluation.intervals import floor_order
from fedss.evaluation.retrieval import RetrievalMetrics
from fedss.flower.messages import MessageError, Tensors, by_client, unpack
from fedss.flower.registry import Registry, digest
from fedss.sampling.samplers import own_budget
from fedss.seeds import generator
from fedss.text import printable
from fedss.wire.messages import (
    WireFormat,
    decode_feature_sums,
    decode_request,
    decode_update,
    encode_request,
    encode_update,
)

MOST_EXAMPLES = 2**31
"""Most images of a client: the weight of more would drown all others."""

_ERRORS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "not installed",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "raised",
    ErrorCode.MESSAGE_UNAVAILABLE: "lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "lost",
    ErrorCode.NODE_UNAVAILABLE: "offline",
    ErrorCode.INVALID_FAB: "not installed",
    ErrorCode.CLIENT_APP_CRASHED: "died",
}


class RefusedError(Exception):
    """A reply, or a client's part of it, that is not used: the reason in a word, and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        # It is shown on a terminal, and may come from a site.
        self.reason, self.detail = reason, printable(detail[:300])

    def of(self, client: int) -> Failure:
        """As the failure of a client."""
        return Failure(client, self.reason, self.detail)


Parts = dict[int, dict[str, Tensor]]
"""Each client's part of a buffer."""


def read_reply(
    reply: "Message | RefusedError", round: int
) -> tuple[dict[str, Any], dict[str, Parts]]:
    """Metadata of a reply, and what its buffers have for each client."""
    if isinstance(reply, RefusedError):
        raise reply
    if reply.has_error():
        # Flower's own text may hold a traceback of the site: it stays out of records.
        code = reply.error.code
        raise RefusedError(_ERRORS.get(code, "error"), f"Flower's error code {code}")
    try:
        metadata, buffers = unpack(reply)
        parts = {name: by_client(tensors) for name, tensors in buffers.items()}
    except MessageError as error:
        raise RefusedError("damaged", str(error)) from error
    if not isinstance(metadata.get("changed", {}), dict):
        raise RefusedError("damaged", "expected the names of a site")
    if "error" in metadata:
        reason = metadata["error"] if metadata["error"] in ("version", "code") else "raised"
        raise RefusedError(reason, _detail(metadata.get("detail")))
    if metadata.get("round") != round:
        raise RefusedError("stale", f"not a reply to round {round + 1}")
    return metadata, parts


def _detail(detail: Any) -> str:
    return f"{detail[:200] if isinstance(detail, str) else 'no detail'}; the site's log has more"


def part_of(metadata: dict[str, Any], parts: Parts, client: int) -> Tensors:
    """A client's part of a reply."""
    failed = metadata.get("failed")
    if isinstance(failed, dict) and str(client) in failed:
        raise RefusedError("raised", _detail(failed[str(client)]))
    return parts.get(client, {})


def check_request(wire: WireFormat, plan: RoundPlan, message: Tensors) -> Tensor:
    """The ids that a client asks for: sorted, unique, of this table, and no more than its part."""
    n, size, shared_R = plan.num_classes, plan.sample_size, shared_classes(plan)
    if shared_R is not None:
        expected = encode_request(wire, shared_R)
        if message.keys() != expected.keys() or not all(
            message[name].dtype == ids_R.dtype and torch.equal(message[name], ids_R)
            for name, ids_R in expected.items()
        ):
            raise RefusedError("request", "expected the classes that all clients ask for")
        return shared_R
    at_server = plan.sampler.drawn_by == "server"
    most = {
        "all": n,
        "sampled": own_budget(size, n) if at_server else size,
        "cover": size if at_server else size + plan.cover,
        "none": size,
    }[plan.method.negatives]
    whole = message.keys() == set() and most >= n
    if not whole:
        kind = torch.int32 if n < 2**31 else torch.int64
        ids_S = message.get("ids")
        if message.keys() != {"ids"} or ids_S is None or ids_S.dtype != kind or ids_S.ndim != 1:
            raise RefusedError("request", "expected a list of class ids")
        if not 0 < len(ids_S) <= most:
            raise RefusedError("request", f"expected 1 to {most} class ids, got {len(ids_S)}")
        if bool((ids_S.diff() <= 0).any()) or int(ids_S[0]) < 0 or int(ids_S[-1]) >= n:
            raise RefusedError("request", f"expected sorted, unique class ids from 0 to {n - 1}")
    return decode_request(wire, message)


def check_update(
    wire: WireFormat, plan: RoundPlan, client: int, ids_S: Tensor, message: Tensors
) -> ClientUpdate:
    """A client's update, if it is one for these rows: names, dtypes, shapes, ids, numbers."""
    # What encoded tensors look like depends on shapes alone.
    zeros_P = torch.zeros(sum(shape.numel() for shape in wire.layout))
    zeros = ClientUpdate(client, zeros_P, ids_S, torch.zeros(len(ids_S), wire.dim), 1, 0.0)
    if plan.clipping is not None and plan.clipping.adaptive:
        zeros = replace(zeros, within=True)
    expected = encode_update(wire, zeros, generator(0, "template"))
    if message.keys() != expected.keys():
        differ = ", ".join(sorted(message.keys() ^ expected.keys())[:4])
        # A message about all n rows carries no ids, any other does.
        raise RefusedError("ids" if differ == "ids" else "damaged", f"missing or extra: {differ}")
    if "ids" in message and (
        message["ids"].dtype != expected["ids"].dtype
        or not torch.equal(message["ids"], expected["ids"])
    ):
        raise RefusedError("ids", "not the ids that were asked for")
    for name, tensor in expected.items():
        came = message[name]
        if came.dtype != tensor.dtype or came.shape != tensor.shape:
            raise RefusedError(
                "shape",
                f"{name}: expected {tensor.dtype} {list(tensor.shape)}, "
                f"got {came.dtype} {list(came.shape)}",
            )
    num_examples = int(message["num_examples"])
    if not 0 < num_examples <= MOST_EXAMPLES:
        raise RefusedError("examples", f"expected 1 or more images, got {num_examples}")
    update = decode_update(wire, message, client)
    numbers = [update.backbone_delta_P, update.rows_delta_SD]
    # A loss is a float32 there: of larger ones the mean might not be finite.
    usual = abs(update.loss) <= torch.finfo(torch.float32).max
    if not usual or not all(bool(t.isfinite().all()) for t in numbers):
        raise RefusedError("not finite", f"a loss of {update.loss}, or a change that is not finite")
    return update


def check_feature_sums(
    num_classes: int, features: int, by_class: bool, message: Tensors
) -> FeatureSums:
    """What a client tells of its features, if it can be the sums of vectors of length 1."""
    kinds = {
        "factor": torch.float32,
        "ids": torch.int64,
        "counts": torch.int64,
        "sums": torch.float32,
    }
    if message.keys() != kinds.keys() or any(message[n].dtype != kinds[n] for n in kinds):
        raise RefusedError("damaged", f"expected the tensors {', '.join(kinds)}")
    sums = decode_feature_sums(message)
    factor_RF, ids_P, counts_P, sums_PF = sums.factor_RF, sums.ids_P, sums.counts_P, sums.sums_PF
    if ids_P.ndim != 1:
        raise RefusedError("shape", "expected a list of class ids")
    groups = len(ids_P) if by_class else 1
    if (
        (factor_RF.ndim, len(ids_P) > 0) != (2, by_class)
        or factor_RF.shape[1] != features
        or not 0 < len(factor_RF) <= features
        or counts_P.shape != (groups,)
        or sums_PF.shape != (groups, features)
    ):
        raise RefusedError("shape", f"expected sums of features of {features} numbers")
    if by_class and (
        int(ids_P[0]) < 0 or int(ids_P[-1]) >= num_classes or bool((ids_P.diff() <= 0).any())
    ):
        raise RefusedError("ids", f"expected sorted, unique class ids from 0 to {num_classes - 1}")
    if not 0 < int(counts_P.min()) <= int(counts_P.max()) <= MOST_EXAMPLES:
        raise RefusedError("examples", "expected 1 or more images of each class")
    # Of n vectors of length 1, or 0, the squares add up to n at most, and no sum is longer than n.
    squares, count = factor_RF.double().square().sum(), counts_P.sum()
    longest_P = sums_PF.double().norm(dim=1) / counts_P
    if not bool(squares / count < 1.01) or not bool((longest_P < 1.01).all()):
        raise RefusedError("not finite", "expected sums of vectors of length 1")
    return sums


def check_registration(
    metadata: dict[str, Any], registry: Registry, taken: Collection[str]
) -> tuple[list[str], list[str], str]:
    """A site's names of classes and of clients, none of them ``taken``, and their fingerprint."""
    classes, clients = _names(metadata, "classes"), _names(metadata, "clients")
    if not isinstance(metadata.get("secret"), str):
        raise RefusedError("damaged", "expected which secret the names were made with")
    if registry.secret is not None and metadata.get("secret") != registry.secret:
        raise RefusedError(
            "secret",
            "its names were made with another secret-file than those of the other sites (or only "
            "one of them has any): give all sites the same, or none",
        )
    both = set(clients).intersection(taken)
    if both:
        raise RefusedError(
            "clients",
            f"another site has {len(both)} of its clients too, such as {min(both)!r}: give each "
            "site a name of its own in its node-config (site=...), or a client one site",
        )
    return classes, clients, digest(classes, clients)


def _names(metadata: dict[str, Any], kind: str) -> list[str]:
    names = metadata.get(kind)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RefusedError("damaged", f"expected a list of {kind}")
    if not names or names != sorted(set(names)):
        raise RefusedError("damaged", f"expected {kind} in sorted order, each once")
    return names


def check_metrics(metadata: dict[str, Any]) -> dict[str, float] | None:
    """Retrieval figures of a site; None if it has no images to tell by."""
    metrics = metadata.get("metrics")
    if metrics is None:
        return None
    names = {field.name for field in fields(RetrievalMetrics)}

    def valid(name: str, value: Any) -> bool:
        if name in ("queries", "classes", "skipped"):
            return type(value) is int and 0 <= value <= MOST_EXAMPLES
        return isinstance(value, int | float) and 0 <= value <= 1

    if (
        not isinstance(metrics, dict)
        or metrics.keys() != names
        or not all(valid(name, value) for name, value in metrics.items())
    ):
        raise RefusedError("damaged", "expected retrieval figures from 0 to 1")
    return metrics


def check_floors(metadata: dict[str, Any]) -> dict[str, float]:
    """What a site's test gives for nothing; see `fedss.evaluation.baselines`."""
    floors = metadata.get("floors", {})
    if (
        not isinstance(floors, dict)
        or len(floor_order(floors)) < len(floors)
        or not all(isinstance(value, float) and 0 <= value <= 1 for value in floors.values())
    ):
        raise RefusedError("damaged", "expected floors from 0 to 1")
    return floors
