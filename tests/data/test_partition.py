"""Partitions: each image at one client, as drawn from the seed and the law that is stated."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedss import Config, ConfigError, DataError, load_data
from fedss.data import Images, deal_images, holdings, parse_partition
from fedss.data.partition import Partition
from fedss.flower.settings import Deployment, write_app


def make_images(labels):
    """Images of these labels at one client; pixels tell them apart."""
    labels = np.asarray(labels, np.int64)
    pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    names = [f"p{i}" for i in range(len(labels))]
    classes = [f"class {i}" for i in range(labels.max() + 1)]
    return Images(pixels, labels, np.zeros(len(labels), np.int64), classes, ["all"], names)


def matrix(images):
    counts = np.zeros((len(images.client_names), len(images.class_names)), np.int64)
    np.add.at(counts, (images.clients, images.labels), 1)
    return counts


@st.composite
def cases(draw):
    """Labels, and a partition that may or may not be possible with them."""
    labels = draw(st.lists(st.integers(0, 9), min_size=1, max_size=60))
    kind = draw(st.sampled_from(["classes", "dirichlet", "class"]))
    clients = draw(st.integers(1, 12))
    if kind == "classes":
        every = draw(st.booleans())
        return labels, Partition(kind, draw(st.integers(1, 10)), clients if every else None)
    if kind == "dirichlet":
        return labels, Partition(kind, draw(st.sampled_from([1e-3, 0.1, 1.0, 50.0, 1e6])), clients)
    return labels, Partition(kind)


def impossible(labels, partition):
    n = len(set(labels))
    if partition.kind == "dirichlet":
        return partition.clients > len(labels)
    if partition.kind == "class":
        return False
    number = partition.clients or n
    # More hands than images in some class: a client may be left without any.
    rare = min(labels.count(label) for label in labels) < -(-number * partition.amount // n)
    return partition.amount > n or number * partition.amount < n or rare


@given(cases(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_each_image_is_at_one_client_and_no_client_is_empty(case, seed, random):
    labels, partition = case
    images = make_images(labels)
    try:
        dealt = deal_images(images, partition, seed)
    except DataError:
        assert impossible(labels, partition)
        return
    assert dealt.pixels is images.pixels
    assert dealt.labels is images.labels
    assert dealt.names is images.names
    counts = matrix(dealt)
    assert counts.sum() == len(labels)
    assert (counts.sum(0) == np.bincount(labels)).all()
    assert (counts.sum(1) > 0).all()
    assert list(dealt.client_names) == sorted(dealt.client_names)
    assert (deal_images(images, partition, seed).clients == dealt.clients).all()

    present = (counts.sum(0) > 0).sum()
    if partition.kind == "classes":
        assert ((counts > 0).sum(1) <= partition.amount).all()
        if partition.clients is None:
            assert ((counts > 0).sum(0) <= 1).all()
            assert len(counts) == -(-present // partition.amount)
    elif partition.kind == "dirichlet":
        assert len(counts) == partition.clients
        assert set(counts.sum(1)) <= {len(labels) // len(counts), -(-len(labels) // len(counts))}
    else:
        assert len(counts) == present
        assert [images.class_names[row.argmax()] for row in counts] == list(dealt.client_names)

    # What a client gets of a class does not depend on which image stands where.
    shuffled = list(labels)
    random.shuffle(shuffled)
    assert (matrix(deal_images(make_images(shuffled), partition, seed)) == counts).all()


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30), st.integers(0, 5))
def test_classes_are_dealt_evenly(n, most, clients, seed):
    if most > n or clients * most < n:
        with pytest.raises(DataError, match="the training has"):
            deal_images(
                make_images(np.arange(n).repeat(40)), Partition("classes", most, clients), seed
            )
        return
    images = make_images(np.arange(n).repeat(400))
    counts = matrix(deal_images(images, Partition("classes", most, clients), seed))
    assert ((counts > 0).sum(1) == most).all()
    holders = (counts > 0).sum(0)
    assert holders.max() - holders.min() <= 1
    for column, number in zip(counts.T, holders, strict=True):
        held = column[column > 0]
        assert held.max() - held.min() <= 1
        assert len(held) == number


def test_another_seed_deals_otherwise():
    images = make_images(np.arange(20).repeat(10))
    for text, clients in (("classes:3", 10), ("classes:3", None), ("dirichlet:1", 10)):
        partition = parse_partition(text, clients)
        assert (
            deal_images(images, partition, 0).clients != deal_images(images, partition, 1).clients
        ).any()


@pytest.mark.parametrize("alpha", [0.05, 1.0, 20.0])
def test_dirichlet_shares_have_the_mean_and_variance_of_their_law(alpha):
    # Counts of a client of m images: E = m p, Var = m p (1 - p) (m + alpha) / (1 + alpha).
    p, m = np.array([0.5, 0.3, 0.15, 0.05]), 20
    images = make_images(np.repeat(np.arange(4), (p * 16_000).astype(int)))
    partition = Partition("dirichlet", alpha, 800)
    # The first quarter of the clients find most images still there, and draw for themselves.
    first = [matrix(deal_images(images, partition, seed))[:200] for seed in range(3)]
    counts = np.concatenate(first)
    variance = m * p * (1 - p) * (m + alpha) / (1 + alpha)
    error = np.sqrt(variance / len(counts))
    assert (np.abs(counts.mean(0) - m * p) < 5 * error).all()
    assert counts.var(0) == pytest.approx(variance, rel=0.3)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_a_class_that_is_used_up_drops_out_of_the_draws(alpha):
    # One image of class 0, three of class 1; the first client draws two. It has none of class 0
    # if both draws are class 1, E q_1^2 = a (a + 1) / (alpha (alpha + 1)) with a = 3 alpha / 4, and
    # else one, since a second one of class 0 is drawn anew.
    a, seeds = 0.75 * alpha, 600
    images, partition = make_images([0, 1, 1, 1]), Partition("dirichlet", alpha, 2)
    found = np.array([matrix(deal_images(images, partition, s))[0, 0] for s in range(seeds)])
    expected = a * (a + 1) / (alpha * (alpha + 1))
    assert (found == 0).mean() == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(seeds))


def test_the_smallest_concentration_gives_a_client_classes_one_after_another():
    # 5 images a class, 50 a client: ten classes, though nearly all of q is below any float.
    images = make_images(np.arange(400).repeat(5))
    counts = matrix(deal_images(images, Partition("dirichlet", 1e-3, 40), 0))
    assert np.median((counts > 0).sum(1)) <= 12
    assert ((counts > 0).sum(1) >= 10).all()


def test_the_largest_concentration_is_an_even_draw():
    images = make_images(np.arange(5).repeat(400))
    counts = matrix(deal_images(images, Partition("dirichlet", 1e6, 4), 0))
    assert np.abs(counts - 100).max() < 50


def test_holdings_are_the_pairs_that_have_an_image():
    rng = np.random.default_rng(0)
    images = make_images(rng.integers(0, 7, 50))
    images = dataclasses.replace(
        images, clients=rng.integers(0, 5, 50), client_names=[f"c{i}" for i in range(5)]
    )
    found = np.zeros((5, 7), np.int64)
    clients, classes, counts = holdings(images)
    found[clients, classes] = counts
    assert (found == matrix(images)).all()
    assert (counts > 0).all()


@pytest.mark.parametrize(
    ("text", "clients", "message"),
    [
        ("classes", None, "expected classes:K, dirichlet:ALPHA or class with .*got 'classes'"),
        ("classes:0", None, "got 'classes:0'"),
        ("classes:2.5", None, "got 'classes:2.5'"),
        ("shards:3", None, "got 'shards:3'"),
        ("dirichlet:0", 5, "expected ALPHA from 0.001 to 1e6, got 'dirichlet:0'"),
        ("dirichlet:1e9", 5, "expected ALPHA from"),
        ("dirichlet:1.2.3", 5, "expected ALPHA from"),
        ("dirichlet:-1", 5, "expected ALPHA from"),
        ("dirichlet:1", None, "dirichlet:1 needs the number of clients"),
        ("class", 5, "each class is a client; expected none, got 5"),
        ("class ", None, "got 'class '"),
        (None, 5, "got 5 without a partition"),
        ("classes:2", 0, "partition_clients: expected at least 1, got 0"),
    ],
)
def test_partitions_that_cannot_be(text, clients, message):
    with pytest.raises(ConfigError, match=message):
        parse_partition(text, clients)
    with pytest.raises(ConfigError, match=message):
        Config(partition=text, partition_clients=clients)


@pytest.mark.parametrize(
    ("labels", "partition", "message"),
    [
        (
            [0, 1, 2],
            Partition("classes", 4),
            "the training has 3 classes; expected K to be at most",
        ),
        ([0, 1, 2], Partition("classes", 1, 2), "classes:1, 2 clients: .*at least 3 clients"),
        ([0, 1, 2], Partition("classes", 1, 4), "1 of 4 clients would have no image"),
        ([0, 1, 2], Partition("dirichlet", 1.0, 4), "expected at most 3, the number of training"),
    ],
)
def test_partitions_that_images_do_not_have(labels, partition, message):
    with pytest.raises(DataError, match=message):
        deal_images(make_images(labels), partition, 0)


def test_images_are_dealt_then_turned_then_split():
    config = Config(glyphs_classes=40, glyphs_clients=8, image_size=12)
    given_clients = load_data(config)
    dealt = load_data(
        dataclasses.replace(config, partition="classes:6", partition_clients=10, client_classes=4)
    )
    assert (dealt.train.labels == given_clients.train.labels).all()
    assert (dealt.train.pixels == given_clients.train.pixels).all()
    # Ten hands of six, each split in two of three.
    assert ((matrix(dealt.train) > 0).sum(1) == 3).all()
    assert dealt.train.client_names[0] == "client 01 part 1"
    turned = load_data(dataclasses.replace(config, partition="class", rotations=True)).train
    assert len(turned.client_names) == len(turned.class_names) == 4 * 32
    assert ((matrix(turned) > 0).sum(1) == 1).all()


@pytest.mark.parametrize(
    "options", [{"partition": "class"}, {"partition": "dirichlet:1", "partition_clients": 9}]
)
def test_sites_read_their_images_as_they_are(options, tmp_path):
    with pytest.raises(ConfigError, match="partition: sites read their images as they are"):
        write_app(tmp_path / "app", Config(**options), Deployment(out="/srv/run"))


def test_an_app_folder_does_not_offer_a_partition(tmp_path):
    text = write_app(
        tmp_path / "app", Config(data="folder"), Deployment(out="/srv/run")
    ).read_text()
    assert "partition" not in text
