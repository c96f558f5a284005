"""The messages between server and client, and how many bytes they are.

A message is a safetensors buffer: names, dtypes and shapes in a short JSON header, then the
tensors' bytes. Class ids and counts travel as int64, backbone and rows as float32. A message about
all n rows carries no ids.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from safetensors.torch import save
from torch import Tensor

from fedss.algorithm import ClientUpdate, Submodel

Message = Mapping[str, Tensor]


def request_message(ids_S: Tensor, num_classes: int) -> Message:
    """Client to server: the class ids it asks for, sorted; nothing tells own from negative."""
    return {} if len(ids_S) == num_classes else {"ids": ids_S}


def submodel_message(submodel: Submodel, num_classes: int) -> Message:
    """Server to client: the backbone and the rows it asked for."""
    return {
        "backbone": submodel.backbone_P,
        "class_rows": submodel.rows_SD,
        **request_message(submodel.ids_S, num_classes),
    }


def update_message(update: ClientUpdate, num_classes: int) -> Message:
    """Client to server: the changes of both, its number of examples and its mean loss."""
    return {
        "backbone": update.backbone_delta_P,
        "class_rows": update.rows_delta_SD,
        "num_examples": torch.tensor(update.num_examples),
        "loss": torch.tensor(update.loss, dtype=torch.float64),
        **request_message(update.ids_S, num_classes),
    }


def encoded_size(message: Message) -> int:
    """Bytes of the message as serialised: ``len(safetensors.torch.save(message))``."""
    content = sum(tensor.nbytes for tensor in message.values())
    return content + _header_size(
        tuple((name, tensor.shape, tensor.dtype) for name, tensor in message.items())
    )


@lru_cache(maxsize=4096)
def _header_size(layout: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> int:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout}
    return len(save(tensors)) - sum(tensor.nbytes for tensor in tensors.values())
