import dataclasses
import io

import numpy as np
import torch
from torch.nn import functional as F

from fedss import RetrievalTask
from fedss.evaluation import embed_task, evaluate_embedding, panels
from tests import reference

QUERY = reference.tiny_dataset().test.query


def flat(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(len(pixels), -1) / 255).float()


def embedded(task: RetrievalTask) -> tuple:
    return task, *embed_task(flat, task)


def test_panels_show_each_query_with_its_nearest_others():
    twins = dataclasses.replace(QUERY, pixels=QUERY.pixels.copy())
    twins.pixels[3] = twins.pixels[9]
    found = np.load(io.BytesIO(panels(*embedded(RetrievalTask(twins)), seed=0)))
    h = F.normalize(flat(twins.pixels).double(), dim=1)
    cos = (h @ h.T).fill_diagonal_(-2)
    assert sorted(found["query_index"]) == list(range(len(twins)))
    for q, pictures, names, scores in zip(
        found["query_index"],
        found["pixels"],
        found["class_names"],
        found["scores"],
        strict=True,
    ):
        nearest = torch.sort(cos[q], descending=True, stable=True).indices[:5].numpy()
        assert np.array_equal(pictures, twins.pixels[[q, *nearest]])
        assert names.tolist() == [twins.class_names[twins.labels[i]] for i in [q, *nearest]]
        assert np.allclose(scores, cos[q, nearest], atol=1e-5)


def test_panels_and_figures_with_a_gallery_match_classes_by_name():
    gallery = dataclasses.replace(
        QUERY, class_names=QUERY.class_names[::-1], labels=3 - QUERY.labels
    )
    task = RetrievalTask(QUERY, gallery)
    found = np.load(io.BytesIO(panels(*embedded(task), seed=0)))
    # Each query is in the gallery too, and nothing is nearer.
    assert np.array_equal(found["pixels"][:, 0], found["pixels"][:, 1])
    same_name = found["class_names"][:, :1] == found["class_names"]
    assert np.array_equal(same_name, found["labels"][:, :1] == found["labels"])
    assert same_name[:, 1].all()
    assert evaluate_embedding(flat, task).recall_at_1 == 1.0
