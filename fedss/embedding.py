"""A trained model used on picture files: from files to embeddings with names."""

import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedss.data.cache import decode, quiet_pillow
from fedss.data.folder import EXTENSIONS
from fedss.data.manifest import read_table
from fedss.errors import ConfigError, DataError
from fedss.files import write_file, writing
from fedss.models import Embedder, embed_pixels

_BLOCK = 512
_ADVICE = "make room or mend the place, or choose another one (--out)"


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of picture files.

    Attributes:
        names: one per row, as given or the file's path.
        embeddings_ND: float32 [N, D], rows of length 1.
        skipped: files that could not be read, where that was asked for.
    """

    names: tuple[str, ...]
    embeddings_ND: np.ndarray
    skipped: tuple[str, ...] = ()


def embed_files(
    embedder: Embedder,
    paths: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    skip_broken: bool = False,
) -> Embeddings:
    """Embed picture files: decoded as in training, a block at a time.

    Args:
        embedder: e.g. from ``fedss.load``.
        paths: picture files.
        names: a name per picture; None: its path.
        skip_broken: leave out files that cannot be read, and list them in ``skipped``.

    Raises:
        DataError: a file that cannot be read (named), or none at all.
    """
    names = [str(path) for path in paths] if names is None else names
    kept: list[str] = []
    skipped: list[str] = []
    blocks: list[np.ndarray] = []

    def attempt(path: str | Path) -> np.ndarray | Exception:
        try:
            # A pipe would keep whoever opens it waiting.
            if not os.path.isfile(path) and os.path.exists(path):
                raise OSError("not a file")
            return decode(Path(path), embedder.spec.image_size, embedder.spec.channels)
        except Exception as error:
            return error

    with quiet_pillow(), ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), _BLOCK):
            block = paths[start : start + _BLOCK]
            pixels = []
            for path, name, result in zip(
                block, names[start : start + _BLOCK], pool.map(attempt, block), strict=True
            ):
                if isinstance(result, np.ndarray):
                    kept.append(name)
                    pixels.append(result)
                elif skip_broken:
                    skipped.append(name)
                else:
                    raise DataError(
                        f"cannot read picture {path}: {result}; mend or remove it, or leave such "
                        "pictures out with skip_broken (--skip-broken)"
                    ) from result
            if pixels:
                blocks.append(embed_pixels(embedder, np.stack(pixels)).numpy())
    if not blocks:
        raise DataError(f"no readable picture among the {len(paths)} given")
    return Embeddings(tuple(kept), np.concatenate(blocks), tuple(skipped))


def list_pictures(path: Path) -> tuple[list[Path], list[str]]:
    """Picture files in a folder (and below it), or in the ``image`` column of a CSV.

    Returns:
        Paths, and their names relative to the folder or as written in the CSV.

    Raises:
        DataError: no such place, no picture in it, or anything amiss with the CSV.
    """
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
        )
        names = [file.relative_to(path).as_posix() for file in found]
    elif path.is_file():
        names = [image for _, (image,) in read_table(path, ("image",))]
        found = [path.parent / name for name in names]
    else:
        raise DataError(f"{path}: expected a folder of pictures or a CSV, found neither")
    if not found:
        raise DataError(f"{path}: no picture found ({', '.join(sorted(EXTENSIONS))})")
    return found, names


def write_embeddings(path: Path, result: Embeddings) -> list[Path]:
    """Write ``X.npy`` with the names, a JSON list, in ``X.names.json``; or one ``X.parquet``.

    The parquet file has the columns ``name`` and ``embedding`` (a list of float32).

    Returns:
        The files written.

    Raises:
        ConfigError: another ending, or pyarrow is not installed.
        DataError: parquet, and a name that is no UTF-8.
        RunFolderError: the place cannot be written.
    """
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, result.embeddings_ND)
        names = (json.dumps(result.names, indent=0) + "\n").encode()
        files = {path: buffer.getvalue(), path.with_suffix(".names.json"): names}
    elif path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(
                f'{path}: parquet needs pyarrow: pip install "fedss[parquet]", or write .npy'
            ) from error
        size = result.embeddings_ND.shape[1]
        rows = pyarrow.FixedSizeListArray.from_arrays(result.embeddings_ND.ravel(), size)
        try:
            table = pyarrow.table({"name": list(result.names), "embedding": rows})
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}: parquet keeps names in UTF-8, which {error.object!r} is not; rename the "
                "picture, or write .npy"
            ) from error
        pyarrow.parquet.write_table(table, buffer)
        files = {path: buffer.getvalue()}
    else:
        raise ConfigError(f"{path}: expected a name that ends in .npy or .parquet")
    with writing(path.parent, _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_file(file, content)
    return list(files)
