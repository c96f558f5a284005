"""What the server takes of a reply, at each limit: the last value that may be, and the next."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedss.config import Config
from fedss.core.client import ClientUpdate, RoundPlan, shared_classes
from fedss.core.features import feature_sums
from fedss.flower.messages import MessageError, by_client, of_clients, pack
from fedss.flower.registry import Registry, digest, token
from fedss.flower.validation import (
    MOST_EXAMPLES,
    RefusedError,
    check_feature_sums,
    check_floors,
    check_metrics,
    check_registration,
    check_request,
    check_update,
    part_of,
    read_reply,
)
from fedss.seeds import generator
from fedss.settings import resolve
from fedss.training.build import round_plan
from fedss.wire.messages import WireFormat, encode_feature_sums, encode_request, encode_update

N, D, LAYOUT = 20, 4, (torch.Size([3, 8]), torch.Size([5]))
IDS = torch.tensor([0, 2, 19])


def asked(n: int = N, **changes: Any) -> tuple[WireFormat, RoundPlan]:
    config = Config(**{"sample_size": 8, "embedding_size": D, **changes})
    return WireFormat(LAYOUT, D, n), round_plan(resolve(config, None)[0], n, 0)


def refused(reason: str) -> Any:
    return pytest.raises(RefusedError, match=reason)


def some(count: int) -> dict[str, Tensor]:
    return {"ids": torch.arange(count, dtype=torch.int32)}


@pytest.mark.parametrize("requests", ["all", "common"])
def test_where_all_ask_for_the_same_nobody_asks_for_anything_else(requests):
    wire, plan = asked(requests=requests)
    shared_R = shared_classes(plan)
    assert shared_R is not None
    right = encode_request(wire, shared_R)
    assert (right == {}) == (requests == "all")
    assert torch.equal(check_request(wire, plan, right), shared_R)
    other = {"ids": (shared_R + 1).int() % N}
    wrong = [other, some(8), {"ids": shared_R.long()}, {**right, "more": IDS}, {"ids": IDS.int()}]
    for message in [*wrong, *([{}] if right else [some(N)])]:
        with refused("request"):
            check_request(wire, plan, message)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"method": "full"}, N),
        ({"method": "fedss"}, 8),
        ({"method": "fedss", "sampler": "deck"}, 7),  # an eighth is left for negatives
        ({"method": "pos-only"}, 8),
        ({"method": "moments", "cover": 3}, 11),
        ({"method": "moments", "cover": 3, "sampler": "deck"}, 8),
    ],
    ids=str,
)
def test_as_many_ids_as_a_client_may_ask_for(changes, most):
    wire, plan = asked(**changes)
    for count in (1, most):
        assert check_request(wire, plan, some(count)).tolist() == list(range(count))
    for count in (0, most + 1):
        with refused("request"):
            check_request(wire, plan, some(count))
    if most == N:
        assert check_request(wire, plan, {}).tolist() == list(range(N))
    else:
        with refused("request"):
            check_request(wire, plan, {})


@pytest.mark.parametrize(
    "ids", [[0, 0], [3, 1], [-1, 4], [0, N], [1, 2, 2], [[0, 1]], [0.0, 1.0]], ids=str
)
def test_ids_are_sorted_unique_and_of_the_table(ids):
    wire, plan = asked()
    assert check_request(wire, plan, {"ids": IDS.int()}).tolist() == IDS.tolist()
    tensor = torch.tensor(ids)
    with refused("request"):
        check_request(wire, plan, {"ids": tensor if tensor.is_floating_point() else tensor.int()})
    with refused("request"):
        check_request(wire, plan, {"ids": IDS.int(), "more": IDS})


@pytest.mark.parametrize(
    ("n", "dtype", "other"),
    [(2**31 - 1, torch.int32, torch.int64), (2**31, torch.int64, torch.int32)],
)
def test_ids_are_as_wide_as_the_number_of_classes_needs(n, dtype, other):
    wire, plan = asked(n)
    assert check_request(wire, plan, {"ids": torch.tensor([n - 1], dtype=dtype)}).item() == n - 1
    with refused("request"):
        check_request(wire, plan, {"ids": torch.tensor([5], dtype=other)})


def sent(wire: WireFormat, **parts: Tensor) -> dict[str, Tensor]:
    rows_SD = torch.ones(len(IDS), D)
    update = ClientUpdate(1, torch.ones(29), IDS, rows_SD, 2, 0.5)
    return {**encode_update(wire, update, generator(0, "x")), **parts}


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("name", "values", "beyond"),
    [
        ("num_examples", [1, MOST_EXAMPLES], [0, -1, MOST_EXAMPLES + 1]),
        ("loss", [-LARGEST, LARGEST], [2 * LARGEST, -2 * LARGEST, float("nan")]),
    ],
)
def test_numbers_of_an_update_up_to_their_limits(name, values, beyond):
    wire, plan = asked()
    dtype = sent(wire)[name].dtype
    for value in values:
        update = check_update(
            wire, plan, 1, IDS, sent(wire, **{name: torch.tensor(value, dtype=dtype)})
        )
        assert getattr(update, name) == value
    for value in beyond:
        with refused({"num_examples": "examples", "loss": "not finite"}[name]):
            check_update(wire, plan, 1, IDS, sent(wire, **{name: torch.tensor(value, dtype=dtype)}))


@pytest.mark.parametrize("name", ["backbone.values", "class_rows.values"])
def test_each_tensor_of_an_update_is_as_it_was_asked_for(name):
    wire, plan = asked()
    good = sent(wire)[name]
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = good.clone()
        spoilt.view(-1)[3] = bad
        with refused("not finite"):
            check_update(wire, plan, 1, IDS, sent(wire, **{name: spoilt}))
    for other in (good.double(), good.bfloat16(), good[:-1], good[None]):
        with refused("shape"):
            check_update(wire, plan, 1, IDS, sent(wire, **{name: other}))
    without = {key: tensor for key, tensor in sent(wire).items() if key != name}
    for parts in (without, sent(wire, more=IDS), {}):
        with refused("damaged"):
            check_update(wire, plan, 1, IDS, parts)
    for ids in (IDS, IDS.flip(0).int(), IDS[1:].int(), (IDS + 1).int()):
        with refused("ids"):
            check_update(wire, plan, 1, IDS, sent(wire, ids=ids))


F = 6


def sums(by_class: bool = True, images: int = 9, scale: float = 1.0) -> dict[str, Tensor]:
    """What an honest client tells of features, as it arrives."""
    rng = torch.Generator().manual_seed(images)
    features_NF = scale * (torch.randn(images, F, generator=rng) + 1)
    labels_N = torch.tensor([3, 0, N - 1])[torch.arange(images) % 3]
    return {**encode_feature_sums(feature_sums(features_NF, labels_N, by_class))}


@pytest.mark.parametrize("by_class", [True, False])
def test_feature_sums_that_a_client_makes_are_taken(by_class):
    for images in (1, 3, 9, 500):
        for scale in (1e-3, 1.0, 1e3):
            message = sums(by_class, images, scale)
            taken = check_feature_sums(N, F, by_class, message)
            assert torch.equal(taken.factor_RF, message["factor"])
            assert torch.equal(taken.sums_PF, message["sums"])
            assert int(taken.counts_P.sum()) == images
            expected = sorted({3, 0, N - 1} & {*[3, 0, N - 1][:images]}) if by_class else []
            assert taken.ids_P.tolist() == expected
    # Images that are all the same are as long as can be.
    labels_N = torch.zeros(7, dtype=torch.int64)
    alike = feature_sums(torch.ones(7, F), labels_N, by_class)
    check_feature_sums(N, F, by_class, {**encode_feature_sums(alike)})


def with_nan(tensor: Tensor, value: float = float("nan")) -> Tensor:
    changed = tensor.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[1] = value
    return changed


INF = float("inf")
# What is changed of a good message, and for what it is refused.
SPOILT = {
    "no factor": ({"factor": None}, "damaged"),
    "no ids": ({"ids": None}, "damaged"),
    "no counts": ({"counts": None}, "damaged"),
    "no sums": ({"sums": None}, "damaged"),
    "more": ({"more": lambda _: torch.ones(1)}, "damaged"),
    "factor in float64": ({"factor": Tensor.double}, "damaged"),
    "factor in float16": ({"factor": Tensor.half}, "damaged"),
    "ids in int32": ({"ids": Tensor.int}, "damaged"),
    "counts in float32": ({"counts": Tensor.float}, "damaged"),
    "sums in bfloat16": ({"sums": Tensor.bfloat16}, "damaged"),
    "narrow factor": ({"factor": lambda t: t[:, :-1]}, "shape"),
    "wide factor": ({"factor": lambda t: torch.cat([t, t[:, :1]], 1)}, "shape"),
    "long factor": ({"factor": lambda t: torch.cat([t, 0 * t[:1]])}, "shape"),
    "flat factor": ({"factor": Tensor.flatten}, "shape"),
    "factor of no dimension": ({"factor": Tensor.sum}, "shape"),
    "factor of three": ({"factor": lambda t: t[None]}, "shape"),
    "narrow sums": ({"sums": lambda t: t[:, 1:]}, "shape"),
    "sums of fewer classes": ({"sums": lambda t: t[1:]}, "shape"),
    "flat sums": ({"sums": Tensor.flatten}, "shape"),
    "sums of no dimension": ({"sums": Tensor.sum}, "shape"),
    "counts of fewer classes": ({"counts": lambda t: t[1:]}, "shape"),
    "counts of no dimension": ({"counts": Tensor.sum}, "shape"),
    "empty counts": ({"counts": lambda t: t[:0]}, "shape"),
    "ids of no dimension": ({"ids": Tensor.sum}, "shape"),
    "ids of two": ({"ids": lambda t: t[None]}, "shape"),
    "count of 0": ({"counts": lambda t: torch.cat([t[:-1], 0 * t[:1]])}, "examples"),
    "negative count": ({"counts": lambda t: torch.cat([t[:-1], -t[:1]])}, "examples"),
    "count too large": ({"counts": lambda t: t + MOST_EXAMPLES}, "examples"),
    "count that overflows": ({"counts": lambda t: t + (2**63 - 99)}, "examples"),
    "NaN in factor": ({"factor": with_nan}, "not finite"),
    "inf in factor": ({"factor": lambda t: with_nan(t, INF)}, "not finite"),
    "NaN in sums": ({"sums": with_nan}, "not finite"),
    "inf in sums": ({"sums": lambda t: with_nan(t, -INF)}, "not finite"),
    "sums too long": ({"sums": lambda t: 4 * t}, "not finite"),
    "one sum too long": ({"sums": lambda t: torch.cat([9 * t[:1], t[1:]])}, "not finite"),
    "factor too large": ({"factor": lambda t: 1.01 * t}, "not finite"),
    "empty factor": ({"factor": lambda t: t[:0]}, "shape"),
}
BY_CLASS = {
    "unsorted ids": ({"ids": lambda t: t.flip(0)}, "ids"),
    "an id twice": ({"ids": lambda t: torch.cat([t[:1], t[:1], t[2:]])}, "ids"),
    "negative id": ({"ids": lambda t: t - 1}, "ids"),
    "id beyond": ({"ids": lambda t: torch.cat([t[:-1], t[-1:] + 1])}, "ids"),
    "fewer ids": ({"ids": lambda t: t[1:]}, "shape"),
    "no ids, no classes": (dict.fromkeys(("ids", "counts", "sums"), lambda t: t[:0]), "shape"),
}
NOT_BY_CLASS = {"ids that nobody wants": ({"ids": lambda _: torch.tensor([3])}, "shape")}


def spoilt(message: dict[str, Tensor], changes: dict[str, Any]) -> dict[str, Tensor]:
    made = {n: t if n not in changes else changes[n] and changes[n](t) for n, t in message.items()}
    made |= {name: change(None) for name, change in changes.items() if name not in message}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


@pytest.mark.parametrize(
    ("by_class", "what"),
    [(True, what) for what in [*SPOILT, *BY_CLASS]]
    + [(False, what) for what in [*SPOILT, *NOT_BY_CLASS]],
)
def test_feature_sums_that_cannot_be_are_refused(by_class, what):
    changes, reason = {**SPOILT, **BY_CLASS, **NOT_BY_CLASS}[what]
    with refused(reason):
        check_feature_sums(N, F, by_class, spoilt(sums(by_class), changes))


def test_sums_by_class_and_in_all_are_not_taken_for_each_other():
    for by_class in (True, False):
        for message in (sums(not by_class), {}):
            with refused("shape|damaged"):
                check_feature_sums(N, F, by_class, message)


FIGURES = {
    "recall_at_1": 0,
    "recall_at_5": 1,
    "map_at_10": 1.0,
    "map_at_r": 0.0,
    "map_at_10_by_class": 0.5,
    "classes": 1,
    "queries": MOST_EXAMPLES,
    "skipped": 0,
}


def test_figures_up_to_their_limits():
    assert check_metrics({"metrics": FIGURES}) == FIGURES
    assert check_metrics({"metrics": None}) is None
    for name, bad in [
        ("recall_at_1", 1 + 1e-9),
        ("recall_at_5", -1e-9),
        ("map_at_10", float("nan")),
        ("map_at_r", "1"),
        ("map_at_r", None),
        ("queries", True),
        ("queries", 3.0),
        ("queries", MOST_EXAMPLES + 1),
        ("skipped", -1),
        ("classes", -1),
        ("map_at_10_by_class", 1.5),
        ("more", 1),
    ]:
        with refused("damaged"):
            check_metrics({"metrics": {**FIGURES, name: bad}})
    for name in FIGURES:
        with refused("damaged"):
            check_metrics({"metrics": {k: v for k, v in FIGURES.items() if k != name}})


NAMES = {"classes": ["a", "b"], "clients": ["k", "l"], "secret": ""}


def test_what_a_site_may_call_itself():
    assert check_registration(NAMES, Registry(), ())[:2] == (["a", "b"], ["k", "l"])
    assert check_registration(NAMES, Registry(secret=""), ["m"])[:2] == (["a", "b"], ["k", "l"])
    for kind in ("classes", "clients"):
        for names in (["b", "a"], ["a", "a"], [], "ab", ["a", 1], None):
            with refused("damaged"):
                check_registration({**NAMES, kind: names}, Registry(), ())
    for secret in (None, 1):
        with refused("damaged"):
            check_registration({**NAMES, "secret": secret}, Registry(), ())
    for ours, theirs in (("", "x"), ("x", ""), ("x", "y")):
        with refused("secret"):
            check_registration({**NAMES, "secret": theirs}, Registry(secret=ours), ())
    with refused("clients"):
        check_registration(NAMES, Registry(), ["l"])
    stamps = {
        check_registration({**NAMES, **other}, Registry(), ())[2]
        for other in ({}, {"classes": ["a"]}, {"clients": ["k"]}, {"secret": "x"})
    }
    assert len(stamps) == 3  # of classes and clients


def test_a_reply_says_its_round():
    def reply(metadata: dict[str, Any]) -> Any:
        return SimpleNamespace(has_error=lambda: False, content=pack(metadata))

    assert read_reply(reply({"round": 3}), 3) == ({"round": 3}, {})
    for metadata in ({}, {"round": 2}, {"round": None}, {"round": "3"}):
        with refused("stale"):
            read_reply(reply(metadata), 3)
    for error in (None, "", "raised", ["version"]):
        with refused("raised"):
            read_reply(reply({"round": 3, "error": error}), 3)
    with refused("version"):
        read_reply(reply({"round": 3, "error": "version"}), 3)


def test_a_client_that_failed_at_its_site_has_no_part():
    parts = {k: {"x": torch.full((1,), float(k))} for k in (1, 7)}
    assert by_client(of_clients(parts)) == parts
    metadata = {"failed": {"7": "ValueError"}}
    assert part_of(metadata, parts, 1) == parts[1]
    assert part_of(metadata, parts, 2) == {}
    with refused("raised"):
        part_of(metadata, parts, 7)


def test_what_a_terminal_would_obey_is_not_shown():
    shown = RefusedError("x", "a\x1b[31m\r\n\u202eb").detail
    assert shown.isprintable()
    assert (shown[0], shown[-1]) == ("a", "b")
    assert len(RefusedError("x", "a" * 999).detail) == 300


def test_tensors_are_named_by_client_in_one_way_alone():
    one = torch.ones(1)
    names = ["0/x", f"{10**17}/y/z", "7/"]
    assert by_client(dict.fromkeys(names, one)) == {
        0: {"x": one},
        10**17: {"y/z": one},
        7: {"": one},
    }
    for name in ("00/x", "01/x", "-1/x", "+1/x", " 1/x", "1", "x", "/x", f"{10**18}/x", "1.0/x"):
        with pytest.raises(MessageError, match="expected tensors named"):
            by_client({name: one})


def test_tokens_and_digests_tell_apart_what_differs():
    tokens = [
        token(secret, kind, name)
        for secret in (b"s" * 16, b"t" * 16)
        for kind in ("class", "client")
        for name in ("a", "b")
    ]
    assert len({*tokens}) == 8
    digests = [
        digest(["a", "b"], ["c"]),
        digest(["a"], ["b", "c"]),
        digest(["b", "a"], ["c"]),
        digest(["c"], ["a", "b"]),
        digest(["a,b"], ["c"]),
    ]
    assert len({*digests}) == 5


def test_floors_have_known_names_and_are_shares():
    floors = {"chance": 0.1, "frozen_whitened_at_224": 0.5}
    assert check_floors({"floors": floors}) == floors
    for name, value in (("pixels_at_224", 0.5), ("frozen_at_0", 0.5), ("x", 0.5), ("frozen", 2.0)):
        with pytest.raises(RefusedError, match="floors from 0 to 1"):
            check_floors({"floors": {**floors, name: value}})
