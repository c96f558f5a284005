"""Average query expansion, against a loop written from its formula."""

import numpy as np
import pytest
import torch

from fedss.evaluation.expansion import expand_queries


@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_queries_move_towards_what_they_find(count: int) -> None:
    rng = np.random.default_rng(count)
    gallery = rng.normal(size=(20, 4))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    # The first three lie in the gallery, and do not find themselves.
    queries = np.concatenate([gallery[:3], rng.normal(size=(4, 4)) * 3])
    expected = []
    for query in queries:
        unit = query / np.linalg.norm(query)
        cosines = gallery @ unit
        order = [i for i in np.argsort(-cosines) if cosines[i] < 1 - 1e-9][:count]
        moved = unit + sum(max(cosines[i], 0.0) * gallery[i] for i in order)
        expected.append(moved / np.linalg.norm(moved))
    found = expand_queries(torch.from_numpy(queries), torch.from_numpy(gallery), count)
    assert torch.allclose(found, torch.from_numpy(np.array(expected)).float(), atol=1e-5)


def test_a_query_that_finds_nothing_stays() -> None:
    query = torch.tensor([[0.0, 2.0]])
    gallery = torch.tensor([[0.0, -1.0], [0.0, 1.0], [1.0, 0.0]])
    assert torch.equal(expand_queries(query, gallery, 2), torch.tensor([[0.0, 1.0]]))
