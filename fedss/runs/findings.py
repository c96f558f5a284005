"""What a run finds out beside its records, file by file: written here, read and checked here."""

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from fedss.evaluation.baselines import Floors
from fedss.evaluation.evaluate import ConfusedClasses, Findings, Neighbours
from fedss.evaluation.intervals import ClassScores
from fedss.evaluation.verification import Identification, Point, Verification
from fedss.files import write_file, write_json
from fedss.runs.fields import Fields, damaged, read_fields

VERIFICATION = "verification.json"


def write_findings(folder: Path, found: Findings) -> None:
    """Write ``retrieval.npz``, ``confusions.npz`` and, where pairs could tell, the verification."""
    for name, arrays in (("retrieval.npz", found.neighbours), ("confusions.npz", found.confused)):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **vars(arrays))
        write_file(folder / name, buffer.getvalue())
    if found.verification is not None:
        write_verification(folder, found.verification)


def write_verification(folder: Path, found: Verification) -> None:
    """Write ``verification.json``: the fields of its class, as they are."""
    write_json(folder / VERIFICATION, asdict(found))


def read_verification(folder: Path) -> Verification | None:
    """What ``verification.json`` says; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    path = folder / VERIFICATION
    if not path.exists():
        return None
    found = read_fields(path)
    points, roc = (tuple(map(_point, found.objects(name))) for name in ("points", "roc"))
    fars = [point.far for point in roc]
    if not fars or min(fars) <= 0 or fars != sorted(fars):
        raise damaged(path, "'roc': expected points whose 'far' is above 0 and rises")
    return Verification(
        eer=found.share("eer"),
        eer_threshold=found.number("eer_threshold"),
        points=points,
        roc=roc,
        genuine=found.integer("genuine"),
        impostor=found.integer("impostor"),
        smallest_far=found.number("smallest_far"),
        identification=found.unless_null(
            "identification", lambda key: _identification(found.object(key))
        ),
    )


def _point(found: Fields) -> Point:
    return Point(
        found.share("far"),
        found.share("tar"),
        found.number("threshold"),
        bool(found.any("supported")),
    )


def _identification(found: Fields) -> Identification:
    threshold, enrolled = found.number("threshold"), found.integer("enrolled")
    if not threshold >= -1 or enrolled < 1:
        raise damaged(
            found.where,
            f"expected a threshold from -1 on and classes, got {threshold} and {enrolled}",
        )
    return Identification(
        fpir=found.share("fpir"),
        dir=found.share("dir"),
        dir_low=found.share("dir_low"),
        dir_high=found.share("dir_high"),
        threshold=threshold,
        supported=bool(found.any("supported")),
        draws=found.integer("draws"),
        enrolled=enrolled,
        mated=found.integer("mated"),
        nonmated=found.integer("nonmated"),
    )


def write_scores(path: Path, scores: Floors) -> None:
    """MAP@10 by name, and that of each class of one test: ``floors.json``, ``by_class.json``."""
    first = next(iter(scores.by_class.values()), None)
    content = {
        "map_at_10": dict(scores.map_at_10),
        "class_names": [] if first is None else list(first.names),
        "queries": [] if first is None else first.queries_C.tolist(),
        "by_class": {name: of.map_at_10_C.tolist() for name, of in scores.by_class.items()},
    }
    # In one line: a number of each class in a line of its own would help nobody.
    write_file(path, (json.dumps(content) + "\n").encode())


def read_scores(path: Path) -> Floors:
    """What :func:`write_scores` wrote; nothing where there is no file.

    Raises:
        RunFolderError: it is damaged.
    """
    if not path.exists():
        return Floors()
    found = read_fields(path)
    means = found.object("map_at_10")
    names, queries = found.list("class_names"), found.list("queries")
    counted = all(type(count) is int and 0 < count < 2**63 for count in queries)
    if not all(isinstance(name, str) for name in names) or not counted:
        raise damaged(path, "expected names of classes and their numbers of queries")
    by_class = {}
    for name, values in found.object("by_class").value.items():
        fits = isinstance(values, list) and len(values) == len(names) == len(queries) > 0
        if not fits or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values):
            raise damaged(path, f"{name!r}: expected a share from 0 to 1 for each class")
        by_class[name] = ClassScores(
            tuple(names), np.array(queries, np.int64), np.array(values, np.float64)
        )
    return Floors({name: means.share(name) for name in means}, by_class)


def read_neighbours(path: Path) -> Neighbours | None:
    """The arrays of ``retrieval.npz``; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    if not path.is_file():
        return None
    arrays = _arrays(path, [field.name for field in fields(Neighbours)])
    scores, pixels = arrays["scores"], arrays["pixels"]
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise damaged(path, f"scores: expected [queries, neighbours], got {scores.shape}")
    count, depth = scores.shape
    with_query = (count, 1 + depth)
    expected = {"labels": with_query, "class_names": with_query, "query_index": (count,)}
    shapes_fit = all(arrays[name].shape == shape for name, shape in expected.items())
    if not shapes_fit or pixels.shape[:2] != with_query:
        raise damaged(path, f"shapes do not fit {count} queries with {depth} neighbours each")
    if pixels.ndim != 5 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape[3:]:
        raise damaged(path, f"pixels: expected [Q, 1 + K, 1 or 3, H, W], got {pixels.shape}")
    _check_types(path, arrays, pixels="u", labels="iu", query_index="iu", scores="f")
    return Neighbours(**arrays)


def read_confused(path: Path) -> ConfusedClasses | None:
    """The arrays of ``confusions.npz``; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    if not path.is_file():
        return None
    arrays = _arrays(path, [field.name for field in fields(ConfusedClasses)])
    pixels, count = arrays["pixels"], len(np.atleast_1d(arrays["scores"]))
    names = ("shown", "class_names", "confused", "queries")
    if arrays["scores"].ndim != 1 or any(arrays[name].shape != (count, 2) for name in names):
        raise damaged(path, f"shapes do not fit {count} pairs of classes")
    if pixels.ndim != 5 or pixels.shape[:2] != (count, 2) or pixels.shape[2] not in (1, 3):
        raise damaged(path, f"pixels: expected [{count}, 2, 1 or 3, H, W], got {pixels.shape}")
    _check_types(path, arrays, pixels="u", confused="iu", queries="iu", scores="f")
    return ConfusedClasses(**arrays)


def read_augmented(path: Path) -> np.ndarray | None:
    """``augmentation.npz``: uint8 [P, 1 + V, C, H, W], training images, each followed by what
    clients may make of it; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    if not path.is_file():
        return None
    pixels = _arrays(path, ["pixels"])["pixels"]
    fits = pixels.ndim == 5 and pixels.shape[2] in (1, 3) and pixels.shape[1] > 1
    if pixels.dtype != np.uint8 or not fits or 0 in pixels.shape:
        got = f"{pixels.dtype} {pixels.shape}"
        raise damaged(path, f"pixels: expected uint8 [P, 1 + V, 1 or 3, H, W], got {got}")
    return pixels


def _arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, f"cannot be read ({error})") from error


def _check_types(path: Path, arrays: Mapping[str, np.ndarray], **kinds: str) -> None:
    for name, kind in kinds.items():
        array = arrays[name]
        if array.dtype.kind not in kind or (name == "pixels" and array.itemsize > 1):
            raise damaged(path, f"{name}: unexpected type {array.dtype}")
