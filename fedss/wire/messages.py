"""The messages between server and client, how they are encoded, and how many bytes they are.

A message is a safetensors buffer: names, dtypes and shapes in a short JSON header, then the
tensors' bytes. Class ids travel as int32 (int64 from 2^31 classes on). A message about all n rows
carries no ids. How numbers travel, a :class:`WireFormat` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fedss.choices import Precision
from fedss.core.client import Broadcast, ClientUpdate
from fedss.core.features import FeatureSums
from fedss.losses.softmax import ClassSample
from fedss.wire.codec import (
    Encoded,
    Layout,
    decode_backbone,
    decode_payload,
    decode_rows,
    encode_backbone,
    encode_payload,
    encode_rows,
)

Message = Mapping[str, Tensor]


@dataclass(frozen=True)
class WireFormat:
    """How the parts of a message travel, down to the client and up from it.

    Attributes:
        layout: shapes of the backbone's trained parameters, in their order in the flat vector.
        dim: D, the embedding size.
        num_classes: n.
        rows_down, rows_up: precision of class rows and payloads, and of their changes.
        backbone_down, backbone_up: precision of the backbone and of its change.
        moments_rank: symmetric matrices travel as that many eigenvectors and a multiple of the
            identity; None: whole.
    """

    layout: Layout
    dim: int
    num_classes: int
    rows_down: Precision = "float32"
    rows_up: Precision = "float32"
    backbone_down: Precision = "float32"
    backbone_up: Precision = "float32"
    moments_rank: int | None = None


def encode_request(wire: WireFormat, ids_S: Tensor) -> Message:
    """Client to server: the classes it asks for, sorted; nothing tells own from negative.

    Where the server draws negatives, these are its own classes alone.
    """
    if len(ids_S) == wire.num_classes:
        return {}
    return {"ids": ids_S.to(torch.int32 if wire.num_classes < 2**31 else torch.int64)}


def decode_request(wire: WireFormat, message: Message) -> Tensor:
    """The ids in :func:`encode_request`, int64 [S]."""
    ids_S = message.get("ids")
    return torch.arange(wire.num_classes) if ids_S is None else ids_S.long()


def encode_broadcast(wire: WireFormat, sent: Broadcast) -> Message:
    """Server to every client of a round: the backbone, and a method's payload.

    Of whatever name, a payload is made of the rows' moments, and counted as that.
    """
    backbone = encode_backbone(sent.backbone_P, wire.layout, wire.backbone_down, None)
    message = _prefixed("backbone", backbone)
    for name, tensor in sent.payload.items():
        encoded = encode_payload(tensor, wire.rows_down, wire.moments_rank)
        message |= _prefixed(f"moments.{name}", encoded)
    if sent.clip is not None:
        message["clip"] = torch.tensor(sent.clip, dtype=torch.float64)
    return message


def decode_broadcast(wire: WireFormat, message: Message) -> Broadcast:
    """The inverse of :func:`encode_broadcast`, up to rounding."""
    parts = _under("moments", message)
    names = dict.fromkeys(part.rpartition(".")[0] for part in parts)
    payload = {
        name: decode_payload(_under(name, parts), wire.dim, wire.rows_down) for name in names
    }
    backbone = _under("backbone", message)
    clip = float(message["clip"]) if "clip" in message else None
    return Broadcast(decode_backbone(backbone, wire.layout, wire.backbone_down), payload, clip)


def encode_answer(
    wire: WireFormat, ids_S: Tensor, rows_SD: Tensor, dealt: ClassSample | None
) -> Message:
    """Server to client: its class rows; and, if the server drew them, which ones and their q."""
    message = {
        **_prefixed("class_rows", encode_rows(rows_SD, wire.rows_down, None)),
        **encode_request(wire, ids_S),
    }
    if dealt is not None:
        # One number, where all negatives have the same q: the client knows its own classes.
        log_q_M = dealt.log_q_S[~dealt.own_S]
        message["log_q"] = log_q_M[:1] if bool((log_q_M == log_q_M[:1]).all()) else log_q_M
    return message


def decode_answer(wire: WireFormat, message: Message) -> Tensor:
    """The rows in :func:`encode_answer`, [S, D], up to rounding."""
    return decode_rows(_under("class_rows", message), wire.dim, wire.rows_down)


def decode_dealt(wire: WireFormat, message: Message, own_P: np.ndarray) -> ClassSample:
    """The class sample in :func:`encode_answer`, at the client that asked for ``own_P``."""
    ids_S = decode_request(wire, message)
    own_S = torch.isin(ids_S, torch.from_numpy(own_P))
    log_q_S = torch.zeros(len(ids_S))
    log_q_S[~own_S] = message["log_q"]
    return ClassSample(ids_S, log_q_S, own_S)


def encode_update(wire: WireFormat, update: ClientUpdate, rng: np.random.Generator) -> Message:
    """Client to server: its changes, its number of examples and its mean loss; and whether its
    norm was within the largest, where that adapts.

    Numbers are rounded at random, so that their mean over clients is unbiased.
    """
    backbone = encode_backbone(update.backbone_delta_P, wire.layout, wire.backbone_up, rng)
    return {
        **_prefixed("backbone", backbone),
        **_prefixed("class_rows", encode_rows(update.rows_delta_SD, wire.rows_up, rng)),
        "num_examples": torch.tensor(update.num_examples),
        "loss": torch.tensor(update.loss, dtype=torch.float64),
        **({} if update.within is None else {"within": torch.tensor(update.within)}),
        **encode_request(wire, update.ids_S),
    }


def decode_update(wire: WireFormat, message: Message, client: int) -> ClientUpdate:
    """The inverse of :func:`encode_update`, up to rounding."""
    return ClientUpdate(
        client,
        decode_backbone(_under("backbone", message), wire.layout, wire.backbone_up),
        decode_request(wire, message),
        decode_rows(_under("class_rows", message), wire.dim, wire.rows_up),
        int(message["num_examples"]),
        float(message["loss"]),
        within=bool(message["within"]) if "within" in message else None,
    )


def encode_feature_sums(sums: FeatureSums) -> Message:
    """Client to server, before the first round: what it tells of its features."""
    return {
        "factor": sums.factor_RF,
        "ids": sums.ids_P,
        "counts": sums.counts_P,
        "sums": sums.sums_PF,
    }


def decode_feature_sums(message: Message) -> FeatureSums:
    """The inverse of :func:`encode_feature_sums`."""
    return FeatureSums(message["factor"], message["ids"], message["counts"], message["sums"])


def encode_whitening(mean_F: Tensor, axes_FK: Tensor) -> Message:
    """Server to client, once: the whitening of features, :func:`fedss.core.features.rounded`."""
    message: dict[str, Tensor] = {}
    for name, numbers in {"mean": mean_F, "axes": axes_FK}.items():
        largest = numbers.abs().max().clamp_min(1e-30)
        message |= {name: (numbers / largest).half(), f"{name}_largest": largest}
    return message


def decode_whitening(message: Message) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`encode_whitening`, bit for bit."""
    mean_F, axes_FK = (message[n].float() * message[f"{n}_largest"] for n in ("mean", "axes"))
    return mean_F, axes_FK


PARTS = ("backbone", "class_row", "moment")


def traffic(down: Message, request: Message, up: Message) -> dict[str, int]:
    """Bytes of a client's messages in a round, as serialized.

    ``bytes_down`` and ``bytes_up`` (the request and the update) are whole messages; of these,
    ``<part>_bytes_<way>`` are the tensors of each part.
    """
    total = {"bytes_down": encoded_size(down), "bytes_up": encoded_size(request) + encoded_size(up)}
    return total | {
        f"{part}_bytes_{way}": sum(t.nbytes for name, t in message.items() if name.startswith(part))
        for part in PARTS
        for way, message in (("down", down), ("up", up))
    }


def encoded_size(message: Message) -> int:
    """Bytes of the message as serialized: ``len(safetensors.torch.save(message))``."""
    layout = tuple((name, tensor.shape, tensor.dtype) for name, tensor in message.items())
    return _header_size(layout) + sum(tensor.nbytes for tensor in message.values())


@lru_cache(maxsize=4096)
def _header_size(layout: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> int:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout}
    return len(save(tensors)) - sum(tensor.nbytes for tensor in tensors.values())


def _prefixed(prefix: str, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in encoded.items()}


def _under(prefix: str, message: Message) -> Encoded:
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in message.items() if name.startswith(start)}
