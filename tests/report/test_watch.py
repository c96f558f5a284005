"""The report of a run under way, while another process writes its records."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedss.errors import RunFolderError
from fedss.report import watch
from fedss.report.watch import watch_report
from fedss.runs.reading import read_runs
from tests.report.made import Page, fake_run

# Writes a run's lines in halves, each when it is told to go on; at last its summary.
WRITER = """
import json, sys
from pathlib import Path
folder, summary = Path(sys.argv[1]), sys.argv[2]
lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
for line in lines:
    for part in (line[: len(line) // 2], line[len(line) // 2 :]):
        sys.stdin.readline()
        with (folder / "records.jsonl").open("a") as file:
            file.write(part)
        print("written", flush=True)
sys.stdin.readline()
(folder / "summary.json").write_text(summary)
print("written", flush=True)
"""


def begin(folder: Path, method: str = "fedss", rounds: int = 10, **settings: int) -> dict:
    """A run that is about to begin: its records lie aside in all.jsonl."""
    entry = fake_run(folder, method, rounds=rounds, **settings) | {"folder": "."}
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {"eval_every": 5, "checkpoint_every": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "retrieval.npz").unlink()
    (folder / "records.jsonl").rename(folder / "all.jsonl")
    return entry


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page whenever there is more to tell, whatever it costs."""
    monkeypatch.setattr(watch, "_SHARE", 1.0)


@pytest.mark.usefixtures("at_once")
def test_follows_a_writer_to_the_end(tmp_path: Path) -> None:
    entry, page = begin(tmp_path, rounds=3), tmp_path / "report.html"
    command = [sys.executable, "-c", WRITER, str(tmp_path), json.dumps([entry])]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        said, pages = [], []

        def say(line: str) -> None:
            said.append(re.sub(r"^[\d:]+  ", "", line))
            if page.exists():
                pages.append(page.read_text())
            if writer.poll() is None:  # let it write the next half of a line
                try:
                    print(file=writer.stdin, flush=True)
                    writer.stdout.readline()
                except BrokenPipeError:
                    pass

        assert watch_report(tmp_path, say, poll=0.01) == page
    assert said[0].startswith(f"{page}: open it")
    # Half a line is no round: the page says what it said before, and nothing breaks.
    told = [line for line in said if "seed 0: round" in line]
    assert [re.search(r"round \d", line).group() for line in told] == [
        *("round 0", "round 1", "round 1", "round 2", "round 2", "round 3")
    ]
    assert "round 1 of 3, at least" in told[1]
    assert said[-1].startswith("done. fedss reaches MAP@10 0.3")
    for html in pages[:-1]:
        assert "Under way" in html
        assert "location.reload()" in html
        assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in html
        assert "loads itself again every 10 s" in Page(html).words
        assert not re.search(r"https?://|@import|url\((?!#)", html)
    final = Page(page.read_text())
    assert "script" not in final.tags
    assert "Under way" not in final.words
    assert "loads itself again" not in final.words


def test_a_finished_run_is_written_once(tmp_path: Path) -> None:
    entry = fake_run(tmp_path, rounds=5) | {"folder": "."}
    (tmp_path / "summary.json").write_text(json.dumps([entry]))
    said: list[str] = []
    watch_report(tmp_path, said.append)
    assert len(said) == 2
    assert "done." in said[-1]
    assert "script" not in Page((tmp_path / "report.html").read_text()).tags


@pytest.mark.parametrize("there", [True, False])
def test_a_mistaken_path_is_an_error_at_once(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "elsewhere"
    if there:
        folder.mkdir()
    expected = "a folder without config.json" if there else "no such folder"
    with pytest.raises(RunFolderError, match=f"has begun, got {expected}"):
        watch_report(folder, pytest.fail)


@pytest.mark.usefixtures("at_once")
def test_waits_for_the_first_records(tmp_path: Path) -> None:
    entry, said = begin(tmp_path, rounds=2), []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            (tmp_path / "all.jsonl").rename(tmp_path / "records.jsonl")
        if len(said) == 3:
            (tmp_path / "summary.json").write_text(json.dumps([entry]))

    watch_report(tmp_path, say, poll=0.01)
    assert said[1].endswith("waiting for the first records")
    assert "round 2 of 2" in said[2]
    assert "done." in said[3]


@pytest.mark.usefixtures("at_once")
def test_a_comparison_is_followed_over_its_runs(tmp_path: Path) -> None:
    methods, said, pages = ["full", "fedss"], [], []
    config = {"config": {}, "methods": methods, "seeds": [0]}
    entries = [begin(tmp_path / f"{method}-seed0", method, rounds=4) for method in methods]
    # Of an earlier comparison in this folder: it does not end this one.
    earlier = fake_run(tmp_path / "pos-only-seed0", "pos-only", rounds=4)
    earlier |= {"folder": "pos-only-seed0"}
    (tmp_path / "summary.json").write_text(json.dumps([earlier]))
    time.sleep(0.01)  # files of one moment have one time
    (tmp_path / "config.json").write_text(json.dumps(config))
    runs = [tmp_path / f"{method}-seed0" for method in methods]
    named = [e | {"folder": run.name} for e, run in zip(entries, runs, strict=True)]
    steps = [
        lambda: (runs[0] / "all.jsonl").rename(runs[0] / "records.jsonl"),
        lambda: (runs[0] / "summary.json").write_text(json.dumps([entries[0]])),
        lambda: (runs[1] / "all.jsonl").rename(runs[1] / "records.jsonl"),
        lambda: (runs[1] / "summary.json").write_text(json.dumps([entries[1]])),
        lambda: (tmp_path / "summary.json").write_text(json.dumps([earlier, *named])),
    ]

    def say(line: str) -> None:
        said.append(re.sub(r"^[\d:]+  ", "", line))
        if len(said) > 1:
            pages.append((tmp_path / "report.html").read_text())
            if steps:
                steps.pop(0)()

    watch_report(tmp_path, say, poll=0.01)
    assert said[1] == "1 run done"
    assert said[2].startswith("full, seed 0: round 4 of 4, MAP@10")
    assert said[2].endswith("; 1 run done")
    assert said[3] == "2 runs done"
    assert said[4].startswith("fedss, seed 0: round 4 of 4")
    assert said[5] == "3 runs done"
    assert said[6].startswith("done. fedss")
    assert len(said) == 7
    assert ["location.reload()" in html for html in pages] == [True] * 5 + [False]


@pytest.mark.usefixtures("at_once")
def test_a_run_that_stopped_is_said_to_be_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of 1.8 s, and none for an hour."""
    entry, said = begin(tmp_path, stop=7), []
    (tmp_path / "all.jsonl").rename(tmp_path / "records.jsonl")
    last = (tmp_path / "records.jsonl").stat().st_mtime

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            assert "Under way" in (tmp_path / "report.html").read_text()
            monkeypatch.setattr("time.time", lambda: last + 3600)
        if len(said) == 3:
            (tmp_path / "summary.json").write_text(json.dumps([entry]))

    watch_report(tmp_path, say, poll=0.01)
    assert "has it stopped" not in said[1]
    assert "nothing new for a long time: has the run stopped? Still waiting" in said[2]
    monkeypatch.undo()
    watch._write(read_runs(tmp_path), tmp_path, True)
    words = Page((tmp_path / "report.html").read_text()).words
    assert "far longer than one takes" in words
    assert "Not finished" in words


def test_late_is_a_minute_and_three_times_the_longest_of_recent_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run(tmp_path, rounds=50)
    path = tmp_path / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        # Before the last 30 rounds one took an hour; of the last ones the longest took 100 s.
        longest = {10: 3600.0, 40: 70.0}.get(record["round"], 1.0)
        record["seconds"] = {"train": longest, "evaluate": 30.0 if record["round"] == 40 else 0.0}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    last, runs = path.stat().st_mtime, read_runs(tmp_path)
    for seconds, late in ((359, False), (361, True)):
        monkeypatch.setattr("time.time", lambda at=last + seconds: at)
        assert watch._late(tmp_path, runs) == late


def test_ctrl_c_ends_quietly_and_leaves_a_page_that_stays(tmp_path: Path) -> None:
    begin(tmp_path, stop=7)
    (tmp_path / "all.jsonl").rename(tmp_path / "records.jsonl")
    command = [sys.executable, "-m", "fedss", "report", str(tmp_path), "--watch"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert "round 7 of 10" in process.stdout.readline()
        assert "location.reload()" in (tmp_path / "report.html").read_text()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.strip() == "fedss: interrupted"
    html = (tmp_path / "report.html").read_text()
    assert "location.reload()" not in html
    assert "Not finished" in html
