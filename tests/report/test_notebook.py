"""What a notebook shows: short reprs, a run's report and chart in place."""

import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fedss
from fedss.report import rounds_figure
from fedss.runs.summaries import read_summaries
from tests.report.made import single


def test_reprs_are_a_line_that_says_what_it_is() -> None:
    config = fedss.Config(data="csv", data_path="photos.csv", client_lr=0.1, eval_every=0)
    text = "Config(data='csv', data_path='photos.csv', client_lr=0.1, eval_every=0)"
    assert repr(config) == text
    assert eval(repr(config), vars(fedss)) == config
    assert repr(fedss.Config()) == "Config()"
    images = fedss.Images(
        np.zeros((4, 1, 8, 8), np.uint8),
        np.array([0, 0, 1, 1]),
        np.zeros(4, np.int64),
        [f"class {i}" for i in range(1000)],
        ["one"],
        list("abcd"),
    )
    data = fedss.Dataset("shop", images, fedss.RetrievalTask(images))
    shown = "Images(4 of 1 x 8 x 8, 1,000 classes, 1 client)"
    task = f"RetrievalTask({shown} among the others)"
    assert repr(data) == f"Dataset('shop', train={shown}, test={task})"


def test_a_run_shows_its_report_and_its_curve(tmp_path: Path) -> None:
    entry = single(tmp_path, rounds=10)
    run = fedss.Run(tmp_path, None, read_summaries(tmp_path)[0], False)
    expected = f"Run('{tmp_path}', fedss, 10 rounds, MAP@10 {entry['map_at_10']:.3f})"
    assert repr(run) == expected

    pages: list[dict[str, Any]] = []

    class Frames(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            pages.append({"tag": tag, **dict(attrs)})

    report = run.report()
    Frames().feed(report._repr_html_())
    (frame,) = pages
    assert frame["tag"] == "iframe"
    assert frame["srcdoc"] == (tmp_path / "report.html").read_text()
    assert report.path == tmp_path / "report.html"

    png, size = run.plot()._repr_png_()
    assert len(repr(run.plot())) < 80
    assert png == rounds_figure(tmp_path)
    with Image.open(io.BytesIO(png)) as image:
        assert (image.size, size) == ((1280, 800), {"width": 640})
