"""The report, from fake records with plausible curves."""

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedss
from fedss.errors import ConfigError, RunFolderError
from fedss.evaluation.baselines import Floors
from fedss.evaluation.intervals import ClassScores
from fedss.report import (
    bytes_figure,
    charts,
    figures,
    frontier,
    frontier_figure,
    labels,
    rounds,
    write_report,
)
from fedss.runs import headlines, reading
from fedss.runs.findings import write_scores
from fedss.text import human_bytes

N_CLASSES, SIZE, BACKBONE, ROW = 964, 64, 209_344, 64 * 4
# method -> (final MAP@10, class rows per client)
METHODS: dict[str, tuple[float, int | None]] = {
    "full": (0.352, N_CLASSES),
    "fedss": (0.341, SIZE),
    "fedss-uncorrected": (0.303, SIZE),
    "pos-only": (0.270, 32),
    "neg-only": (0.147, SIZE),
    "fedaws": (0.288, 32),
    "central": (0.412, None),
}


def fake_run(
    folder: Path,
    method: str = "fedss",
    seed: int = 0,
    rounds: int = 120,
    stop: int | None = None,
    level: float | None = None,
    pixels: np.ndarray | None = None,
    class_name: str = "character {}",
    clients: int = 20,
    depth: int = 5,
    seen: int | None = None,
) -> dict[str, Any]:
    """Write a run folder; return its line of summary.json. pixels: [class, drawing, C, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, len(method)])
    final, rows = METHODS.get(method, (0.25, SIZE))
    final = (level or final) + rng.normal(0, 0.006)
    class_bytes = None if rows is None else rows * (ROW + 8)
    each = None if class_bytes is None else BACKBONE + class_bytes
    config: dict[str, Any] = {
        "fedss": "0.1.0",
        "torch": "2.13.0",
        "python": "3.11.7",
        "platform": "Linux x86_64",
        "config": {
            "method": method,
            "data": "omniglot",
            "rounds": rounds,
            "sample_size": SIZE,
            "seed": seed,
            "clients_per_round": 20,
            "batch_size": 8,
            "client_lr": 0.05,
            "class_row_lr": 0.5,
            "scale": 10.0,
            "embedding_size": 64,
            "backbone": "conv4",
            "server_optimizer": "momentum",
            "server_lr": 1.0,
            "renormalise": True,
            "workers": None,
        },
        "data": {
            "name": "omniglot",
            "train_images": 19280,
            "train_classes": N_CLASSES,
            "train_clients": 600 if clients == 20 else clients,
            "own_classes": [14, 30, 55],
            "test_queries": 10180,
            "test_gallery": None,
            "test_classes": 509,
            "image_shape": [1, 28, 28],
        },
        "model": {"parameters": 52_336},
    }
    if seen is not None:
        config["data"] |= {"test_classes_seen": seen}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for r in range(1, (stop or rounds) + 1):
        share = 1 - np.exp(-3.2 * r / rounds)
        metrics = None
        if r % 5 == 0 or r == rounds:
            score = final if r == rounds else final * share / (1 - np.exp(-3.2))
            score += 0 if r == rounds else float(rng.normal(0, 0.003))
            metrics = scores(score)
        line = {
            "round": r,
            "loss": 1 + len(method) / 20 + 4 * np.exp(-4 * r / rounds) + float(rng.normal(0, 0.04)),
            "clients": clients,
            "examples": 640,
            "bytes_down": None if each is None else clients * each,
            "bytes_up": None if each is None else clients * each,
            "seconds": {"train": 1.2, "aggregate": 0.1, "evaluate": 0.5, "checkpoint": 0.02},
            "metrics": metrics,
        }
        lines.append(json.dumps(line))
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines))
    write_neighbours(folder / "retrieval.npz", final, rng, pixels, class_name, depth)
    return {
        "method": method,
        "seed": seed,
        "rounds": rounds,
        "sample_size": SIZE,
        **scores(final),
        **{f"bytes_{way}_per_client_round": each for way in ("down", "up")},
        **{f"class_row_bytes_{way}_per_client_round": class_bytes for way in ("down", "up")},
        "backbone_bytes_down_per_client_round": None if rows is None else BACKBONE,
        "backbone_bytes_up_per_client_round": None if rows is None else BACKBONE,
        "class_rows_per_client": rows,
        "seconds": 218.4,
    }


def scores(level: float) -> dict[str, float]:
    return {
        "map_at_10": level,
        "recall_at_1": level + 0.3,
        "recall_at_5": level + 0.45,
        "map_at_r": level - 0.1,
    }


def write_neighbours(
    path: Path,
    quality: float,
    rng: np.random.Generator,
    pixels: np.ndarray | None,
    class_name: str,
    depth: int = 5,
    queries: int = 12,
) -> None:
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 1, 8, 8), dtype=np.uint8)
    fixed = np.random.default_rng(7)
    hardness = fixed.random(queries)
    own = fixed.permutation(len(pixels))[:queries]
    labels = np.empty((queries, 1 + depth), dtype=np.int64)
    labels[:, 0] = own
    right = rng.random((queries, depth)) < (quality * 2.6 * (1.3 - hardness))[:, None]
    labels[:, 1:] = np.where(right, own[:, None], rng.integers(0, len(pixels), (queries, depth)))
    drawing = rng.integers(1, pixels.shape[1], (queries, 1 + depth))
    drawing[:, 0] = 0
    np.savez_compressed(
        path,
        pixels=pixels[labels, drawing],
        labels=labels,
        class_names=np.array([[class_name.format(c) for c in row] for row in labels]),
        scores=-np.sort(-rng.uniform(0.55, 0.98, (queries, depth)), axis=1).astype(np.float32),
        query_index=np.arange(queries, dtype=np.int64) * 100,
    )


def fake_comparison(
    folder: Path, methods: list[str], seeds: int = 1, **settings: Any
) -> list[dict[str, Any]]:
    summary = []
    for method in methods:
        for seed in range(seeds):
            name = f"{method}-{seed}"
            summary.append(fake_run(folder / name, method, seed, **settings) | {"folder": name})
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


class Page(HTMLParser):
    """What a browser would load, say and show of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.titles: list[str] = []
        self.alts: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            if name in found:
                self.loads.append(found[name] or "")
        self.ids += [found["id"] or ""] if "id" in found else []
        self.titles += [found["title"] or ""] if "title" in found else []
        self.alts += [found["alt"] or ""] if "alt" in found else []
        if tag in ("td", "th"):
            self.cells.append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def read(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html"
    assert [p.name for p in folder.glob(".report*")] == []
    html = path.read_text()
    return html, Page(html)


def single(folder: Path, **settings: Any) -> dict[str, Any]:
    entry = fake_run(folder, **settings) | {"folder": "."}
    (folder / "summary.json").write_text(json.dumps([entry]))
    return entry


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("comparison")
    return folder, fake_comparison(folder, ["full", "fedss", "pos-only", "central"], seeds=3)


def test_refers_to_nothing_outside_itself(comparison: tuple[Path, Any]) -> None:
    html, page = read(comparison[0])
    assert page.loads
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(html) < 2_000_000


def test_references_within_the_page_resolve(comparison: tuple[Path, Any]) -> None:
    html, page = read(comparison[0])
    wanted = {load[1:] for load in page.loads if load.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert html.count('<svg class="chart"') == 5
    assert "#fe01" not in html
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= set(re.findall(r"--([\w-]+): #", html)) | {"slot"}


def test_table_has_the_numbers_of_every_method(comparison: tuple[Path, Any]) -> None:
    folder, summary = comparison
    _, page = read(folder)
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
            assert f"{rows:,} bytes".replace(",", "\u202f") in page.titles
        assert cells[9] == "3 min 38 s"
        for entry in entries:
            assert f"{entry['map_at_10']:.4f}" in page.cells


def test_finding_is_computed(comparison: tuple[Path, Any]) -> None:
    folder, summary = comparison
    _, page = read(folder)
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


def measured(
    folder: Path,
    methods: dict[str, float],
    seeds: int = 1,
    classes: int = 60,
    noise: float = 0.01,
    pixels: float = 0.1,
) -> Page:
    """A comparison whose runs say what each class has, and floors; read."""
    rng = np.random.default_rng(0)
    usual = rng.uniform(-0.03, 0.03, classes)
    usual -= usual.mean()
    summary = []

    def write(path: Path, by_class: dict[str, np.ndarray]) -> None:
        scores = {
            name: ClassScores(tuple(f"{i:03d}" for i in range(classes)), np.full(classes, 5), v)
            for name, v in by_class.items()
        }
        write_scores(path, Floors({name: s.map_at_10 for name, s in scores.items()}, scores))

    for method, level in methods.items():
        for seed in range(seeds):
            name = f"{method}-{seed}"
            entry = fake_run(folder / name, method, seed, rounds=10)
            values = level + usual + noise * rng.uniform(-1.7, 1.7, classes)
            values += level - values.mean()
            write(folder / name / "by_class.json", {"trained": values})
            floors = {"chance": 0.01, "pixels": pixels, "untrained": 0.05}
            write(folder / name / "floors.json", {n: v + usual * 0.05 for n, v in floors.items()})
            mean = float(values.mean())
            summary.append({**entry, **scores(mean), "map_at_10_by_class": mean, "folder": name})
    (folder / "summary.json").write_text(json.dumps(summary))
    return read(folder)[1]


def headline(page: Page) -> str:
    return re.sub(r"\s+", " ", page.words.split("Federated Sampled Softmax ·")[1])


def test_a_difference_within_its_interval_is_none(tmp_path: Path) -> None:
    found = headline(measured(tmp_path / "a", {"full": 0.352, "fedss": 0.351}))
    assert "No difference shown between fedss and full softmax: MAP@10 0.351 against 0.352" in found
    assert re.search(r"95 % interval of the difference: −0\.0\d\d to 0\.0\d\d", found)
    assert "; fedss moves 7" in found
    assert "reaches 0.9" not in found
    found = headline(measured(tmp_path / "b", {"full": 0.352, "fedss": 0.2}))
    assert "falls short" in found
    assert "No difference shown" not in found
    # What is not shown to be better is not said to be.
    found = headline(measured(tmp_path / "c", {"full": 0.35, "fedss": 0.302, "fedaws": 0.303}))
    assert "retrieves better" not in found
    found = headline(measured(tmp_path / "d", {"full": 0.35, "fedss": 0.2, "fedaws": 0.303}))
    assert "fedaws (0.303) retrieves better than fedss here." in found


def test_a_demo_that_shows_nothing_says_so(tmp_path: Path) -> None:
    found = headline(measured(tmp_path / "a", {"fedss": 0.274, "pos-only": 0.275}))
    assert "No difference shown: fedss reaches MAP@10 0.274 (95 % interval 0.2" in found
    four = {"fedss": 0.273, "pos-only": 0.2746, "neg-only": 0.2735, "fedaws": 0.274}
    found = headline(measured(tmp_path / "b", four, seeds=2))
    assert "No difference shown: MAP@10 goes from 0.273 (fedss) to 0.275 (pos-only)" in found
    found = headline(measured(tmp_path / "c", {**four, "fedaws": 0.2}, seeds=2))
    assert "MAP@10 goes from 0.200 (fedaws) to 0.275 (pos-only)." in found
    assert "No difference shown" not in found


def test_what_a_floor_reaches_is_not_praised(tmp_path: Path) -> None:
    found = headline(measured(tmp_path / "a", {"fedss": 0.158}, pixels=0.106))
    assert "fedss reaches MAP@10 0.158 (95 % interval 0.1" in found
    assert "raw pixels 0.106, after 10 rounds" in found
    found = headline(measured(tmp_path / "b", {"fedss": 0.08}, pixels=0.106))
    assert "fedss falls below raw pixels: MAP@10 0.080 against 0.106 after 10 rounds." in found
    assert "reaches" not in found.split("Trained")[0]
    found = headline(measured(tmp_path / "c", {"fedss": 0.107}, pixels=0.106))
    assert "No difference shown between fedss and raw pixels: MAP@10 0.107 against 0.106" in found
    two = {"full": 0.12, "fedss": 0.1}
    found = headline(measured(tmp_path / "d", two, pixels=0.2, seeds=2))
    assert "Not shown to beat raw pixels, MAP@10 0.200, after 10 rounds: full (0.120)" in found
    found = headline(measured(tmp_path / "e", {"full": 0.3, "fedss": 0.1}, pixels=0.2))
    assert "Not shown to beat raw pixels, MAP@10 0.200, after 10 rounds: fedss (0.100)." in found
    assert "Above it: full (0.300)." in found


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
    assert f"Trained for {stop} of 120 rounds of 20 clients" in page.words
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


def test_without_neighbours(tmp_path: Path) -> None:
    single(tmp_path, rounds=10)
    (tmp_path / "retrieval.npz").unlink()
    _, page = read(tmp_path)
    assert "img" not in page.tags
    assert "What is found" not in page.words


def test_comparison_shows_the_same_queries(comparison: tuple[Path, Any]) -> None:
    _, page = read(comparison[0])
    queries = [i for i, alt in enumerate(page.alts) if alt.startswith("Query: ")]
    assert len(queries) >= 4
    assert np.diff([*queries, len(page.alts)]).tolist() == [1 + 4 * 5] * len(queries)
    assert "Where the methods differ" in page.words


def test_large_colour_images_stay_small(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 4, 3, 160, 120), dtype=np.uint8)
    for method in ("full", "fedss", "pos-only", "central"):
        fake_run(tmp_path / method, method, rounds=5, pixels=pixels)
    html, _ = read(tmp_path)
    assert "data:image/jpeg" in html
    assert len(html) < 2_000_000


def test_only_central(tmp_path: Path) -> None:
    entry = single(tmp_path, method="central", rounds=10)
    html, page = read(tmp_path)
    assert f"central reaches MAP@10 {entry['map_at_10']:.3f} after 10 rounds." in page.words
    assert html.count('<svg class="chart"') == 2


AGAIN = "; restore it from a copy, or run again in another folder"
ANEW = "; delete it and start this folder's fedss command again, which writes it anew"
NO_IMAGES = "; delete it: the report is then written without images"


@pytest.mark.parametrize(
    ("name", "text", "message", "advice"),
    [
        ("records.jsonl", None, "records.jsonl: cannot be read", AGAIN),
        ("records.jsonl", '{"round": 1, \n', "records.jsonl, line 1: damaged JSON", AGAIN),
        ("records.jsonl", '{"round": 2}', "records.jsonl, line 1: 'loss' is missing", AGAIN),
        ("records.jsonl", "[]\n", "records.jsonl, line 1: expected an object, got []", AGAIN),
        ("records.jsonl", "5\n", "records.jsonl, line 1: expected an object, got 5", AGAIN),
        ("config.json", None, "config.json: cannot be read", AGAIN),
        ("config.json", "{", "config.json: damaged JSON", AGAIN),
        ("config.json", "{}", "config.json: 'config' is missing", AGAIN),
        ("config.json", "[]", "config.json: expected an object, got []", AGAIN),
        ("config.json", '{"config": []}', "config.json: expected an object, got []", AGAIN),
        ("summary.json", "[", "summary.json: damaged JSON", ANEW),
        ("summary.json", "{}", "summary.json: expected a list", ANEW),
        ("summary.json", "[]", "summary.json: expected a list with one object per run", ANEW),
        ("summary.json", "[{}]", "summary.json: 'folder' is missing", ANEW),
        ("summary.json", '[{"folder": "."}]', "'method' is missing", ANEW),
        ("retrieval.npz", "no archive", "retrieval.npz: cannot be read", NO_IMAGES),
        ("retrieval.npz", "", "retrieval.npz: cannot be read", NO_IMAGES),
    ],
)
def test_damaged_records(
    tmp_path: Path, name: str, text: str | None, message: str, advice: str
) -> None:
    single(tmp_path, rounds=5)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(RunFolderError, match=re.escape(message) + ".*" + re.escape(advice)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("train_images", "many"), ("own_classes", 3), ("image_shape", ["a", 1, 2])],
)
def test_damaged_facts(tmp_path: Path, key: str, value: object) -> None:
    single(tmp_path, rounds=5)
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFolderError, match=rf"config\.json: '{key}': expected "):
        write_report(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"summary\.json and config\.json and records\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "scores",
            lambda a: a[:, :4],
            "scores: expected those of all neighbours, .*got 4",
        ),
        (
            "scores",
            lambda a: a[:, :0],
            "scores: expected those of all neighbours, .*got 0",
        ),
        ("scores", lambda a: a.astype(str), "scores: unexpected type"),
        ("query_index", lambda a: a[0], r"query_index: expected \[Q\], got \[\]"),
        ("pixels", lambda a: a.astype(float), "pixels: unexpected type float64"),
        ("pixels", lambda a: a[..., 0], "pixels: expected"),
    ],
)
def test_damaged_neighbours(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    single(tmp_path, rounds=5)
    with np.load(tmp_path / "retrieval.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "retrieval.npz", **(arrays | {name: change(arrays[name])}))
    with pytest.raises(RunFolderError, match=rf"retrieval\.npz: {message}.*{NO_IMAGES}"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        (1, "its nearest neighbour, with its cosine"),
        (3, "its three nearest neighbours, with their cosine"),
        (7, "its 7 nearest neighbours, with their cosine"),
    ],
)
def test_any_number_of_neighbours(tmp_path: Path, depth: int, words: str) -> None:
    fake_comparison(tmp_path, ["full", "fedss"], rounds=5, depth=depth)
    _, page = read(tmp_path)
    assert words in page.words
    queries = [i for i, alt in enumerate(page.alts) if alt.startswith("Query: ")]
    assert queries
    assert set(np.diff([*queries, len(page.alts)])) == {1 + 2 * depth}
    counts = [int(n) for n in re.findall(rf"(\d+) of {depth} right", page.words)]
    assert len(counts) == 2 * len(queries)
    assert sum(counts) == sum(alt.startswith("Right: ") for alt in page.alts)


def test_methods_with_different_numbers_of_neighbours(tmp_path: Path) -> None:
    fake_run(tmp_path / "full", "full", rounds=5, depth=5)
    fake_run(tmp_path / "fedss", "fedss", rounds=5, depth=2)
    assert "its two nearest neighbours" in read(tmp_path)[1].words


def test_clients_of_a_round_are_those_recorded(tmp_path: Path) -> None:
    fake_comparison(tmp_path, ["fedss", "central"], rounds=60, clients=6)
    _, page = read(tmp_path)
    assert "trained for 60 rounds of 6 clients with seed 0." in page.words
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


def test_pooled_training_is_a_reference(comparison: tuple[Path, Any]) -> None:
    _, page = read(comparison[0])
    assert "central, the pooled reference, moves images" in page.words
    assert "upper bound" not in page.words


def test_hovering_is_offered_only_where_it_works(comparison: tuple[Path, Any]) -> None:
    html, _ = read(comparison[0])
    assert '<span class="hover">Exact values on hovering.</span>' in html
    assert "@media (hover: none) { .hover { display: none; } }" in html


@pytest.mark.parametrize(
    "ends",
    [
        [0.350, 0.352, 0.345, 0.339, 0.36],
        [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.4, 0.0, 0.39, 0.38, 0.01, 0.2, 0.41, 0.37, 0.3, 0.02],
    ],
)
def test_labels_keep_the_order_of_the_ends_and_do_not_touch(ends: list[float]) -> None:
    low, high, height = 46.0, 298.0, 18.0
    wanted = [46 + 600 * end for end in ends]
    places = labels.apart(wanted, [height] * len(ends), low, high)
    order = sorted(range(len(ends)), key=lambda i: (ends[i], i))
    assert np.all(np.diff([places[i] for i in order]) > height - 0.5)
    assert min(places) >= low + height / 2 - 0.5
    assert max(places) <= high - height / 2 + 0.5


def test_every_line_of_the_bytes_chart_is_labelled_in_order(tmp_path: Path) -> None:
    methods = list(METHODS)
    summary = fake_comparison(tmp_path, methods, rounds=20)
    html, _ = read(tmp_path)
    chart = html[html.index("MAP@10 against bytes moved for") :].partition("</svg>")[0]
    of_slot = {charts.SLOT_OF[method]: method for method in methods}
    place: dict[str, float] = {}  # the last line of a wrapped label stands for it
    for slot, x, y in re.findall(r'fill: var\(--([\w-]+)\)".*?\((?:-0 )?(\S+) (\S+)\)">', chart):
        if slot in of_slot:
            place[of_slot[slot]] = float(y)
            assert float(x) > 300
    ends = sorted((entry["map_at_10"], entry["method"]) for entry in summary)
    heights = [place[method] for _, method in ends]
    assert np.all(np.diff(heights) < -13)  # downwards in SVG


def test_image_has_size_and_colours(comparison: tuple[Path, Any]) -> None:
    image = bytes_figure(comparison[0])
    with Image.open(io.BytesIO(image)) as image:
        assert image.format == "PNG"
        assert image.size == (1280, 800)
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == 255).all(axis=1).mean() > 0.8
    for color in ((0x1B, 0x1F, 0x24), (0x0B, 0x5F, 0xD0), (0x00, 0x79, 0x5C), (0x6A, 0x73, 0x7D)):
        assert (pixels == color).all(axis=1).sum() > 100


def test_image_needs_bytes(tmp_path: Path) -> None:
    single(tmp_path, method="central", rounds=5)
    with pytest.raises(RunFolderError, match="expected an evaluated round with its bytes"):
        bytes_figure(tmp_path)


def test_two_runs_of_one_method_and_seed(tmp_path: Path) -> None:
    summary = fake_comparison(tmp_path, ["fedss"], rounds=5)
    again = fake_run(tmp_path / "again", rounds=5) | {"folder": "again"}
    (tmp_path / "summary.json").write_text(json.dumps([*summary, again]))
    with pytest.raises(RunFolderError, match="two runs of fedss with seed 0"):
        write_report(tmp_path)


def test_fewer_neighbours_than_five(tmp_path: Path) -> None:
    """A small test set has fewer others to find; the panels show those."""
    folder = tmp_path / "few"
    fake_comparison(folder, ["full", "fedss"])
    for path in folder.glob("*/retrieval.npz"):
        panels = dict(np.load(path))
        for name, keep in (("pixels", 3), ("labels", 3), ("class_names", 3), ("scores", 2)):
            panels[name] = panels[name][:, :keep]
        np.savez_compressed(path, **panels)
    text = write_report(folder).read_text()
    assert "of 2 right" in text
    assert "of 5 right" not in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", "[{}]"),
        ("summary.json", "5"),
        ("config.json", "[]"),
        ("records.jsonl", "5\n"),
        ("records.jsonl", '{"round": 2}\n'),
    ],
)
def test_damage_is_named_and_no_traceback(tmp_path: Path, file: str, content: str) -> None:
    folder = tmp_path / "bad"
    fake_comparison(folder, ["full", "fedss"])
    place = folder if file == "summary.json" else next(iter(sorted(folder.glob("fedss*"))))
    (place / file).write_text(content)
    with pytest.raises(RunFolderError, match=file.replace(".", r"\.")):
        write_report(folder)


def test_the_image_is_a_png_and_the_same_each_time(tmp_path: Path) -> None:
    folder = tmp_path / "four"
    fake_comparison(folder, ["full", "fedss", "pos-only", "central"])
    image = bytes_figure(folder)
    assert image.startswith(b"\x89PNG")
    assert image == bytes_figure(folder)


# label -> (method, MAP@10, bytes both ways, of these moments)
VARIANTS: dict[str, tuple[str, float, float | None, float]] = {
    "full": ("full", 0.350, 866e3, 0),
    "fedss uniform": ("fedss", 0.340, 407e3, 0),
    "fedss deck": ("fedss", 0.347, 407e3, 0),
    "moments": ("moments", 0.348, 408e3, 16.6e3),
    "moments rank 16": ("moments", 0.340, 400e3, 8.6e3),
    "fedss deck int8": ("fedss", 0.346, 112e3, 0),
    "fedss deck int4": ("fedss", 0.335, 54e3, 0),
    "moments int4": ("moments", 0.334, 54e3, 2e3),
    "pos-only": ("pos-only", 0.270, 391e3, 0),
    "central": ("central", 0.460, None, 0),
}


def fake_variants(
    folder: Path, names: list[str] | None = None, seeds: int = 2, **changed: Any
) -> list[dict[str, Any]]:
    """A comparison of variants whose means are those of `VARIANTS`; ``changed``: other scores."""
    summary = []
    for label in names or list(VARIANTS):
        method, score, moved, moments = VARIANTS[label]
        score = changed.get(label, score)
        for seed in range(seeds):
            name = f"{label.replace(' ', '-')}-seed{seed}"
            entry = fake_run(folder / name, method, seed, rounds=10, level=score)
            entry |= {"folder": name, "label": label}
            entry["map_at_10"] = score + 0.004 * (seed - (seeds - 1) / 2)
            if moved is not None:
                backbone = 0.45 * moved
                for way in ("down", "up"):
                    entry |= {
                        f"bytes_{way}_per_client_round": moved / 2,
                        f"backbone_bytes_{way}_per_client_round": backbone,
                        f"class_row_bytes_{way}_per_client_round": moved / 2 - backbone - moments,
                        f"moment_bytes_{way}_per_client_round": moments,
                    }
            summary.append(entry)
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    fake_variants(folder)
    return folder


def groups_of(folder: Path) -> list[reading.Group]:
    return reading.group_runs(reading.read_runs(folder), folder)


def test_runs_are_grouped_by_label(variants: Path) -> None:
    _, page = read(variants)
    assert [c for c in page.cells if c in VARIANTS][: len(VARIANTS)] == [
        *("full", "fedss uniform", "fedss deck", "fedss deck int8", "fedss deck int4"),
        *("moments", "moments rank 16", "moments int4", "pos-only", "central"),
    ]
    assert "10 variants on omniglot" in page.words
    assert "Variants in figures" in page.words
    assert all(len(group.runs) == 2 for group in groups_of(variants))


def test_two_runs_of_one_label_and_seed(tmp_path: Path) -> None:
    summary = fake_variants(tmp_path, ["full", "fedss deck", "fedss uniform"], seeds=1)
    summary[2]["label"] = "fedss deck"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RunFolderError, match="two runs of fedss deck with seed 0; "):
        write_report(tmp_path)


def test_label_must_be_text(tmp_path: Path) -> None:
    entry = single(tmp_path, rounds=5)
    (tmp_path / "summary.json").write_text(json.dumps([entry | {"label": 3}]))
    with pytest.raises(RunFolderError, match=r"summary\.json: 'label': expected a string, got 3"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps([entry | {"label": None}]))
    assert [group.label for group in groups_of(tmp_path)] == ["fedss"]


def test_without_labels_sample_sizes_tell_runs_apart(tmp_path: Path) -> None:
    fake_comparison(tmp_path, ["full", "fedss"], rounds=5)
    other = fake_run(tmp_path / "other", rounds=5) | {"folder": "other"}
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["config"]["sample_size"] = 32
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps([*summary, other]))
    assert [group.label for group in groups_of(tmp_path)] == ["full", "fedss 64", "fedss 32"]


def test_unfinished_variants_are_named_by_their_folders(tmp_path: Path) -> None:
    summary = fake_variants(tmp_path, ["full", "fedss deck"])
    for entry in summary[2:]:
        entry["label"] = "fedss:sampler=deck,rows_up=int8"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for name, seed in (("fedss-sampler=deck-rows_up=int8", 2), ("fedss-sampler=hard", 0)):
        fake_run(tmp_path / f"{name}-seed{seed}", seed=seed, rounds=10, stop=4)
    _, page = read(tmp_path)
    for line in ("fedss:sampler=deck,rows_up=int8, seed 2", "fedss-sampler=hard, seed 0"):
        assert f"{line}: round 4 of 10" in page.words


def test_moments_are_counted_with_the_class_rows(variants: Path, tmp_path: Path) -> None:
    html, page = read(variants)
    at = page.cells.index("moments")
    rows = 408e3 / 2 - 0.45 * 408e3
    assert page.cells[at + 6] == page.cells[at + 8] == human_bytes(rows)
    assert "class rows and moments</text>" in html
    assert "class rows with moments, where a method sends these" in page.words
    fake_comparison(tmp_path, ["full", "fedss", "pos-only"], rounds=5)  # older: no moments at all
    html, page = read(tmp_path)
    assert "moments" not in page.words
    assert "class rows</text>" in html


def test_moments_of_a_run_still_under_way(tmp_path: Path) -> None:
    fake_run(tmp_path, "moments", stop=10)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    for line in lines:
        for way in ("down", "up"):
            line |= {f"class_row_bytes_{way}": 20 * 100, f"moment_bytes_{way}": 20 * 11}
            line |= {f"backbone_bytes_{way}": 20 * 1000}
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (group,) = groups_of(tmp_path)
    assert headlines.both_ways(group, "row_") == 222
    assert headlines.has_moments([group])


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


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Any]:
    """Change each line of records.jsonl; the new lines."""
    path = folder / "records.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return lines


def table_after(page: Page, first: str) -> list[str]:
    return page.cells[page.cells.index(first) :]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"failures": {}}, "'failures': expected a list, got {}"),
        ({"failures": ["shop"]}, "expected an object, got 'shop'"),
        ({"failures": [{"client": "shop"}]}, "'reason' is missing"),
        ({"failures": [{"client": 3, "reason": "ids"}]}, "'client': expected a string, got 3"),
        ({"attempts": "many"}, "'attempts': expected an integer, got 'many'"),
        ({"seconds": {"train": None}}, "'train': expected a number, got None"),
        ({"seconds": 3}, "expected an object, got 3"),
    ],
)
def test_damaged_federation_records(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    single(tmp_path, rounds=5)
    rewrite(tmp_path, lambda line: line | change)
    with pytest.raises(RunFolderError, match=rf"records\.jsonl, line 1: {re.escape(message)}"):
        write_report(tmp_path)


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
    assert titles == ["Bytes per client and round", "Training loss"]
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


def test_charts_say_what_is_not_evaluated_yet(tmp_path: Path) -> None:
    fake_run(tmp_path, stop=1)
    assert "No round has been evaluated yet, so there is no accuracy to draw." in (
        read(tmp_path)[1].words.replace("\n", " ")
    )
    assert "fedss evaluate" not in read(tmp_path)[1].words


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


def point(label: str, moved: float, score: float) -> frontier.FrontierPoint:
    return frontier.FrontierPoint(label, "fedss", moved, score, score - 0.004, score + 0.004)


def test_frontier_is_what_nothing_beats() -> None:
    points = [
        *(point("a", 10, 0.30), point("b", 20, 0.35), point("c", 20, 0.34), point("d", 30, 0.35)),
        *(point("e", 40, 0.36), point("f", 5, 0.1), point("twin of b", 20, 0.35)),
    ]
    assert frontier.on_frontier(points) == [True, True, False, False, True, True, True]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["full", "fedss deck"], ["MAP@10 against bytes moved"]),
        (["full", "fedss deck", "central"], ["MAP@10 against bytes moved"]),
        (["full", "fedss deck", "moments"], ["MAP@10 against bytes moved", "The frontier"]),
        (list(VARIANTS), ["The frontier"]),
    ],
)
def test_frontier_stands_where_it_says_something(
    tmp_path: Path, names: list[str], shown: list[str]
) -> None:
    fake_variants(tmp_path, names)
    html, _ = read(tmp_path)
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", html)
    assert titles == ["MAP@10 over rounds", *shown, "Bytes per client and round", "Training loss"]


def test_frontier_names_every_variant(variants: Path) -> None:
    html, page = read(variants)
    chart = html[html.index("MAP@10 against bytes per round for") :].partition("</svg>")[0]
    texts = re.findall(r">([^<>\n]+)</text>", chart)
    for label in set(VARIANTS) - {"pos-only", "central"}:
        assert label in texts
    # Far from all others: their values are named at the edges.
    assert "pos-only 0.270↓" in texts
    assert "central 0.460↑" in texts
    assert "hollow marks are beaten; uprights span the seeds." in page.words


def test_unfinished_runs_are_not_on_the_frontier(tmp_path: Path) -> None:
    fake_variants(tmp_path, ["full", "fedss deck"])
    fake_run(tmp_path / "moments-seed0", "moments", rounds=10, stop=5)
    assert "The frontier" not in read(tmp_path)[1].words


@pytest.mark.parametrize("width", [420, 460])
@pytest.mark.parametrize("count", [1, 3, 9, 12])
def test_names_beside_marks_do_not_touch(width: int, count: int) -> None:
    rng = np.random.default_rng(count)
    marks = np.stack(
        [rng.choice([90.0, 150.0, 290.0, 291.0], count), rng.uniform(80, 330, count)], axis=1
    )
    sizes = np.stack([rng.uniform(40, 120, count), np.full(count, 15.0)], axis=1)
    area = np.array([44.0, 50.0, width - 4.0, 364.0])
    places, tied = labels.beside(marks, sizes, np.empty((0, 4)), np.array([]), area)
    low, high = places - sizes / 2, places + sizes / 2
    for i in range(count):
        for j in range(i):
            assert np.any(low[i] >= high[j]) or np.any(low[j] >= high[i])
    inside = (marks[None] > low[:, None]) & (marks[None] < high[:, None])
    assert not inside.all(axis=2).any()
    assert np.all(low >= area[:2])
    assert np.all(high <= area[2:])
    assert len(tied) == count


def test_marks_that_would_hide_each_other_stand_side_by_side() -> None:
    marks = np.array([[100.0, 50.0], [100.0, 52.0], [101.0, 90.0], [200.0, 50.0]])
    moved = labels.side_by_side(marks)
    assert abs(moved[0, 0] - moved[1, 0]) == pytest.approx(9)
    assert np.array_equal(moved[2:], marks[2:])
    assert np.array_equal(moved[:, 1], marks[:, 1])


@pytest.mark.parametrize(
    ("label", "width", "most", "text"),
    [
        ("fedss deck int4", 12, 2, "fedss deck\nint4"),
        ("moments rank 16", 22, 2, "moments rank 16"),
        ("fedss-uncorrected", 12, 2, "fedss-\nuncorrected"),
        ("fedss:sampler=uniform", 15, 2, "fedss:\nsampler=uniform"),
        (
            "fedss:sampler=deck,rows_down=int4,rows_up=int8",
            22,
            2,
            "fedss:sampler=deck,…\nrows_up=int8",
        ),
        ("x" * 40, 12, 2, "x" * 12 + "…"),
        ("", 12, 2, ""),
    ],
)
def test_long_names_keep_both_ends(label: str, width: int, most: int, text: str) -> None:
    assert labels.wrap(label, width, most) == text


def test_names_at_line_ends_are_shown_in_full() -> None:
    names = list(VARIANTS)
    texts = labels.wrapped(names, 200)
    assert [text.replace("\n", " ") for text in texts] == names
    assert labels.stacked(texts) <= 200


def test_twelve_variants_look_different() -> None:
    slots = charts.slots_of([f"variant {i}" for i in range(12)])
    assert len(set(slots)) == 12
    assert len({(charts.DASHES[s], charts.MARKERS[s]) for s in slots}) == 12
    known = charts.SLOT_OF
    assert charts.slots_of(["fedss", "moments", "fedss deck"]) == [
        *(known["fedss"], known["moments"], "extra-1")
    ]
    assert charts.DASHES[known["moments"]]
    assert set(known) == set(fedss.METHODS)
    assert len(set(known.values())) == len(known)


# Machado et al. 2009: normal, protanopia, deuteranopia, tritanopia, on linear RGB.
SEEN_AS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    ]
)


def linear(color: str) -> np.ndarray:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_can_be_read_and_told_apart(theme: int) -> None:
    style = (Path(charts.__file__).parent / "report.html").read_text()
    block = style.split(":root {")[1 + theme].split("}")[0]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    luminance = {name: float(linear(c) @ [0.2126, 0.7152, 0.0722]) for name, c in colors.items()}
    for slot in (*charts.SLOTS, *charts.EXTRA_SLOTS):
        low, high = sorted((luminance[slot], luminance["paper"]))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert len({colors[slot] for slot in charts.EXTRA_SLOTS}) == 12
    phases = [f"phase-{phase}" for phase in rounds.PHASES]
    timed = [np.cbrt((SEEN_AS @ linear(colors[name])).clip(0)) for name in phases]
    for i, name in enumerate(phases):
        low, high = sorted((luminance[name], luminance["paper"]))
        # Waiting is paler: it is no work.
        assert (high + 0.05) / (low + 0.05) >= (1.5 if name == "phase-pause" else 3)
        for j in range(i):
            assert np.linalg.norm(timed[i] - timed[j], axis=1).min() > 0.15
    of_method = {method: colors[slot] for method, slot in charts.SLOT_OF.items()}
    for other in ("full", "fedss"):
        pair = of_method["moments"], of_method[other]
        seen = [np.cbrt((SEEN_AS @ linear(c)).clip(0)) for c in pair]
        assert np.linalg.norm(seen[0] - seen[1], axis=1).min() > 0.3


def test_frontier_image_of_one_comparison(variants: Path) -> None:
    image = frontier_figure({"Omniglot": variants})
    assert image == frontier_figure({"Omniglot": variants})
    with Image.open(io.BytesIO(image)) as image:
        assert image.format == "PNG"
        assert image.size == (1280, 800)
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == 255).all(axis=1).mean() > 0.8
    for color in ((0x1B, 0x1F, 0x24), (0xD0, 0x10, 0x4C)):
        assert (pixels == color).all(axis=1).sum() > 100


@pytest.mark.parametrize(("count", "size"), [(2, (2320, 880)), (3, (2320, 1760))])
def test_frontier_image_of_several(
    variants: Path, tmp_path: Path, count: int, size: tuple[int, int]
) -> None:
    fake_variants(tmp_path, ["full", "fedss deck", "pos-only"])
    folders = {"one": variants, "two": tmp_path, "three": variants}
    image = frontier_figure(dict(list(folders.items())[:count]))
    with Image.open(io.BytesIO(image)) as image:
        assert image.size == size


def test_frontier_image_is_relative_where_every_comparison_has_full(
    variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_variants(tmp_path, ["fedss deck", "pos-only"])
    drawn: list[frontier.FrontierPanel] = []
    monkeypatch.setattr(figures, "frontier_png", lambda panels, _: drawn.extend(panels) or b"")
    frontier_figure({"with full": variants})
    frontier_figure({"with full": variants, "without": tmp_path})
    scores = [{p.label: p.mean for p in panel.points} for panel in drawn]
    assert [panel.relative for panel in drawn] == [True, False, False]
    assert scores[0]["full"] == 1
    assert scores[0]["fedss deck"] == pytest.approx(0.347 / 0.35)
    assert scores[1]["fedss deck"] == scores[2]["fedss deck"] == pytest.approx(0.347)
    assert drawn[0].level is not None
    assert drawn[0].level[2] == pytest.approx(0.46 / 0.35)
    slots = [{p.label: p.slot for p in panel.points} for panel in drawn]
    assert slots[1]["fedss deck"] == slots[2]["fedss deck"]


def test_frontier_image_needs_one_to_four_comparisons_with_bytes(
    variants: Path, tmp_path: Path
) -> None:
    for folders in ({}, {str(i): variants for i in range(5)}):
        with pytest.raises(ConfigError, match="folders: expected 1 to 4 of them, got"):
            frontier_figure(folders)
    single(tmp_path, method="central", rounds=5)
    with pytest.raises(RunFolderError, match="expected a finished run with its score and bytes"):
        frontier_figure({"pooled": tmp_path})
