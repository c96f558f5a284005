"""Lists of images in Parquet, as strict as those in a CSV."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedss.data.names import composed
from fedss.data.table import Table, choose_columns
from fedss.errors import DataError
from fedss.optional import import_extra


def read_parquet(
    path: Path,
    columns: Sequence[str],
    optional: str | None = None,
    *,
    spare: Collection[str] = (),
    called: Mapping[str, str] | None = None,
) -> Table:
    """A Parquet file as ``read_table`` reads a CSV; its values are text or whole numbers.

    Numbers of lines are those of rows, from 1 on.

    Raises:
        DataError: It cannot be read, a column is missing, or a value is none or something else.
        ConfigError: pyarrow is not installed.
    """
    parquet = import_extra("pyarrow.parquet", "parquet")
    try:
        names = parquet.read_schema(path).names
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    header, filled, read = choose_columns(
        str(path), list(names), columns, optional, spare=spare, called=called
    )
    own = [names[header.index(name)] for name in read]
    try:
        table = parquet.read_table(path, columns=own)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    if not len(table):
        raise DataError(f"{path}: no images: there are columns and no rows")

    def rows() -> Iterator[tuple[int, list[str]]]:
        cells = (table[name].to_pylist() for name in own)
        for number, values in enumerate(zip(*cells, strict=True), 1):
            where = f"{path}, row {number}"
            line = [_cell(where, *pair) for pair in zip(read, values, strict=True)]
            for name, value in zip(filled, line, strict=False):
                if not composed(value):
                    raise DataError(f"{where}: empty {name}; fill it in or remove the row")
            yield number, line

    return Table(rows(), tuple(read), tuple(name for name in header if name not in read))


def _cell(where: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int | str) and not isinstance(value, bool):
        return str(value).strip()
    hint = ""
    if column == "image":
        hint = "; images within the file are read by fedss.Dataset.from_huggingface"
    raise DataError(
        f"{where}: expected {column} to be text or a whole number, got a "
        f"{type(value).__name__}{hint}"
    )
