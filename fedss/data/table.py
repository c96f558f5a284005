"""CSV files, read strictly: nothing is guessed, and each mistake is named by its line."""

import difflib
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedss.data.names import composed
from fedss.errors import ConfigError, DataError

KNOWN = ("image", "label", "client", "split")
"""The columns that mean something to some command."""

_OPENING = re.compile(r'[ \t]*"')
_BREAK = re.compile(r"\r\n|\r|\n")
# These two match at any place.
_INSIDE = re.compile(r'((?:[^"]+|"")*)("?)[ \t]*')
_OUTSIDE = re.compile(r'[^,"\r\n]*')
_OTHER_MARKS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_SAVE = "Save the file as UTF-8 (in Excel: 'CSV UTF-8')"

_Lines = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class Table:
    """A CSV: line number and cells, without outer spaces, of each line that is not blank.

    The cells are those of ``columns``: of the columns asked for, then the optional one, those that
    are there; ``unread`` names the others. Errors come as ``rows`` is read.
    """

    rows: Iterator[tuple[int, list[str]]]
    columns: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """On columns that are not read and mean nothing to any command."""
        strange = [name for name in self.unread if name not in KNOWN]
        return (f"columns not read: {', '.join(strange)}",) if strange else ()


def parse_columns(text: str | None) -> dict[str, str]:
    """From ``image=path,label=species``, the name in a file of each of the columns ``KNOWN``.

    Raises:
        ConfigError: Another text.
    """
    called: dict[str, str] = {}
    for pair in text.split(",") if text is not None else []:
        column, equals, name = (part.strip() for part in pair.partition("="))
        if not (column in KNOWN and equals and name) or column in called:
            raise ConfigError(
                f"columns: expected pairs such as image=path,label=species, each of "
                f"{', '.join(KNOWN)} at most once, got {text!r}"
            )
        called[column] = name
    if len(set(called.values())) < len(called):
        raise ConfigError(f"columns: expected a column of its own for each, got {text!r}")
    return called


def read_table(
    path: Path,
    columns: Sequence[str],
    optional: str | None = None,
    *,
    spare: Collection[str] = (),
    called: Mapping[str, str] | None = None,
    content: bytes | None = None,
) -> Table:
    """A CSV as RFC 4180 has it: commas, and double quotes around a whole value or not at all.

    A quote within a value is written twice, in a value in quotes. Beyond the RFC, spaces around
    values do not count. The file is in UTF-8, with a header line; ``columns`` must be there, with
    no cell empty, ``optional`` and others may.

    Args:
        path: The file, for messages alone where its ``content`` is given.
        columns: Those that are asked for.
        optional: One that may be missing, also in a line.
        spare: Those of ``columns`` that may be missing altogether.
        called: What a column is called in this file, where it is called otherwise.
        content: What is in the file.

    Raises:
        DataError: Anything amiss with the file, its header or a line, or no line at all; a column
            that is there twice, or one whose name is nearly that of a missing one of ``KNOWN``.
    """
    try:
        content = path.read_bytes() if content is None else content
    except OSError as error:
        raise DataError(
            f"{path}: expected a CSV file with {_listed(columns)}; cannot open it: {error.strerror}"
        ) from error
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: expected text in UTF-8, got UTF-16. {_SAVE}")
    if (zero := content.find(b"\0")) >= 0:
        raise DataError(
            f"{path}, line {_line_of(content, zero)}: a zero byte (NUL), which no text has; the "
            f"file is damaged, or no text in UTF-8. {_SAVE}"
        )
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {_line_of(content, error.start)}: expected text in UTF-8, got byte "
            f"0x{content[error.start]:02x} at position {error.start}. {_SAVE}"
        ) from error

    # Decoded anew bit by bit: a whole text takes four bytes a character.
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
    lines = enumerate(text, 1)
    number, first = next(lines, (1, ""))
    _check_commas(path, first, columns)
    header = [composed(cell) for cell in _record(path, number, first, lines)]
    if not any(header):
        also = f"[,{optional}]" if optional else ""
        raise DataError(f"{path}: empty; expected a header line {','.join(columns)}{also}")
    header, columns, read = choose_columns(
        f"{path}, line 1", header, columns, optional, spare=spare, called=called
    )
    taken = [header.index(name) for name in read]

    def rows() -> Iterator[tuple[int, list[str]]]:
        empty = True
        for number, line in lines:
            record = _record(path, number, line, lines)
            cells = [cell.strip() for cell in record]
            breaks = sum(len(_BREAK.findall(cell)) for cell in record)
            if breaks and len(cells) != len(header):
                raise DataError(
                    f"{path}, line {number}: expected {len(header)} cells, got {len(cells)}; a "
                    f"value in quotes goes on to line {number + breaks}: remove a double quote "
                    "that is too much, or put the others right"
                )
            if any(map(composed, cells)):
                empty = False
                where = f"{path}, line {number}"
                yield number, _cells(where, cells, len(header), taken, columns)
        if empty:
            raise DataError(f"{path}: no images: there is a header line and nothing below it")

    unread = tuple(name for name in header if name and name not in read)
    return Table(rows(), tuple(read), unread)


def choose_columns(
    where: str,
    header: list[str],
    columns: Sequence[str],
    optional: str | None,
    *,
    spare: Collection[str] = (),
    called: Mapping[str, str] | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """A header by the names that columns have elsewhere; those of it that must be filled; and
    those that are read. Arguments and errors are those of ``read_table``.
    """
    header = _rename(where, header, called or {})
    filled = [name for name in columns if name in header or name not in spare]
    _check_header(where, header, filled, optional)
    read = [name for name in (*filled, optional) if name is not None and name in header]
    return header, filled, read


def _rename(where: str, header: list[str], called: Mapping[str, str]) -> list[str]:
    """A header with its columns by the names that they have elsewhere."""
    for column, name in called.items():
        if header.count(name) != 1:
            raise DataError(
                f"{where}: expected one column {name!r}, as columns says {column}={name}; found: "
                f"{', '.join(header)}"
            )
    meant = {name: column for column, name in called.items()}
    # What has the name of one that is called otherwise is not that one.
    return [meant.get(name, f"{name} of the file" if name in called else name) for name in header]


def _line_of(content: bytes, position: int) -> int:
    before = content[:position].replace(b"\r\n", b"\n")
    return before.count(b"\n") + before.count(b"\r") + 1


def _record(path: Path, number: int, line: str, following: _Lines) -> list[str]:
    """The cells of the record that begins with a line; a value in quotes may go on in others."""
    if '"' not in line:
        return line.rstrip("\r\n").split(",")
    cells: list[str] = []
    place = 0
    while True:
        if opening := _OPENING.match(line, place):
            value, number, line, place = _quoted(
                path, number, line, opening.end(), following, len(cells)
            )
        else:
            value = next(_OUTSIDE.finditer(line, place))[0]
            end = place + len(value)
            if line[end : end + 1] == '"':
                whole = _up_to_comma(line, place)
                raise DataError(
                    f"{path}, line {number}: a double quote within a value: {whole}; put the whole "
                    f"value in quotes, and write a quote within it twice: {_in_quotes(whole)}"
                )
            place = end
        cells.append(value)
        if line[place : place + 1] != ",":
            return cells
        place += 1


def _quoted(
    path: Path, begins: int, line: str, place: int, following: _Lines, column: int
) -> tuple[str, int, str, int]:
    """A value from behind its first quote, and line number, line and place behind its last."""
    number, from_quote, pieces = begins, line[place:], []
    while True:
        part = next(_INSIDE.finditer(line, place))
        pieces.append(part[1])
        if part[2]:
            break
        number, line = next(following, (0, ""))
        if not number:
            raise DataError(
                f"{path}, line {begins}: a double quote begins a value, and no other one ends it: "
                f'"{_short(from_quote)}; end it with one, or remove it'
            )
        place = 0
    value = "".join(pieces).replace('""', '"')
    place = part.end()
    rest = _up_to_comma(line, place)
    if rest and number == begins:
        whole = _up_to_comma(from_quote, 0)
        raise DataError(
            f'{path}, line {begins}: expected a comma after the value in quotes "{value}", got '
            f"{rest}; write a quote within a value twice: {_in_quotes(whole)}"
        )
    if rest or any(row.count(",") >= max(1, column) for row in re.split(r"[\r\n]+", value)[1:]):
        raise DataError(
            f'{path}, line {begins}: the value in quotes "{_short(from_quote)} goes on to line '
            f"{number}, over what look like other rows; remove a double quote that is too much, "
            "or the line breaks and commas within the value"
        )
    return value, number, line, place


def _up_to_comma(line: str, place: int) -> str:
    return line[place:].split(",")[0].strip()


def _in_quotes(value: str) -> str:
    return '"' + value.strip('"').replace('"', '""') + '"'


def _short(text: str) -> str:
    text = text.rstrip("\r\n")
    return text if len(text) <= 30 else text[:29] + "…"


def _listed(columns: Sequence[str]) -> str:
    return f"the column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"


def _check_commas(path: Path, first: str, columns: Sequence[str]) -> None:
    """Whether a header's columns are separated with something else; said before quotes are."""
    line = first.strip("\ufeff \r\n")
    if line.lower().startswith("sep="):
        raise DataError(
            f"{path}, line 1: found {line!r}, a note for Excel; remove this line, and separate the "
            "columns with commas"
        )
    mark = next((mark for mark in _OTHER_MARKS if mark in line), None)
    if mark and "," not in line:
        raise DataError(
            f"{path}, line 1: expected {_listed(columns)}; missing: {', '.join(columns)}; found: "
            f"{line!r}, separated with {_OTHER_MARKS[mark]}; separate the columns with commas"
        )


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def _check_header(
    where: str, header: Sequence[str], columns: Sequence[str], optional: str | None
) -> None:
    # Those that this command does not read, too: a list means the same to all of them.
    known = dict.fromkeys([*columns, *([optional] if optional else []), *KNOWN])
    called: dict[str, list[str]] = {}
    for name in filter(None, header):
        meant = next((column for column in known if _bare(column) == _bare(name)), name.casefold())
        called.setdefault(meant, []).append(name)
    for column, named in called.items():
        if len(named) > 1:
            raise DataError(
                f"{where}: {len(named)} columns are called {column}, or nearly so: "
                f"{', '.join(map(repr, named))}; keep one, and remove or rename the others"
            )
    others = {_bare(name): name for name in header if name not in known}
    missing = [column for column in columns if column not in header]
    hints = {}
    for column in known:
        if column not in header:
            cutoff, likely = 0.6 if column in missing else 0.8, others
            if column not in (*columns, optional):
                # client_id, in a list of which no client is read, is a name of its own.
                likely = {bare: name for bare, name in others.items() if "_" not in name}
            if column == "client" and column in missing:
                hints[column] = (
                    "without clients, a partition deals the images to some (--partition)"
                )
            if near := difflib.get_close_matches(_bare(column), likely, 1, cutoff):
                hints[column] = f"is {others[near[0]]!r} meant as {column!r}?"
    if missing:
        raise DataError(
            f"{where}: expected {_listed(columns)}"
            + (f" and perhaps {optional}" if optional else "")
            + f"; missing: {', '.join(missing)}; found: {', '.join(header)}"
            + "".join(f"; {hint}" for hint in hints.values())
        )
    for column, hint in hints.items():
        raise DataError(
            f"{where}: {hint} Rename the column: to {column!r} if so, else to something that "
            "is less like it"
        )


def _cells(
    where: str, cells: list[str], width: int, taken: Sequence[int], columns: Sequence[str]
) -> list[str]:
    if len(cells) > width:
        raise DataError(
            f"{where}: expected {width} cells, got {len(cells)}; "
            'put a value with a comma in it between double quotes: "a,b"'
        )
    alone = cells[0] if len(cells) == 1 < width else ""
    cells += [""] * (width - len(cells))
    values = [cells[i] for i in taken]
    for column, value in zip(columns, values, strict=False):
        if not composed(value):
            mark = next((word for mark, word in _OTHER_MARKS.items() if mark in alone), None)
            advice = f"separate the cells with commas, not {mark}" if mark else "fill it in"
            raise DataError(f"{where}: empty {column}; {advice} or remove the line")
    return values
