import numpy as np
import pytest
import torch

from fedss.data import index_clients
from fedss.engines.local import intra_op_threads, local_engine
from fedss.models import embed_pixels
from fedss.samplers import SAMPLERS
from fedss.wire import WireFormat
from tests.test_algorithm import DATA, MOMENTUM, Model, N, engine, plan, start


def local(workers: int = 2, **wire: str):
    model = Model().embedder
    layout = tuple(p.shape for p in model.parameters())
    return local_engine(
        model, index_clients(DATA.train), MOMENTUM, WireFormat(layout, 6, N, **wire), workers
    )


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(
    ("method", "sampler"),
    [
        *((method, "uniform") for method in ("full", "pos-only", "fedaws", "moments")),
        *(("fedss", sampler) for sampler in SAMPLERS),
    ],
)
def test_threads_give_the_bits_of_the_plain_loop(workers, method, sampler):
    told, cohort = plan(method, sampler=sampler), np.arange(6)
    state = start(MOMENTUM, told)
    plain = list(engine(MOMENTUM).train(state, cohort, told))
    with local(workers) as threads:
        threaded = list(threads.train(state, cohort, told))
    assert [u.client for u in threaded] == [u.client for u in plain]
    for one, other in zip(plain, threaded, strict=True):
        assert torch.equal(one.backbone_delta_P, other.backbone_delta_P)
        assert torch.equal(one.ids_S, other.ids_S)
        assert torch.equal(one.rows_delta_SD, other.rows_delta_SD)
        assert (one.num_examples, one.loss) == (other.num_examples, other.loss)
        if method == "moments":
            assert torch.equal(one.row_map.matrix_DD, other.row_map.matrix_DD)
            assert torch.equal(one.row_map.shift_D, other.row_map.shift_D)


def test_embedding_in_blocks_is_embedding_at_once():
    model = Model().embedder
    theta = Model().theta_P
    with local() as threads:
        ours = threads.embed(theta, DATA.train.pixels, block=7)
    assert (ours - embed_pixels(model, DATA.train.pixels)).abs().max() < 1e-6


def test_a_failing_client_raises_and_the_engine_goes_on():
    state, told = start(MOMENTUM), plan("fedss")
    with local() as threads:
        with pytest.raises(IndexError):
            list(threads.train(state, np.array([0, 99]), told))
        assert len(list(threads.train(state, np.arange(6), told))) == 6


def test_the_number_of_torch_threads_is_put_back():
    before = torch.get_num_threads()
    with intra_op_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
