import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedss.core.client import Broadcast, ClientUpdate
from fedss.sampling.samplers import class_sample
from fedss.seeds import generator
from fedss.wire.messages import (
    WireFormat,
    decode_answer,
    decode_broadcast,
    decode_dealt,
    decode_update,
    encode_answer,
    encode_broadcast,
    encode_request,
    encode_update,
    encoded_size,
    traffic,
)

PRECISIONS = ("float32", "bfloat16", "int8", "int4")


def wire(parameters: int, dim: int, n: int, precision: str = "float32", rank: int | None = None):
    shapes = (torch.Size([4, parameters // 4]), torch.Size([parameters % 4]))
    return WireFormat(shapes, dim, n, precision, precision, precision, precision, rank)


def symmetric(dim: int) -> torch.Tensor:
    matrix = torch.rand(dim, dim)
    return matrix + matrix.T


@given(
    st.integers(40, 3000),
    st.integers(1, 100),
    st.integers(3, 32),
    st.booleans(),
    st.booleans(),
    st.sampled_from(PRECISIONS),
    st.sampled_from([None, 2]),
)
def test_every_message_is_as_long_as_its_bytes_and_comes_back(
    parameters, requested, dim, everything, moments, precision, rank
):
    n = requested if everything else requested + 5
    format_ = wire(parameters, dim, n, precision, rank)
    ids, rows, backbone = (
        torch.arange(requested),
        torch.rand(requested, dim),
        torch.rand(parameters),
    )
    matrix = symmetric(dim)
    payload = {"mean": rows.mean(dim=0), "covariance": matrix}
    sent = Broadcast(backbone, payload if moments else {})
    update = ClientUpdate(3, backbone, ids, rows, 17, 0.5)
    to_all = encode_broadcast(format_, sent)
    answer = encode_answer(format_, ids, rows, None)
    up = encode_update(format_, update, generator(0, "test"))
    request = encode_request(format_, ids)
    received = []
    for message in (to_all, answer, up, request):
        encoded = save(dict(message))
        assert encoded_size(message) == len(encoded)
        received.append(load(encoded))
    got, got_rows = decode_broadcast(format_, received[0]), decode_answer(format_, received[1])
    got_update = decode_update(format_, received[2], 3)
    assert got.payload.keys() == sent.payload.keys()
    assert torch.equal(got_update.ids_S, ids)
    assert (got_update.num_examples, got_update.loss, got_update.client) == (17, 0.5, 3)
    step = {"float32": 0.0, "bfloat16": 1 / 128, "int8": 1 / 60, "int4": 0.3}[precision]
    pairs = [
        (got.backbone_P, backbone),
        (got_rows, rows),
        (got_update.backbone_delta_P, backbone),
        (got_update.rows_delta_SD, rows),
    ]
    if moments:
        pairs.append((got.payload["mean"], payload["mean"]))
    if moments and rank is None:
        pairs.append((got.payload["covariance"], matrix))
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= step * theirs.abs().max()
    counted = traffic({**to_all, **answer}, request, up)
    assert counted["bytes_up"] == len(save(dict(up))) + len(save(dict(request)))
    assert counted["bytes_down"] == len(save({**to_all, **answer}))
    assert (counted["moment_bytes_down"] > 0) == moments
    assert counted["moment_bytes_up"] == 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_the_wire_carries_a_payload_that_it_does_not_know(dim, precision):
    # Two of them by names that messages have for other parts.
    payload = {"mine.vector": torch.rand(dim), "mine.matrix": symmetric(dim)}
    payload |= {"backbone": torch.rand(dim), "class_rows": symmetric(dim)}
    format_, backbone = wire(5, dim, 9, precision, None), torch.rand(5)
    message = encode_broadcast(format_, Broadcast(backbone, payload))
    without = encode_broadcast(format_, Broadcast(backbone))
    got = decode_broadcast(format_, message)
    counted, plain = traffic(message, {}, {}), traffic(without, {}, {})
    extra = sum(t.nbytes for t in message.values()) - sum(t.nbytes for t in without.values())
    assert counted["moment_bytes_down"] == extra > 0
    assert counted["backbone_bytes_down"] == plain["backbone_bytes_down"]
    assert counted["class_row_bytes_down"] == 0
    assert got.payload.keys() == payload.keys()
    for name, tensor in payload.items():
        assert got.payload[name].shape == tensor.shape
        assert (got.payload[name] - tensor).abs().max() <= 0.3 * tensor.abs().max()


@pytest.mark.parametrize(("requested", "n"), [(64, 964), (256, 100_000), (964, 964)])
def test_bytes_are_the_arithmetic_within_two_percent(requested, n):
    d, parameters = 64, 30_240
    format_ = wire(parameters, d, n)
    ids, rows, backbone = (
        torch.arange(requested),
        torch.zeros(requested, d),
        torch.zeros(parameters),
    )
    ids_bytes = 0 if requested == n else 4 * requested
    arithmetic = requested * d * 4 + ids_bytes + parameters * 4
    down = {
        **encode_broadcast(format_, Broadcast(backbone)),
        **encode_answer(format_, ids, rows, None),
    }
    update = ClientUpdate(0, backbone, ids, rows, 1, 0.0)
    up = encode_update(format_, update, generator(0, "test"))
    assert encoded_size(down) == pytest.approx(arithmetic, rel=0.02)
    assert encoded_size(up) == pytest.approx(arithmetic, rel=0.02)


def test_what_goes_up_is_rounded_at_random_and_right_on_average():
    format_ = wire(64, 8, 20, "int4")
    g = torch.Generator().manual_seed(0)
    update = ClientUpdate(
        0, torch.randn(64, generator=g), torch.arange(5), torch.randn(5, 8, generator=g), 3, 1.0
    )
    decoded = [
        decode_update(format_, encode_update(format_, update, generator(i, "test")), 0)
        for i in range(2000)
    ]
    for of in (lambda u: u.backbone_delta_P, lambda u: u.rows_delta_SD):
        found = torch.stack([of(u) for u in decoded]).double()
        error = found.std(dim=0) / 2000**0.5
        # What is rounded away once in a thousand draws may not have come up.
        unseen = 1e-4 * of(update).abs().max()
        assert ((found.mean(dim=0) - of(update)).abs() <= 6 * error + unseen).all()


def test_a_request_tells_ids_and_nothing_else():
    format_ = wire(8, 2, 9)
    assert list(encode_request(format_, torch.tensor([1, 5]))) == ["ids"]
    assert list(encode_request(format_, torch.arange(9))) == []
    for n, dtype in ((2**31 - 1, torch.int32), (2**31, torch.int64), (2**33, torch.int64)):
        ids = encode_request(wire(8, 2, n), torch.tensor([n - 1]))["ids"]
        assert (ids.dtype, ids.tolist()) == (dtype, [n - 1])


def test_a_dealt_answer_tells_q_once_where_it_is_the_same_for_all():
    format_, own = wire(8, 2, 9), np.array([2])
    rows = torch.zeros(3, 2)
    for q, numbers in (([0.5, 0.5], 1), ([0.5, 0.25], 2)):
        sample = class_sample(own, np.array([4, 7]), np.array(q))
        answer = encode_answer(format_, sample.ids_S, rows, sample)
        assert answer["log_q"].exp().tolist() == q[:numbers]
        assert answer["ids"].tolist() == [2, 4, 7]
        got = decode_dealt(format_, answer, own)
        assert torch.equal(got.ids_S, sample.ids_S)
        assert torch.equal(got.own_S, sample.own_S)
        assert torch.equal(got.log_q_S, sample.log_q_S)


@pytest.mark.parametrize("precisions", list(itertools.permutations(PRECISIONS))[::5])
def test_each_part_travels_in_its_own_precision(precisions):
    rows_down, rows_up, backbone_down, backbone_up = precisions
    d, parameters = 8, 64
    format_ = WireFormat((torch.Size([4, 16]),), d, 20, *precisions)
    ids, rows, backbone = torch.arange(5), torch.rand(5, d), torch.rand(parameters)
    update = ClientUpdate(0, backbone, ids, rows, 3, 1 / 3)
    down = {
        **encode_broadcast(format_, Broadcast(backbone)),
        **encode_answer(format_, ids, rows, None),
    }
    up = encode_update(format_, update, generator(0, "test"))
    assert decode_update(format_, up, 0).loss == 1 / 3
    counted = traffic(down, {}, up)
    for part, way, precision, values, scales in (
        ("class_row", "down", rows_down, 5 * d, 5),
        ("class_row", "up", rows_up, 5 * d, 5),
        ("backbone", "down", backbone_down, parameters, 4),
        ("backbone", "up", backbone_up, parameters, 4),
    ):
        expected = {
            "float32": 4 * values,
            "bfloat16": 2 * values,
            "int8": values + 2 * scales,
            "int4": values // 2 + 2 * scales,
        }[precision]
        assert counted[f"{part}_bytes_{way}"] == expected, (part, way)
