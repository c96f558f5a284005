"""What a command prints where a terminal cannot show it, is narrow, or is gone."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len

from fedss.cli import main
from fedss.cli.tables import print_results
from fedss.text import PLAIN, encodable, printable

LABEL = "鸟类 “{}” é [red]–"
ENCODINGS = ("ascii", "latin-1", "cp932", "cp1252", "utf-8", "utf-16")
TINY = """
    --image-size 12 --backbone conv4-4 --embedding-size 8 --rounds 2 --clients-per-round 2
    --workers 1
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Said:
    code: int
    out: bytes
    err: bytes


def said(words: Sequence[str], encoding: str, to: int | None = None) -> Said:
    """What a command writes to streams of its own, of an encoding and as strict as Python's are.

    ``to``: a descriptor for both, in place of files.
    """
    files = [os.memfd_create("out"), os.memfd_create("err")]
    handles = [os.dup(to) if to is not None else os.dup(file) for file in files]
    before = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
    streams = [
        io.TextIOWrapper(os.fdopen(handle, "wb"), encoding=encoding, errors="strict")
        for handle in handles
    ]
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = streams
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(str(stop.code))
    finally:
        sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__ = before
        for stream in streams:
            stream.close()
    out, err = (os.pread(file, 2**20, 0) for file in files)
    for file in files:
        os.close(file)
    return Said(code, out, err)


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of images whose names, classes and clients no narrow encoding holds, and its run."""
    folder = tmp_path_factory.mktemp("图片")
    rng = np.random.default_rng(0)
    rows = [("image", "label", "client")]
    for label in range(10):
        colour = rng.integers(0, 256, 3)
        for copy in range(4):
            name = f"图{label}-{copy}.png"
            noise = rng.normal(0, 12, (12, 12, 3))
            Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(folder / name)
            rows.append((name, LABEL.format(label), f"客户{copy % 2}"))
    with (folder / "m.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    words = ["train", *data(folder), "--out", str(folder / "run")]
    assert said(words, "ascii").code == 0
    assert said(["index", str(folder / "run"), str(folder / "m.csv")], "ascii").code == 0
    return folder


def data(folder: Path) -> list[str]:
    return [*TINY, "--data", "csv", "--data-path", str(folder / "m.csv")]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_command_says_in_every_encoding_all_that_it_has_to_say(chinese, encoding, tmp_path):
    run, image, new = str(chinese / "run"), str(chinese / "图0-0.png"), "新类–"
    nearest = [f"图{label}-{copy}.png" for label in range(10) for copy in range(4)]
    shown_names = {
        ("info", *data(chinese)): ["full", "100.0%"],
        ("search", run, image, "--count", "40"): [*nearest, *map(LABEL.format, range(10))],
        ("enrol", run, new, image): [new],
        ("identify", run, image, "--threshold", "0.5"): ["图0-0.png", new],
        ("enrol", run, new, "--remove"): [new],
        ("train", "--help"): ["--rounds"],
        ("search", run, str(tmp_path / "没有.png")): ["没有.png"],
        ("train", "--rounds", "三"): [],
    }
    if encoding == "ascii":  # All others, where least can be said.
        compared = ["compare", *data(chinese), "--methods", "full", "fedss"]
        shown_names |= {
            ("train", *data(chinese), "--out", run): ["is done", "report.html"],
            (*compared, "--out", str(chinese / "comparison")): ["report.html"],
            ("evaluate", run): ["MAP@10", "threshold"],
            ("embed", run, str(chinese / "m.csv"), "--out", str(tmp_path / "嵌.npy")): ["嵌.npy"],
            ("export", run, "--format", "safetensors", "--out", str(tmp_path / "出")): ["出"],
            ("search", run, image, "--show", str(tmp_path / "显.html")): ["显.html"],
            ("report", run): ["report.html"],
            ("app", str(tmp_path / "应"), "--out", str(tmp_path / "果")): ["应"],
        }
    for words, expected in shown_names.items():
        result = said(words, encoding)
        mistaken = words[-1] == "三" or words[-1].endswith("没有.png")
        assert result.code == (2 if mistaken else 0), words
        text = (result.err if mistaken else result.out).decode(encoding)
        for name in expected:
            # A table may fold it.
            whole, folded = encodable(printable(name), encoding), "".join(text.split())
            assert "".join(whole.split()) in folded, (words, name)
    for command in (["evaluate", run], ["search", run, image], ["identify", run, image]):
        json.loads(said([*command, "--json"], encoding).out.decode(encoding))


@given(st.text(), st.sampled_from(("ascii", "latin-1", "cp1252", "utf-8")))
def test_text_is_one_line_and_no_two_are_shown_alike(text, encoding):
    shown = encodable(printable(text), encoding)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    if "\\" not in text:
        back = shown.encode("latin-1", "backslashreplace").decode("unicode_escape")
        assert back == text


def test_our_own_words_have_their_like_in_every_encoding():
    assert "MAP@10 – …".encode("ascii", PLAIN) == b"MAP@10 - ..."
    assert "鸟".encode("ascii", PLAIN) == rb"\u9e1f"


@pytest.fixture
def nobody() -> Iterator[int]:
    """A descriptor whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_a_pipe_that_nobody_reads_changes_neither_work_nor_code(chinese, tmp_path, nobody):
    run = tmp_path / "run"
    words = ["train", *data(chinese), "--eval-every", "1", "--out", str(run)]
    assert said(words, "utf-8", nobody).code == 0
    assert (run / "report.html").exists()
    (summary,) = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 2
    (run / "verification.json").unlink()
    assert said(["evaluate", str(run)], "utf-8", nobody).code == 0
    assert (run / "verification.json").exists()
    assert said(["info", *data(chinese)], "utf-8", nobody).code == 0
    assert said(["info", "--help"], "utf-8", nobody).code == 0
    assert said(["report", str(tmp_path / "none")], "utf-8", nobody).code == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_output_that_is_lost_is_said_after_the_work(chinese, tmp_path):
    run = tmp_path / "run"
    full = os.open("/dev/full", os.O_WRONLY)
    words = [sys.executable, "-m", "fedss", "train", *data(chinese), "--out", str(run)]
    done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    os.close(full)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "fedss: cannot write its output: No space left on device"
    )
    assert (run / "report.html").exists()


def test_a_shell_that_knows_ascii_alone_and_a_pipe_that_is_closed(chinese):
    """The real thing: a process of its own, its locale C and Python's UTF-8 mode off."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    fedss = f'"{sys.executable}" -m fedss'
    search, info = f'{fedss} search "$RUN" "$IMAGE"', f"{fedss} info --glyphs-classes 20"
    done = subprocess.run(
        ["bash", "-c", f"{search}; echo $?; {info} | true; echo ${{PIPESTATUS[0]}}; {info} >&-"],
        env={**environment, "RUN": str(chinese / "run"), "IMAGE": str(chinese / "图0-0.png")},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode("ascii").splitlines()
    assert [line for line in lines if line.isdecimal()] == ["0", "0"]
    assert b"0-0.png" in done.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at(width: int, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(words) == 0
    monkeypatch.undo()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    return [line.rstrip() for line in plain.splitlines()]


@pytest.mark.parametrize("width", [200, 80, 60, 30])
def test_tables_lose_nothing_in_narrow_terminals(chinese, width, monkeypatch):
    lines = at(width, monkeypatch, ["info", *data(chinese)])
    text = "\n".join(lines)
    assert "…" not in text
    assert "per client and round, conv4-4, d = 8" in lines
    (full,) = (line for line in lines if line.startswith(" full "))
    assert re.fullmatch(r" full +\d\.0 +100\.0% +\d+ B +[\d.]+ kB +[\d.]+ kB", full)
    words = re.findall(r"\S+", "method class rows share of W class-row bytes bytes down bytes up")
    heading = lines[lines.index("per client and round, conv4-4, d = 8") + 1 :]
    heading = heading[: next(i for i, line in enumerate(heading) if "─" in line)]
    assert sorted(" ".join(heading).split()) == sorted(words)
    if width >= 60:
        assert max(map(cell_len, lines)) <= width


def test_headings_of_a_comparison_are_each_of_one_meaning(chinese, monkeypatch):
    words = ["compare", *data(chinese), "--methods", "full", "fedss"]
    lines = at(200, monkeypatch, [*words, "--out", str(chinese / "comparison")])
    for line in lines:
        names = re.split(r" {2,}", line.strip())
        if names[0] == "method":
            assert len(set(names)) == len(names)
    (names,) = (re.split(r" {2,}", line.strip()) for line in lines if "kB down" in line)
    assert "class rows" in names
    assert "class-row kB up" in names


@pytest.mark.parametrize("width", [60, 80])
def test_results_fit_narrow_terminals_without_what_can_be_spared(chinese, width, monkeypatch):
    words = ["compare", *data(chinese), "--methods", "full", "fedss"]
    lines = at(width, monkeypatch, [*words, "--out", str(chinese / "comparison")])
    tables = [line for line in lines if line.startswith((" full ", " fedss ", " method "))]
    assert len(tables) >= 4
    assert max(map(cell_len, tables)) <= width
    text = "\n".join(lines)
    assert ("seeds" in text) == (width == 80)
    assert "MAP@10" in text


def test_what_was_sent_before_the_first_round_is_said(tmp_path, capsys):
    metrics = dict.fromkeys(("map_at_10", "map_at_10_by_class", "recall_at_1"), 0.5)
    sent = {"warm_start_bytes_down": 224_620_128, "warm_start_bytes_up": 11_011_832}
    none = dict.fromkeys(sent, 0)
    line = "before the first round, all clients together: 225 MB down, 11.0 MB up"
    for more, expected in (
        ({"fedss": sent, "full": sent, "central": none, "older": {}}, [line]),
        ({"a": sent, "b": {**sent, "warm_start_bytes_up": 7}}, [f"{line}: a", "7 B up: b"]),
        ({"central": none}, []),
    ):
        runs = [
            {"method": method, "rounds": 2, "seconds": 3.0, **metrics, **of_method}
            for method, of_method in more.items()
        ]
        print_results(runs, 0, tmp_path)
        said = [text for text in capsys.readouterr().out.splitlines() if "before the" in text]
        assert len(said) == len(expected)
        assert all(text.endswith(end) for text, end in zip(said, expected, strict=True))
        assert max(map(len, said), default=0) <= 80


INTERRUPTED = """
import os, signal, time
from fedss.cli.output import lasting_output
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(3):
    if process := os.fork():
        os.waitpid(process, 0)
        continue
    with lasting_output():
        try:
            print(os.getpid(), flush=True)
            time.sleep(30)
        except KeyboardInterrupt:
            pass
    break
"""


def test_what_was_written_when_ctrl_c_came_is_not_written_again():
    """The reader has the line before the writer knows that it is written: on one core, often."""
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        numbers = []
        while line := process.stdout.readline():
            numbers.append(int(line))
            os.kill(numbers[-1], signal.SIGINT)
        assert len(set(numbers)) == len(numbers) == 3
        assert process.wait(20) == 0
