"""What server and sites tell each other: facts in JSON, tensors in safetensors buffers.

A Flower message carries one configuration record with the facts and one array for each buffer:
Flower stores equal arrays once, so the backbone that all sites get lies at the SuperLink once, and
each array costs a request or more, so what one site alone gets is one buffer.
"""

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from fedss.errors import FedssError

REGISTER, REQUEST, TRAIN, EVALUATE = "query.register", "query.classes", "train", "evaluate"

_FACTS, _BUFFERS = "fedss", "fedss.tensors"


class MessageError(FedssError):
    """A message that cannot be read."""


Tensors = Mapping[str, Tensor]


def pack(facts: Mapping[str, Any], **buffers: Tensors) -> RecordDict:
    """A message's content; buffers without tensors are left out."""
    arrays = {}
    for name, tensors in buffers.items():
        if tensors:
            data = save({key: tensor.clone() for key, tensor in tensors.items()})
            arrays[name] = Array("uint8", (len(data),), "safetensors", data)
    records: dict[str, Any] = {_FACTS: ConfigRecord({"json": json.dumps(facts)})}
    if arrays:
        records[_BUFFERS] = ArrayRecord(arrays)
    return RecordDict(records)


def unpack(content: RecordDict) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The inverse of :func:`pack`: facts, and tensors by buffer.

    Raises:
        MessageError: it was not made by :func:`pack`.
    """
    try:
        facts = json.loads(str(content.config_records[_FACTS]["json"]))
        if not isinstance(facts, dict):
            raise TypeError(f"expected a JSON object, got {type(facts).__name__}")
        arrays = content.array_records.get(_BUFFERS, {})
        return facts, {name: load(array.data) for name, array in arrays.items()}
    # Whatever a broken or malicious sender made of it; safetensors has an exception of its own.
    except Exception as error:
        raise MessageError(f"a message that is not one of fedss ({error})") from error


def by_client(tensors: Tensors) -> dict[int, dict[str, Tensor]]:
    """Each client's part of a buffer in which names begin with ``<client>/``.

    Raises:
        MessageError: a name does not.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        client, slash, name = key.partition("/")
        if not slash or not client.isdecimal():
            raise MessageError(f"expected tensors named <client>/<name>, got {key!r}")
        parts.setdefault(int(client), {})[name] = tensor
    return parts


def of_clients(parts: Mapping[int, Tensors]) -> dict[str, Tensor]:
    """The inverse of :func:`by_client`."""
    return {f"{k}/{name}": tensor for k, part in parts.items() for name, tensor in part.items()}
