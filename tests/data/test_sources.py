"""Data sets of other libraries, held against the same images as files of a CSV."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

import fedss
from fedss.data import Dataset, deal_images, gathering, load_dataset, parse_partition
from fedss.errors import ConfigError, DataError
from tests.data.made import make_image, save

SIDE = 12
LABELS = [i * 7 % 6 for i in range(30)]
NAMES = ["ant", "bee", "cow", "dog", "elk", "fox"]
CLIENTS = [f"site {i % 4}" for i in range(30)]


@pytest.fixture
def pictures():
    return [make_image(i, (SIDE, SIDE)) for i in range(30)]


@pytest.fixture
def array(pictures):
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])


@pytest.fixture
def by_csv(tmp_path, pictures):
    """The same images, listed in a CSV: the oracle."""
    lines = ["image,label,client"]
    for i, picture in enumerate(pictures):
        save(tmp_path / "files" / f"{i:02}.png", picture)
        lines.append(f"{i:02}.png,{NAMES[LABELS[i]]},{CLIENTS[i]}")
    (tmp_path / "files" / "list.csv").write_text("\n".join(lines))
    path = tmp_path / "files" / "list.csv"
    return lambda **options: load_dataset(
        "csv", path, cache=tmp_path / "cache", **{"image_size": SIDE, **options}
    )


def contents(images):
    """Pixels, class and client of each image, in any order."""
    rows = zip(images.pixels, images.labels, images.clients, strict=True)
    return sorted(
        (pixels.tobytes(), images.class_names[k], images.client_names[c]) for pixels, k, c in rows
    )


def same_content(data, expected, clients=True):
    for part in ("train", "test"):
        one, other = getattr(data, part), getattr(expected, part)
        assert (one is None) == (other is None)
        if one is None:
            continue
        one, other = (one, other) if part == "train" else (one.query, other.query)
        assert one.pixels.shape[1:] == other.pixels.shape[1:]
        assert set(one.class_names) == set(other.class_names)
        rows = [[r if clients else r[:2] for r in contents(images)] for images in (one, other)]
        assert rows[0] == rows[1]
    return True


class Pairs:
    """A data set as people write them; counts how often an image is read."""

    def __init__(self, images, labels, **more):
        self.images, self.labels_, self.reads = images, labels, []
        self.transform: object = None
        self.__dict__.update(more)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.reads.append(i)
        return self.images[i], self.labels_[i]


class HuggingFace:
    """As much of ``datasets.Dataset`` as is asked of it."""

    def __init__(self, columns, features=None, fingerprint=None, name="animals"):
        self.columns, self.features = columns, features or {}
        self.column_names, self.reads = list(columns), []
        self.info = SimpleNamespace(dataset_name=name)
        if fingerprint:
            self._fingerprint = fingerprint

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            assert key != "image", "a column of images decodes them all at once"
            return self.columns[key]
        self.reads.append(key)
        return {name: values[key] for name, values in self.columns.items()}


class Frame(dict):
    """As much of a DataFrame as is asked of it."""

    @property
    def columns(self):
        return list(self)


# --- arrays


@pytest.mark.parametrize("test_classes", [0.0, 0.2, 0.6])
@pytest.mark.parametrize(
    "layout",
    [
        lambda a: a,
        lambda a: a.transpose(0, 2, 3, 1),
        torch.from_numpy,
        lambda a: a.astype(np.float32) / 255,
        lambda a: torch.from_numpy(a).float() / 255,
        lambda a: [Image.fromarray(x.transpose(1, 2, 0)) for x in a],
    ],
)
def test_arrays_are_what_their_files_are(array, by_csv, layout, test_classes):
    data = Dataset.from_arrays(
        layout(array), LABELS, CLIENTS, class_names=NAMES, test_classes=test_classes
    )
    assert same_content(data, by_csv(test_classes=test_classes))
    assert data.name == "arrays"


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 8},
        {"channels": 1},
        {"channels": 1, "test_classes": 0},
        {"image_size": 20, "channels": 1, "seed": 5},
    ],
)
def test_size_channels_and_seed_are_those_of_files(array, by_csv, options):
    data = Dataset.from_arrays(array, [NAMES[k] for k in LABELS], CLIENTS, **options)
    assert same_content(data, by_csv(**options))


def test_an_array_is_not_copied(array):
    for images in (array, array.transpose(0, 2, 3, 1), array[:, 0], torch.from_numpy(array)):
        data = Dataset.from_arrays(images, LABELS, CLIENTS, test_classes=0)
        assert np.shares_memory(data.train.pixels, array)
        assert data.test is None
    held = Dataset.from_arrays(array, LABELS, CLIENTS, test_classes=1e-9).test.query.class_names
    order = np.argsort([str(k) == held[0] for k in LABELS], kind="stable")
    in_order = np.ascontiguousarray(array[order])
    labels, clients = np.array(LABELS)[order], np.array(CLIENTS)[order]
    data = Dataset.from_arrays(in_order, labels, clients, test_classes=1e-9)
    assert np.shares_memory(data.train.pixels, in_order)
    assert np.shares_memory(data.test.query.pixels, in_order)
    assert np.array_equal(data.test.query.pixels, array[np.array(LABELS) == int(held[0])])


def test_numbers_text_and_tensors_name_classes_and_clients_alike(array):
    first = Dataset.from_arrays(array, LABELS, CLIENTS)
    for labels in (np.array(LABELS, np.int32), torch.tensor(LABELS), [str(k) for k in LABELS]):
        for clients in (np.array(CLIENTS), np.array(CLIENTS, object)):
            assert same_content(Dataset.from_arrays(array, labels, clients), first)
    named = Dataset.from_arrays(array, [f" {k} " for k in LABELS], CLIENTS)
    assert same_content(named, first)  # spaces do not count, as elsewhere


@pytest.mark.parametrize(
    "how",
    [
        {"clients": "classes:2"},
        {"clients": "class"},
        {"clients": "dirichlet:2", "partition_clients": 3},
        {"partition": "classes:1"},
    ],
)
def test_a_partition_deals_the_training_images(array, how):
    data = Dataset.from_arrays(array, LABELS, test_classes=0.3, **how)
    whole = Dataset.from_arrays(array, LABELS, CLIENTS, test_classes=0.3)
    partition = parse_partition(
        how.get("clients", how.get("partition")), how.get("partition_clients")
    )
    expected = deal_images(whole.train, partition, 0)
    assert contents(data.train) == contents(expected)
    assert len(data.test.query) == len(whole.test.query)


def test_a_class_of_one_image_that_would_be_tested_is_left_out(array, by_csv):
    labels = [*LABELS[:-1], "alone"]
    for seed in range(20):
        data = Dataset.from_arrays(array, labels, CLIENTS, test_classes=0.5, seed=seed)
        if data.unpaired:
            break
    assert data.unpaired == ("29",)
    assert "alone" not in (*data.train.class_names, *data.test.query.class_names)
    assert len(data.train) + len(data.test.query) == 29


ARRAY = np.zeros((4, 3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ARRAY, [0, 0, 1]), {"clients": "class"}, "labels: expected 4 values, .* got 3"),
        ((ARRAY, [0, 0, 1, 1], [0]), {}, "clients: expected 4 values, .* got 1"),
        ((ARRAY, [0, 0, 1, 1]), {}, "who holds which image.*'classes:10'"),
        ((ARRAY, [0, 0, 1, 1.5], "class"), {}, r"labels: expected a whole .* 1\.5 \(float\) at 3"),
        ((ARRAY, [0, 0, 1, None], "class"), {}, "labels: .* got nothing at 3$"),
        ((ARRAY, [0.0, 0.0, 1.0, float("nan")], "class"), {}, "at 0; where one number is missing"),
        ((ARRAY, [0, 0, 1, float("nan")], "class"), {}, "labels: .* got nothing at 3"),
        ((ARRAY, [0, 0, 1, " "], "class"), {}, "labels: a name of nothing but spaces at 3"),
        ((ARRAY, [[0], [0], [1], [1]], "class"), {}, r"got \[0\] \(list\) at 0"),
        ((ARRAY, np.zeros((4, 2)), "class"), {}, r"one value per image, got \[4, 2\]"),
        ((ARRAY, [0, 0, -1, 1], "class"), {"class_names": ["a", "b"]}, "from 0 to 1.*got -1 at 2"),
        ((ARRAY[0], [0, 0, 1], "class"), {"channels": 2}, "channels: expected 1"),
        ((ARRAY.astype(int), [0, 0, 1, 1], "class"), {}, r"image \d .*int64: where they are"),
        ((ARRAY[:, :, :5], [0, 0, 1, 1], "class"), {}, r"image \d .*8 x 5 pixels.*image_size="),
        ((ARRAY, [0, 0, 1, 1], "class"), {"partition": "class"}, "a partition twice"),
        ((ARRAY, [0, 0, 1, 1], "class"), {"skip_broken": True}, "skip_broken"),
        ((ARRAY, [0, 0, 1, 1], "class"), {"test_classes": 1.0}, "test_classes"),
        ((ARRAY, [0, 0, 0, 0], "class"), {}, "cannot hold out a class"),
        ((ARRAY[:0], [], "class"), {}, "no images"),
    ],
)
def test_mistakes_with_arrays_are_named(arguments, options, message):
    with pytest.raises(DataError, match=message):
        Dataset.from_arrays(*arguments, **options)


def test_a_partition_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"expected classes:K"):
        Dataset.from_arrays(ARRAY, [0, 0, 1, 1], "site 1")


# --- PyTorch


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("test_classes", [0.0, 0.3, 0.6])
def test_a_torch_data_set_is_read_once(
    pictures, by_csv, tmp_path, monkeypatch, small, test_classes
):
    if not small:
        monkeypatch.setattr(gathering, "_IN_MEMORY", 0)
    dataset = Pairs(pictures, LABELS, classes=NAMES)
    data = Dataset.from_torch(
        dataset, clients=CLIENTS, test_classes=test_classes, cache=tmp_path / "none"
    )
    assert sorted(dataset.reads) == list(range(30))
    assert same_content(data, by_csv(test_classes=test_classes))
    assert isinstance(data.train.pixels, np.memmap) != small
    assert not list((tmp_path / "none").glob("*")) if not small else True
    assert data.name == "Pairs"
    names = [int(name) for name in data.train.names]
    assert [np.asarray(pictures[i]).tobytes() for i in names] == [
        np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes() for pixels in data.train.pixels
    ]


def test_parts_and_tensors_of_torch(array, by_csv):
    tensors = TensorDataset(torch.from_numpy(array), torch.tensor(LABELS))
    data = Dataset.from_torch(tensors, clients=CLIENTS)
    assert same_content(data, Dataset.from_arrays(array, LABELS, CLIENTS))
    part = Subset(Pairs(array, LABELS, classes=NAMES), range(30))
    assert same_content(Dataset.from_torch(part, clients=CLIENTS), by_csv())


def test_one_gray_image_among_coloured_ones(pictures):
    mixed = [pictures[0], make_image(50, (SIDE, SIDE), "L"), *pictures[2:4]]
    data = Dataset.from_torch(Pairs(mixed, [0, 0, 1, 1]), clients="class", test_classes=0)
    gray = data.train.pixels[1]
    assert data.train.pixels.shape == (4, 3, SIDE, SIDE)
    assert all(np.array_equal(band, np.asarray(mixed[1])) for band in gray)
    with pytest.raises(
        DataError, match=r"image 1 .* has colour, image 0 is grayscale; say channels="
    ):
        Dataset.from_torch(Pairs([mixed[1], mixed[0]], [0, 1]), clients="class", test_classes=0)


def test_an_image_folder_is_read_as_files_are(tmp_path, pictures, by_csv):
    root = tmp_path / "folder"
    for i, picture in enumerate(pictures):
        save(root / NAMES[LABELS[i]] / f"{i:02}.png", picture)

    def loader(path):
        raise AssertionError("files are decoded by the library, on all cores")

    loader.__module__ = "torchvision.datasets.folder"
    samples = [(str(root / NAMES[LABELS[i]] / f"{i:02}.png"), LABELS[i]) for i in range(30)]
    folder = Pairs([None] * 30, LABELS, classes=NAMES, samples=samples, loader=loader, root=root)
    options = {"image_size": SIDE, "cache": tmp_path / "cache"}
    data = Dataset.from_torch(folder, clients=CLIENTS, **options)
    assert same_content(data, by_csv())
    assert set(data.train.names) <= {os.path.relpath(path, root) for path, _ in samples}
    dealt = Dataset.from_torch(folder, clients="classes:2", **options)
    assert same_content(dealt, by_csv(partition="classes:2"), clients=False)
    assert set(dealt.train.client_names) == {"client 1", "client 2"} or len(dealt.train) > 0
    assert not folder.reads
    folder.transform = lambda image: image
    folder.images = pictures
    assert same_content(Dataset.from_torch(folder, clients=CLIENTS, **options), by_csv())
    assert sorted(folder.reads) == list(range(30))
    folder.transform, folder.reads = None, []
    loader.__module__ = "mine"  # which may give other pixels than the file has
    assert same_content(Dataset.from_torch(folder, clients=CLIENTS, **options), by_csv())
    assert sorted(folder.reads) == list(range(30))


def test_torchvision_s_image_folder(tmp_path, pictures, by_csv):
    torchvision = pytest.importorskip("torchvision")
    for i, picture in enumerate(pictures):
        save(tmp_path / "folder" / NAMES[LABELS[i]] / f"{i:02}.png", picture)
    folder = torchvision.datasets.ImageFolder(tmp_path / "folder")
    clients = [CLIENTS[int(os.path.basename(path)[:2])] for path, _ in folder.samples]
    data = Dataset.from_torch(folder, clients=clients, image_size=SIDE)
    assert same_content(data, by_csv())


def test_mistakes_with_torch_data_sets_are_named(pictures):
    with pytest.raises(DataError, match=r"map-style.*got a generator"):
        Dataset.from_torch((pair for pair in ()), clients="class")
    with pytest.raises(DataError, match=r"image 0 .*pair of image and label, got a Image"):
        Dataset.from_torch(pictures, clients="class")
    with pytest.raises(DataError, match=r"from_huggingface"):
        Dataset.from_torch([{"image": pictures[0], "label": 0}], clients="class")
    with pytest.raises(
        DataError, match=r"image 1 .*20 pixels wide and high, image 0 12; say image_"
    ):
        Dataset.from_torch(
            Pairs([pictures[0], make_image(1)], [0, 1]), clients="class", test_classes=0
        )
    normalized = torch.linspace(-2, 2, 3 * 64).reshape(1, 3, 8, 8)
    with pytest.raises(DataError, match=r"image 0 .*from -2 to 2.*Leave out what normalizes"):
        Dataset.from_torch(TensorDataset(normalized, torch.tensor([0])), clients="class")
    with pytest.raises(DataError, match=r"who holds which image"):
        Dataset.from_torch(Pairs(pictures, LABELS))


# --- Hugging Face


def test_hugging_face_columns_names_and_cache(pictures, by_csv, tmp_path):
    columns = {"image": pictures, "species": LABELS, "keeper": CLIENTS}
    features = {"species": SimpleNamespace(names=NAMES), "keeper": SimpleNamespace()}
    first = HuggingFace(columns, features, "f1")
    how = {"label": "species", "client": "keeper", "cache": tmp_path / "cache"}
    data = Dataset.from_huggingface(first, image="image", **how)
    assert same_content(data, by_csv())
    assert data.name == "animals"
    assert isinstance(data.train.pixels, np.memmap)
    again = HuggingFace(columns, features, "f1")
    assert same_content(
        Dataset.from_huggingface(again, image_size=SIDE, channels=3, **how), by_csv()
    )
    third = HuggingFace(columns, features, "f1")
    Dataset.from_huggingface(third, image_size=SIDE, channels=3, **how)
    assert (sorted(first.reads), third.reads) == (list(range(30)), [])  # the key has the size
    seeded = Dataset.from_huggingface(first, seed=1, **how)
    assert same_content(seeded, by_csv(seed=1))
    small = Dataset.from_huggingface(first, image_size=8, channels=1, **how)
    assert same_content(small, by_csv(image_size=8, channels=1))
    other = HuggingFace({**columns, "image": pictures[::-1]}, features, "f2")
    with pytest.raises(AssertionError):
        same_content(Dataset.from_huggingface(other, **how), by_csv())
    dealt = Dataset.from_huggingface(first, label="species", clients="class", cache=how["cache"])
    assert set(dealt.train.client_names) == set(dealt.train.class_names) < set(NAMES)


def test_mistakes_with_hugging_face_are_named(pictures):
    columns = {"image": pictures, "label": LABELS, "user": CLIENTS}
    data = HuggingFace(columns)
    with pytest.raises(
        DataError, match=r"column 'lable', found image, label, user; is 'label' meant"
    ):
        Dataset.from_huggingface(data, label="lable", client="user")
    with pytest.raises(DataError, match=r"who holds"):
        Dataset.from_huggingface(data)
    with pytest.raises(DataError, match=r"both client='user' and clients="):
        Dataset.from_huggingface(data, client="user", clients="class")
    splits = SimpleNamespace(column_names={"train": ["image"], "test": ["image"]})
    with pytest.raises(DataError, match=r"one split, got a dict of train, test.*\['train'\]"):
        Dataset.from_huggingface(splits)
    with pytest.raises(DataError, match=r"a Dataset of Hugging Face, got a list"):
        Dataset.from_huggingface([])
    unlabelled = HuggingFace(
        {"image": pictures, "label": [-1] * 30}, {"label": SimpleNamespace(names=NAMES)}
    )
    with pytest.raises(DataError, match=r"labels \(column 'label'\).*-1 often stands for none"):
        Dataset.from_huggingface(unlabelled, clients="class")


def test_hugging_face_itself(pictures, by_csv, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=NAMES),
            "client": datasets.Value("string"),
        }
    )
    columns = {"image": pictures, "label": LABELS, "client": CLIENTS}
    data = datasets.Dataset.from_dict(columns, features=features)
    found = Dataset.from_huggingface(data, client="client", cache=tmp_path)
    assert same_content(found, by_csv())


# --- DataFrames


@pytest.mark.parametrize("library", ["", "pandas", "polars"])
def test_a_data_frame_of_files(tmp_path, by_csv, library):
    make = pytest.importorskip(library).DataFrame if library else Frame
    expected = by_csv()
    columns = {
        "file": [f"{i:02}.png" for i in range(30)],
        "kind": [NAMES[k] for k in LABELS],
        "client": CLIENTS,
    }
    how = {"root": tmp_path / "files", "image": "file", "label": "kind", "image_size": SIDE}
    data = Dataset.from_dataframe(make(columns), **how)
    assert same_content(data, expected)
    assert list(data.train.names) == list(expected.train.names)
    assert fedss.data.data_fingerprint(data) == fedss.data.data_fingerprint(expected)
    dealt = Dataset.from_dataframe(make(columns), clients="classes:2", **how)
    assert same_content(dealt, by_csv(), clients=False)
    splits = {**columns, "split": ["train", "test"] * 15}
    split = Dataset.from_dataframe(make(splits), **how)
    assert len(split.train) == len(split.test.query) == 15


def test_a_data_frame_of_images(pictures, by_csv):
    frame = Frame(image=pictures, label=[NAMES[k] for k in LABELS], client=CLIENTS)
    assert same_content(Dataset.from_dataframe(frame), by_csv())


def test_mistakes_with_data_frames_are_named(tmp_path, pictures):
    columns = {"image": ["a.png", "a.png"], "label": ["x", "y"], "client": ["c", "c"]}
    with pytest.raises(DataError, match=r"a DataFrame of pandas or polars, got a list"):
        Dataset.from_dataframe([])
    with pytest.raises(DataError, match=r"lazy one: give frame.collect\(\)"):
        Dataset.from_dataframe(SimpleNamespace(collect=None))
    with pytest.raises(DataError, match=r"column 'client', found image, label.*clients= takes"):
        Dataset.from_dataframe(Frame(image=["a"], label=["x"]))
    with pytest.raises(DataError, match=r"image 1: a.png is listed already at 0"):
        Dataset.from_dataframe(Frame(columns), root=tmp_path)
    with pytest.raises(DataError, match=r"a\.png: no such image file"):
        Dataset.from_dataframe(Frame({**columns, "image": ["a.png", "b.png"]}), root=tmp_path)
    with pytest.raises(DataError, match=r"expected a file, got None at 1"):
        Dataset.from_dataframe(Frame({**columns, "image": ["a.png", None]}))
    with pytest.raises(DataError, match=r"split: expected one of train, .* got 'tset' at 1"):
        Dataset.from_dataframe(
            Frame({**columns, "image": ["a.png", "b.png"], "split": ["train", "tset"]})
        )
    with pytest.raises(DataError, match=r"the DataFrame has no rows"):
        Dataset.from_dataframe(Frame(image=[], label=[], client=[]))
    with pytest.raises(DataError, match=r"column 'split': a split is read where images are files"):
        Dataset.from_dataframe(
            Frame(image=pictures[:2], label=[0, 1], client=[0, 1], split=["train", "test"])
        )


def test_training_on_one(pictures, tmp_path):
    data = Dataset.from_torch(Pairs(pictures, LABELS), clients=CLIENTS, test_classes=0.7)
    config = fedss.Config(rounds=2, clients_per_round=2, backbone="conv4-8", embedding_size=8)
    run = fedss.train(config, tmp_path / "run", data=data)
    assert 0 <= fedss.evaluate(run.embedder, data.test).map_at_10 <= 1
