"""Records of a run or of a comparison -> one self-contained HTML page, or a picture."""

from pathlib import Path

from fedss.errors import RunFolderError
from fedss.files import write_file


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

    folder = Path(folder)
    html, path = render(folder), folder / "report.html"
    try:
        write_file(path, html.encode())
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error})") from error
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
    from fedss.report.page import render_bytes_picture

    return render_bytes_picture(Path(folder))


__all__ = ["bytes_picture", "write_report"]
