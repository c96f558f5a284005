"""Retrieval against slow loops written from the definitions and against two other libraries."""

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedss.evaluation import neighbours, retrieval
from fedss.evaluation.inputs import unit_rows
from fedss.evaluation.neighbours import block_rows
from fedss.evaluation.retrieval import RetrievalMetrics, evaluate_retrieval, nearest
from tests.installed import needs_torchvision


# Slow and exact: the rows the module defines (length 1, in whole multiples of 2^-24), as Python
# integers, compared by their dot product. `dyadic` rows below are whole multiples without rounding,
# so for them this is the cosine itself.
def grid(row: list[int]) -> list[int]:
    length = math.sqrt(sum(x * x for x in row))
    return [round(x / length * 2**24) if length else 0 for x in row]


def cosine_key(a: list[int], b: list[int]) -> int:
    return sum(x * y for x, y in zip(grid(a), grid(b), strict=True))


def slow_order(query: list[int], gallery: list[list[int]], own: int | None) -> list[int]:
    others = [g for g in range(len(gallery)) if g != own]
    return sorted(others, key=lambda g: (-cosine_key(query, gallery[g]), g))


def slow_metrics(
    query: list[list[int]],
    labels: list[int],
    gallery: list[list[int]] | None,
    gallery_labels: list[int] | None,
) -> RetrievalMetrics | None:
    alone = gallery is None
    gallery = query if gallery is None else gallery
    gallery_labels = labels if gallery_labels is None else gallery_labels
    rows = []
    of_class: dict[int, list[float]] = {}
    for q, row in enumerate(query):
        order = slow_order(row, gallery, q if alone else None)
        rel = [int(gallery_labels[g] == labels[q]) for g in order]
        total = sum(rel)
        if total == 0:
            continue

        def average_precision(depth: int, norm: int, rel: list[int] = rel) -> float:
            return sum(sum(rel[: i + 1]) / (i + 1) for i in range(depth) if rel[i]) / norm

        rows.append(
            (
                max(rel[:1]),
                max(rel[:5]),
                average_precision(min(10, len(rel)), min(total, 10)),
                average_precision(total, total),
            )
        )
        of_class.setdefault(labels[q], []).append(rows[-1][2])
    if not rows:
        return None
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    by_class = sum(sum(result) / len(result) for result in of_class.values()) / len(of_class)
    counts = len(rows), len(of_class), len(query) - len(rows)
    return RetrievalMetrics(*[*means, by_class, *counts])


def assert_close(a: RetrievalMetrics, b: RetrievalMetrics, tolerance: float = 1e-12) -> None:
    assert (a.queries, a.classes, a.skipped) == (b.queries, b.classes, b.skipped)
    for name in ("recall_at_1", "recall_at_5", "map_at_10", "map_at_r", "map_at_10_by_class"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=tolerance), name


# Of length 1 or 2 times a whole number: coordinates 0, 1/2 and 1 after normalizing.
dyadic = st.tuples(
    st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4),
    st.integers(-1, 3),
    st.integers(0, 3),
).map(lambda t: [t[2] * (x if t[1] < 0 else int(i == t[1]) * x) for i, x in enumerate(t[0])])
any_row = st.lists(st.integers(-2, 2), min_size=4, max_size=4)


@st.composite
def make_images(draw: st.DrawFn, least: int) -> tuple[list[list[int]], list[int]]:
    rows = draw(st.integers(least, 16))
    labels = st.integers(-2, 2).map(lambda y: y * 2**40)
    return (
        draw(st.lists(draw(st.sampled_from([dyadic, any_row])), min_size=rows, max_size=rows)),
        draw(st.lists(labels, min_size=rows, max_size=rows)),
    )


@contextmanager
def screening(*dtypes: torch.dtype, group: int = 16) -> Iterator[None]:
    """Screens of these types, whatever pays on this machine, also for small galleries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_GROUP", group)
        patch.setattr(neighbours, "_bfloat16_pays", lambda: torch.bfloat16 in dtypes)
        patch.setattr(neighbours, "_float32_is_kept", lambda: torch.float32 in dtypes)
        yield


@pytest.mark.parametrize("dtypes", [(), (torch.bfloat16,), (torch.float32,)])
@settings(max_examples=60)
@given(query=make_images(2), gallery=st.none() | make_images(1), scale=st.integers(-30, 30))
def test_equals_the_definition_also_among_ties(
    dtypes: tuple[torch.dtype, ...],
    query: tuple[list[list[int]], list[int]],
    gallery: tuple[list[list[int]], list[int]] | None,
    scale: int,
) -> None:
    query_rows = torch.tensor(query[0]).float() * 10.0**scale
    query_labels = torch.tensor(query[1])
    gallery_rows = None if gallery is None else torch.tensor(gallery[0]).float()
    gallery_labels = None if gallery is None else torch.tensor(gallery[1])
    expected = slow_metrics(*query, *(gallery or (None, None)))
    if expected is None:
        with pytest.raises(ValueError, match="no query has"):
            evaluate_retrieval(query_rows, query_labels, gallery_rows, gallery_labels)
    else:
        got = evaluate_retrieval(query_rows, query_labels, gallery_rows, gallery_labels)
        assert_close(got, expected)

    gallery_list = query[0] if gallery is None else gallery[0]
    orders = [
        slow_order(row, gallery_list, q if gallery is None else None)
        for q, row in enumerate(query[0])
    ]
    with screening(*dtypes, group=2):
        for k in {1, len(orders[0]) // 2 or 1, len(orders[0])}:
            _, index = nearest(query_rows, gallery_rows, k)
            assert index.tolist() == [order[:k] for order in orders]


def random_set(
    n: int = 300, classes: int = 40, d: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator)
    return centres[labels] + torch.randn(n, d, generator=generator), labels


def test_equals_pytorch_metric_learning() -> None:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    def knn(
        query: Tensor, k: int, reference: Tensor, ref_includes_query: bool
    ) -> tuple[Tensor, Tensor]:
        scores = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(reference).T
        if ref_includes_query:
            scores.fill_diagonal_(-torch.inf)
        result = scores.topk(k, dim=1)
        return result.values, result.indices

    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=knn,
    )
    rows, labels = random_set(1500, 200)
    other, other_labels = random_set(1400, 200, seed=1)
    for gallery, gallery_labels in ((None, None), (other, other_labels)):
        ours = evaluate_retrieval(rows, labels, gallery, gallery_labels)
        theirs = calculator.get_accuracy(rows, labels, gallery, gallery_labels)
        assert ours.recall_at_1 == pytest.approx(theirs["precision_at_1"], abs=1e-12)
        assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-12)


@needs_torchvision
def test_equals_torchmetrics() -> None:
    from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

    rows, labels = random_set(n=120, classes=9)
    gallery, gallery_labels = random_set(n=90, classes=9, seed=1)
    scores = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(gallery).T

    def average_precision(target: Tensor, score: Tensor, depth: int) -> float:
        # Theirs divides by the hits found among the first `depth`, ours by the hits that could
        # have been; and theirs ignores scores that are not positive.
        result = int(target[score.topk(depth).indices].sum())
        value = float(retrieval_average_precision(score + 2, target, top_k=depth))
        return value * result / min(int(target.sum()), depth)

    columns: dict[str, list[float]] = {name: [] for name in ("1", "5", "10", "r")}
    for score, label in zip(scores, labels, strict=True):
        target = gallery_labels == label
        columns["1"].append(float(retrieval_hit_rate(score + 2, target, top_k=1)))
        columns["5"].append(float(retrieval_hit_rate(score + 2, target, top_k=5)))
        columns["10"].append(average_precision(target, score, 10))
        columns["r"].append(average_precision(target, score, int(target.sum())))
    of_class = [np.mean(np.array(columns["10"])[labels == label]) for label in labels.unique()]
    means = [sum(c) / len(c) for c in columns.values()]
    theirs = RetrievalMetrics(*[*means, float(np.mean(of_class)), len(rows), len(of_class), 0])
    assert_close(evaluate_retrieval(rows, labels, gallery, gallery_labels), theirs, 1e-6)


@pytest.mark.parametrize("power", [-1074, -700, -401, 401, 600, 1021])
def test_rows_of_any_size_have_the_same_direction(power: int) -> None:
    # Squares of these leave float64, and 2^-1074 is its smallest number.
    rows = torch.randint(-2, 3, (60, 5), generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(60) % 7
    far = rows * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)
    assert bool(far.isfinite().all())
    assert torch.equal(unit_rows(far, ""), unit_rows(rows, ""))
    assert evaluate_retrieval(far, labels) == evaluate_retrieval(rows, labels)
    mixed = torch.where(torch.arange(60)[:, None] % 2 == 0, far, rows)
    assert torch.equal(unit_rows(mixed, ""), unit_rows(rows, ""))


def collapsed(n: int) -> Tensor:
    return torch.ones(n, 4)


def few_values(n: int) -> Tensor:
    return torch.randint(-1, 2, (n, 3), generator=torch.Generator().manual_seed(3)).float()


def smooth(n: int) -> Tensor:
    return random_set(n)[0]


@pytest.mark.parametrize("make", [collapsed, few_values, smooth])
def test_block_size_changes_no_bit(
    make: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make(301)
    labels = random_set(301, 60)[1]
    labels[:120] = 0
    with screening(torch.bfloat16, torch.float32, group=4):
        whole = evaluate_retrieval(rows, labels)
        neighbours = nearest(rows, k=17)
        for block in (1, 7, 64):
            monkeypatch.setattr(retrieval, "block_rows", lambda *_, block=block: block)
            assert evaluate_retrieval(rows, labels) == whole
            for got, expected in zip(nearest(rows, k=17), neighbours, strict=True):
                assert torch.equal(got, expected)


def lookalikes(n: int, kinds: int, d: int, apart: float, seed: int) -> tuple[Tensor, Tensor]:
    """Queries, and gallery items that lie close together around them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, d, generator=generator)
    gallery = centres.repeat(-(-n // kinds), 1)[:n]
    gallery += apart * torch.randn(gallery.shape, generator=generator)
    return centres + 0.3 * torch.randn(centres.shape, generator=generator), gallery


BOTH = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtypes", [BOTH[:1], BOTH[1:], BOTH])
@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(100, 500), st.integers(1, 40), st.sampled_from([1, 3, 64, 300])),
    digits=st.integers(0, 8),
    zeros=st.integers(0, 10),
    equals=st.integers(0, 10),
    k=st.integers(1, 20),
    block=st.integers(1, 500),
    sign=st.sampled_from([-1, 1]),
    alone=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_screen_changes_no_bit(
    dtypes: tuple[torch.dtype, ...],
    sizes: tuple[int, int, int],
    digits: int,
    zeros: int,
    equals: int,
    k: int,
    block: int,
    sign: int,
    alone: bool,
    seed: int,
) -> None:
    queries, gallery = lookalikes(*sizes, 10.0**-digits, seed)
    gallery[::3][:zeros] = 0
    gallery[::2][:equals] = gallery[1]
    sides = (gallery, None) if alone else (sign * queries, gallery)
    with screening():
        scores, index = nearest(*sides, k)
    with screening(*dtypes, group=4), pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_BLOCK", block)
        patch.setattr(neighbours, "_TILE", 1000)
        screened_scores, screened_index = nearest(*sides, k)
    assert torch.equal(screened_index, index)
    assert torch.equal(screened_scores, scores)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("d", [3, 64])
@pytest.mark.parametrize("digits", range(8))
def test_a_screen_confuses_no_lookalikes(dtype: torch.dtype, d: int, digits: int) -> None:
    # Of 25 items the screen alone would often take the wrong one for the nearest.
    queries, gallery = lookalikes(1000, 40, d, 10.0**-digits, seed=0)
    for sides in ((queries, gallery), (gallery, None)):
        for k in (1, 5):
            with screening():
                expected = nearest(*sides, k)
            with screening(dtype, group=4):
                result = nearest(*sides, k)
            assert torch.equal(result[1], expected[1])
            assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("positive", [0, 3, 8])
def test_a_screen_takes_negative_cosines_for_less_than_positive(
    dtype: torch.dtype, positive: int
) -> None:
    gallery = 1 + random_set(300, 300, 4)[0].abs()
    gallery[:positive] *= -1
    with screening():
        expected = nearest(-torch.eye(4), gallery, 5)
    with screening(dtype, group=4):
        result = nearest(-torch.eye(4), gallery, 5)
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("d", [1, 64, 2048])
def test_a_screen_is_in_doubt_as_much_as_it_errs(dtype: torch.dtype, d: int) -> None:
    # Coordinates that all round the same way, up or down, and sums of nothing but positive terms.
    generator = torch.Generator().manual_seed(0)
    spacing = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(d**-0.5))
    steps = torch.randint(-9, 9, (300, d), generator=generator)
    rows = d**-0.5 + spacing * (steps + torch.linspace(-0.5, 0.5, 300)[:, None])
    rows = unit_rows(torch.cat([rows, torch.randn(300, d, generator=generator)]), "")
    with screening(dtype, group=1):
        (screen,) = neighbours.prepare_gallery(rows, 1).screens
    rounded = rows.to(dtype)
    result = torch.mm(screen.rows_GD, rounded.T, out=torch.empty(600, 600, dtype=dtype)).double()
    error = (result - rows.double() @ rows.double().T).abs() - result.abs() * torch.finfo(
        dtype
    ).eps / 2
    doubt = neighbours._doubt(screen, rows, rounded)
    assert (error <= doubt).all()
    if dtype == torch.bfloat16 and d > 1:
        assert (error > 0.5 * doubt).any()


def lopsided(raised: int, side: float, negative: int = 128) -> Tensor:
    """A row of length 1 that bfloat16 rounds to one side in its first 256 coordinates, by `side`
    times all that it may, and hardly in the others. So many of the 256 are negative, and `raised`
    of them lie one step higher."""
    spacing = 2.0**-12  # of bfloat16 between 2^-5 and 2^-4
    sign = torch.ones(256, dtype=torch.float64)
    sign[:negative] = -1
    row = ((0.055 * sign + 0.0006) / spacing).round() * spacing + side * spacing / 2
    row[:raised] += spacing
    rest, tail = 1 - row.square().sum(), []
    for _ in range(4):
        tail.append((rest.sqrt() * (1 - 2.0**-8)).bfloat16().double())
        rest = rest - tail[-1].square()
    return torch.cat([row, torch.stack([*tail, rest.sqrt()])])


@pytest.mark.parametrize("raised", range(128, 256, 16))
def test_a_screen_keeps_the_nearest_if_rounding_moves_it_down_and_another_up(raised: int) -> None:
    """Each is off by nearly the bound: their screened scores may differ by twice that."""
    assert the_screen_finds_what_it_takes_for_less(lopsided(0, 0.98), lopsided(raised, -0.98))


def test_a_screen_keeps_the_nearest_if_its_score_is_rounded_down_and_another_up() -> None:
    """Rows hardly move, but their scores lie on either side of where bfloat16 rounds."""
    pairs = [
        (lopsided(raised, 0.1, 40), lopsided(raised + 20, -0.1, 40)) for raised in range(0, 236, 8)
    ]
    assert sum(the_screen_finds_what_it_takes_for_less(*pair) for pair in pairs) >= 2


def the_screen_finds_what_it_takes_for_less(first: Tensor, second: Tensor) -> bool:
    """Whether the first of two rows, which is nearest, has the lower score in bfloat16."""
    query = torch.cat([torch.full((256,), 2.0**-4), torch.zeros(5)])[None].double()
    far = torch.eye(261, dtype=torch.float64)[-1].repeat(98, 1)
    gallery = torch.cat([far, torch.stack([second, first])])
    assert (query @ gallery.T).argmax() == 99
    with screening(torch.bfloat16, group=4):
        assert nearest(query, gallery, k=1)[1].tolist() == [[99]]
    return int((query.bfloat16() @ gallery.bfloat16().T).argmax()) == 98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_screen_leaves_nothing_of_rows_that_differ(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = random_set(5000, 900, 64)
    with screening():
        expected = evaluate_retrieval(rows, labels)
    monkeypatch.delattr(neighbours, "_exact")
    with screening(dtype):
        assert evaluate_retrieval(rows, labels) == expected


def test_what_one_screen_leaves_is_left_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def spy(query: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
        result = screened(query, *args)
        seen.append((args[3].rows_GD.dtype, len(query), int(result[0].sum())))  # type: ignore[attr-defined]
        return result

    screened = neighbours._screened
    seen: list[tuple[torch.dtype, int, int]] = []
    monkeypatch.setattr(neighbours, "_screened", spy)
    apart, alike = random_set(1000, 1000, 64)[0], 1 + 0.03 * random_set(1000, 1000, 64, 1)[0]
    apart -= apart.mean(1, keepdim=True)  # no component along `alike`
    with screening(torch.bfloat16, torch.float32):
        nearest(torch.cat([apart[:20], alike[:30], torch.zeros(5, 64)]), torch.cat([apart, alike]))
    assert seen == [(torch.bfloat16, 55, 20), (torch.float32, 35, 30)]


def test_autocast_and_matmul_precision_change_no_bit() -> None:
    rows, labels = random_set(2000, 300, 64)
    expected = evaluate_retrieval(rows, labels)
    with torch.autocast("cpu", torch.bfloat16), screening(torch.float32):
        assert evaluate_retrieval(rows, labels) == expected
    torch.set_float32_matmul_precision("medium")
    try:
        assert not neighbours._float32_is_kept()
        assert evaluate_retrieval(rows, labels) == expected
    finally:
        torch.set_float32_matmul_precision("highest")
    assert neighbours._float32_is_kept()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [collapsed, few_values, smooth])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_cuda_device_gives_the_same_bits(make: Callable[[int], Tensor], precision: str) -> None:
    rows, labels = make(3000), random_set(3000, 500)[1]
    expected = evaluate_retrieval(rows, labels), *nearest(rows, rows[:2000], 7)
    torch.set_float32_matmul_precision(precision)
    try:
        got = (
            evaluate_retrieval(rows.cuda(), labels.cuda()),
            *nearest(rows.cuda(), rows[:2000].cuda(), 7),
        )
    finally:
        torch.set_float32_matmul_precision("highest")
    assert got[0] == expected[0]
    for actual, wanted in zip(got[1:], expected[1:], strict=True):
        assert actual.is_cuda
        assert torch.equal(actual.cpu(), wanted)


def test_a_collapsed_model_ranks_by_position() -> None:
    _, index = nearest(collapsed(6), k=4)
    assert index.tolist() == [
        [1, 2, 3, 4],
        [0, 2, 3, 4],
        [0, 1, 3, 4],
        [0, 1, 2, 4],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_renaming_the_gallery_renames_the_neighbours() -> None:
    rows, labels = random_set()
    gallery, gallery_labels = random_set(seed=1)
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(2))
    scores, index = nearest(rows, gallery, 20)
    assert (scores.diff(dim=1) < 0).all()  # no ties, else the law would not hold
    moved_scores, moved_index = nearest(rows, gallery[order], 20)
    assert torch.equal(moved_scores, scores)
    assert torch.equal(order[moved_index], index)
    shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4))
    assert evaluate_retrieval(rows, labels, gallery, gallery_labels) == evaluate_retrieval(
        rows[shuffle], labels[shuffle], gallery[order], gallery_labels[order]
    )


def test_true_ties_of_exact_cosines() -> None:
    half = [0.5, 0.5, 0.5, 0.5]
    gallery = torch.tensor([[0, 1, 0, 0], [5, 5, 5, 5], [3, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    scores, index = nearest(torch.tensor([half]), gallery.float(), k=5)
    assert index.tolist() == [[1, 3, 0, 2, 4]]
    assert scores.tolist() == [[1.0, 1.0, 0.5, 0.5, 0.0]]


def test_scores_are_cosines() -> None:
    rows, _ = random_set(50, 5, 64)
    rows[3] = 0
    scores, index = nearest(rows, k=49)
    expected = torch.nn.functional.cosine_similarity(rows[:, None], rows[index], dim=2)
    torch.testing.assert_close(scores, expected, atol=5e-7, rtol=0)
    assert scores.dtype == torch.float32
    assert scores[3].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype_and_any_length(dtype: torch.dtype) -> None:
    rows, labels = random_set(60, 6)
    rows = rows.to(dtype)
    lengths = 2.0 ** torch.randint(-3, 4, (60, 1), generator=torch.Generator().manual_seed(0))
    expected = evaluate_retrieval(rows.float(), labels)
    assert evaluate_retrieval(rows * lengths.to(dtype), labels) == expected
    assert evaluate_retrieval(rows.requires_grad_(), labels.to(torch.int32)) == expected


def test_inputs_are_not_changed() -> None:
    rows, labels = random_set(20, 4)
    rows = rows.double()
    copies = rows.clone(), labels.clone()
    evaluate_retrieval(rows, labels)
    assert torch.equal(rows, copies[0])
    assert torch.equal(labels, copies[1])


def test_lonely_queries_are_counted_and_left_out() -> None:
    rows, labels = random_set(100, 10)
    lonely = torch.cat([labels, torch.tensor([1000, 1001, 1002])])
    got = evaluate_retrieval(torch.cat([rows, rows[:3] + 0.01]), lonely)
    assert (got.queries, got.skipped) == (100, 3)


class Bytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.held:
                storage = leaf.untyped_storage()
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata)
        self.most = max(self.most, sum(self.held.values()))
        return made


@pytest.mark.parametrize("make", [collapsed, few_values, smooth])
@pytest.mark.parametrize("dtypes", [(), (torch.bfloat16,), (torch.float32,)])
def test_a_block_stays_below_its_bytes(
    make: Callable[[int], Tensor], dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(neighbours, "_TILE", 2**12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # what others make is not counted
    rows, labels = make(1001), random_set(1001, 170)[1]
    labels[:120] = 0
    gallery = make(5000)
    with screening(*dtypes):
        with Bytes() as evaluating:
            evaluate_retrieval(rows, labels)
        with Bytes() as searching:
            nearest(gallery[:40], gallery, k=3)
    # Beside a block: the rows once in float64, then in float32 and once more, and a few columns.
    for counter, embeddings in ((evaluating, rows), (searching, gallery)):
        beside = 3 * embeddings.nbytes + 100 * len(embeddings)
        assert beside / 2 < counter.most < beside + 2**20


@pytest.mark.parametrize("workers", [1, 4, 64])
def test_workers_share_the_bytes_of_blocks(workers: int) -> None:
    bytes_of_a_query = 4 * 60_502 + 32 * 16 * 72
    rows = block_rows(60_502, 10, workers)
    assert rows == 1 or rows * workers * bytes_of_a_query < neighbours.BLOCK_BYTES / 2
    assert rows * workers > 100 or rows == 1
    assert block_rows(10**9, 10, workers) == 1


@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize("make", [few_values, smooth])
def test_workers_change_no_bit(
    make: Callable[[int], Tensor], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spy(*args: object) -> tuple[Tensor, Tensor]:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return top(*args)

    top = neighbours._top
    seen: set[tuple[int, int]] = set()
    monkeypatch.setattr(neighbours, "_top", spy)
    monkeypatch.setattr(neighbours, "_BLOCK", 10)
    rows, labels = make(2000), random_set(2000, 300)[1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = evaluate_retrieval(rows, labels), *nearest(rows, k=7)
        assert seen == {(threading.get_ident(), 1)}
        seen.clear()
        torch.set_num_threads(threads)
        with torch.inference_mode():
            got = evaluate_retrieval(rows, labels), *nearest(rows, k=7)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert {count for _, count in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}
    assert got[0] == expected[0]
    for wanted, actual in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(wanted, actual)


def test_the_long_lists_of_one_large_class_are_not_paid_by_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lists = []

    def spy(*args: object) -> tuple[Tensor, Tensor]:
        values, index = top(*args)
        lists.append(index.shape)
        return values, index

    top = neighbours._top
    monkeypatch.setattr(neighbours, "_top", spy)
    monkeypatch.setattr(retrieval, "block_rows", lambda *_: 50)
    rows, _ = random_set(1000)
    labels = torch.arange(1000) // 2 + 1
    labels[:400] = 0
    evaluate_retrieval(rows, labels)
    assert sum(b * k for b, k in lists) == 400 * 399 + 600 * 10


def test_what_cannot_be_is_refused() -> None:
    rows, labels = random_set(10, 2)
    bad = rows.clone()
    bad[4, 2] = math.nan
    infinite = rows.clone()
    infinite[7, 0] = math.inf
    for call, message in (
        (lambda: nearest(bad), "query embedding 4 holds NaN"),
        (lambda: nearest(rows, infinite), "gallery embedding 7 holds NaN or infinite"),
        (lambda: nearest(rows, k=10), "between 1 and the number of candidates, 9"),
        (lambda: nearest(rows, k=0), "k must lie"),
        (lambda: nearest(rows, rows, k=11), "candidates, 10"),
        (lambda: nearest(rows[:1], k=1), "nothing to be compared"),
        (lambda: nearest(rows[:0]), "at least one of each"),
        (lambda: nearest(rows[0]), r"\[rows, dimensions\]"),
        (lambda: nearest(rows.long()), "floating point"),
        (lambda: nearest(rows, rows[:, :5]), "16 dimensions and gallery items 5"),
        (lambda: evaluate_retrieval(rows, labels[:9]), r"one per row, \[10\], not \[9\]"),
        (lambda: evaluate_retrieval(rows, labels.float()), "must be integers"),
        (lambda: evaluate_retrieval(rows, labels > 0), "must be integers"),
        (lambda: evaluate_retrieval(rows, labels, rows), "together, or neither"),
        (lambda: evaluate_retrieval(rows, labels, None, labels), "together, or neither"),
        (lambda: evaluate_retrieval(rows, torch.arange(10)), "another image of its class"),
        (lambda: evaluate_retrieval(rows, labels, rows, labels + 9), "class in the gallery"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
