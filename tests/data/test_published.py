"""Published data sets, each as a small made-up copy in the original layout."""

import os
import pickle
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fedss import DataError, load_dataset
from fedss.cli import main
from fedss.data import count_own_classes
from fedss.data.manifest import ListedImage
from fedss.data.sets.products import read_products
from fedss.data.sets.published import Counts, published_listing
from fedss.data.sets.user_split import read_gld23k

SHADES = {}


def photograph(path, shade=None):
    """An image of one shade of gray, in colour: its pixels say which file it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = SHADES.setdefault(str(path), (len(SHADES) * 37) % 256) if shade is None else shade
    Image.new("RGB", (9, 9), (shade,) * 3).save(path, format="PNG")


def load(name, root, tmp_path, **options):
    return load_dataset(name, root, cache=tmp_path / "cache", image_size=8, **options)


def held(images):
    """(client, class, file) of each image, after a look at its pixels."""
    if images is None:
        return []
    clients = [images.client_names[k] for k in images.clients.tolist()]
    labels = [images.class_names[label] for label in images.labels.tolist()]
    return sorted(zip(clients, labels, images.names, strict=True))


def same_pixels(images, root):
    assert images.pixels.shape[1:] == (3, 8, 8)
    for pixels, name in zip(images.pixels, images.names, strict=True):
        assert (pixels == SHADES[str(root / name)]).all(), name
    return True


# Landmarks-User-160k and gld23k


TRAIN = [("7", "a1b2c3", "3"), ("7", "a1d4e5", "0"), ("12", "0123ab", "3"), ("12", "012fff", "5")]
TEST = [("ffaa00", "3"), ("ffaa01", "3"), ("eeaa02", "0")]


def landmarks(root, names, nested, folder=""):
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    train = [f"{user},{image},{label}" for user, image, label in TRAIN]
    test = [f"{image},{label}" for image, label in TEST]
    (place / names[0]).write_text("\n".join(["user_id,image_id,class", *train]) + "\n")
    (place / names[1]).write_text("\n".join(["image_id,class", *test]) + "\n")

    def file(image):
        return f"train/{'/'.join(image[:3])}/{image}.jpg" if nested else f"images/{image}.jpg"

    for image in [row[1] for row in TRAIN] + [row[0] for row in TEST]:
        photograph(root / file(image))
    return file


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("name", "names", "folder"),
    [
        ("landmarks-user-160k", ("federated_train.csv", "test.csv"), "landmarks-user-160k"),
        ("landmarks-user-160k", ("federated_train.csv", "test.csv"), ""),
        ("gld23k", ("mini_gld_train_split.csv", "mini_gld_test.csv"), ""),
    ],
)
def test_landmarks(tmp_path, name, names, folder, nested):
    root = tmp_path / "data"
    file = landmarks(root, names, nested, folder)
    data = load(name, root, tmp_path)
    assert held(data.train) == sorted((user, label, file(image)) for user, image, label in TRAIN)
    assert sorted(data.test.query.names) == sorted(file(image) for image, _ in TEST[:2])
    assert data.test.query.class_names == ["3"]
    # Nobody can mend a published list: what cannot be found is left out and named.
    assert data.unpaired == (file("eeaa02"),)
    assert same_pixels(data.train, root)
    assert same_pixels(data.test.query, root)
    clients = 1262 if "160k" in name else 233
    assert f"train clients: the lists have 2, published are {clients:,}" in data.remarks


def test_images_that_a_published_list_names_but_nobody_unpacked(tmp_path):
    file = landmarks(tmp_path, ("federated_train.csv", "test.csv"), True)
    (tmp_path / file("a1d4e5")).unlink()
    (tmp_path / file("ffaa00")).unlink()
    with pytest.raises(
        DataError,
        match=r"federated_train\.csv, line 3: no such image file: .*a1d4e5\.jpg "
        r"\(2 of 7 are missing\)\. Unpack the rest",
    ):
        load("landmarks-user-160k", tmp_path, tmp_path)
    data = load("landmarks-user-160k", tmp_path, tmp_path, skip_broken=True)
    assert set(data.skipped) == {file("a1d4e5"), file("ffaa00")}
    assert len(data.train) == 3
    assert data.test is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["user_id,image_id,class", "7,../../secret,3"], r"line 2: .*got '\.\./\.\./secret'"),
        (["user_id,image_id,class", "7,ab,3"], r"line 2: expected an image_id of 3 or more"),
        (["user_id,image_id,class", "7,abc,"], r"line 2: empty class"),
        (["user_id,image_id", "7,abc"], r"line 1: .*missing: class"),
        (["user_id,image_id,class"], "no images"),
    ],
)
def test_lines_of_another_form_in_a_split_file(tmp_path, lines, message):
    landmarks(tmp_path, ("mini_gld_train_split.csv", "mini_gld_test.csv"), False)
    (tmp_path / "mini_gld_train_split.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"mini_gld_train_split\.csv.*" + message):
        load("gld23k", tmp_path, tmp_path)


def test_an_image_listed_twice_is_a_remark(tmp_path):
    landmarks(tmp_path, ("mini_gld_train_split.csv", "mini_gld_test.csv"), False)
    with (tmp_path / "mini_gld_train_split.csv").open("a") as file:
        file.write("9,ffaa01,3\n")
    remarks = load("gld23k", tmp_path, tmp_path).remarks
    assert "images listed more than once: 1, the first is images/ffaa01.jpg" in remarks
    # It is for testing and for training: that is worse.
    leak = "images listed both for training and for testing: 1, the first is images/ffaa01.jpg; "
    assert sum(remark.startswith(leak) for remark in remarks) == 1


def test_an_image_of_two_people_is_no_leak(tmp_path):
    landmarks(tmp_path, ("mini_gld_train_split.csv", "mini_gld_test.csv"), False)
    with (tmp_path / "mini_gld_train_split.csv").open("a") as file:
        file.write("9,0123ab,3\n")
    remarks = load("gld23k", tmp_path, tmp_path).remarks
    assert "images listed more than once: 1, the first is images/0123ab.jpg" in remarks
    assert not any("for testing" in remark for remark in remarks)


# iNaturalist-User-120k


def inaturalist(root):
    place = root / "inaturalist-user-120k"
    place.mkdir(parents=True)
    (place / "federated_train_user_120k.csv").write_text(
        "user_id,image_id,class,label\n5,aa01,0,17\n5,aa02,1,40\n6,aa03,0,17\n"
    )
    (place / "test.csv").write_text("image_id,class,label\nbb01,0,17\nbb02,0,17\n")
    for species, image in (
        ("Aves/Ardea alba", "aa01"),
        ("Insecta/Apis mellifera", "aa02"),
        ("Aves/Ardea alba", "aa03"),
        ("Aves/Ardea alba", "bb01"),
        ("Aves/Ardea alba", "bb02"),
        ("Plantae/Quercus robur", "cc09"),
    ):
        photograph(root / "train_val_images" / species / f"{image}.jpg")
    return root


def test_inaturalist(tmp_path):
    root = inaturalist(tmp_path / "data")
    data = load("inaturalist-user-120k", root, tmp_path)
    birds = "train_val_images/Aves/Ardea alba"
    assert held(data.train) == [
        ("5", "0", f"{birds}/aa01.jpg"),
        ("5", "1", "train_val_images/Insecta/Apis mellifera/aa02.jpg"),
        ("6", "0", f"{birds}/aa03.jpg"),
    ]
    assert data.test.query.names == [f"{birds}/bb01.jpg", f"{birds}/bb02.jpg"]
    assert same_pixels(data.train, root)
    assert "test images: the lists have 2, published are 35,641" in data.remarks


def test_mistakes_in_inaturalist(tmp_path):
    root = inaturalist(tmp_path / "data")
    (root / "train_val_images/Aves/Ardea alba/aa03.jpg").unlink()
    with pytest.raises(DataError, match=r"120k\.csv, line 4: .*/\*/\*/aa03\.jpg \(1 of 5 are mis"):
        load("inaturalist-user-120k", root, tmp_path)
    photograph(root / "train_val_images/Mollusca/Ostrea edulis/aa01.jpg")
    with pytest.raises(DataError, match=r"two images have the id aa01: .*alba.*edulis|edulis.*al"):
        load("inaturalist-user-120k", root, tmp_path)


# Stanford Online Products


HEADER = "image_id class_id super_class_id path"


def products(root, classes=23):
    """``classes`` products with two images each to train on, three more to test with."""
    root.mkdir(parents=True, exist_ok=True)
    lines, number = {"train": [HEADER], "test": [HEADER]}, 0
    for product in range(1, classes + 4):
        split = "train" if product <= classes else "test"
        kind = ("bicycle", "coffee_maker")[product % 2]
        for copy in range(2):
            number += 1
            name = f"{kind}_final/1110{product}_{copy}.JPG"
            lines[split].append(f"{number} {product} {1 + product % 2} {name}")
            photograph(root / name)
    for split, of_split in lines.items():
        (root / f"Ebay_{split}.txt").write_text("\n".join(of_split) + "\n")
    return lines


@pytest.mark.parametrize("folder", ["", "Stanford_Online_Products"])
def test_products(tmp_path, folder):
    root = tmp_path / "data" / folder
    products(root)
    data = load("sop", tmp_path / "data", tmp_path)
    assert len(data.train) == 46
    assert data.train.names[0] == "bicycle_final/111010_0.JPG"
    label = data.train.class_names[data.train.labels[0]]
    assert label == "bicycle 10"
    assert Counter(data.train.labels.tolist()) == dict.fromkeys(range(23), 2)
    assert data.test.query.class_names == ["bicycle 24", "bicycle 26", "coffee_maker 25"]
    assert same_pixels(data.train, root)
    assert same_pixels(data.test.query, root)
    # The default partition: each product at one client, at most ten at each.
    assert len(data.train.client_names) == 3
    assert sorted(count_own_classes(data.train)) == [7, 8, 8]
    assert count_own_classes(data.train).sum() == 23
    other = load("sop", tmp_path / "data", tmp_path, partition="class").train
    assert other.client_names == data.train.class_names


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 1 1", "line 2: expected 'image_id class_id super_class_id path', got '1 1 1'"),
        ("1 one 1 a/b.JPG", "line 2: expected .*got '1 one 1 a/b.JPG'"),
        ("1 1 1 ../a/b.JPG", r"line 2: expected a path such as .*got '\.\./a/b\.JPG'"),
        ("1 1 1 /etc/b.JPG", "line 2: expected a path such as .*got '/etc/b.JPG'"),
        ("1 1 1 b.JPG", "line 2: expected a path such as"),
    ],
)
def test_lines_of_another_form_in_products(tmp_path, line, message):
    products(tmp_path)
    (tmp_path / "Ebay_train.txt").write_text(f"{HEADER}\n{line}\n")
    with pytest.raises(DataError, match=r"Ebay_train\.txt, " + message):
        load("sop", tmp_path, tmp_path)


def test_a_list_of_products_without_its_header(tmp_path):
    lines = products(tmp_path)
    (tmp_path / "Ebay_test.txt").write_text("\n".join(lines["test"][1:]))
    with pytest.raises(DataError, match=r"Ebay_test\.txt, line 1: expected 'image_id class_id"):
        load("sop", tmp_path, tmp_path)


def test_more_than_was_published_is_a_remark_too(tmp_path):
    rows = [ListedImage(f"user {i}", f"class {i}", f"{i}.jpg", "train", i) for i in range(1200)]
    lists = {"train": tmp_path / "train.csv"}

    def remarks(number):
        counts = {"train": Counts(number, number, number)}
        return published_listing(lists, tmp_path, rows, counts).remarks

    assert remarks(1200) == ()
    for number in (1199, 1201):
        assert remarks(number) == tuple(
            f"train {what}: the lists have 1,200, published are {number:,}"
            for what in ("images", "classes", "clients")
        )


def test_lists_of_the_published_size_have_no_remark(tmp_path):
    for split, count, first, last in (
        ("train", 59_551, 1, 11_318),
        ("test", 60_502, 11_319, 22_634),
    ):
        lines = [HEADER]
        for i in range(count):
            product = first + i % (last - first + 1)
            lines.append(f"{i} {product} 1 chair_final/{product}_{i}.JPG")
        (tmp_path / f"Ebay_{split}.txt").write_text("\n".join(lines))
    listing = read_products(tmp_path)
    assert listing.remarks == ()
    assert len(listing.rows) == 120_053

    landmarks(tmp_path, ("mini_gld_train_split.csv", "mini_gld_test.csv"), False)
    lines = [f"{i % 233},{i:016x},{i % 203}" for i in range(23_080)]
    header = "user_id,image_id,class"
    (tmp_path / "mini_gld_train_split.csv").write_text("\n".join([header, *lines]))
    assert read_gld23k(tmp_path).remarks == ()


# CelebA


def celeba(root, nested):
    counts = {"2880": 6, "2937": 5, "8692": 4, "17": 5, "18": 7}
    lines, number = [], 0
    images = root / ("Img/img_align_celeba" if nested else "img_align_celeba")
    for person, count in counts.items():
        for _ in range(count):
            number += 1
            lines.append(f"{number:06}.jpg {person}")
            photograph(images / f"{number:06}.jpg")
    place = root / ("Anno" if nested else "")
    place.mkdir(exist_ok=True)
    (place / "identity_CelebA.txt").write_text("\n".join(lines) + "\n")
    return counts


@pytest.mark.parametrize("nested", [True, False])
def test_celeba_is_a_celebrity_a_client(tmp_path, nested):
    root = tmp_path / "data"
    counts = celeba(root, nested)
    data = load("celeba", root, tmp_path, test_classes=0.4)
    rows = held(data.train)
    assert all(client == label for client, label, _ in rows)
    trained = Counter(client for client, _, _ in rows)
    tested = Counter(data.test.query.class_names[i] for i in data.test.query.labels.tolist())
    # LEAF's rule leaves out who has four; the rest is whole, and on one side each.
    assert trained | tested == {p: n for p, n in counts.items() if p != "8692"}
    assert trained
    assert tested
    assert not set(trained) & set(tested)
    assert same_pixels(data.train, root)
    left_out = "left out, as in LEAF, celebrities with fewer than 5 images: 1, with 4 images"
    assert left_out in data.remarks
    assert "classes: the lists have 4, published are 9,343" in data.remarks


def test_a_line_of_another_form_in_celeba(tmp_path):
    celeba(tmp_path, False)
    with (tmp_path / "identity_CelebA.txt").open("a") as file:
        file.write("\n../000001.jpg 3\n")
    with pytest.raises(
        DataError,
        match=r"CelebA\.txt, line 29: expected '000001\.jpg 2880', got '\.\./000001\.jpg 3'",
    ):
        load("celeba", tmp_path, tmp_path)


# Labeled Faces in the Wild


def lfw(root, folder="lfw"):
    people = {
        "train": {"Aaron_Eckhart": 1, "Abba_Eban": 2, "José_Serra": 3},
        "test": {"Zico": 3, "Zoran_Djindjic": 1, "Yao_Ming": 2},
    }
    root.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "peopleDevTrain.txt"), ("test", "peopleDevTest.txt")):
        lines = [str(len(people[split])), *(f"{p}\t{n}" for p, n in people[split].items())]
        (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        for person, count in people[split].items():
            for number in range(1, count + 1):
                photograph(root / folder / person / f"{person}_{number:04}.jpg")


@pytest.mark.parametrize("folder", ["lfw", "lfw_funneled", "lfw-deepfunneled"])
def test_lfw_is_a_person_a_client(tmp_path, folder):
    root = tmp_path / "data"
    lfw(root, folder)
    data = load("lfw", root, tmp_path)
    assert data.train.client_names == data.train.class_names
    assert data.train.class_names == ["Aaron_Eckhart", "Abba_Eban", "José_Serra"]
    assert data.train.names[-1] == f"{folder}/José_Serra/José_Serra_0003.jpg"
    assert data.test.query.class_names == ["Yao_Ming", "Zico"]
    assert len(data.test.query) == 5
    assert data.unpaired == (f"{folder}/Zoran_Djindjic/Zoran_Djindjic_0001.jpg",)
    assert same_pixels(data.train, root)
    assert "images: the lists have 12, published are 13,233" in data.remarks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Zico\t3\n", "line 1: expected the number of people, got 'Zico'"),
        ("", "line 1: expected the number of people"),
        ("3\nZico\t3\n", "line 1 says 3 people, and 1 follow"),
        ("1\nZico\n", "line 2: expected a name and a number of images, got 'Zico'"),
        ("1\nZico\t3\t4\n", r"line 2: expected 'Aaron_Eckhart\\t1'"),
        ("1\n../Zico\t3\n", "line 2: expected"),
        ("1\nZico\t0\n", "line 2: expected"),
    ],
)
def test_lists_of_people_of_another_form(tmp_path, text, message):
    lfw(tmp_path)
    (tmp_path / "peopleDevTest.txt").write_text(text)
    with pytest.raises(DataError, match=r"peopleDevTest\.txt.*" + message):
        load("lfw", tmp_path, tmp_path)


# CIFAR-100


def cifar100(root, classes=10, copies=(5, 2)):
    """Records <coarse><fine><3072 pixels>; returns {name: (class name, pixels [3, 32, 32])}."""
    root.mkdir(parents=True, exist_ok=True)
    rng, images = np.random.default_rng(0), {}
    for part, count in zip(("train", "test"), copies, strict=True):
        labels = rng.permutation(np.arange(classes).repeat(count))
        records = []
        for position, label in enumerate(labels.tolist()):
            pixels = rng.integers(0, 256, (3, 32, 32), np.uint8)
            records.append(bytes([label // 5, label]) + pixels.tobytes())
            images[f"{part}.bin/{position:05}"] = (f"fine_{label:03}", pixels)
        (root / f"{part}.bin").write_bytes(b"".join(records))
    (root / "fine_label_names.txt").write_text("".join(f"fine_{i:03}\n" for i in range(classes)))
    return images


def load_cifar100(root, **options):
    return load_dataset("cifar100", root / "data", cache=root / "cache", **options)


@pytest.mark.parametrize("folder", ["", "cifar-100-binary"])
def test_cifar100_is_read_as_it_is(tmp_path, folder):
    written = cifar100(tmp_path / "data" / folder)
    # Another seed holds out as many other classes, whose pixels are kept apart from these.
    other = load_cifar100(tmp_path, partition="classes:3", seed=2)
    data = load_cifar100(tmp_path, partition="classes:3")
    assert data.test.query.pixels.shape == other.test.query.pixels.shape
    assert data.test.query.class_names != other.test.query.class_names
    train, test = data.train, data.test.query
    assert train.pixels.shape[1:] == (3, 32, 32)
    found = {}
    for images in (train, test):
        for pixels, label, name in zip(images.pixels, images.labels, images.names, strict=True):
            found[name] = (images.class_names[label], pixels)
    assert found.keys() == written.keys()
    for name, (label, pixels) in written.items():
        assert found[name][0] == label
        assert (found[name][1] == pixels).all()
    # Whole classes are on one side, with the images of both files.
    assert not set(train.class_names) & set(test.class_names)
    assert set(np.bincount(test.labels)) == {7}
    assert "images: the lists have 70, published are 60,000" in data.remarks
    assert isinstance(train.pixels, np.memmap)


def test_cifar100_resized_is_what_its_images_as_files_are(tmp_path):
    images = cifar100(tmp_path / "data")
    for channels in (1, 3):
        data = load_dataset(
            "cifar100",
            tmp_path / "data",
            cache=tmp_path / "cache",
            image_size=20,
            channels=channels,
            partition="class",
        ).train
        lines = ["image,label,client,split"]
        for name in data.names:
            file = tmp_path / f"{name.replace('/', '-')}.png"
            Image.fromarray(images[name][1].transpose(1, 2, 0)).save(file)
            lines.append(f"{file.name},{images[name][0]},{images[name][0]},train")
        (tmp_path / "files.csv").write_text("\n".join(lines))
        files = load_dataset(
            "csv",
            tmp_path / "files.csv",
            cache=tmp_path / "cache",
            image_size=20,
            channels=channels,
            test_classes=0,
        ).train
        order = np.argsort([name.replace("/", "-") + ".png" for name in data.names])
        assert (data.pixels[order] == files.pixels[np.argsort(files.names)]).all()


def test_cifar100_has_a_hundred_clients_unless_told_otherwise(tmp_path):
    cifar100(tmp_path / "data", copies=(20, 4))
    train = load_cifar100(tmp_path).train
    assert len(train.client_names) == 100
    assert np.ptp(np.bincount(train.clients)) <= 1


def test_pickles_of_cifar100_are_not_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    place = tmp_path / "cifar-100-python"
    place.mkdir()
    for name in ("train", "test", "meta"):
        (place / name).write_bytes(pickle.dumps(Trap()))
    for root in (tmp_path, place):
        with pytest.raises(DataError, match=r"made of pickles, which run code .*binary version"):
            load_dataset("cifar100", root, cache=tmp_path / "cache")
    assert not (tmp_path / "trapped").exists()


def test_cifar100_cut_short_or_of_another_kind(tmp_path):
    cifar100(tmp_path)
    whole = (tmp_path / "train.bin").read_bytes()
    for content in (whole[:-1], b""):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(DataError, match=r"train\.bin: expected records of 3,074 bytes"):
            load_dataset("cifar100", tmp_path, cache=tmp_path / "cache")
    (tmp_path / "train.bin").write_bytes(whole[:3074] + b"\x01\xc8" + whole[3076:])
    with pytest.raises(DataError, match=r"train\.bin, record 2: expected a fine label .*got 200"):
        load_dataset("cifar100", tmp_path, cache=tmp_path / "cache")


# Whatever the data set


def test_links_are_followed_and_dangling_ones_are_missing(tmp_path):
    store = tmp_path / "elsewhere"
    file = landmarks(store, ("mini_gld_train_split.csv", "mini_gld_test.csv"), True)
    root = tmp_path / "data"
    root.mkdir()
    for name in ("mini_gld_train_split.csv", "mini_gld_test.csv", "train"):
        (root / name).symlink_to(store / name)
    data = load("gld23k", root, tmp_path)
    assert len(data.train) == 4
    assert same_pixels(data.train, store)
    image = store / file("a1b2c3")
    image.rename(tmp_path / "moved.jpg")
    image.symlink_to(tmp_path / "moved.jpg")
    assert len(load("gld23k", root, tmp_path).train) == 4
    (tmp_path / "moved.jpg").unlink()
    with pytest.raises(DataError, match=r"line 2: no such image file: .*a1b2c3\.jpg"):
        load("gld23k", root, tmp_path)


NEEDED = {
    "landmarks-user-160k": "federated_train.csv or landmarks-user-160k/federated_train.csv; test",
    "gld23k": "mini_gld_train_split.csv; mini_gld_test.csv; train/ or images/",
    "inaturalist-user-120k": "train_val_images/",
    "sop": "Ebay_train.txt or Stanford_Online_Products/Ebay_train.txt; Ebay_test.txt",
    "celeba": "identity_CelebA.txt or Anno/identity_CelebA.txt; img_align_celeba/",
    "lfw": "peopleDevTrain.txt or .*lfw/ or lfw_funneled/ or lfw-deepfunneled/",
    "cifar100": "train.bin or cifar-100-binary/train.bin; test.bin",
}


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_missing_is_listed(tmp_path, name):
    root = tmp_path / "data"
    with pytest.raises(DataError, match=f"{NEEDED[name]}.*got nothing there"):
        load_dataset(name, root)
    root.write_bytes(b"PK")
    with pytest.raises(DataError, match=f"{NEEDED[name]}.*got a file: unpack the archive"):
        load_dataset(name, root)
    root.unlink()
    (root / "other").mkdir(parents=True)
    with pytest.raises(
        DataError, match=rf"{NEEDED[name]}.*; found none of these, but other \(docs/d"
    ):
        load_dataset(name, root)
    with pytest.raises(DataError, match=f"{name}' needs a path: the folder with its files"):
        load_dataset(name)


def test_of_what_is_there_only_the_rest_is_missing(tmp_path):
    lfw(tmp_path)
    (tmp_path / "peopleDevTest.txt").unlink()
    message = r"missing: peopleDevTest.txt or view1/peopleDevTest.txt; found: lfw, peopleDevTrain"
    with pytest.raises(DataError, match=message):
        load_dataset("lfw", tmp_path)


def test_two_places_for_one_thing_are_refused(tmp_path):
    lfw(tmp_path)
    (tmp_path / "lfw-deepfunneled").mkdir()
    with pytest.raises(DataError, match="both lfw/ and lfw-deepfunneled/ are there"):
        load_dataset("lfw", tmp_path)


def test_an_archive_under_the_name_of_a_list(tmp_path):
    celeba(tmp_path, False)
    (tmp_path / "identity_CelebA.txt").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match="in UTF-8, got byte 0x8b at position 1; is it another"):
        load_dataset("celeba", tmp_path)


def test_info_tells_what_is_not_as_published_and_draws_who_holds_what(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "cache"))
    products(tmp_path / "data", classes=23)
    words = ["info", "--data", "sop", "--data-path", str(tmp_path / "data"), "--image-size", "12"]
    words += ["--backbone", "conv4-4", "--embedding-size", "8"]
    image = tmp_path / "clients.png"
    assert main([*words, "--plot", str(image)]) == 0
    said = capsys.readouterr().out
    assert "remark: train classes: the lists have 23, published are 11,318" in said
    assert re.search(r"clients +3, dealt by classes:10 *\n", said)
    assert re.search(r"images per client +14 to 16, median 16 *\n", said)
    assert re.search(r"clients per class +1 *\n", said)
    with Image.open(image) as image:
        assert image.format == "PNG"
        assert image.width > 2000
    options = ["--partition", "dirichlet:2", "--partition-clients", "5"]
    image = tmp_path / "none" / "clients.png"
    assert main([*words, *options, "--plot", str(image)]) == 2
    said = capsys.readouterr()
    assert re.search(r"clients +5, dealt by dirichlet:2 *\n", said.out)
    assert f"cannot write {image}: No such file" in said.err
    assert main([*words, "--plot", "clients.jpg"]) == 2
    assert "--plot clients.jpg: expected a name that ends with .png" in capsys.readouterr().err
    for options in (["--partition", "shards:3"], ["--partition-clients", "3"]):
        assert main([*words, *options]) == 2
        assert "expected" in capsys.readouterr().err.lower()
