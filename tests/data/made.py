"""Images, CSV files and data sets that tests of this folder share."""

import hashlib

import numpy as np
from PIL import Image

from fedss.data import Images, data_fingerprint, load_dataset


def make_image(seed, size=(20, 20), mode="RGB"):
    depth = () if mode == "L" else (3,)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *depth), np.uint8)
    return Image.fromarray(noise)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write_csv(root, lines, header="image,label,client,split"):
    path = root / "images.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


GOOD = [
    "p0.png,cat,ann,train",
    "p1.png,dog,ann,train",
    "p2.png,cat,bob,train",
    "p3.png,fox,bob,test",
    "p4.png,fox,ann,test",
    "p5.png,owl,cid,test",
    "p6.png,owl,cid,test",
]


def load(path, **options):
    return load_dataset("csv", path, image_size=8, cache=path.parent / "cache", **options)


def load_folder(path, tmp_path):
    return load_dataset("folder", path, image_size=8, cache=tmp_path / "cache")


def same(left, right):
    queries = [data.test and data.test.query for data in (left, right)]
    for a, b in ((left.train, right.train), queries):
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(a.pixels, b.pixels)
    assert data_fingerprint(left) == data_fingerprint(right)
    return True


def lots(labels, seed):
    """Each class's number from 0 to 1, as the rule says it."""
    digest = {label: hashlib.sha256(f"{seed}:{label}".encode()).hexdigest() for label in labels}
    return {label: int(digest[label], 16) / 16**64 for label in labels}


def in_memory(labels, names=None, /, **changes):
    """Images with these labels, for class names c0, c1 and so on; each at its own client."""
    count = len(labels)
    names = names or [f"c{i}" for i in range(max(labels, default=0) + 1)]
    fields = {
        "pixels": np.random.default_rng(count).integers(0, 256, (count, 1, 4, 4), np.uint8),
        "labels": np.array(labels, np.int64),
        "clients": np.arange(count),
        "class_names": names,
        "client_names": [f"client{i}" for i in range(count)],
        "names": [f"{i}.png" for i in range(count)],
    }
    return Images(**{**fields, **changes})
