import dataclasses

import numpy as np
import torch
from torch.nn import functional as F

from fedss import RetrievalTask
from fedss.evaluation import evaluate_embedding, save_panels
from tests import reference

QUERY = reference.tiny_dataset().test.query


def flat(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(len(pixels), -1) / 255).float()


def test_panels_show_each_query_with_its_nearest_others(tmp_path):
    twins = dataclasses.replace(QUERY, pixels=QUERY.pixels.copy())
    twins.pixels[3] = twins.pixels[9]
    save_panels(flat, RetrievalTask(twins), tmp_path / "panels.npz", seed=0)
    panels = np.load(tmp_path / "panels.npz")
    h = F.normalize(flat(twins.pixels).double(), dim=1)
    cos = (h @ h.T).fill_diagonal_(-2)
    assert sorted(panels["query_index"]) == list(range(len(twins)))
    for q, pictures, names, scores in zip(
        panels["query_index"],
        panels["pixels"],
        panels["class_names"],
        panels["scores"],
        strict=True,
    ):
        nearest = torch.sort(cos[q], descending=True, stable=True).indices[:5].numpy()
        assert np.array_equal(pictures, twins.pixels[[q, *nearest]])
        assert names.tolist() == [twins.class_names[twins.labels[i]] for i in [q, *nearest]]
        assert np.allclose(scores, cos[q, nearest], atol=1e-5)


def test_panels_and_figures_with_a_gallery_match_classes_by_name(tmp_path):
    gallery = dataclasses.replace(
        QUERY, class_names=QUERY.class_names[::-1], labels=3 - QUERY.labels
    )
    task = RetrievalTask(QUERY, gallery)
    save_panels(flat, task, tmp_path / "panels.npz", seed=0)
    panels = np.load(tmp_path / "panels.npz")
    # Each query is in the gallery too, and nothing is nearer.
    assert np.array_equal(panels["pixels"][:, 0], panels["pixels"][:, 1])
    same_name = panels["class_names"][:, :1] == panels["class_names"]
    assert np.array_equal(same_name, panels["labels"][:, :1] == panels["labels"])
    assert same_name[:, 1].all()
    assert evaluate_embedding(flat, task).recall_at_1 == 1.0
