import dataclasses

import numpy as np
import torch
from torch.nn import functional as F

from fedss import RetrievalTask
from fedss.data import Images
from fedss.evaluation.task import (
    Embedded,
    embed_task,
    find_confused,
    find_neighbours,
    findings,
    score,
    verify,
)
from fedss.evaluation.verification import identification
from fedss.runs.findings import read_verification, write_findings
from tests import reference

QUERY = reference.tiny_dataset().test.query


def flat(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.reshape(len(pixels), -1) / 255).float()


def embedded(task: RetrievalTask) -> tuple[RetrievalTask, Embedded]:
    return task, embed_task(flat, task)


def test_panels_show_each_query_with_its_nearest_others():
    twins = dataclasses.replace(QUERY, pixels=QUERY.pixels.copy())
    twins.pixels[3] = twins.pixels[9]
    found = vars(find_neighbours(*embedded(RetrievalTask(twins)), seed=0))
    h = F.normalize(flat(twins.pixels).double(), dim=1)
    cos = (h @ h.T).fill_diagonal_(-2)
    assert sorted(found["query_index"]) == list(range(len(twins)))
    for q, images, names, scores in zip(
        found["query_index"], found["pixels"], found["class_names"], found["scores"], strict=True
    ):
        nearest = torch.sort(cos[q], descending=True, stable=True).indices[:5].numpy()
        assert np.array_equal(images, twins.pixels[[q, *nearest]])
        assert names.tolist() == [twins.class_names[twins.labels[i]] for i in [q, *nearest]]
        assert np.allclose(scores, cos[q, nearest], atol=1e-5)


def test_the_seed_draws_which_queries_are_shown():
    task, found = embedded(RetrievalTask(QUERY)), {}
    for seed in (0, 1):
        found[seed] = find_neighbours(*task, seed, 6).query_index.tolist()
        assert found[seed] == find_neighbours(*task, seed, 6).query_index.tolist()
        assert len({*found[seed]}) == 6
    assert found[0] != found[1]


def test_a_small_gallery_is_shown_whole():
    def only(image: list[int]) -> Images:
        arrays = {name: getattr(QUERY, name)[image] for name in ("pixels", "labels", "clients")}
        return dataclasses.replace(QUERY, **arrays, names=[QUERY.names[i] for i in image])

    one_of_each, pairs = only([0, 5, 10, 15]), only([0, 1, 5, 6])
    shown = find_neighbours(*embedded(RetrievalTask(QUERY, one_of_each)), 0, 20)
    assert shown.scores.shape == (20, 4)
    shown = find_neighbours(*embedded(RetrievalTask(pairs)), 0, 20)
    assert shown.scores.shape == (4, 3)


def test_panels_and_figures_with_a_gallery_match_classes_by_name():
    gallery = dataclasses.replace(
        QUERY, class_names=QUERY.class_names[::-1], labels=3 - QUERY.labels
    )
    task = RetrievalTask(QUERY, gallery)
    found = vars(find_neighbours(*embedded(task), seed=0))
    # Each query is in the gallery too, and nothing is nearer.
    assert np.array_equal(found["pixels"][:, 0], found["pixels"][:, 1])
    same_name = found["class_names"][:, :1] == found["class_names"]
    assert np.array_equal(same_name, found["labels"][:, :1] == found["labels"])
    assert same_name[:, 1].all()
    assert score(task, *embed_task(flat, task)).recall_at_1 == 1.0


def test_pairs_and_confusions_with_a_gallery_match_classes_by_name():
    gallery = dataclasses.replace(
        QUERY,
        class_names=QUERY.class_names[::-1],
        labels=3 - QUERY.labels,
        pixels=np.roll(QUERY.pixels, 3, axis=0),  # some look like the class before
    )
    task = RetrievalTask(QUERY, gallery)
    measured = verify(*embedded(task), seed=0)
    assert (measured.genuine, measured.impostor) == (4 * 5 * 5, 4 * 3 * 5 * 5)
    assert measured.identification.enrolled == 2
    points = verify(*embedded(task), seed=0, fars=(0.5, 0.2)).points
    assert [point.far for point in points] == [0.5, 0.2]
    found = vars(find_confused(*embedded(task)))
    nearest = (flat(QUERY.pixels) @ F.normalize(flat(gallery.pixels), dim=1).T).argmax(1).numpy()
    for (query, neighbour), (own_name, other_name) in zip(
        found["pixels"], found["shown"], strict=True
    ):
        (q,) = np.flatnonzero((QUERY.pixels == query).all((1, 2, 3)))
        assert np.array_equal(neighbour, gallery.pixels[nearest[q]])
        assert own_name == QUERY.class_names[QUERY.labels[q]]
        assert other_name == gallery.class_names[gallery.labels[nearest[q]]]
    name_of = [gallery.class_names[i] for i in gallery.labels]
    own = [QUERY.class_names[i] for i in QUERY.labels]
    wrong = [(a, name_of[n]) for a, n in zip(own, nearest, strict=True) if a != name_of[n]]
    assert found["confused"].sum() == len(wrong) > 0
    for (a, b), (there, back) in zip(found["class_names"], found["confused"], strict=True):
        assert (there, back) == (wrong.count((a, b)), wrong.count((b, a)))


def test_the_seed_draws_who_is_enrolled(tmp_path):
    labels = torch.from_numpy(QUERY.labels)
    task, (rows, _) = embedded(RetrievalTask(QUERY))
    noisy = rows + torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for seed in (0, 3):
        direct = identification(noisy, labels, seed=seed)
        assert verify(task, (noisy, None), seed).identification == direct
        write_findings(tmp_path, findings(task, (noisy, None), seed))
        assert read_verification(tmp_path).identification == direct
        found[seed] = direct
    assert found[0] != found[3]


def test_images_of_one_class_have_no_pairs_to_tell_apart():
    one = dataclasses.replace(QUERY, labels=np.zeros(len(QUERY), np.int64))
    task = RetrievalTask(one)
    assert verify(*embedded(task), seed=0) is None
    assert findings(*embedded(task), seed=0).verification is None
    assert len(find_confused(*embedded(task)).scores) == 0
