"""The page as a whole: it stands alone, and holds the numbers of the runs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.made import (
    METHODS,
    Page,
    fake_comparison,
    fake_run,
    measured,
    read,
    scores,
    single,
    table_after,
)


def test_refers_to_nothing_outside_itself(comparison_page: tuple[str, Page]) -> None:
    html, page = comparison_page
    assert page.loads
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(html) < 2_000_000


def test_references_within_the_page_resolve(comparison_page: tuple[str, Page]) -> None:
    html, page = comparison_page
    wanted = {load[1:] for load in page.loads if load.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert html.count('<svg class="chart"') == 4
    assert "#fe01" not in html
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= set(re.findall(r"--([\w-]+): #", html)) | {"slot", "columns"}


def test_table_has_the_numbers_of_every_method(
    comparison: tuple[Path, Any], comparison_page: tuple[str, Page]
) -> None:
    (_, summary), (_, page) = comparison, comparison_page
    full = np.mean([e["map_at_10"] for e in summary if e["method"] == "full"])
    for method in ("full", "fedss", "pos-only", "central"):
        entries = [e for e in summary if e["method"] == method]
        at = page.cells.index(method)
        cells = page.cells[at : at + 10]
        for cell, key in ((cells[1], "map_at_10"), (cells[3], "recall_at_1")):
            values = [e[key] for e in entries]
            assert cell == f"{np.mean(values):.3f}± {np.std(values, ddof=1):.3f}"
        if method != "full":
            assert cells[2] == f"{np.mean([e['map_at_10'] for e in entries]) / full:.3f}"
        if method == "central":
            assert cells[4:9] == ["–"] * 5
        else:
            rows = entries[0]["class_row_bytes_down_per_client_round"]
            assert cells[4] == str(METHODS[method][1])
            assert cells[5] == cells[7] == "209 kB"
            assert cells[6] == cells[8]
            assert float(cells[6].split()[0]) == pytest.approx(rows / 1000, rel=0.01)
            assert f"{rows:,.0f}".replace(",", "\u202f") in page.cells
        assert cells[9] == "3 min 38 s"
        for entry in entries:
            assert f"{entry['map_at_10']:.4f}" in page.cells


def test_the_table_has_floors_intervals_and_averages_over_classes(tmp_path: Path) -> None:
    page = measured(tmp_path, {"full": 0.352, "fedss": 0.3}, classes=20)
    assert "A test of 509 classes is weak" not in page.words
    for name, value in (("chance", "0.010"), ("raw pixels", "0.100"), ("untrained", "0.050")):
        at = next(i for i, cell in enumerate(page.cells) if cell.startswith(name))
        assert page.cells[at + 1] == value
    at = page.cells.index("fedss")
    assert re.fullmatch("0\\.\\d{3}\u2060–\u20600\\.\\d{3}", page.cells[at + 3])
    assert page.cells[at + 4] == "0.300"
    assert "Dotted: raw pixels" in page.words


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        fake_comparison(tmp_path / name, ["full", "fedss", "moments"], seeds=2, rounds=10)
        pages += [read(tmp_path / name)[0], read(tmp_path / name)[0]]
    assert len(set(pages)) == 1


def test_every_method_and_unknown_ones(tmp_path: Path) -> None:
    names = [*METHODS, "moments", "a $x$ <i>", "sampled-with-a-rather-long-name"]
    fake_comparison(tmp_path, names[:-2], rounds=10)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for i, name in enumerate(names[-2:]):
        summary.append(fake_run(tmp_path / f"x{i}", name, rounds=10) | {"folder": f"x{i}"})
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    html, page = read(tmp_path)
    order = ["full", "fedss", "moments", *names[2:6], *names[-2:], "central"]
    for first in ("MAP@10", "round"):
        table = table_after(page, first)
        assert [c for c in table if c in names][: len(order)] == order
    assert "<i>" not in html


def test_escapes_names(tmp_path: Path) -> None:
    single(tmp_path, rounds=10, class_name="<script>alert({})</script>")
    html, page = read(tmp_path)
    assert "script" not in page.tags
    assert "<script" not in html
    assert any(alt.startswith("Query: <script>alert(") for alt in page.alts)


def test_single_run(tmp_path: Path) -> None:
    entry = single(tmp_path, rounds=30)
    html, page = read(tmp_path)
    assert (
        f"fedss reaches MAP@10 {entry['map_at_10']:.3f} after 30 rounds, moving 452 kB per client "
        "and round." in page.words
    )
    assert "÷" not in page.words
    assert "Not finished" not in page.words
    assert "fedss train --method fedss --data omniglot --rounds 30 " in re.sub(
        r"\s+", " ", page.words
    )
    marks = [alt.split(":")[0] for alt in page.alts]
    assert marks.count("Query") * 5 == marks.count("Right") + marks.count("Wrong")
    assert html.count('href="#right"') == marks.count("Right")
    assert html.count('href="#wrong"') == marks.count("Wrong")


@pytest.mark.parametrize("stop", [1, 40])
def test_unfinished_run(tmp_path: Path, stop: int) -> None:
    fake_run(tmp_path, stop=stop)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"round": 41, "lo')  # is being written
    _, page = read(tmp_path)
    assert f"fedss, seed 0: round {stop} of 120" in page.words
    assert f"Trained on omniglot for {stop} of 120 rounds of 20 clients" in page.words
    assert "Not finished" in page.words
    assert ("has not been evaluated yet" in page.words) == (stop == 1)
    assert "moving 452 kB per client and round" in page.words


def test_run_still_under_way_in_a_comparison(tmp_path: Path) -> None:
    fake_comparison(tmp_path, ["full", "fedss"], rounds=20)
    fake_run(tmp_path / "fedss-1", seed=1, rounds=20, stop=7)
    fake_run(tmp_path / "pos-only-0", "pos-only", rounds=20, stop=10)
    _, page = read(tmp_path)
    assert "fedss, seed 1: round 7 of 20" in page.words
    assert "pos-only, seed 0: round 10 of 20" in page.words
    at = page.cells.index("pos-onlyround 10 of 20")
    assert page.cells[at + 2] == ""  # no ratio between a finished and an unfinished run


def test_only_central(tmp_path: Path) -> None:
    entry = single(tmp_path, method="central", rounds=10)
    html, page = read(tmp_path)
    assert f"central reaches MAP@10 {entry['map_at_10']:.3f} after 10 rounds." in page.words
    assert html.count('<svg class="chart"') == 2


def test_clients_of_a_round_are_those_recorded(tmp_path: Path) -> None:
    fake_comparison(tmp_path, ["fedss", "central"], rounds=60, clients=6)
    _, page = read(tmp_path)
    assert "trained on omniglot for 60 rounds of 6 clients with seed 0." in page.words
    lines = (tmp_path / "fedss-0" / "records.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"clients": 6', '"clients": 4')
    (tmp_path / "fedss-0" / "records.jsonl").write_text("\n".join([*lines, ""]))
    assert "60 rounds of 4\u2060–\u20606 clients" in read(tmp_path)[1].words


@pytest.mark.parametrize(
    ("seen", "words"), [(None, ""), (0, "never trained on"), (12, "12 of them trained on")]
)
def test_says_which_test_classes_were_trained_on(
    tmp_path: Path, seen: int | None, words: str
) -> None:
    single(tmp_path, rounds=5, seen=seen)
    _, page = read(tmp_path)
    assert f"test classes{words}509" in page.words
    assert ("trained on" in page.words) == (seen is not None)
    assert "unseen" not in page.words


def test_pooled_training_is_a_reference(comparison_page: tuple[str, Page]) -> None:
    _, page = comparison_page
    assert "central, the pooled reference, moves images" in page.words
    assert "upper bound" not in page.words


def test_exact_values_need_no_mouse(comparison: tuple[Path, Any], tmp_path: Path) -> None:
    html, page = read(comparison[0])
    assert "hover" not in page.words
    assert "title=" not in html.partition("What is found</h2>")[0]
    for entry in comparison[1]:
        seconds = page.cells.index(f"{entry['map_at_10']:.4f}") + 9
        assert page.cells[seconds] == f"{entry['seconds']:.1f}"
    # Each evaluation of a run: what its curve shows.
    single(tmp_path, rounds=10)
    cells = table_after(read(tmp_path)[1], "after round")
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    scores = {r["round"]: r["metrics"] for r in map(json.loads, lines) if r["metrics"]}
    told = [text for r, m in scores.items() for text in (str(r), f"{m['map_at_10']:.4f}")]
    assert cells[: 2 + len(told)] == ["after round", "fedss", *told]


def test_contents_lead_to_every_section_in_order(comparison_page: tuple[str, Page]) -> None:
    html, _ = comparison_page
    contents = re.findall(r'<a href="#([\w-]+)">(.*?)</a>', html)
    assert contents == re.findall(r'<h2 id="([\w-]+)">(.*?)</h2>', html)
    names = [name for _, name in contents]
    assert names.index("What is found") < names.index("Where the time goes")


@pytest.mark.parametrize("name", ["csv", "folder"])
def test_a_list_of_ones_own_goes_by_its_file(tmp_path: Path, name: str) -> None:
    single(tmp_path, rounds=5)
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"]["name"], config["config"]["data_path"] = name, "/secret/place/photos.csv"
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, page = read(tmp_path)
    assert "fedss on photos.csv" in page.words
    assert "Trained on photos.csv for 5 rounds" in page.words


@pytest.mark.parametrize("scored", [True, False])
def test_retrieval_at_the_sites_is_called_so(tmp_path: Path, scored: bool) -> None:
    entry = single(tmp_path, rounds=5)
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"] = {"name": "federation", "evaluated_at": "sites"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not scored:
        (tmp_path / "summary.json").write_text(json.dumps([entry | dict.fromkeys(scores(0))]))
    path = tmp_path / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"num_classes": 1300 + line["round"], "num_clients": 48}
        line["metrics"] = scores(0.3) | {"sites": 7} if scored else None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = "Retrieval was measured at 7 sites, each among its own images"
    words = read(tmp_path)[1].words
    assert (told in words) == scored
    assert "fedss in a federation" in words
    assert "A site gets the backbone once for all its clients of a round." in words
    assert re.search(r"training classes\s*1.?305\s*clients\s*48", words)
    again = re.sub(r"\s+", " ", words)
    assert "fedss app again --method fedss " in again
    assert "--evaluate-at sites --out /srv/again && flwr run again" in again


def test_data_without_a_test(tmp_path: Path) -> None:
    single(tmp_path, rounds=5, seen=0)
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"] |= {"test_queries": 0, "test_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, page = read(tmp_path)
    assert "test queries" not in page.words
    assert "test classes" not in page.words
