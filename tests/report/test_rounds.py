"""Where the time goes, and what failed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedss.report import rounds
from tests.report.made import fake_comparison, fake_run, read, rewrite, single, table_after


def test_seconds_of_each_phase_are_means_over_rounds_and_seeds(tmp_path: Path) -> None:
    fake_comparison(tmp_path, ["full", "fedss"], rounds=10, seeds=2)
    rng = np.random.default_rng(0)
    found: dict[str, list[dict[str, float]]] = {"full": [], "fedss": []}
    for folder in sorted(p for p in tmp_path.iterdir() if p.is_dir()):
        method = folder.name[:-2]

        def change(line: dict[str, Any], method: str = method) -> dict[str, Any]:
            seconds = {"checkpoint": 0.001, "train": float(rng.uniform(10, 30))}
            if line["round"] % 5 == 0:
                seconds["evaluate"] = float(rng.uniform(1, 2))
            if method == "fedss":
                seconds |= {"request": float(rng.uniform(1, 3)), "siesta": 4.0}
            found[method].append(seconds)
            return line | {"seconds": seconds}

        rewrite(folder, change)
    html, page = read(tmp_path)
    phases = ["request", "train", "evaluate", "checkpoint", "siesta"]
    cells = table_after(page, "round")
    assert cells[1:6] == phases
    widths = []
    for row, method in enumerate(("full", "fedss")):
        mean = {p: sum(s.get(p, 0) for s in found[method]) / 20 for p in phases}
        shown = [f"{sum(mean.values()):.2f}", *(f"{mean[p]:.2f}" for p in phases)]
        shown[4] = "<0.01"
        if method == "full":
            shown[1] = shown[5] = "–"
        assert cells[6 + 8 * row : 14 + 8 * row] == [method, "", *shown]
        widths.append(sum(mean.values()))
    drawn = [
        sum(float(width) for width in re.findall(r"width: ([\d.]+)%", bar))
        for bar in re.findall(r'<td class="bar">.*?</td>', html)
    ]
    assert drawn == pytest.approx([100 * w / max(widths) for w in widths], abs=0.05)
    assert "Seconds per round: means over all rounds and seeds" in page.words
    assert "--slot: var(--phase-train)" in html
    assert "phase-siesta" not in html


@pytest.mark.parametrize(
    ("longest", "seconds", "unit", "shown"),
    [
        (2.5, 2.5, "s", "2.50"),
        (2.5, 0.004, "s", "<0.01"),
        (2.5, 0.0, "s", "0.00"),
        (2.5, None, "s", "–"),
        (345.6, 0.02, "s", "<0.1"),
        (345.6, 12.34, "s", "12.3"),
        (12345.6, 12345.6, "s", "12\u202f346"),
        (12345.6, 0.6, "s", "<1"),
        (0.142, 0.0054, "ms", "5.4"),
        (0.0042, 0.0042, "ms", "4.20"),
    ],
)
def test_seconds_fit_the_longest_round(
    longest: float, seconds: float | None, unit: str, shown: str
) -> None:
    assert (rounds.unit(longest), rounds.shown(seconds, longest)) == (unit, shown)


def test_time_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    fake_run(tmp_path, stop=1)
    assert table_after(read(tmp_path)[1], "round")[5:] >= ["fedss", "", "1.82"]
    (tmp_path / "records.jsonl").write_text("")
    assert "Where the time goes" not in read(tmp_path)[1].words


def fail(folder: Path, of_round: dict[int, list[tuple[str, str]]], **more: Any) -> None:
    """Let clients fail: round -> (client, reason), as a federation records it."""

    def change(line: dict[str, Any]) -> dict[str, Any]:
        failures = of_round.get(line["round"], [])
        if not failures:
            return line
        listed = [{"client": client, "reason": reason} for client, reason in failures]
        return line | {"failures": listed, "clients": 20 - len(failures), **more}

    rewrite(folder, change)


def test_failures_are_counted_by_reason_and_client(tmp_path: Path) -> None:
    single(tmp_path, rounds=10)
    assert "What failed" not in read(tmp_path)[1].words
    fail(tmp_path, {3: [("shop 1", "deadline")], 4: []})
    assert "1 of 200 times (0.5\u00a0%) a client of a cohort" in read(tmp_path)[1].words
    fail(
        tmp_path,
        {
            2: [("shop 7", "offline"), ("shop 1", "not finite")],
            3: [("shop 1", "deadline"), ("<b>", "sunspots")],
            9: [("shop 7", "offline"), ("shop 1", "deadline")],
        },
        attempts=3,
    )
    html, page = read(tmp_path)
    assert "6 of 200 times (3\u00a0%) a client of a cohort gave no update" in page.words
    assert "6 times a round was begun again" in page.words
    cells = table_after(page, "reason")
    deadline, offline, undefined = (
        f"{word}{rounds.REASONS[word]}" for word in ("deadline", "offline", "not finite")
    )
    counted = ["reason", "times", deadline, "2", offline, "2", undefined, "1", "sunspots", "1"]
    assert cells[:10] == counted
    assert cells[10:26] == [
        *("client", "times", "reasons", "last round"),
        *("shop 1", "3", "2\u00a0deadline, 1\u00a0not finite", "9"),
        *("shop 7", "2", "offline", "9"),
        *("<b>", "1", "sunspots", "3"),
    ]
    assert "<b>&" not in html
    assert "Clients" in page.words
    assert "failed most" not in page.words


def test_failures_of_several_methods_and_many_clients(tmp_path: Path) -> None:
    fake_comparison(tmp_path, ["full", "fedss", "pos-only"], rounds=10, seeds=2)
    names = [f"ward {i:02d} of the hospital in the north" for i in range(13)]
    for seed in range(2):
        fail(tmp_path / f"full-{seed}", {1: [(name, "died") for name in names]})
        fail(tmp_path / f"fedss-{seed}", {5 + seed: [(names[8], "offline"), (names[4], "died")]})
    _, page = read(tmp_path)
    asked = f"30 of {2 * 3 * 200:,} times".replace(",", "\u202f")
    assert asked in page.words
    cells = table_after(page, "reason")
    assert cells[:5] == ["reason", "all", "full", "fedss", "pos-only"]
    assert cells[6:10] == ["28", "26", "2", "0"]
    assert cells[11:15] == ["2", "0", "2", "0"]
    assert "The 10 of 13 clients that failed most" in page.words
    clients = cells[19 : 19 + 40]
    assert clients[:8] == [
        *("ward 04 of the…north", "4", "died", "6"),
        *("ward 08 of the…north", "4", "2\u00a0died, 2\u00a0offline", "6"),
    ]
    assert clients[36] == "ward 09 of the…north"
    assert set(names[:10]) <= set(page.titles)
    assert not set(names[10:]) & set(page.titles)
    assert "begun again" not in page.words


def test_rounds_begun_again_without_failures(tmp_path: Path) -> None:
    single(tmp_path, rounds=5)
    rewrite(tmp_path, lambda line: line | {"attempts": 1 + (line["round"] == 2), "failures": []})
    _, page = read(tmp_path)
    assert "1 time a round was begun again, since too few clients gave an update." in page.words
    assert "reason" not in page.cells
