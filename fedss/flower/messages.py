"""Messages of server and sites: metadata in JSON, tensors in safetensors buffers.

Each buffer is one of Flower's arrays. Flower stores equal arrays once, so the SuperLink has the
backbone, which all sites get, once; and each array costs requests, so what one site alone gets is
one buffer.
"""

import json
import logging
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from fedss.errors import FedssError
from fedss.text import printable

REGISTER, FEATURES, REQUEST = "query.register", "query.features", "query.classes"
TRAIN, EVALUATE = "train", "evaluate"

Tensors = Mapping[str, Tensor]

_LOG = logging.getLogger("fedss.flower")
_METADATA, _BUFFERS = "fedss", "fedss.tensors"
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")


class Nodes(Protocol):
    """What fedss needs of Flower's ``Grid``: its way to the nodes."""

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are online."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their ids, by which replies are fetched."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that have come, each once."""


class MessageError(FedssError):
    """A message that cannot be read."""


def buffer(tensors: Tensors) -> Array:
    """Tensors as one Flower array."""
    # Copies: safetensors refuses tensors that share memory.
    data = save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    return Array("uint8", (len(data),), "safetensors", data)


def pack(metadata: Mapping[str, Any], **buffers: Array) -> RecordDict:
    """A message's content."""
    return RecordDict(
        {_METADATA: ConfigRecord({"json": json.dumps(metadata)}), _BUFFERS: ArrayRecord(buffers)}
    )


def unpack(message: Message) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The inverse of :func:`pack`: a message's metadata, and its tensors by buffer.

    Raises:
        MessageError: it was not made by :func:`pack`.
    """
    try:
        content = message.content
        metadata = json.loads(str(content.config_records[_METADATA]["json"]))
        if not isinstance(metadata, dict):
            raise TypeError(f"expected a JSON object, got a {type(metadata).__name__}")
        arrays = content.array_records[_BUFFERS]
        return metadata, {name: load(array.data) for name, array in arrays.items()}
    # A broken or malicious sender can make it fail in many ways.
    except Exception as error:
        raise MessageError(f"not a message of fedss ({error!r})") from error


def of_clients(parts: Mapping[int, Tensors]) -> dict[str, Tensor]:
    """One set of tensors out of one for each client; names begin with ``<client>/``."""
    return {f"{k}/{name}": tensor for k, part in parts.items() for name, tensor in part.items()}


def by_client(tensors: Tensors) -> dict[int, dict[str, Tensor]]:
    """The inverse of :func:`of_clients`; a client without tensors is left out.

    Raises:
        MessageError: a name does not begin so.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        client, slash, name = key.partition("/")
        if not slash or not _NUMBER.fullmatch(client):
            raise MessageError(f"expected tensors named <client>/<name>, got {key!r}")
        parts.setdefault(int(client), {})[name] = tensor
    return parts


def log_line(text: str) -> None:
    """A line in the log, whatever the text has in it."""
    _LOG.info(printable(text))


def log_traceback() -> None:
    """The error that is being handled, and where it came from, in the log."""
    lines = map(printable, traceback.format_exc().splitlines())
    _LOG.error("\n".join(["an error, of which the server is told the kind alone", *lines]))
