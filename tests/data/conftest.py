"""Folders of images, as tests of this folder load them."""

import zipfile

import pytest

from tests.data.made import make_image, save


@pytest.fixture
def root(tmp_path):
    """Nine images p0.png to p8.png, in colour."""
    for i in range(9):
        save(tmp_path / f"p{i}.png", make_image(i))
    return tmp_path


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "root"
    for i, (client, label) in enumerate(
        [("ann", "cat"), ("ann", "cat"), ("ann", "dog"), ("bob", "dog"), ("bob", "fox")]
    ):
        suffix = ["png", "JPG", "webp"][i % 3]
        save(root / client / label / f"{i}.{suffix}", make_image(i, (10 + i, 12)))
    (root / "ann" / "cat" / "notes.txt").write_text("not an image")
    (root / "ann" / "cat" / ".hidden.png").write_text("not an image")
    (root / ".git").mkdir()
    return root


@pytest.fixture
def small_omniglot(tmp_path):
    """Two background and eight evaluation alphabets, of two characters by three drawers."""
    place = tmp_path / "place"
    place.mkdir()
    number = 0
    for name, alphabets in (("images_background", 2), ("images_evaluation", 8)):
        with zipfile.ZipFile(place / f"{name}.zip", "w") as pack:
            for alphabet in range(alphabets):
                for character in (1, 2):
                    number += 1
                    for drawer in (1, 2, 3):
                        inner = (
                            f"{name}/Alphabet_{alphabet}/character{character:02d}/"
                            f"{number:04d}_{drawer:02d}.png"
                        )
                        image = make_image(number * 10 + drawer, (35, 35), "L").convert("1")
                        file = tmp_path / "unpacked" / inner
                        save(file, image)
                        pack.write(file, inner)
    return place, tmp_path / "unpacked"
