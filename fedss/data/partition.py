"""Other federations of the same images: other clients, smaller ones, more classes.

Shape suffixes: N images, n classes that have an image, P pairs of a client and a class, O
classes that are not used up.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedss.data.images import Images, LazyNames, count_own_classes, index_clients
from fedss.errors import ConfigError, DataError
from fedss.seeds import generator

_FORMS = "classes:K, dirichlet:ALPHA or class"


@dataclass(frozen=True)
class Partition:
    """Who holds which image, where no one is given, or instead of those who are.

    ``classes``: each client holds at most ``amount`` classes. ``dirichlet``: its classes are drawn
    from a Dirichlet distribution of concentration ``amount``. ``class``: each class is a client.
    ``clients=None``: for ``classes`` as few as hold each class once.
    """

    kind: Literal["classes", "dirichlet", "class"]
    amount: float = 0.0
    clients: int | None = None

    def __str__(self) -> str:
        text = self.kind if self.kind == "class" else f"{self.kind}:{self.amount:g}"
        return text if self.clients is None else f"{text}, {self.clients} clients"


def parse_partition(text: str | None, clients: int | None) -> Partition | None:
    """A partition from ``classes:K``, ``dirichlet:ALPHA`` or ``class``; None from None.

    Raises:
        ConfigError: Another text, a number out of range, or a number of clients that is missing or
            does not go with it.
    """
    if text is None:
        if clients is not None:
            raise ConfigError(
                f"partition_clients: got {clients} without a partition; expected partition to be "
                f"{_FORMS}"
            )
        return None
    match = re.fullmatch(r"classes:([1-9]\d{0,8})|dirichlet:([\d.eE+-]+)|class", text)
    if match is None:
        raise ConfigError(
            f"partition: expected {_FORMS} with a whole number K and a number ALPHA, got {text!r}"
        )
    if clients is not None and clients < 1:
        raise ConfigError(f"partition_clients: expected at least 1, got {clients}")
    if match[1]:
        return Partition("classes", int(match[1]), clients)
    if match[2]:
        try:
            alpha = float(match[2])
        except ValueError:
            alpha = math.nan
        if not 1e-3 <= alpha <= 1e6:
            raise ConfigError(f"partition: expected ALPHA from 0.001 to 1e6, got {text!r}")
        if clients is None:
            raise ConfigError(
                f"partition_clients: {text} needs the number of clients (--partition-clients)"
            )
        return Partition("dirichlet", alpha, clients)
    if clients is not None:
        raise ConfigError(
            f"partition_clients: in the partition 'class' each class is a client; expected none, "
            f"got {clients}"
        )
    return Partition("class")


def deal_images(images: Images, partition: Partition, seed: int) -> Images:
    """The same images, in the same order, at other clients: each at one, none without any.

    - ``classes:K``: the classes are dealt like cards to clients of K classes each, deck after
      shuffled deck, so that all classes are held by as many clients, or one more or less, and no
      client gets a class twice; the images of a class are dealt evenly to those who hold it.
      (Those that get none of it, as it has too few, hold less than K.) Where no number of clients
      is given, there is one deck and each class is at one client. McMahan et al. 2017
      (arXiv 1602.05629, section 3) deal shards of two digits each in this spirit.
    - ``dirichlet:ALPHA``: Hsu, Qi, Brown 2019 (arXiv 1909.06335, section 3). With p the shares of
      the classes in all images, client k draws ``q_k ~ Dirichlet(ALPHA p)``, so
      ``E q_kc = p_c`` and ``Var q_kc = p_c (1 - p_c) / (ALPHA + 1)``, then the classes of its
      images from q_k, clients in turn, all of as many images or one more or less. A class whose
      images are used up drops out of q_k. (Many programs take ALPHA for each class instead of
      ALPHA p_c: theirs is ours divided by the number of classes.)
    - ``class``: a client for each class, with its name.

    How many images of which class a client gets depends on the seed and on how many images
    each class has, and on nothing else. O(N log N), and for ``dirichlet`` O(K n) more.

    Raises:
        DataError: A partition that these images do not have.
    """
    present_n, label_N = np.unique(images.labels, return_inverse=True)
    if partition.kind == "class":
        names = [images.class_names[label] for label in present_n.tolist()]
        return replace(images, clients=label_N.astype(np.int64), client_names=names)
    count_n = np.bincount(label_N)
    number = partition.clients or -(-len(count_n) // int(partition.amount))
    if partition.kind == "classes":
        client_N, class_N = _deal_classes(count_n, int(partition.amount), number, partition, seed)
    else:
        client_N, class_N = _draw_dirichlet(count_n, partition.amount, number, seed)
    # Both sides sorted by class; which of a class's images goes where is drawn.
    shuffled_N = generator(seed, "partition").permutation(len(images))
    of_class_N = shuffled_N[np.argsort(label_N[shuffled_N], kind="stable")]
    clients_N = np.empty(len(images), np.int64)
    clients_N[of_class_N] = client_N[np.argsort(class_N, kind="stable")]
    digits = len(str(number))
    return replace(
        images,
        clients=clients_N,
        # Numbered alike where clients are numbered by sorted names.
        client_names=LazyNames(number, lambda k: f"client {k + 1:0{digits}}"),
    )


def _deal_classes(
    count_n: np.ndarray, most: int, number: int, partition: Partition, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Client and class of each image, [N] both, for ``classes:K``."""
    n = len(count_n)
    if most > n or most * number < n:
        wanted = f"at least {-(-n // most):,} clients, so that each class is at one of them"
        wanted = f"K to be at most {n:,}" if most > n else wanted
        raise DataError(f"partition {partition}: the training has {n:,} classes; expected {wanted}")
    slots = most * number if partition.clients else n
    sizes = [slots // number + (k < slots % number) for k in range(number)]
    rng, deck, hands = generator(seed, "partition", round=1), np.empty(0, np.int64), []
    for size in sizes:
        hand, deck = deck[:size], deck[size:]
        if len(hand) < size:
            fresh = rng.permutation(n)
            held = np.isin(fresh, hand)
            # What this client has from the last deck goes to the bottom of the new one.
            deck = np.concatenate([fresh[~held], fresh[held]])
            more = size - len(hand)
            hand, deck = np.concatenate([hand, deck[:more]]), deck[more:]
        hands.append(hand)
    class_P, client_P = np.concatenate(hands), np.repeat(np.arange(number), sizes)
    client_P = client_P[np.argsort(class_P, kind="stable")]
    holders_n = np.bincount(class_P, minlength=n)
    first_n = np.cumsum(holders_n) - holders_n
    class_N = np.repeat(np.arange(n), count_n)
    rank_N = np.arange(len(class_N)) - np.repeat(np.cumsum(count_n) - count_n, count_n)
    client_N = client_P[first_n[class_N] + rank_N % holders_n[class_N]]
    empty = np.flatnonzero(np.bincount(client_N, minlength=number) == 0)
    if len(empty):
        raise DataError(
            f"partition {partition}: {len(empty):,} of {number:,} clients would have no image: "
            "each of their classes has fewer images than clients to hold it; take fewer clients "
            f"(up to {-(-n // most):,} each class is at one client) or more classes for each"
        )
    return client_N, class_N


def _draw_dirichlet(
    count_n: np.ndarray, alpha: float, number: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Client and class of each image, [N] both, for ``dirichlet:ALPHA``."""
    n, total = len(count_n), int(count_n.sum())
    if number > total:
        raise DataError(
            f"partition_clients: expected at most {total:,}, the number of training images, got "
            f"{number:,}"
        )
    clients, classes, left_n = [], [], count_n.copy()
    shape_n = alpha * count_n / total
    for client in range(number):
        rng = generator(seed, "partition", round=2, client=client)
        # Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms: for small a most of q is below any float,
        # and still decides what comes after classes that are used up.
        log_q_n = np.log(rng.standard_gamma(shape_n + 1)) + np.log1p(-rng.random(n)) / shape_n
        needed, taken_n = total // number + (client < total % number), np.zeros_like(left_n)
        # As if drawn one by one: what a used-up class cannot give is drawn anew from the others.
        while needed:
            open_O = np.flatnonzero(left_n > taken_n)
            weight_O = np.exp(log_q_n[open_O] - log_q_n[open_O].max())
            drawn_O = rng.multinomial(needed, weight_O / weight_O.sum())
            drawn_O = np.minimum(drawn_O, left_n[open_O] - taken_n[open_O])
            taken_n[open_O] += drawn_O
            needed -= int(drawn_O.sum())
        left_n -= taken_n
        held = np.flatnonzero(taken_n)
        classes.append(np.repeat(held, taken_n[held]))
        clients.append(np.full(len(classes[-1]), client))
    return np.concatenate(clients), np.concatenate(classes)


def split_clients(images: Images, max_classes: int, seed: int) -> Images:
    """Split clients so that none holds more than ``max_classes`` (at least 1) classes.

    The classes of a client are dealt at random, in even parts, to as few clients as do; each class
    stays whole. Clients that are small enough stay as they are.
    """
    index, parts_K = index_clients(images), -(-count_own_classes(images) // max_classes)
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
    images of a client are at a client of their own, so that there are four times as many clients,
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
