"""Other federations of the same pictures: smaller clients, more classes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedss.data.images import Images, LazyNames, index_clients, own_classes
from fedss.seeds import generator


def split_clients(images: Images, max_classes: int, seed: int) -> Images:
    """Split clients so that none holds more than ``max_classes`` classes.

    The classes of a client are dealt at random, in even parts, to as few clients as do; each class
    stays whole. Clients that are small enough stay as they are.

    Args:
        images: pictures, labels, clients.
        max_classes: at least 1.
        seed: of the deal.
    """
    index, parts_K = index_clients(images), -(-own_classes(images) // max_classes)
    first_K = np.cumsum(parts_K) - parts_K
    clients_N = first_K[images.clients]
    for client in np.flatnonzero(parts_K > 1).tolist():
        of_client = index.examples(client)
        classes = np.unique(images.labels[of_client])
        deal = generator(seed, "split clients", client=client).permutation(len(classes))
        part = deal % parts_K[client]
        clients_N[of_client] += part[np.searchsorted(classes, images.labels[of_client])]

    def name(number: int) -> str:
        client = int(np.searchsorted(first_K, number, side="right")) - 1
        part = f" part {number - first_K[client] + 1}" if parts_K[client] > 1 else ""
        return images.client_names[client] + part

    names = LazyNames(int(parts_K.sum()), name)
    return replace(images, clients=clients_N, client_names=names)


def rotate_classes(images: Images) -> Images:
    """Four times the classes: each turned by 0, 90, 180 and 270 degrees is a class of its own.

    As is common with Omniglot (Santoro et al. 2016, arXiv 1605.06065, section 4.1). The turned
    pictures of a client are at a client of their own, so that there are four times as many clients,
    each with as many classes as before.
    """
    pixels = np.concatenate([np.rot90(images.pixels, turns, axes=(2, 3)) for turns in range(4)])
    turns_N = np.repeat(np.arange(4), len(images))

    def names(of: Sequence[str]) -> LazyNames:
        count = len(of)
        return LazyNames(4 * count, lambda i: f"{of[i % count]} turned {90 * (i // count)}")

    return Images(
        pixels,
        np.tile(images.labels, 4) + turns_N * len(images.class_names),
        np.tile(images.clients, 4) + turns_N * len(images.client_names),
        names(images.class_names),
        names(images.client_names),
        names(images.names),
    )
