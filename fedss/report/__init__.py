"""Records of a run or of a comparison -> one self-contained HTML page, or a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedss.errors import RunFolderError
from fedss.files import write_file

if TYPE_CHECKING:
    import numpy as np


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from the records of a run or a comparison.

    Args:
        folder: a run folder (``config.json``, ``records.jsonl``), finished or not, or the folder
            of a comparison (``summary.json`` that names run folders).

    Returns:
        The path of the page: one file that refers to nothing outside itself. The same records
        give the same bytes.

    Raises:
        RunFolderError: records are missing or damaged, or the page cannot be written.
    """
    # Here, since drawing takes a large library, which most uses of this one need not load.
    from fedss.report.page import render
    from fedss.runs.reading import read_runs

    folder = Path(folder)
    html, path = render(read_runs(folder), folder), folder / "report.html"
    try:
        # Names of classes may hold bytes that are no UTF-8, which a page cannot.
        write_file(path, html.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def bytes_picture(folder: Path) -> bytes:
    """The report's chart of MAP@10 against bytes moved, as a PNG for a README or a talk.

    Args:
        folder: as for :func:`write_report`.

    Returns:
        A PNG of 6.4 x 4 inches at 200 dpi on white. The same records give the same bytes.

    Raises:
        RunFolderError: records are missing or damaged, or no round has both score and bytes.
    """
    from fedss.report.figures import render_bytes_picture

    return render_bytes_picture(Path(folder))


def frontier_picture(folders: Mapping[str, Path]) -> bytes:
    """The report's chart of the frontier, of one or several comparisons, as a PNG for a README.

    Each variant's final MAP@10 (mean over seeds; a line from the lowest to the highest) against
    the bytes it moves per client and round, both ways. Where every comparison has a finished
    ``full``, scores are relative to it, and all panels share one axis.

    Args:
        folders: one to four: title -> folder of a comparison, as for :func:`write_report`. Runs
            not yet finished are left out. The pictures of several stand in two columns.

    Returns:
        A PNG at 200 dpi on white: 6.4 x 4 inches for one comparison, 5.8 x 4.4 inches for each
        of several. The same records give the same bytes.

    Raises:
        ConfigError: no folder, or more than four.
        RunFolderError: records are missing or damaged, or a comparison has no finished run with
            both score and bytes.
    """
    from fedss.report.figures import render_frontier_picture

    return render_frontier_picture({title: Path(folder) for title, folder in folders.items()})


def clients_picture(held: "tuple[np.ndarray, np.ndarray, np.ndarray]", title: str) -> bytes:
    """Pictures and classes per client, clients per class, and a client x class matrix, as a PNG.

    The matrix shows up to 36 clients, evenly spread from most pictures to fewest, and the classes
    that they hold; those held by the same clients stand next to each other.

    Args:
        held: client, class and number of pictures of each pair of client and class that has any,
            integers [P], as :func:`fedss.data.holdings` gives them.
        title: stands above.

    Returns:
        A PNG of 12.2 x 9.2 inches at 200 dpi on white. The same numbers give the same bytes.
    """
    from fedss.report.figures import render_clients_picture

    return render_clients_picture(held, title)


__all__ = ["bytes_picture", "clients_picture", "frontier_picture", "write_report"]
