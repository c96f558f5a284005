"""Images found in an index: what is searched, what is kept, who may change it."""

import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fedss
from fedss.cli import main
from fedss.data import RetrievalTask
from fedss.errors import ConfigError, DataError, RunFolderError
from fedss.evaluation.task import verify
from fedss.evaluation.verification import REJECT_ALL
from fedss.inference.embedding import embed_files, list_images
from fedss.inference.pixels import thumbnail
from fedss.models import build_embedder, fingerprint, save_embedder
from fedss.search import (
    build_collection,
    enrol,
    identify,
    open_collection,
    remove,
    reopen,
    stored_threshold,
    why_no_threshold,
)
from fedss.search.collection import Collection, check_model
from fedss.search.store import transaction, write_metadata
from fedss.search.web.page import neighbours_page
from tests import reference

MODEL = build_embedder("conv4-4", channels=3, image_size=12, embedding_size=6, seed=0)


def make_image(seed: int, size: tuple[int, int] = (24, 18)) -> Image.Image:
    """Of four colours and a little noise; neighbouring seeds look nothing alike."""
    rng = np.random.default_rng(seed)
    fields = rng.integers(0, 256, (2, 2, 3), np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run (its model alone), twelve photos of four classes, and their index."""
    root = tmp_path_factory.mktemp("search")
    save_embedder(MODEL, root / "run" / "model", {})
    for label in range(4):
        for copy in range(3):
            file = root / "photos" / f"class {label}" / f"{copy}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            make_image(3 * label + copy).save(file)
    build_collection(root / "run", root / "photos")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed; the index is of the copy's photos."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    build_collection(tmp_path / "run", tmp_path / "photos")
    return tmp_path


def opened(place: Path) -> Collection:
    return open_collection(place / "run" / "index", place / "run")


def with_vectors(collection: Collection, rows_ND: torch.Tensor) -> Collection:
    names = tuple(f"{i}.png" for i in range(len(rows_ND)))
    labels = (None,) * len(names)
    unit_ND = torch.nn.functional.normalize(rows_ND, dim=1)
    return replace(
        collection, names=names, labels=labels, vectors_ND=unit_ND, indexed=len(names), _ids=()
    )


def measured(rows_ND: torch.Tensor | None = None, **identification: object) -> dict:
    """What an evaluation writes of embeddings (unless given: at random), and changes to it."""
    query = reference.tiny_dataset().test.query
    if rows_ND is None:
        rows_ND = torch.randn(len(query), 6, generator=torch.Generator().manual_seed(0))
    verification = asdict(verify(RetrievalTask(query), (rows_ND[: len(query)], None), 0))
    return verification | {"identification": verification["identification"] | identification}


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 60),
    kinds=st.integers(1, 8),
    k=st.integers(1, 70),
)
def test_what_is_found_is_what_a_plain_sort_finds_and_ties_go_by_position(
    made, seed, rows, kinds, k
):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(kinds, 6))[rng.integers(0, kinds, rows)]  # many equal rows
    query = rng.normal(size=(2, 6))
    collection = with_vectors(opened(made), torch.from_numpy(vectors).float())
    results = collection.search(torch.from_numpy(query), k)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row, matches in zip(
        query / np.linalg.norm(query, axis=1, keepdims=True), results, strict=True
    ):
        # Equal rows give equal sums, one at a time.
        scores = np.array([sum(a * b for a, b in zip(row, other, strict=True)) for other in unit])
        order = np.lexsort((np.arange(rows), -scores))[:k]
        assert [match.position for match in matches] == order.tolist()
        assert np.allclose([match.score for match in matches], scores[order], atol=1e-6)


def test_of_many_images_exactly_those_of_nearest_are_found(made):
    rows_ND = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
    rows_ND[1000:] = rows_ND[:1000].repeat(2, 1) + 1e-7  # nearly or quite equal ones
    collection = with_vectors(opened(made), rows_ND)
    scores_QK, index_QK = fedss.nearest(rows_ND[:40], collection.vectors_ND, 25)
    results = collection.search(rows_ND[:40], 25)
    assert [[match.position for match in matches] for matches in results] == index_QK.tolist()
    assert [[match.score for match in matches] for matches in results] == scores_QK.tolist()


def test_an_index_holds_names_classes_and_the_embeddings_of_embed_files(made):
    collection = opened(made)
    image_list = list_images(made / "photos")
    assert collection.names == image_list.names == tuple(sorted(image_list.names))
    assert collection.labels == tuple(name.split("/")[0] for name in image_list.names)
    assert collection.classes == {f"class {i}": 3 for i in range(4)}
    assert collection.images_of("class 2") == [6, 7, 8]
    expected = embed_files(MODEL, image_list.paths).embeddings_ND
    assert np.allclose(collection.vectors_ND, expected, atol=1e-6)
    assert [collection.path(i) for i in range(12)] == image_list.paths
    assert torch.allclose(
        collection.embed(image_list.paths[:2]), collection.vectors_ND[:2], atol=1e-6
    )


def test_a_class_is_the_name_of_the_folder_whatever_lies_above_it(made, tmp_path):
    files = ["shop a/mug/1.png", "shop b/mug/1.png", "pot/1.png", "1.png", ".hidden/x/2.png"]
    for seed, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(tmp_path / name)
    collection = build_collection(made / "run", tmp_path, tmp_path / "index")
    assert dict(zip(collection.names, collection.labels, strict=True)) == {
        "1.png": None,
        "pot/1.png": "pot",
        "shop a/mug/1.png": "mug",
        "shop b/mug/1.png": "mug",
    }
    assert collection.classes == {"mug": 2, "pot": 1}


def test_a_csv_gives_names_and_classes_and_each_image_once(made, tmp_path):
    for seed in range(3):
        make_image(seed).save(tmp_path / f"{seed}.png")
    listed = tmp_path / "list.txt"
    listed.write_text("image,label\n2.png,pot\n0.png,\n")
    collection = build_collection(made / "run", listed, tmp_path / "index")
    assert collection.names == ("2.png", "0.png")
    assert collection.labels == ("pot", None)
    assert collection.path(0) == tmp_path / "2.png"
    listed.write_text("image\n2.png\n2.png\n")
    with pytest.raises(DataError, match=r"list\.txt, line 3: 2\.png is listed already in line 2"):
        build_collection(made / "run", listed, tmp_path / "index")


def test_links_are_passed_over_and_counted(made, tmp_path):
    (tmp_path / "photos").mkdir()
    make_image(0).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.png").symlink_to(made / "photos" / "class 0" / "1.png")
    (tmp_path / "photos" / "c").symlink_to(made / "photos")
    (tmp_path / "photos" / "circle").symlink_to(tmp_path / "photos")
    collection = build_collection(made / "run", tmp_path / "photos", tmp_path / "index")
    assert collection.names == ("a.png",)
    assert collection.passed_over == {"symbolic links": 3}
    (tmp_path / "photos" / "a.png").unlink()
    with pytest.raises(DataError, match=r"symbolic links \(3\); list what links lead to in a CSV"):
        build_collection(made / "run", tmp_path / "photos", tmp_path / "index")
    assert len(open_collection(tmp_path / "index", made / "run")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names of bytes")
def test_names_in_any_script_and_of_bytes_that_are_no_text(made, tmp_path, capsys):
    names = [
        "кружка/чай.png",
        "杯/一.png",
        "café/\udce9.png",
        "[red]/\x1b[2J.png",
        "'\"; DROP/1.png",
    ]
    for seed, name in enumerate(names):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True)
        make_image(seed).save(os.fsencode(file))
    run, index = str(made / "run"), str(tmp_path / "index")
    collection = build_collection(run, tmp_path / "photos", index)
    assert set(collection.names) == set(names)
    assert set(collection.classes) == {name.split("/")[0] for name in names}
    assert main(["search", run, str(tmp_path / "photos" / names[0]), "--index", index]) == 0
    table = capsys.readouterr().out
    assert "кружка" in table
    assert "[red]" in table
    assert "\x1b[2J" not in table
    page = neighbours_page(
        collection,
        [tmp_path / "photos" / names[1]],
        [collection.search(collection.vectors_ND[:1])[0]],
    )
    assert page.encode()
    assert "DROP" in page


def test_thumbnails_are_small_upright_and_of_the_right_image(made, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be rotated by a quarter
    make_image(1, (600, 400)).save(tmp_path / "turned.jpg", exif=turned)
    make_image(2, (20, 10)).save(tmp_path / "small.png")
    Image.new("CMYK", (90, 30)).save(tmp_path / "print.jpg")
    collection = build_collection(made / "run", tmp_path, tmp_path / "index")
    assert collection.names == ("print.jpg", "small.png", "turned.jpg")
    opened = [Image.open(io.BytesIO(collection.thumbnail(i))) for i in range(3)]
    assert [image.size for image in opened] == [(90, 30), (20, 10), (107, 160)]
    assert {image.format for image in opened} == {"JPEG"}
    assert not opened[2].getexif()
    corner = np.asarray(Image.open(tmp_path / "turned.jpg"))[380, 20]  # lower left comes on top
    assert np.abs(np.asarray(opened[2])[5, 5].astype(int) - corner).max() < 30


def test_only_what_is_new_or_changed_is_embedded_again(place):
    photos = place / "photos"
    (photos / "class 0" / "0.png").unlink()
    make_image(50).save(photos / "class 1" / "new.png")
    make_image(51).save(photos / "class 2" / "1.png")
    os.utime(photos / "class 2" / "1.png", ns=(1, 1))
    before = opened(place)
    after = build_collection(place / "run", photos)
    assert (before.embedded, after.embedded) == (12, 2)
    image_list = list_images(photos)
    assert after.names == image_list.names
    expected = embed_files(MODEL, image_list.paths).embeddings_ND
    assert np.allclose(after.vectors_ND, expected, atol=1e-6)
    whole = build_collection(place / "run", photos, place / "other")
    assert whole.embedded == 12
    assert [after.thumbnail(i) for i in range(12)] == [whole.thumbnail(i) for i in range(12)]
    # Positions mean other images now: an index opened earlier must not show them as its own.
    with pytest.raises(RunFolderError, match="open the index again"):
        before.thumbnail(3)


def test_a_build_that_fails_leaves_the_old_index(place):
    make_image(60).save(place / "photos" / "more.png")
    (place / "photos" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read image .*broken\.png: .*--skip-broken"):
        build_collection(place / "run", place / "photos")
    # All of them at once.
    (place / "photos" / "empty.png").write_bytes(b"")
    both = (
        r"cannot read 2 images: broken\.png: .*; empty\.png: .*mend or remove them, .*--skip-broken"
    )
    with pytest.raises(DataError, match=both):
        build_collection(place / "run", place / "photos")
    (place / "photos" / "empty.png").unlink()

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_collection(place / "run", place / "photos", skip_broken=True, on_progress=interrupt)
    assert len(opened(place)) == 12
    seen: list[tuple[int, int]] = []
    collection = build_collection(
        place / "run", place / "photos", skip_broken=True, on_progress=lambda *now: seen.append(now)
    )
    assert collection.skipped == ("broken.png",)
    assert len(collection) == 13
    # What could be read is embedded, and kept.
    assert seen[0] == (13, 14)
    assert seen[-1] == (14, 14)
    assert seen == sorted(seen)
    assert {file.name for file in (place / "run" / "index").iterdir()} == {"index.sqlite", ".lock"}


def test_an_interrupted_build_goes_on(place, monkeypatch):
    monkeypatch.setattr("fedss.search.build._CHUNK", 4)
    (place / "run" / "index" / "index.sqlite").unlink()

    def interrupt(done: int, total: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_collection(place / "run", place / "photos", on_progress=interrupt)
    make_image(61).save(place / "photos" / "class 0" / "1.png")  # changed since it was embedded
    os.utime(place / "photos" / "class 0" / "1.png", ns=(1, 1))
    seen: list[int] = []
    build_collection(place / "run", place / "photos", on_progress=lambda now, _: seen.append(now))
    assert seen[0] == 7
    expected = embed_files(MODEL, list_images(place / "photos").paths).embeddings_ND
    assert np.allclose(opened(place).vectors_ND, expected, atol=1e-6)
    assert opened(place).embedded == 12


def test_places_without_images_are_named(made, tmp_path):
    with pytest.raises(DataError, match="no image found"):
        build_collection(made / "run", tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="no readable image among the 1"):
        build_collection(made / "run", tmp_path, tmp_path / "index", skip_broken=True)
    with pytest.raises(RunFolderError, match=r"index\.sqlite is missing: fedss index RUN IMAGES"):
        open_collection(tmp_path / "index", made / "run")
    with pytest.raises(RunFolderError, match="expected a finished run"):
        open_collection(made / "run" / "index", tmp_path)


def test_an_image_that_may_be_an_attack_is_refused(made, tmp_path, monkeypatch):
    make_image(0, (40, 40)).save(tmp_path / "huge.png")
    monkeypatch.setattr("fedss.data.decoding.MAX_PIXELS", 1000)
    limit = "40 x 40 = 1,600 pixels, above the limit of 1,000: save it smaller"
    with pytest.raises(DataError, match=rf"huge\.png: {limit}"):
        opened(made).embed([tmp_path / "huge.png"])
    with pytest.raises(ValueError, match=limit):
        thumbnail(tmp_path / "huge.png")


def test_the_model_that_made_an_index_is_asked_for(place):
    collection = enrol(opened(place), "new", [make_image(80)])
    other = build_embedder("conv4-4", channels=3, image_size=12, embedding_size=6, seed=0)
    assert fingerprint(other) == fingerprint(MODEL)
    with torch.no_grad():
        next(other.parameters()).flatten()[0].add_(1e-3)
    assert fingerprint(other) != fingerprint(MODEL)
    save_embedder(other, place / "run" / "model", {})
    with pytest.raises(RunFolderError, match=r"index\.sqlite was made with another model"):
        opened(place)
    with pytest.raises(
        RunFolderError, match=r"delete enrolled\.sqlite and enrol its classes again"
    ):
        build_collection(place / "run", place / "photos")
    (collection.folder / "enrolled.sqlite").unlink()
    with pytest.raises(RunFolderError, match=r"make it anew \(fedss index --replace\)"):
        build_collection(place / "run", place / "photos")
    assert build_collection(place / "run", place / "photos", replace=True).embedded == 12


def test_an_index_is_replaced_where_that_is_asked_for(place, tmp_path, caplog):
    enrol(opened(place), "new", [make_image(80)])
    (tmp_path / "others").mkdir()
    make_image(0).save(tmp_path / "others" / "another.png")
    # What was enrolled with the same model stays.
    other = build_collection(place / "run", tmp_path / "others", place / "run/index", replace=True)
    assert (other.names[0], len(other), [*other.enrolled]) == ("another.png", 2, ["new"])
    # All is embedded anew, also what is there.
    again = build_collection(place / "run", tmp_path / "others", place / "run/index", replace=True)
    assert (again.embedded, again._builds != other._builds) == (1, True)
    model = build_embedder("conv4-4", channels=3, image_size=12, embedding_size=6, seed=0)
    with torch.no_grad():
        next(model.parameters()).flatten()[0].add_(1e-3)
    save_embedder(model, place / "run" / "model", {})
    assert not build_collection(place / "run", place / "photos", replace=True).enrolled
    assert "removed the classes enrolled with another model" in caplog.text


def test_an_index_of_other_images_is_not_replaced(place, tmp_path):
    make_image(0).save(tmp_path / "another.png")
    before = (place / "run" / "index" / "index.sqlite").read_bytes()
    (tmp_path / "others").mkdir()
    (tmp_path / "another.png").rename(tmp_path / "others" / "another.png")
    with pytest.raises(RunFolderError, match=r"is the index of .*photos, not of .*others: choose"):
        build_collection(place / "run", tmp_path / "others")
    assert (place / "run" / "index" / "index.sqlite").read_bytes() == before
    # A folder that was moved is the same one.
    (place / "photos").rename(place / "moved")
    assert len(build_collection(place / "run", place / "moved")) == 12


@pytest.mark.parametrize("place_of_digit", [0, 11, 12, 40, -1])
def test_models_whose_fingerprints_differ_in_one_digit_are_two(place, place_of_digit):
    path = place / "run" / "index" / "index.sqlite"
    check_model(path, MODEL)
    digits = list(fingerprint(MODEL))
    digits[place_of_digit] = "0" if digits[place_of_digit] != "0" else "1"
    with transaction(path) as file:
        write_metadata(file, {"model": "".join(digits)})
    with pytest.raises(RunFolderError, match="made with another model"):
        check_model(path, MODEL)


def test_a_change_within_a_second_that_keeps_the_size_is_seen(made, tmp_path):
    photo, moment = tmp_path / "photos" / "a.bmp", 10**18 + 5 * 10**8
    photo.parent.mkdir()
    make_image(1).save(photo)
    size = photo.stat().st_size
    os.utime(photo, ns=(moment, moment))
    before = build_collection(made / "run", photo.parent, tmp_path / "index").vectors_ND
    make_image(2).save(photo)
    os.utime(photo, ns=(moment, moment + 1000))
    assert photo.stat().st_size == size
    after = build_collection(made / "run", photo.parent, tmp_path / "index")
    assert after.embedded == 1
    assert not torch.allclose(after.vectors_ND, before, atol=1e-3)


@pytest.mark.parametrize("length", [3, 100, 5000, -100])
def test_a_damaged_index_is_named_and_can_be_made_anew(place, length):
    path = place / "run" / "index" / "index.sqlite"
    content = path.read_bytes()
    path.write_bytes(content[:length] if length != 100 else b"x" * len(content))
    with pytest.raises(RunFolderError, match=r"index\.sqlite is damaged .*fedss index RUN"):
        opened(place).thumbnail(11)
    assert len(build_collection(place / "run", place / "photos")) == 12
    assert opened(place).thumbnail(11)


def test_vectors_that_were_changed_are_noticed(place):
    path = place / "run" / "index" / "index.sqlite"
    content = path.read_bytes()
    vector = opened(place).vectors_ND[4].numpy().tobytes()
    assert content.count(vector) == 1
    path.write_bytes(content.replace(vector, vector[:-1] + b"\x7f"))
    with pytest.raises(RunFolderError, match=r"damaged .*not of length 1"):
        opened(place)


def test_an_enrolled_class_is_found_at_once_and_by_whoever_opens_the_index(place):
    before = opened(place)
    new = [make_image(70), make_image(71)]
    content = io.BytesIO()
    make_image(72).save(content, "PNG")
    after = enrol(before, " ключ ", [*new, content], names=["a", "b", "c"])
    assert len(before) == 12
    assert after.enrolled == {"ключ": 3}
    assert after.classes == {**before.classes, "ключ": 3}
    for collection in (after, opened(place), reopen(before)):
        (first, *_), *_ = collection.search(collection.embed(new), 3)
        assert (first.name, first.label, collection.path(first.position)) == ("a", "ключ", None)
        assert first.score > 0.9999
        assert Image.open(io.BytesIO(collection.thumbnail(first.position))).size == (24, 18)
    # The prototype is the mean embedding.
    mean_D = after.embed([*new, content]).mean(0)
    row = list(after.classes).index("ключ")
    expected_D = torch.nn.functional.normalize(mean_D, dim=0)
    assert torch.allclose(after.prototypes_CD[row], expected_D, atol=1e-5)
    # It outlives a new index, and goes when it is told to.
    assert build_collection(place / "run", place / "photos").enrolled == {"ключ": 3}
    gone = remove(after, "ключ")
    assert gone.classes == before.classes
    assert opened(place).enrolled == {}
    with pytest.raises(DataError, match="no class 'ключ' was enrolled; enrolled classes: none"):
        remove(after, "ключ")
    assert (
        after.vectors_ND[-1].numpy().tobytes()
        not in (place / "run" / "index" / "enrolled.sqlite").read_bytes()
    )
    # Its number is given to no other image.
    enrol(gone, "other", [make_image(73)])
    with pytest.raises(RunFolderError, match="open the index again"):
        after.thumbnail(12)


def test_accents_are_one_letter_however_they_are_written(made, tmp_path):
    (tmp_path / "photos" / "cafe\u0301").mkdir(parents=True)
    make_image(0).save(tmp_path / "photos" / "cafe\u0301" / "1.png")
    collection = build_collection(made / "run", tmp_path / "photos", tmp_path / "index")
    assert collection.path(0).is_file()
    assert enrol(collection, "caf\u00e9", [make_image(1)]).classes == {"caf\u00e9": 2}
    assert remove(collection, "cafe\u0301").classes == {"caf\u00e9": 1}


def test_images_enrolled_into_a_class_of_the_folder_join_it(place):
    both = enrol(opened(place), "class 1", [make_image(74)])
    assert both.classes["class 1"] == 4
    assert both.images_of("class 1") == [3, 4, 5, 12]
    assert remove(both, "class 1").classes["class 1"] == 3


def test_what_cannot_be_enrolled_leaves_nothing(place):
    collection = opened(place)
    for label, images, message in (
        ("  ", [make_image(0)], "a class needs a name"),
        ("new", [], "expected one image or more"),
        ("new", [make_image(0), place / "none.png"], r"cannot read image .*none\.png"),
        ("new", [io.BytesIO(b"GIF89a")], "cannot read image 1:"),
    ):
        with pytest.raises(DataError, match=message):
            enrol(collection, label, images)
    assert not (collection.folder / "enrolled.sqlite").exists()


def test_an_open_image_is_embedded_as_its_file_and_stays_as_it_was(place, tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8))
    noise.save(tmp_path / "a.jpg", quality=95)
    collection = opened(place)
    expected_1D = collection.embed([tmp_path / "a.jpg"])
    with Image.open(tmp_path / "a.jpg") as image:
        assert torch.equal(collection.embed([image]), expected_1D)
        (taken,) = enrol(collection, "open", [image]).search(expected_1D, 1)[0]
        assert taken.score == pytest.approx(1)
        remove(collection, "open")
        assert image.size == (400, 300)
        with Image.open(tmp_path / "a.jpg") as untouched:
            assert np.array_equal(np.asarray(image), np.asarray(untouched))
        # Decoded now, it is what it is; nothing but its pixels counts.
        plain_1D = collection.embed([Image.fromarray(np.asarray(image))])
        assert torch.equal(collection.embed([image]), plain_1D)
        assert not torch.equal(plain_1D, expected_1D)
    content = io.BytesIO((tmp_path / "a.jpg").read_bytes())
    assert torch.equal(collection.embed([Image.open(content)]), expected_1D)
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft("L", None)
        told_1D = collection.embed([image.copy()])
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft("L", None)
        assert torch.equal(collection.embed([image]), told_1D)
        assert not torch.equal(told_1D, expected_1D)
    first, second = make_image(1), make_image(2)
    first.save(tmp_path / "two.gif", save_all=True, append_images=[second])
    with Image.open(tmp_path / "two.gif") as image:
        image.seek(1)
        page_1D = collection.embed([image])
        assert torch.equal(page_1D, collection.embed([image.copy()]))
        assert not torch.equal(page_1D, collection.embed([tmp_path / "two.gif"]))


def test_several_enrol_at_once(place):
    collection = opened(place)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: enrol(collection, f"new {i}", [make_image(i)] * 2), range(12)))
    assert opened(place).enrolled == dict(sorted((f"new {i}", 2) for i in range(12)))


def test_an_enrolment_killed_in_its_middle_was_never_there(place):
    collection = enrol(opened(place), "new", [make_image(75)])
    # With so small a cache half of it is on the disk when the process dies.
    code = """if True:
        import os, sys
        from pathlib import Path
        import numpy as np
        from fedss.search.store import Item, transaction, add_items
        with transaction(Path(sys.argv[1])) as file:
            file.execute("PRAGMA cache_size = 1")
            items = (Item(f"{i}", "half", None, np.ones(6), bytes(5000)) for i in range(200))
            add_items(file, items)
            os._exit(9)
    """
    path = collection.folder / "enrolled.sqlite"
    size = path.stat().st_size
    died = subprocess.run([sys.executable, "-c", code, str(path)])
    assert died.returncode == 9
    assert path.stat().st_size > 10 * size
    assert opened(place).enrolled == {"new": 1}
    assert enrol(collection, "more", [make_image(76)]).enrolled == {"more": 1, "new": 1}


def test_identify_names_the_nearest_class_or_says_unknown(place):
    collection = opened(place)
    query_QD = collection.embed([place / "photos" / "class 3" / "1.png", make_image(90)])
    means = [collection.vectors_ND[3 * i : 3 * i + 3].double().mean(0) for i in range(4)]
    units = torch.stack([mean / mean.norm() for mean in means]).float()
    scores_QC = query_QD @ units.T
    best_Q, row_Q = scores_QC.max(1)
    between = float(best_Q.sort().values.mean())
    identities = identify(collection, query_QD, between)
    for one, best, row in zip(identities, best_Q.tolist(), row_Q.tolist(), strict=True):
        assert one.score == pytest.approx(best, abs=1e-6)
        assert one.nearest == f"class {row}"
        assert one.label == (one.nearest if best >= between else None)
    assert {one.label is None for one in identities} == {True, False}
    assert [one.label for one in identify(collection, query_QD, 1.0)] == [None, None]
    assert None not in [one.label for one in identify(collection, query_QD, -1.0)]
    with pytest.raises(ConfigError, match="threshold: expected a cosine from -1 to 1, got 60"):
        identify(collection, query_QD, 60)


def test_identify_needs_classes(made, tmp_path):
    make_image(0).save(tmp_path / "a.png")
    collection = build_collection(made / "run", tmp_path, tmp_path / "index")
    with pytest.raises(DataError, match=r"no image of .* has a class: sort the images"):
        identify(collection, collection.vectors_ND, 0.5)
    named = enrol(collection, "new", [tmp_path / "a.png"])
    assert identify(named, collection.vectors_ND, 0.99)[0].label == "new"


def test_a_score_at_the_threshold_is_named_whatever_else_is_asked_for(place):
    collection = opened(place)
    query_QD = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    scores_Q1, rows_Q1 = fedss.nearest(query_QD, collection.prototypes_CD, 1)
    together = identify(collection, query_QD, -1.0)
    assert [one.score for one in together] == scores_Q1[:, 0].tolist()
    names = list(collection.classes)
    assert [one.nearest for one in together] == [names[row] for row in rows_Q1[:, 0].tolist()]
    for at, one in enumerate(together):
        query_1D = query_QD[at : at + 1]
        assert identify(collection, query_1D, one.score) == [one]
        above = float(np.nextafter(one.score, 2))
        assert identify(collection, query_1D, above)[0].label is None
    assert identify(collection, query_QD[:0], 0.5) == []
    for query, message in ((query_QD[0], "expected"), (query_QD / 0, "expected finite numbers")):
        with pytest.raises(DataError, match=message):
            identify(collection, query, 0.5)


def test_the_threshold_of_an_evaluation_is_read(tmp_path):
    assert stored_threshold(tmp_path) is None
    path = tmp_path / "verification.json"
    path.write_text(json.dumps(measured(threshold=0.62, fpir=0.01, enrolled=120)))
    stored = stored_threshold(tmp_path)
    assert stored is not None
    assert (stored.threshold, stored.fpir, stored.enrolled) == (0.62, 0.01, 120)
    assert stored.fpir_among(120) == pytest.approx(0.01)
    # A stranger is passed by two independent halves.
    assert 1 - stored.fpir_among(240) == pytest.approx((1 - stored.fpir_among(120)) ** 2)
    path.write_text(json.dumps(measured(threshold=1.5)))
    assert stored_threshold(tmp_path).threshold == REJECT_ALL
    wrong = ({"threshold": "high"}, {"enrolled": 0}, {"threshold": 1e999}, {"threshold": -1.5})
    for change in wrong:
        path.write_text(json.dumps(measured(**change)))
        with pytest.raises(
            RunFolderError, match=r"verification\.json: .*; delete it and run fedss evaluate"
        ):
            stored_threshold(tmp_path)


def test_where_no_threshold_can_be_measured_it_is_said_why(tmp_path):
    assert "fedss evaluate" in why_no_threshold(tmp_path)
    assert "if its test images are of several classes" in why_no_threshold(tmp_path)
    config = tmp_path / "config.json"
    data = {"name": "federation", "evaluated_at": "sites"}
    config.write_text(json.dumps({"config": {}, "data": data}))
    assert "evaluated at the sites, which gives none" in why_no_threshold(tmp_path)
    config.write_text(json.dumps({"config": {}, "data": data | {"evaluated_at": "server"}}))
    assert "evaluated at the sites" not in why_no_threshold(tmp_path)
    path = tmp_path / "verification.json"
    path.write_text(json.dumps(measured() | {"identification": None}))
    assert stored_threshold(tmp_path) is None
    why = why_no_threshold(tmp_path)
    assert "no classes to find, or none to reject. Or give a least cosine with --threshold" in why
    assert "fedss evaluate" not in why


def test_a_model_that_collapsed_names_nobody(place, capsys):
    flat = build_embedder("conv4-4", channels=3, image_size=12, embedding_size=6, seed=0)
    last = flat.backbone.block4.norm
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.ones_(last.bias)
    run = place / "run"
    save_embedder(flat, run / "model", {})
    shutil.rmtree(run / "index")
    collection = build_collection(run, place / "photos")
    rows_ND = collection.vectors_ND
    assert (rows_ND == rows_ND[0]).all()
    (run / "verification.json").write_text(json.dumps(measured(rows_ND[:1].expand(500, 6))))
    stored = stored_threshold(run)
    # Also where a vector's cosine with itself is a little below 1, by the processor.
    assert stored.threshold == REJECT_ALL > 1
    (one, other) = identify(collection, rows_ND[:2], stored.threshold)
    assert one.label is other.label is None
    assert one.nearest == "class 0"
    with pytest.raises(ConfigError, match="expected a cosine from -1 to 1"):
        identify(collection, rows_ND[:2], 1.5)
    told = "the test of this run allows no name at a false-positive rate of 1.0%"
    words = ["identify", str(run), str(place / "photos" / "class 1" / "1.png")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"among 4 classes, {told}" in said
    assert "unknown" in said
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["pictures"][0]["label"] is None
    assert told in said.err
    assert main([*words, "--threshold", "1.5"]) == 2
    assert "expected a cosine from -1 to 1, got 1.5" in capsys.readouterr().err


def test_more_than_there_is_gives_all_and_nonsense_is_refused(made):
    collection = opened(made)
    query_QD = collection.vectors_ND[:2]
    assert [len(matches) for matches in collection.search(query_QD, 1000)] == [12, 12]
    assert collection.search(query_QD[:0], 3) == []
    for query, k, message in (
        (query_QD, 0, "k: expected 1 or more, got 0"),
        (query_QD[0], 1, r"queries: expected \[Q, 6\], got \[6\]"),
        (query_QD[:, :5], 1, r"queries: expected \[Q, 6\], got \[2, 5\]"),
        (query_QD / 0 * 0, 1, "expected finite numbers"),
    ):
        with pytest.raises(DataError, match=message):
            collection.search(query, k)


def test_a_model_that_diverged_makes_no_index(made, tmp_path):
    broken = build_embedder("conv4-4", channels=3, image_size=12, embedding_size=6, seed=0)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    save_embedder(broken, tmp_path / "run" / "model", {})
    with pytest.raises(DataError, match=r"the embedding of .*0\.png is not finite"):
        build_collection(tmp_path / "run", made / "photos")


def test_two_builds_of_one_index_do_not_mix(place):
    def build_another(done: int, total: int) -> None:
        with pytest.raises(RunFolderError, match="in use by another fedss process"):
            build_collection(place / "run", place / "photos")

    assert len(build_collection(place / "run", place / "photos", on_progress=build_another)) == 12


def test_the_commands(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (place / "photos" / "link.png").symlink_to("class 0/0.png")
    (place / "photos" / "broken.png").write_bytes(b"")
    assert main(["index", "run", "photos"]) == 2
    assert "broken.png" in capsys.readouterr().err
    assert main(["index", "run", "photos", "--skip-broken"]) == 0
    said = capsys.readouterr()
    assert "12 images; 4 classes; 0 images were new or changed" in said.out
    assert "left out 1 unreadable images: broken.png" in said.err
    assert "passed over: symbolic links (1); list what links lead to in a CSV" in said.err

    one, two = "photos/class 1/2.png", "photos/class 2/0.png"
    assert main(["search", "run", one, two, "--count", "3", "--json", "--show", "found.html"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert [first["picture"], second["picture"]] == [one, two]
    expected = opened(place).search(opened(place).embed([one]), 3)[0]
    assert [match["name"] for match in first["matches"]] == [match.name for match in expected]
    assert first["matches"][0]["path"] == str(place.resolve() / one)
    assert set(first["matches"][0]) == {"position", "name", "label", "score", "path"}
    page = Path("found.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * (1 + 3)
    assert "http" not in page
    # File names, no paths; the query's own copy, and with it which classes are right.
    assert str(place.resolve()) not in page
    assert "Already in the index: 2.png, class class 1" in page
    assert page.count("the query itself") == 2
    found = first["matches"] + second["matches"]
    own = ["class 1"] * 3 + ["class 2"] * 3
    right = [match["label"] == label for match, label in zip(found, own, strict=True)]
    assert page.count("✓ right class") == sum(right) - 2
    assert page.count("✗ wrong class") == 6 - sum(right)
    assert main(["search", "run", one]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"nearest to {one} in ")
    assert lines[4].split() == ["1.000", "class", "1", "class", "1/2.png"]

    assert main(["enrol", "run", "new one", one, two]) == 0
    assert "enrolled 2 images of new one; 5 classes now" in capsys.readouterr().out
    assert main(["identify", "run", one]) == 2
    assert "fedss evaluate run measures one, if its test" in capsys.readouterr().err
    assert main(["identify", "run", one, two, "--threshold", "0.99999", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["threshold"] == 0.99999
    assert [row["label"] for row in output["pictures"]] == [None, None]
    verification = measured(threshold=0.1, enrolled=5)
    Path("run/verification.json").write_text(json.dumps(verification))
    assert main(["identify", "run", one]) == 0
    said = capsys.readouterr().out
    assert "among 5 classes, threshold 0.100 (of strangers 1.0% are named among 5 classes" in said
    assert "here about 1.0%; too few images were at hand" in said
    assert "unknown" not in said
    assert main(["enrol", "run", "new one", "--remove"]) == 0
    assert "4 classes now" in capsys.readouterr().out
    assert main(["enrol", "run", "new one", one, "--remove"]) == 2
    assert "give no images with it" in capsys.readouterr().err
    assert main(["search", "run", "none.png"]) == 2
    assert "cannot read image none.png" in capsys.readouterr().err
