"""The report of what is still under way, written again whenever there is more to tell."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from fedss.errors import RunFolderError
from fedss.runs import headlines
from fedss.runs.about import read_any_config
from fedss.runs.reading import RecordedRun, group_runs, read_runs
from fedss.text import tally

REFRESH = 10  # seconds after which the page loads itself again
_SHARE = 0.1  # of one core, at most, for the page: the run needs it more
_PATIENCE = 60.0
_READ = ("config.json", "records.jsonl", "summary.json", "retrieval.npz")


def watch_report(folder: Path, say: Callable[[str], None], poll: float = 5.0) -> Path:
    """Write ``folder/report.html`` whenever the records change, until what is under way is done.

    Until then the page, whose path is returned, loads itself again every ten seconds. Whoever
    interrupts it gets a last page that no longer does.

    Args:
        folder: of a run or a comparison that has begun.
        say: gets a line per page, or why there is none.
        poll: seconds between two looks at the records.

    Raises:
        RunFolderError: as :func:`fedss.write_report`, and if nothing has begun there. That there
            are no records yet is none: it waits.
    """
    if not (folder / "config.json").is_file():
        what = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise RunFolderError(
            f"{folder}: expected the folder of a run or a comparison that has begun, got {what}; "
            "give the --out of its fedss command, once that has read its images"
        )
    path, shown = folder / "report.html", False
    say(f"{path}: open it in a browser; it loads itself again every {REFRESH} s")
    try:
        while True:
            seen, done, began = _file_times(folder), _done(folder), time.process_time()
            late = False
            if not any(name.endswith("records.jsonl") for name in seen):
                say(f"{_clock()}  waiting for the first records")
            else:
                runs = read_runs(folder)
                late = not done and _late(folder, runs)
                _write(runs, folder, None if done else late)
                shown = True
                say(f"{_clock()}  {_line(runs, folder, done, late)}")
            if done:
                return path
            rest = time.monotonic() + (time.process_time() - began) * (1 / _SHARE - 1)
            while True:
                time.sleep(poll)
                more = _file_times(folder) != seen or (shown and not late and _late(folder, runs))
                if more and (time.monotonic() >= rest or _done(folder)):
                    break
    except KeyboardInterrupt:
        if shown:
            _write(read_runs(folder), folder, None)
        raise


def _write(runs: Sequence[RecordedRun], folder: Path, late: bool | None) -> None:
    """The page; one that loads itself again, unless ``late`` is None."""
    # Here, since drawing takes a large library, which most uses of this one need not load.
    from fedss.report.page import write_page

    watched = None
    if late is not None:
        last = _last(folder)
        last_round = "" if last is None else _clock(last)
        watched = {"written": _clock(), "last_round": last_round, "late": late, "refresh": REFRESH}
    write_page(runs, folder, watched)


def _file_times(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Which of the files that a report is made from are there, and their times and sizes."""
    found = {}
    for place in (folder, *folder.glob("*/")):
        for name in _READ:
            with suppress(OSError):
                status = (place / name).stat()
                found[str(place / name)] = status.st_mtime_ns, status.st_size
    return found


def _done(folder: Path) -> bool:
    """A run writes its summary in the end; a comparison a new configuration in the beginning."""
    summary, config = folder / "summary.json", folder / "config.json"
    if not summary.is_file():
        return False
    compared = "methods" in read_any_config(folder)
    return not compared or summary.stat().st_mtime_ns >= config.stat().st_mtime_ns


def _last(folder: Path) -> float | None:
    """When the last round was recorded, in seconds since 1970."""
    files = [folder / "records.jsonl", *folder.glob("*/records.jsonl")]
    times = [file.stat().st_mtime for file in files if file.is_file() and file.stat().st_size]
    return max(times, default=None)


def _late(folder: Path, runs: Sequence[RecordedRun]) -> bool:
    """Whether nothing was recorded for a minute and three times the longest of recent rounds."""
    last = _last(folder)
    took = [sum(r["seconds"].values()) for run in runs for r in run.records[-30:]]
    return last is not None and time.time() - last > _PATIENCE + 3 * max(took, default=0.0)


def _clock(seconds: float | None = None) -> str:
    """Now, or seconds since 1970."""
    moment = datetime.now() if seconds is None else datetime.fromtimestamp(seconds)
    today = moment.date() == datetime.now().date()
    return f"{moment:%H:%M:%S}" if today else f"{moment:%Y-%m-%d %H:%M:%S}"


def _line(runs: Sequence[RecordedRun], folder: Path, done: bool, late: bool) -> str:
    if done:
        return f"done. {headlines.headline(group_runs(runs, folder))}"
    parts = [headlines.status(run) for run in runs if not run.finished]
    if finished := sum(run.finished for run in runs):
        parts.append(f"{tally(finished, 'run')} done")
    if late:
        parts.append("nothing new for a long time: has the run stopped? Still waiting")
    return "; ".join(parts)
