"""Other federations of the same pictures: smaller clients, more classes."""

from dataclasses import replace

import numpy as np

from fedss.data.images import Images, index_clients
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
    part_N, clients_N = np.zeros(len(images), np.int64), images.clients.copy()
    names: list[str] = []
    index = index_clients(images)
    for client, name in enumerate(images.client_names):
        of_client = index.examples(client)
        classes = np.unique(images.labels[of_client])
        parts = -(-len(classes) // max_classes)
        dealt = generator(seed, "split clients", client=client).permutation(len(classes)) % parts
        part_N[of_client] = dealt[np.searchsorted(classes, images.labels[of_client])]
        clients_N[of_client] = len(names) + part_N[of_client]
        names += [name] if parts == 1 else [f"{name} part {part + 1}" for part in range(parts)]
    return replace(images, clients=clients_N, client_names=names)


def rotate_classes(images: Images) -> Images:
    """Four times the classes: each turned by 0, 90, 180 and 270 degrees is a class of its own.

    As is common with Omniglot (Santoro et al. 2016, arXiv 1605.06065, section 4.1). The turned
    pictures of a client are at a client of their own, so that there are four times as many clients,
    each with as many classes as before.
    """
    pixels = np.concatenate([np.rot90(images.pixels, turns, axes=(2, 3)) for turns in range(4)])
    turns_N = np.repeat(np.arange(4), len(images))

    def names(of: list[str]) -> list[str]:
        return [f"{name} turned {90 * turns}" for turns in range(4) for name in of]

    return Images(
        pixels,
        np.tile(images.labels, 4) + turns_N * len(images.class_names),
        np.tile(images.clients, 4) + turns_N * len(images.client_names),
        names(list(images.class_names)),
        names(list(images.client_names)),
        names(list(images.names)),
    )
