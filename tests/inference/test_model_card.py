"""A run's model card: read as a model hub reads it, with the run's own figures and nothing else."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from fedss import RetrievalTask
from fedss.errors import RunFolderError
from fedss.evaluation.task import verify
from fedss.inference.model_card import model_card
from fedss.models import EmbedderSpec
from tests import reference

SPEC = EmbedderSpec("conv4-32", channels=3, image_size=64, embedding_size=16)
ABOUT: dict[str, Any] = {
    "config": {"rounds": 7, "margin_kind": "arcface", "data_path": "/home/somebody/photos.csv"},
    "data": {
        "name": "csv",
        "train_images": 12345,
        "train_classes": 67,
        "train_clients": 8,
        "own_classes": [2, 5.5, 9],
        "test_gallery": None,
        "test_queries": 40,
        "test_classes": 11,
        "test_classes_seen": 3,
        "image_shape": [3, 64, 64],
        "skipped_pictures": 2,
        "fingerprint": "abc",
    },
    "model": {"backbone": "Sequential"},
    "fedss": "0.2.0",
}
SUMMARY: dict[str, Any] = {
    "method": "fedss",
    "seed": 0,
    "rounds": 7,
    "sample_size": 33,
    "folder": ".",
    "recall_at_1": 0.5,
    "recall_at_5": 0.75,
    "map_at_10": 0.4375,
    "map_at_r": 0.25,
    "map_at_10_interval": [0.375, 0.5],
    "floors": {"chance": 0.0625, "pixels": 0.3125},
    "queries": 40,
    "skipped": 0,
    "bytes_down_per_client_round": 204000.0,
    "bytes_up_per_client_round": 198000.0,
    "backbone_bytes_down_per_client_round": 188000.0,
    "backbone_bytes_up_per_client_round": 188000.0,
    "class_row_bytes_down_per_client_round": 16000.0,
    "class_row_bytes_up_per_client_round": 10000.0,
    "class_rows_per_client": 33.0,
    "seconds": 12.5,
}


def card_of(
    about: object = ABOUT,
    summary: dict[str, Any] = SUMMARY,
    spec: EmbedderSpec = SPEC,
    verification: str | None = None,
) -> str:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(about))
        Path(folder, "summary.json").write_text(json.dumps([summary]))
        if verification is not None:
            Path(folder, "verification.json").write_text(verification)
        return model_card(Path(folder), spec, "f" * 64, "Cut out the square.")


def table(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table below a heading, by their first cell."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_a_hub_reads_the_header():
    card = ModelCard(card_of())
    assert card.data.library_name == "fedss"
    assert card.data.license == "unknown"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert {"image-retrieval", "federated-learning"} <= set(card.data.tags)
    assert set(card.data.metrics) == {"map_at_10", "map_at_r", "recall_at_1", "recall_at_5"}
    assert card.data.model_name == "conv4-32 trained with fedss on csv"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {metric: SUMMARY[metric] for metric in card.data.metrics}
    assert {result.dataset_name for result in card.data.eval_results} == {"csv"}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert card.text.lstrip().startswith("# conv4-32 trained with fedss on csv\n")


def test_figures_are_those_of_the_run():
    text = card_of()
    data, settings, results = (table(text, h) for h in ("Data", "Training", "Results"))
    assert data["training images"] == ["12,345"]
    assert data["classes per client"] == ["2 to 9, median 5.5"]
    assert data["images left out as unreadable"] == ["2"]
    assert settings["`rounds`"][0] == "`7`"
    assert settings["`sample_size`"][0] == "`33`"
    assert settings["`margin_kind`"][0] == "`arcface`"
    assert "`margin`" not in settings
    assert "`data_path`" not in settings
    assert "somebody" not in text
    assert results["MAP@10"][0] == "0.4375"
    assert results["MAP@10, 95 %"][0] == "0.3750 to 0.5000"
    assert results["MAP@10, raw pixels"][0] == "0.3125"
    assert "40 queries of the split `test` (each among all the others), 0 more left out" in text
    assert "11 classes, 3 of them seen in training" in text
    assert table(text, "What training moved")["backbone"] == ["188 kB", "188 kB"]
    assert table(text, "Versions")["fingerprint of the model"] == [f"`{'f' * 64}`"]
    assert table(text, "Versions")["torch, in training"] == ["unknown"]
    assert "\n\nCut out the square.\n\n" in text


def test_what_nobody_knows_is_unknown():
    federation = {"name": "federation", "image_shape": [1, 28, 28], "evaluated_at": "sites"}
    unknown = dict.fromkeys(("recall_at_1", "recall_at_5", "map_at_10", "map_at_r", "queries"))
    text = card_of({**ABOUT, "data": federation}, {**SUMMARY, **unknown})
    card = ModelCard(text)
    assert card.data.metrics == []
    assert card.data.eval_results is None
    data = table(text, "Data")
    assert data["training images"] == data["clients"] == data["classes per client"] == ["unknown"]
    assert data["why unknown"] == ["images stayed at their sites, and these counts with them"]
    assert "\n\nUnknown: nobody could evaluate the model.\n" in text
    judged = card_of({**ABOUT, "data": federation})
    assert "(evaluated at: sites)" in judged
    assert "unknown classes, unknown of them seen" in judged


def test_pooled_training_moves_nothing_and_own_networks_are_named():
    pooled = {name: None if "bytes" in name else value for name, value in SUMMARY.items()}
    text = card_of(
        summary={**pooled, "method": "central"},
        spec=EmbedderSpec(None, channels=1, image_size=32, embedding_size=8),
    )
    assert "\n\nNo federated message: images were pooled.\n" in text
    assert "`central`: images pooled" in text
    assert table(text, "Training")["`backbone`"][0] == "`Sequential (a module of its owner's)`"
    assert 'fedss.load("model.safetensors", backbone=net)  # net: a module' in text


def measured(classes: int, seed: int = 0) -> dict[str, Any]:
    """What a run writes of six images a class, under embeddings of some quality."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), 6)
    noise = 0.7 * rng.normal(size=(len(labels), 4))
    h_ND = torch.from_numpy(rng.normal(size=(classes, 4))[labels] + noise)
    query = dataclasses.replace(
        reference.tiny_dataset().test.query,
        pixels=np.zeros((len(labels), 1, 8, 8), np.uint8),
        labels=labels,
        clients=np.zeros(len(labels), np.int64),
        class_names=[str(i) for i in range(classes)],
        names=[str(i) for i in range(len(labels))],
    )
    found = verify(RetrievalTask(query), (h_ND, None), 0)
    assert found is not None
    return dataclasses.asdict(found)


def test_rates_and_thresholds_are_those_of_the_run():
    found = measured(classes=24)
    text = card_of(verification=json.dumps(found))
    shown = table(text, "Thresholds")
    assert shown["EER"][:2] == [f"{found['eer']:.4f}", f"{found['eer_threshold']:.4f}"]
    for point in found["points"]:
        tar, threshold, means = shown[f"TAR at FAR {point['far']:g}"]
        assert (tar, threshold) == (f"{point['tar']:.4f}", f"{point['threshold']:.4f}")
        assert ("fewer than 30" in means) == (not point["supported"])
    assert {point["supported"] for point in found["points"]} == {True, False}
    known = found["identification"]
    name, threshold, means = shown["DIR at FPIR 0.01"]
    assert (name, threshold) == (f"{known['dir']:.4f}", f"{known['threshold']:.4f}")
    assert ("fewer than 30" in means) == (not known["supported"])
    assert len(shown) == len(found["points"]) + 2
    assert f"{24 * 15:,} pairs of images of one class and {(24 * 23 // 2) * 36:,} of two" in text
    assert f"{known['enrolled']:,} enrolled classes, drawn {known['draws']:,} times" in text
    # The rest of the card is as without them.
    without = card_of()
    assert text.split("## What training moved")[1] == without.split("## What training moved")[1]
    assert ModelCard(text).data.to_dict() == ModelCard(without).data.to_dict()


def test_thresholds_without_identification_or_without_a_file():
    text = card_of(verification=json.dumps({**measured(classes=24), "identification": None}))
    assert "EER" in table(text, "Thresholds")
    assert "DIR" not in text
    assert "\n## Thresholds\n\nUnknown: no `verification.json` lay beside the run." in card_of()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"eer": 2}'])
def test_a_damaged_file_of_rates_is_refused(content):
    with pytest.raises(RunFolderError, match=r"verification\.json.*delete it"):
        card_of(verification=content)


@given(st.text(min_size=1))
def test_no_name_of_a_data_set_breaks_the_card(name):
    card = ModelCard(text := card_of({**ABOUT, "data": {**ABOUT["data"], "name": name}}))
    shown = "".join(c if c.isprintable() else " " for c in name).replace("`", "'")
    assert {result.dataset_name for result in card.data.eval_results} == {shown}
    assert card.data.model_name == f"conv4-32 trained with fedss on {shown}"
    row = next(line for line in text.splitlines() if line.startswith("| data set |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert len(card.data.eval_results) == 4


def test_a_path_among_the_settings_loses_its_folders():
    text = card_of({**ABOUT, "config": {**ABOUT["config"], "sampler": "/home/somebody/own.py"}})
    assert table(text, "Training")["`sampler`"][0] == "`own.py`"


@pytest.mark.parametrize("about", [[], {}, {**ABOUT, "data": None}])
def test_a_configuration_of_something_else_is_refused(about):
    with pytest.raises(RunFolderError, match="name the run folder itself"):
        card_of(about)
