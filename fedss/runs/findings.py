"""What a run finds out beside its records, file by file: written here, read and checked here."""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import numpy as np

from fedss.evaluation.baselines import Floors
from fedss.evaluation.intervals import ClassScores
from fedss.evaluation.task import ConfusedClasses, Findings, Neighbours
from fedss.evaluation.verification import Verification
from fedss.files import write_file, write_json
from fedss.runs.fields import Share, damaged, read_file

VERIFICATION = "verification.json"


def write_findings(folder: Path, findings: Findings) -> None:
    """Write ``retrieval.npz``, ``confusions.npz`` and, where pairs could tell, the verification."""
    for name, arrays in (
        ("retrieval.npz", findings.neighbours),
        ("confusions.npz", findings.confused),
    ):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **vars(arrays))
        write_file(folder / name, buffer.getvalue())
    if findings.verification is not None:
        write_verification(folder, findings.verification)


def write_verification(folder: Path, verification: Verification) -> None:
    """Write ``verification.json``: the fields of its class, as they are."""
    write_json(folder / VERIFICATION, asdict(verification))


def read_verification(folder: Path) -> Verification | None:
    """What ``verification.json`` says; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    path = folder / VERIFICATION
    if not path.exists():
        return None
    measured: Verification = read_file(Verification, path)
    fars = [point.far for point in measured.roc]
    if not fars or min(fars) <= 0 or fars != sorted(fars):
        raise damaged(path, "'roc': expected points whose 'far' is above 0 and rises")
    known = measured.identification
    if known is not None and (not known.threshold >= -1 or known.enrolled < 1):
        got = f"{known.threshold} and {known.enrolled}"
        raise damaged(path, f"expected a threshold from -1 on and classes, got {got}")
    return measured


class _Scores(TypedDict):
    map_at_10: Mapping[str, Share]
    class_names: list[str]
    queries: list[int]
    by_class: Mapping[str, list[Share]]


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
    content: _Scores = read_file(_Scores, path)
    names, queries = tuple(content["class_names"]), np.array(content["queries"], np.int64)
    by_class = {}
    for name, values in content["by_class"].items():
        if not len(values) == len(names) == len(queries) > 0 or queries.min() < 1:
            raise damaged(path, f"{name!r}: expected a score of each class, and its queries")
        by_class[name] = ClassScores(names, queries, np.array(values, np.float64))
    return Floors(dict(content["map_at_10"]), by_class)


# By array: kinds of dtype, and the shape, in which a letter is the same number throughout.
_NEIGHBOURS = {
    "pixels": ("u", "QNCHW"),
    "labels": ("iu", "QN"),
    "class_names": ("U", "QN"),
    "scores": ("f", "QK"),
    "query_index": ("iu", "Q"),
}
_CONFUSED = {
    "pixels": ("u", "P2CHW"),
    "shown": ("U", "P2"),
    "class_names": ("U", "P2"),
    "confused": ("iu", "P2"),
    "queries": ("iu", "P2"),
    "scores": ("f", "P"),
}


def read_neighbours(path: Path) -> Neighbours | None:
    """The arrays of ``retrieval.npz``; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    arrays = _read_arrays(path, _NEIGHBOURS)
    if arrays is None:
        return None
    depth = arrays["scores"].shape[1]
    if depth < 1 or arrays["labels"].shape[1] != 1 + depth:
        raise damaged(path, f"scores: expected those of all neighbours, 1 or more, got {depth}")
    return Neighbours(**arrays)


def read_confused(path: Path) -> ConfusedClasses | None:
    """The arrays of ``confusions.npz``; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    arrays = _read_arrays(path, _CONFUSED)
    return None if arrays is None else ConfusedClasses(**arrays)


def read_augmented(path: Path) -> np.ndarray | None:
    """``augmentation.npz``: uint8 [P, 1 + V, C, H, W], training images, each followed by what
    clients may make of it; None where there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    arrays = _read_arrays(path, {"pixels": ("u", "PVCHW")})
    if arrays is not None and (arrays["pixels"].shape[1] < 2 or not arrays["pixels"].size):
        raise damaged(path, f"pixels: expected versions, got {arrays['pixels'].shape}")
    return None if arrays is None else arrays["pixels"]


def _read_arrays(path: Path, layout: Mapping[str, tuple[str, str]]) -> dict[str, np.ndarray] | None:
    """The arrays of a file, of the right types and of shapes that fit each other."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in layout}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # Of what is no archive numpy says that it could be a pickle, which is never loaded.
        why = "no .npz archive" if "pickle" in str(error) else error
        raise damaged(path, f"cannot be read ({why})") from error
    sizes = {"2": 2}
    for name, (kinds, shape) in layout.items():
        array = arrays[name]
        if array.dtype.kind not in kinds or (name == "pixels" and array.itemsize > 1):
            raise damaged(path, f"{name}: unexpected type {array.dtype}")
        fits = array.ndim == len(shape) and all(
            sizes.setdefault(letter, size) == size
            for letter, size in zip(shape, array.shape, strict=True)
        )
        if not fits or (name == "pixels" and (sizes["C"] not in (1, 3) or 0 in array.shape[3:])):
            expected = ", ".join(shape).replace("C", "1 or 3")
            raise damaged(path, f"{name}: expected [{expected}], got {list(array.shape)}")
    return arrays
