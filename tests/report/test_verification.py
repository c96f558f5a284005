"""What the page says on pairs of images: rates, ROC, the hardest confusions."""

import base64
import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedss import RetrievalTask, RunFolderError, write_report
from fedss.evaluation.task import embed_task, findings
from fedss.report.verification import number
from fedss.runs.findings import write_findings
from tests import reference
from tests.report.made import fake_comparison, fake_run, read, single

FIGURES = "Verification and identification"


def leave_findings(folder: Path, noise: float = 1.2, classes: int = 40, seed: int = 0) -> Any:
    """What a run leaves of a task of 6 images a class, under embeddings of some quality."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), 6)
    query = dataclasses.replace(
        reference.tiny_dataset().test.query,
        pixels=rng.integers(0, 256, (len(labels), 1, 8, 8), dtype=np.uint8),
        labels=labels,
        clients=np.zeros(len(labels), np.int64),
        class_names=[f"alphabet/sign {i}" for i in range(classes)],
        names=[f"{i}.png" for i in range(len(labels))],
    )
    centres = rng.normal(size=(classes, 4))
    h_ND = torch.from_numpy(centres[labels] + noise * rng.normal(size=(len(labels), 4)))
    task = RetrievalTask(query)
    kept = (folder / "retrieval.npz").read_bytes()
    write_findings(folder, findings(task, embed_task(lambda _: h_ND, task), seed=0))
    (folder / "retrieval.npz").write_bytes(kept)
    return json.loads((folder / "verification.json").read_text()), task, h_ND


def test_a_run_shows_its_rates_as_far_as_pairs_support_them(tmp_path: Path) -> None:
    single(tmp_path, rounds=5)
    _, plain = read(tmp_path)
    assert FIGURES not in plain.words
    assert "FAR, TAR, EER" not in plain.words
    verification, _, _ = leave_findings(tmp_path)
    html, page = read(tmp_path)
    assert FIGURES in page.words
    shown = page.cells[page.cells.index("EER") :]
    points = {p["far"]: p for p in verification["points"]}
    known = verification["identification"]
    assert shown[:15] == [
        *("EER", f"{verification['eer']:.3f}", f"{verification['eer_threshold']:.3f}"),
        *("TAR at FAR 0.1", f"{points[0.1]['tar']:.3f}", f"{points[0.1]['threshold']:.3f}"),
        *("TAR at FAR 0.01", f"{points[0.01]['tar']:.3f}", f"{points[0.01]['threshold']:.3f}"),
        *("DIR at FPIR 0.01", f"{known['dir']:.3f}", f"{known['threshold']:.3f}"),
        *("first class", "second class", "first taken for second"),
    ]
    assert not points[0.001]["supported"]
    assert "600 of one class" in page.words
    assert "28\u202f080 of two, too few for a FAR below 1.1\u00a0·\u00a010⁻³" in page.words
    assert "20 classes are enrolled, drawn 10 times; so few images" in page.words
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", html[html.index(FIGURES) :])
    assert f"EER {verification['eer']:.3f}" in texts
    assert {f"{points[far]['tar']:.3f}" for far in (0.1, 0.01)} <= set(texts)
    assert f"{points[0.001]['tar']:.3f}" not in texts
    assert "it grows with the number of enrolled classes" in page.words


def test_confused_classes_stand_with_an_image_of_each(tmp_path: Path) -> None:
    single(tmp_path, rounds=5)
    _, task, h_ND = leave_findings(tmp_path, noise=1.0)
    html, page = read(tmp_path)
    unit = torch.nn.functional.normalize(h_ND, dim=1)
    best = (unit @ unit.T).fill_diagonal_(-2).argmax(1).numpy()
    labels, names = task.query.labels, task.query.class_names
    images = re.findall(r'src="data:image/png;base64,([^"]+)" alt="Confused: ([^"]+)"', html)
    assert len(images) == 2 * 10
    rows = []
    at = page.cells.index("cosine")
    for i in range(10):
        cells = page.cells[at + 1 + 5 * i : at + 6 + 5 * i]
        first, second = (names.index(cell) for cell in cells[:2])
        for own, other, cell in ((first, second, cells[2]), (second, first, cells[3])):
            taken = int((labels[best[labels == own]] == other).sum())
            share = f"{100 * taken / 6:.0f}\u00a0%" if taken else ""
            assert cell == f"{taken} of 6{share}"
        ways = [int(cell[0]) for cell in cells[2:4]]
        assert ways[0] >= ways[1]
        rows.append(sum(ways))
        pixels = []
        for (uri, name), of in zip(images[2 * i : 2 * i + 2], (first, second), strict=True):
            assert name == names[of]
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
            (position,) = np.flatnonzero((task.query.pixels[:, 0] == shown).all((1, 2)))
            assert labels[position] == of
            pixels.append(position)
        a, b = pixels
        assert b == best[a] or a == best[b]
        assert cells[4] == f"{float(unit[a] @ unit[b]):.2f}"
    assert rows == sorted(rows, reverse=True)


def test_a_comparison_shows_each_method_and_the_confusions_of_the_best(tmp_path: Path) -> None:
    fake_comparison(tmp_path, ["full", "fedss", "central"], seeds=2, rounds=10)
    figures = {
        (method, seed): leave_findings(tmp_path / f"{method}-{seed}", noise, seed=seed)[0]
        for method, noise in (("full", 0.6), ("fedss", 1.0), ("central", 0.4))
        for seed in (0, 1)
    }
    html, page = read(tmp_path)
    assert "Hardest confusions of full" in page.words
    cells = page.cells[page.cells.index("DIR at FPIR 0.01") + 1 :]
    for i, method in enumerate(("full", "fedss", "central")):
        both = [figures[method, seed] for seed in (0, 1)]
        columns = [
            [f["eer"] for f in both],
            [f["points"][1]["tar"] for f in both],
            [f["identification"]["dir"] for f in both],
        ]
        assert cells[4 * i] == method
        for cell, values in zip(cells[4 * i + 1 : 4 * i + 4], columns, strict=True):
            assert cell == f"{np.mean(values):.3f}± {np.std(values, ddof=1):.3f}"
    assert "TAR against FAR for full, fedss and central" in html
    chart = html[html.index("TAR against FAR") :]
    chart = chart[: chart.index("</svg>")]
    assert {"full", "fedss", "central"} <= set(re.findall(r"<text[^>]*>([^<]+)</text>", chart))
    (tmp_path / "fedss-1" / "verification.json").unlink()
    again = read(tmp_path)[1]
    at = again.cells.index("DIR at FPIR 0.01") + 1
    assert again.cells[at : at + 8 : 4] == ["full", "central"]


def test_many_methods_have_a_table_and_no_chart(tmp_path: Path) -> None:
    methods = ["full", "fedss", "pos-only", "neg-only", "fedaws", "moments", "fedss-uncorrected"]
    fake_comparison(tmp_path, methods, rounds=5)
    before = read(tmp_path)[0].count('<svg class="chart"')
    for method in methods:
        leave_findings(tmp_path / f"{method}-0")
    html, page = read(tmp_path)
    assert html.count('<svg class="chart"') == before
    assert FIGURES in page.words
    assert set(methods) <= set(page.cells[page.cells.index("DIR at FPIR 0.01") :])


def test_few_pairs_make_no_chart_and_no_claim(tmp_path: Path) -> None:
    single(tmp_path, rounds=5)
    before = read(tmp_path)[0].count('<svg class="chart"')
    leave_findings(tmp_path, classes=2)
    verification = json.loads((tmp_path / "verification.json").read_text())
    verification |= {"smallest_far": 1.5, "roc": verification["roc"][-1:], "identification": None}
    for point in verification["points"]:
        point["supported"] = False
    (tmp_path / "verification.json").write_text(json.dumps(verification))
    html, page = read(tmp_path)
    assert html.count('<svg class="chart"') == before
    assert "too few for any rate of errors" in page.words
    assert "TAR at" not in page.words
    assert "DIR" not in page.words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: [], "expected an object"),
        (lambda f: {k: v for k, v in f.items() if k != "eer"}, "'eer' is missing"),
        (lambda f: f | {"eer": 1.5}, "'eer': expected a share from 0 to 1"),
        (lambda f: f | {"eer": float("nan")}, "'eer': expected a share from 0 to 1"),
        (lambda f: f | {"points": 3}, "'points': expected a list"),
        (lambda f: f | {"roc": []}, "'roc': expected points"),
        (lambda f: f | {"roc": f["roc"][::-1]}, "'roc': expected points"),
        (lambda f: f | {"impostor": 1.5}, "'impostor': expected an integer"),
        (lambda f: f | {"identification": {"fpir": 0.01}}, "'dir' is missing"),
        (
            lambda f: f | {"identification": f["identification"] | {"enrolled": 0}},
            "expected a threshold from -1 on and classes",
        ),
    ],
)
def test_damaged_figures(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    fake_run(tmp_path, rounds=5)
    verification, _, _ = leave_findings(tmp_path, classes=5)
    (tmp_path / "verification.json").write_text(json.dumps(change(verification)))
    advice = "delete it and run fedss evaluate"
    with pytest.raises(RunFolderError, match=rf"verification\.json: {message}.*{advice}"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("queries", lambda a: a[:, 0], r"queries: expected \[P, 2\], got \[10\]"),
        ("scores", lambda a: a[:3], r"scores: expected \[P\], got \[3\]"),
        ("scores", lambda a: a.astype(str), "scores: unexpected type"),
        ("pixels", lambda a: a[:, :1], "pixels: expected"),
        ("pixels", lambda a: a.astype(float), "pixels: unexpected type"),
    ],
)
def test_damaged_confusions(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    fake_run(tmp_path, rounds=5)
    leave_findings(tmp_path)
    with np.load(tmp_path / "confusions.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "confusions.npz", **(arrays | {name: change(arrays[name])}))
    with pytest.raises(RunFolderError, match=rf"confusions\.npz: {message}.*without images"):
        write_report(tmp_path)
    (tmp_path / "confusions.npz").write_bytes(b"no archive")
    with pytest.raises(RunFolderError, match=r"confusions\.npz: cannot be read"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.1, "0.1"),
        (0.05, "0.05"),
        (0.01, "0.01"),
        (0.001, "10⁻³"),
        (1e-12, "10⁻¹²"),
        (0.005, "5\u00a0·\u00a010⁻³"),
        (5.84e-7, "5.8\u00a0·\u00a010⁻⁷"),
        (1.0, "1"),
    ],
)
def test_rates_in_words(rate: float, text: str) -> None:
    assert number(rate) == text
