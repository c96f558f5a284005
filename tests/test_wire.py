import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedss.algorithm import ClientUpdate, Submodel
from fedss.wire import encoded_size, request_message, submodel_message, update_message


@given(st.integers(0, 3000), st.integers(1, 100), st.integers(1, 32), st.booleans())
def test_sizes_are_those_of_the_bytes(parameters, requested, dim, everything):
    n = requested if everything else requested + 5
    ids, rows = torch.arange(requested), torch.rand(requested, dim)
    backbone = torch.rand(parameters)
    update = ClientUpdate(3, backbone, ids, rows, 17, 0.5)
    for message in (
        request_message(ids, n),
        submodel_message(Submodel(backbone, ids, rows), n),
        update_message(update, n),
    ):
        encoded = save(dict(message))
        assert encoded_size(message) == len(encoded)
        decoded = load(encoded)
        assert decoded.keys() == message.keys()
        assert all(torch.equal(decoded[name], message[name]) for name in message)


@pytest.mark.parametrize(("requested", "n"), [(64, 964), (256, 100_000), (964, 964)])
def test_bytes_are_the_arithmetic_within_two_percent(requested, n):
    d, parameters = 64, 30_240
    ids, rows, backbone = (
        torch.arange(requested),
        torch.zeros(requested, d),
        torch.zeros(parameters),
    )
    ids_bytes = 0 if requested == n else 8 * requested
    arithmetic = requested * d * 4 + ids_bytes + parameters * 4
    down = encoded_size(submodel_message(Submodel(backbone, ids, rows), n))
    up = encoded_size(update_message(ClientUpdate(0, backbone, ids, rows, 1, 0.0), n))
    assert down == pytest.approx(arithmetic, rel=0.02)
    assert up == pytest.approx(arithmetic, rel=0.02)


def test_a_request_tells_ids_and_nothing_else():
    assert list(request_message(torch.tensor([1, 5]), 9)) == ["ids"]
    assert list(request_message(torch.arange(9), 9)) == []
