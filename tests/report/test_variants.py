"""Runs are told apart by label, method, sample size and folder."""

import json
from pathlib import Path

from fedss.runs import headlines
from fedss.text import human_bytes
from tests.report.made import VARIANTS, fake_comparison, fake_run, fake_variants, groups_of, read


def test_runs_are_grouped_by_label(variants: Path) -> None:
    _, page = read(variants)
    assert [c for c in page.cells if c in VARIANTS][: len(VARIANTS)] == [
        *("full", "fedss uniform", "fedss deck", "fedss deck int8", "fedss deck int4"),
        *("moments", "moments rank 16", "moments int4", "pos-only", "central"),
    ]
    assert "10 variants on omniglot" in page.words
    assert "Variants in figures" in page.words
    assert all(len(group.runs) == 2 for group in groups_of(variants))


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
    for name, seed in (("fedss-sampler=deck-rows_up=int8", 2), ("fedss-sampler=sticky", 0)):
        fake_run(tmp_path / f"{name}-seed{seed}", seed=seed, rounds=10, stop=4)
    _, page = read(tmp_path)
    for line in ("fedss:sampler=deck,rows_up=int8, seed 2", "fedss-sampler=sticky, seed 0"):
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
