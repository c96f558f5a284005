"""The finding above a report: computed, and never more than was shown."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedss.errors import RunFolderError
from fedss.report import bytes_figure
from fedss.runs import headlines
from fedss.text import printable
from tests.report.made import (
    BACKBONE,
    N_CLASSES,
    ROW,
    SIZE,
    Page,
    fake_comparison,
    fake_variants,
    headline,
    measured,
    read,
    rewrite,
    scores,
    single,
)


def test_finding_is_computed(
    comparison: tuple[Path, Any], comparison_page: tuple[str, Page]
) -> None:
    (_, summary), (_, page) = comparison, comparison_page
    mean = {
        m: np.mean([e["map_at_10"] for e in summary if e["method"] == m]) for m in ("full", "fedss")
    }
    share = (BACKBONE + SIZE * (ROW + 8)) / (BACKBONE + N_CLASSES * (ROW + 8))
    assert (
        f"fedss reaches {mean['fedss'] / mean['full']:.3f} of full softmax’s MAP@10 "
        f"({mean['fedss']:.3f} against {mean['full']:.3f}) and moves "
        f"{100 * SIZE / N_CLASSES:.0f}\u00a0% of its class-row bytes, "
        f"{100 * share:.0f}\u00a0% of all bytes." in page.words
    )
    assert "falls short" not in page.words
    command = "fedss compare --methods full fedss pos-only central --seeds 0 1 2 --data omniglot "
    assert command in re.sub(r"\s+", " ", page.words)
    assert "seeds 0\u2060–\u20602" in page.words


def test_a_difference_within_its_interval_is_none(tmp_path: Path) -> None:
    text = headline(measured(tmp_path / "a", {"full": 0.352, "fedss": 0.351}))
    assert "No difference shown between fedss and full softmax: MAP@10 0.351 against 0.352" in text
    assert re.search(r"95 % interval of the difference: −0\.0\d\d to 0\.0\d\d", text)
    assert "; fedss moves 7" in text
    assert "reaches 0.9" not in text
    text = headline(measured(tmp_path / "b", {"full": 0.352, "fedss": 0.2}))
    assert "falls short" in text
    assert "No difference shown" not in text
    # What is not shown to be better is not said to be.
    text = headline(measured(tmp_path / "c", {"full": 0.35, "fedss": 0.302, "fedaws": 0.303}))
    assert "retrieves better" not in text
    text = headline(measured(tmp_path / "d", {"full": 0.35, "fedss": 0.2, "fedaws": 0.303}))
    assert "fedaws (0.303) retrieves better than fedss here." in text


def test_a_demo_that_shows_nothing_says_so(tmp_path: Path) -> None:
    text = headline(measured(tmp_path / "a", {"fedss": 0.274, "pos-only": 0.275}))
    assert "No difference shown: fedss reaches MAP@10 0.274 (95 % interval 0.2" in text
    four = {"fedss": 0.273, "pos-only": 0.2746, "neg-only": 0.2735, "fedaws": 0.274}
    text = headline(measured(tmp_path / "b", four, seeds=2))
    assert "No difference shown: MAP@10 goes from 0.273 (fedss) to 0.275 (pos-only)" in text
    text = headline(measured(tmp_path / "c", {**four, "fedaws": 0.2}, seeds=2))
    assert "MAP@10 goes from 0.200 (fedaws) to 0.275 (pos-only)." in text
    assert "No difference shown" not in text


def test_what_a_floor_reaches_is_not_praised(tmp_path: Path) -> None:
    text = headline(measured(tmp_path / "a", {"fedss": 0.158}, pixels=0.106))
    assert "fedss reaches MAP@10 0.158 (95 % interval 0.1" in text
    assert "raw pixels 0.106, after 10 rounds" in text
    text = headline(measured(tmp_path / "b", {"fedss": 0.08}, pixels=0.106))
    assert "fedss falls below raw pixels: MAP@10 0.080 against 0.106 after 10 rounds." in text
    assert "reaches" not in text.split("Trained")[0]
    text = headline(measured(tmp_path / "c", {"fedss": 0.107}, pixels=0.106))
    assert "No difference shown between fedss and raw pixels: MAP@10 0.107 against 0.106" in text
    two = {"full": 0.12, "fedss": 0.1}
    text = headline(measured(tmp_path / "d", two, pixels=0.2, seeds=2))
    assert "Not shown to beat raw pixels, MAP@10 0.200, after 10 rounds: full (0.120)" in text
    text = headline(measured(tmp_path / "e", {"full": 0.3, "fedss": 0.1}, pixels=0.2))
    assert "Not shown to beat raw pixels, MAP@10 0.200, after 10 rounds: fedss (0.100)." in text
    assert "Above it: full (0.300)." in text


def test_finding_says_when_fedss_loses(tmp_path: Path) -> None:
    summary = fake_comparison(tmp_path, ["full", "fedss", "fedaws"], rounds=10)
    summary[1]["map_at_10"] = 0.2
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    _, page = read(tmp_path)
    assert "fedss falls short: it reaches only 0.5" in page.words
    assert f"fedaws ({summary[2]['map_at_10']:.3f}) retrieves better than fedss here." in page.words


@pytest.mark.parametrize(("growth", "said"), [(3.0, True), (1.4, False)])
def test_a_loss_that_grew_is_said_first(tmp_path: Path, growth: float, said: bool) -> None:
    fake_comparison(tmp_path, ["full", "fedss"], rounds=10)
    (path,) = tmp_path.glob("fedss*/records.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[-1]["loss"] = growth * records[0]["loss"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    _, page = read(tmp_path)
    first, last = (f"{records[i]['loss']:.3g}" for i in (0, -1))
    sentence = f"The loss of fedss grew from {first} to {last}: lower its learning rates."
    assert (sentence in page.words) == said


@pytest.mark.parametrize(
    ("changed", "first", "second"),
    [
        (
            {},
            "moments comes closest to full softmax: 0.994 of its MAP@10 (0.348 against 0.350) with "
            "47\u00a0% of all bytes; the cheapest at 0.96 or more is fedss deck int8: 0.989 with "
            "13\u00a0% of all bytes.",
            "Below 0.96 of full: fedss deck int4 (0.957), moments int4 (0.954) and pos-only (0.771",
        ),
        (
            {"moments": 0.36, "fedss deck int4": 0.336},
            "moments does better than full softmax, with 1.029 of its MAP@10 (0.360 against 0.350) "
            "with 47\u00a0% of all bytes; the cheapest at 0.96 or more is fedss deck int4: 0.960 "
            "with 6\u00a0% of all bytes.",
            "Below 0.96 of full: moments int4 (0.954) and pos-only (0.771).",
        ),
        (
            {"fedss deck int4": 0.349},
            "fedss deck int4 comes closest to full softmax: 0.997 of its MAP@10 (0.349 against "
            "0.350) with 6\u00a0% of all bytes; no variant at 0.96 or more moves fewer.",
            "Below 0.96 of full: moments int4 (0.954) and pos-only (0.771).",
        ),
        (
            {"full": 0.40},
            "No variant reaches 0.96 of full softmax’s MAP@10: the best, moments, reaches only "
            "0.870 (0.348 against 0.400) with 47\u00a0% of all bytes.",
            "Below 0.96 of full: fedss uniform (0.850), ",
        ),
    ],
)
def test_finding_among_variants(
    tmp_path: Path, changed: dict[str, float], first: str, second: str
) -> None:
    fake_variants(tmp_path, **changed)
    _, page = read(tmp_path)
    assert first in page.words
    assert second in page.words


def test_finding_without_full(tmp_path: Path) -> None:
    fake_variants(tmp_path, ["fedss deck", "moments", "pos-only", "fedss uniform"])
    assert "MAP@10 goes from 0.270 (pos-only) to 0.348 (moments)." in read(tmp_path)[1].words


def test_finding_among_plain_methods_names_better_moments(tmp_path: Path) -> None:
    summary = fake_comparison(tmp_path, ["full", "fedss", "moments"], rounds=5)
    summary[2]["map_at_10"] = 0.4
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "moments (0.400) retrieves better than fedss here." in read(tmp_path)[1].words


def unscore(folder: Path) -> None:
    rewrite(folder, lambda line: line | {"metrics": None})
    (folder / "retrieval.npz").unlink()


def unscored_comparison(folder: Path, methods: list[str], without: list[str]) -> Page:
    summary = fake_comparison(folder, methods, rounds=10)
    for entry in summary:
        if entry["method"] in without:
            entry |= dict.fromkeys(scores(0))
            unscore(folder / entry["folder"])
    (folder / "summary.json").write_text(json.dumps(summary))
    return read(folder)[1]


def test_run_that_nobody_could_evaluate(tmp_path: Path) -> None:
    entry = single(tmp_path, rounds=10)
    (tmp_path / "summary.json").write_text(json.dumps([entry | dict.fromkeys(scores(0))]))
    unscore(tmp_path)
    html, page = read(tmp_path)
    assert "fedss was trained for 10 rounds and not evaluated, moving 452 kB" in page.words
    assert "No round has been evaluated, so there is no accuracy to draw. A fin" in page.words
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", html)
    assert titles == ["Training loss"]
    assert page.cells[page.cells.index("fedss") + 1 :][:2] == ["–", "–"]
    with pytest.raises(RunFolderError, match="expected an evaluated round with its bytes"):
        bytes_figure(tmp_path)


def test_methods_that_nobody_could_evaluate(tmp_path: Path) -> None:
    methods = ["full", "fedss", "pos-only", "neg-only"]
    page = unscored_comparison(tmp_path / "none", methods, methods)
    assert "None of 4 has been evaluated." in page.words
    assert "÷" not in page.words
    page = unscored_comparison(tmp_path / "some", methods, ["fedss", "neg-only"])
    assert "Not evaluated, and so without accuracy: fedss and neg-only." in page.words
    assert "pos-only falls short" in page.words
    page = unscored_comparison(tmp_path / "most", methods, ["full", "fedss", "neg-only"])
    assert re.search(
        r"pos-only reaches MAP@10 0\.2\d\d after 10 rounds, moving [^,]*\.", page.words
    )


@pytest.mark.parametrize(("ratio", "text"), [(0.32, "32 %"), (0.004, "0.4 %")])
def test_a_share_is_text_for_a_terminal_too(ratio, text):
    assert headlines.percent(ratio) == text == printable(text)
