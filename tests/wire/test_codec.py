import dataclasses
import itertools
import math
from typing import cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedss.choices import Precision
from fedss.wire.codec import (
    FORMATS,
    GROUP_INT4,
    SHORTEST_CHANNEL,
    NumberFormat,
    decode_backbone,
    decode_rows,
    decode_symmetric,
    encode_backbone,
    encode_rows,
    encode_symmetric,
)

LEVELS = {"int8": 127, "int4": 7}
LOSSY = ["bfloat16", "int8", "int4"]
PRECISIONS = ["float32", *LOSSY]
LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max

seeds = st.integers(0, 2**32 - 1)


def random_rows(seed, rows, dim):
    """Each row of its own magnitude, from 1e-30 to 1e30; some are zero."""
    rng = np.random.default_rng(seed)
    magnitude = 10.0 ** rng.uniform(-30, 30, (rows, 1)) * (rng.random((rows, 1)) < 0.9)
    return torch.from_numpy((rng.standard_normal((rows, dim)) * magnitude).astype(np.float32))


def random_symmetric(seed, dim):
    matrix = torch.from_numpy(np.random.default_rng(seed).standard_normal((dim, dim))).float()
    return matrix + matrix.T


def slow_scale(row, levels):
    """The least bfloat16 (8 significant bits) that is not below ``max |x| / levels``."""
    exact = float(np.float32(max(abs(x) for x in row)) / np.float32(levels))
    mantissa, exponent = math.frexp(max(exact, 2.0**-126))
    return math.ldexp(math.ceil(mantissa * 256), exponent - 8)


def slow_nearest(row, levels):
    scale = slow_scale(row, levels)
    codes = [round(float(np.float32(x) / np.float32(scale))) for x in row]
    return scale, codes


def slow_pack(codes):
    half = (len(codes) + 1) // 2
    high = [*codes[half:], *[0] * (half - len(codes[half:]))]
    return [low % 16 + 16 * (up % 16) for low, up in zip(codes[:half], high, strict=True)]


def nbytes(encoded):
    return sum(tensor.nbytes for tensor in encoded.values())


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@given(seeds, st.integers(0, 9), st.integers(1, 33))
def test_float32_is_the_tensor_itself_and_bfloat16_the_nearest(seed, rows, dim):
    x = random_rows(seed, rows, dim)
    for rng in (None, np.random.default_rng(0)):
        encoded = encode_rows(x, "float32", rng)
        assert encoded["values"] is x
        assert torch.equal(decode_rows(encoded, dim, "float32"), x)
    assert torch.equal(
        decode_rows(encode_rows(x, "bfloat16", None), dim, "bfloat16"), x.bfloat16().float()
    )


@pytest.mark.parametrize("precision", LEVELS)
@given(seed=seeds, rows=st.integers(0, 9), dim=st.integers(1, 33))
def test_nearest_against_a_loop(precision, seed, rows, dim):
    x = random_rows(seed, rows, dim)
    encoded = encode_rows(x, precision, None)
    scales, codes, flat = [], [], []
    for row in x.tolist():
        scale, code = slow_nearest(row, LEVELS[precision])
        assert all(abs(c) <= LEVELS[precision] for c in code)
        scales.append(scale)
        codes.append([c * scale for c in code])
        flat += code
    assert encoded["scale"].tolist() == scales
    assert encoded["values"].tolist() == (slow_pack(flat) if precision == "int4" else flat)
    decoded = decode_rows(encoded, dim, precision)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, torch.tensor(codes).view(rows, dim))


@pytest.mark.parametrize("precision", LEVELS)
@given(seed=seeds, rows=st.integers(1, 9), dim=st.integers(1, 33))
def test_errors_are_within_a_step_of_the_rows_own_scale(precision, seed, rows, dim):
    x = random_rows(seed, rows, dim)
    levels = LEVELS[precision]
    step = torch.tensor([[slow_scale(row, levels)] for row in x.tolist()])
    for rng, bound in ((None, 0.5), (np.random.default_rng(seed), 1)):
        encoded = encode_rows(x, precision, rng)
        error = (decode_rows(encoded, dim, precision) - x).abs()
        assert (error <= bound * step * (1 + 2**-15)).all()
        assert rng is None or (error < step).all()
    # And the scale is no more than bfloat16's rounding above the finest that would do.
    nonzero = x.abs().amax(1) > 1e-35
    finest = x.abs().amax(1, keepdim=True) / levels
    assert (step[nonzero] <= finest[nonzero] * (1 + 2**-7)).all()


@pytest.mark.parametrize("precision", LOSSY)
@given(seed=seeds, rows=st.integers(0, 9), dim=st.integers(1, 33))
def test_what_was_decoded_is_encoded_without_loss(precision, seed, rows, dim):
    once = decode_rows(encode_rows(random_rows(seed, rows, dim), "bfloat16", None), dim, "bfloat16")
    if precision != "bfloat16":
        codes = torch.randint(-7, 8, (rows, dim), generator=torch.Generator().manual_seed(seed))
        codes[:, 0] = LEVELS[precision]
        once = codes * once.abs().amax(1, keepdim=True)
    twice = decode_rows(encode_rows(once, precision, np.random.default_rng(seed)), dim, precision)
    assert torch.equal(twice, once)


@pytest.mark.parametrize("precision", LOSSY)
@given(seed=seeds)
def test_stochastic_rounding_is_unbiased(precision, seed):
    draws, dim = 4000, 16
    row = random_rows(seed, 1, dim)
    assume(row.any())
    x = row.expand(draws, dim).contiguous()
    decoded = decode_rows(
        encode_rows(x, precision, np.random.default_rng(seed)), dim, precision
    ).double()
    if precision == "bfloat16":
        floor = (row.view(torch.int32) & -65536).view(torch.float32).double()
        step = (torch.nextafter(floor.bfloat16(), row.sign().bfloat16() * torch.inf) - floor).abs()
    else:
        step = torch.tensor(slow_scale(row[0].tolist(), LEVELS[precision])).double()
        floor = (row / step).floor() * step
    share = ((row.double() - floor) / step).abs()
    sigma = step * (share * (1 - share) / draws).sqrt()
    # With few hits expected a mean is not normal; 20 draws more do no harm to the bound.
    assert ((decoded.mean(0) - row).abs() <= 6 * sigma + 20 * step / draws).all()
    assert ((decoded == floor) | ((decoded - floor).abs() <= step * (1 + 1e-12))).all()


def test_bfloat16_is_unbiased_over_all_sixteen_bits():
    class EveryNoise(np.random.Generator):
        def integers(self, low, high, size, dtype):  # type: ignore[override]
            return np.arange(low, high, dtype=dtype).reshape(size)

    rng = EveryNoise(np.random.PCG64(0))
    for x in (0.3, -1e-3, 1 + 2**-23, 2 - 2**-23, 1e-39, -3.3e38, 0.0):
        values = torch.full((1 << 16, 1), x)
        mean = decode_rows(encode_rows(values, "bfloat16", rng), 1, "bfloat16").double().mean()
        assert mean.item() == values[0].item()


@pytest.mark.parametrize("precision", LEVELS)
def test_the_largest_code_never_rounds_away(precision):
    # 127 + u is 128 in float32 for one u in 2^18.
    x = torch.full((1, 1 << 20), float(LEVELS[precision]))
    for sign in (1, -1):
        encoded = encode_rows(sign * x, precision, np.random.default_rng(0))
        assert torch.equal(decode_rows(encoded, x.shape[1], precision), sign * x)


@pytest.mark.parametrize("precision", LEVELS)
def test_a_huge_row_or_channel_does_not_spoil_another(precision):
    x = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    alone = decode_rows(encode_rows(x[1:], precision, None), 10, precision)
    x[0] *= 1e30
    assert torch.equal(decode_rows(encode_rows(x, precision, None), 10, precision)[1:], alone)
    layout = (torch.Size([3, 10]),)
    theta = decode_backbone(encode_backbone(x.view(-1), layout, precision, None), layout, precision)
    assert torch.equal(theta.view(3, 10)[1:], alone)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "dim"), [(0, 1), (0, 7), (1, 1), (3, 1), (3, 7), (4, 8)])
def test_zeros_stay_zero_whatever_the_shape(precision, rows, dim):
    zeros = torch.zeros(rows, dim)
    for rng in (None, np.random.default_rng(0)):
        decoded = decode_rows(encode_rows(zeros, precision, rng), dim, precision)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded, zeros)


def test_magnitudes_at_float32s_ends():
    tiny = torch.tensor([[1e-45, -1e-40, 2.0**-126]])
    huge = torch.tensor([[torch.finfo(torch.float32).max, -1e38, 0.0]])
    for precision, levels in LEVELS.items():
        for rng in (None, np.random.default_rng(0)):
            decoded = decode_rows(encode_rows(tiny, precision, rng), 3, precision)
            assert ((decoded - tiny).abs() <= 2.0**-126).all()
            # The largest value itself may decode to a step above it: at most 1/127 too much.
            decoded = decode_rows(encode_rows(huge, precision, rng), 3, precision)
            assert not decoded.isnan().any()
            assert (decoded[:, 1:] - huge[:, 1:]).abs().max() <= 3.5e38 / levels


def test_bfloat16_makes_no_infinity_that_nearest_does_not():
    between = torch.linspace(LARGEST_BFLOAT16, torch.finfo(torch.float32).max, 999)[None]
    up_to = torch.full((1, 999), LARGEST_BFLOAT16)
    for x in (between, -between, up_to, -up_to, torch.full((1, 9), torch.inf)):
        decoded = decode_rows(
            encode_rows(x, "bfloat16", np.random.default_rng(0)), x.shape[1], "bfloat16"
        )
        assert torch.equal(decoded, x.bfloat16().float())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, "payload"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_not_finite_stays_visible_and_apart(precision, bad, stochastic):
    rng = np.random.default_rng(0) if stochastic else None
    x = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    clean = decode_rows(encode_rows(x, precision, None), 9, precision)
    if bad == "payload":
        x.view(torch.int32)[2, 3] = 2**31 - 1  # a NaN that a carry would turn into a zero
    else:
        x[2, 3] = bad
    decoded = decode_rows(encode_rows(x, precision, rng), 9, precision)
    assert not decoded[2, 3].isfinite()
    assert precision in ("float32", "bfloat16") or not decoded[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert decoded[others].isfinite().all()
    assert stochastic or torch.equal(decoded[others], clean[others])

    layout = (torch.Size([5, 9]), torch.Size([5]))
    theta = torch.cat((x.view(-1), x[2, 1:6]))
    theta = decode_backbone(encode_backbone(theta, layout, precision, rng), layout, precision)
    assert not theta[2 * 9 + 3].isfinite()
    assert not theta[45 + 2].isfinite()

    for i, j in ((2, 2), (1, 3)):
        matrix = torch.eye(5)
        matrix[i, j] = matrix[j, i] = x[2, 3]
        for rank in (None, 0, 2):
            decoded = decode_symmetric(encode_symmetric(matrix, precision, rank, rng), 5, precision)
            assert not decoded.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@given(seed=seeds, rows=st.integers(0, 9), dim=st.integers(1, 20), rank=st.integers(0, 19))
def test_the_rng_decides_and_safetensors_carries_all(precision, seed, rows, dim, rank):
    x, matrix = random_rows(seed, rows, dim), random_symmetric(seed, dim)
    layout = (torch.Size([rows, dim]), torch.Size([2 * dim]))
    theta = torch.cat((x.view(-1), matrix[0], matrix[-1]))
    calls = [
        (lambda rng: encode_rows(x, precision, rng), lambda e: decode_rows(e, dim, precision)),
        (
            lambda rng: encode_backbone(theta, layout, precision, rng),
            lambda e: decode_backbone(e, layout, precision),
        ),
        *(
            (
                lambda rng, r=r: encode_symmetric(matrix, precision, r, rng),
                lambda e: decode_symmetric(e, dim, precision),
            )
            for r in (None, rank % dim)
        ),
    ]
    for encode, decode in calls:
        encoded = encode(np.random.default_rng(seed))
        assert same(encode(np.random.default_rng(seed)), encoded)
        carried = load(save(encoded))
        assert same(carried, encoded)
        assert torch.equal(decode(carried), decode(encoded))


def test_rows_may_be_a_strided_view():
    x = torch.rand(5, 3)
    for precision in PRECISIONS:
        expected = encode_rows(x.T.contiguous(), precision, None)
        encoded = encode_rows(x.T, precision, None)
        assert same(encoded, expected)
        assert all(tensor.is_contiguous() for tensor in encoded.values())


def test_another_rng_rounds_another_way():
    x = torch.rand(8, 8)
    for precision in LOSSY:
        a, b = (encode_rows(x, precision, np.random.default_rng(seed)) for seed in (0, 1))
        assert not torch.equal(a["values"], b["values"])


def group(length: int, precision: str) -> int:
    """How many values of a channel share a scale."""
    if precision != "int4":
        return length
    divisors = [g for g in range(SHORTEST_CHANNEL, GROUP_INT4 + 1) if length % g == 0]
    return max(divisors, default=length)


@given(st.integers(0, 40), st.integers(1, 100), st.integers(0, 39), st.booleans())
def test_sizes_are_arithmetic(s, d, r, zeros):
    r %= d
    x, matrix = torch.zeros(s, d) if zeros else torch.rand(s, d), torch.eye(d)
    layout = (torch.Size([s]), torch.Size([s, d]))
    theta = torch.cat((x[:, 0], x.reshape(-1)))
    quantized = s * d if d >= SHORTEST_CHANNEL else 0
    channels = s if d >= SHORTEST_CHANNEL else 0
    t = d * (d + 1) // 2
    # per precision: bytes of n values that have k scales
    size = {
        "float32": lambda n, k: 4 * n,
        "bfloat16": lambda n, k: 2 * n,
        "int8": lambda n, k: n + 2 * k,
        "int4": lambda n, k: (n + 1) // 2 + 2 * k,
    }
    for precision, of in size.items():
        whole = precision in ("float32", "bfloat16")
        scales = channels * (d // group(d, precision))
        assert nbytes(encode_rows(x, precision, None)) == of(s * d, s)
        assert nbytes(encode_backbone(theta, layout, precision, None)) == (
            of(s + s * d, 0) if whole else of(quantized, scales) + 2 * (s + s * d - quantized)
        )
        assert nbytes(encode_symmetric(matrix, precision, None, None)) == (
            of(t, 0) if whole else of(t - d, d // 2) + 4 * d
        )
        assert nbytes(encode_symmetric(matrix, precision, r, None)) == of(r * d, r) + 4 * (r + 1)


shapes = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.integers(0, 20)),
        st.tuples(st.integers(0, 6), st.integers(1, 99)),
        st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("precision", PRECISIONS)
@given(seed=seeds, shapes=shapes)
def test_the_backbone_against_one_parameter_at_a_time(precision, seed, shapes):
    layout = tuple(torch.Size(shape) for shape in shapes)
    parameters = [
        random_rows(seed + i, math.prod(shape[:1]), math.prod(shape[1:])).view(shape)
        for i, shape in enumerate(layout)
    ]
    theta = torch.cat([p.reshape(-1) for p in parameters])
    expected = []
    for p in parameters:
        if precision == "float32":
            expected += p.reshape(-1).tolist()
        elif precision == "bfloat16" or p.dim() < 2 or p[:1].numel() < SHORTEST_CHANNEL:
            expected += p.reshape(-1).bfloat16().tolist()
        else:
            for part in p.reshape(-1).split(group(p[:1].numel(), precision)):
                scale, codes = slow_nearest(part.tolist(), LEVELS[precision])
                expected += [code * scale for code in codes]
    encoded = encode_backbone(theta, layout, precision, None)
    assert len(encoded) == (3 if precision in LEVELS else 1)
    assert (encoded["values"] is theta) == (precision == "float32")
    assert torch.equal(decode_backbone(encoded, layout, precision), torch.tensor(expected))


@pytest.mark.parametrize("dim", [1, 2, 5, 8, 33])
def test_a_triangle_is_the_matrix(dim):
    matrix = random_symmetric(dim, dim)
    for precision in PRECISIONS:
        for rng in (None, np.random.default_rng(0)):
            decoded = decode_symmetric(
                encode_symmetric(matrix, precision, None, rng), dim, precision
            )
            assert torch.equal(decoded, decoded.T)
            if precision in LEVELS:
                assert torch.equal(decoded.diagonal(), matrix.diagonal())
                above = matrix.triu(1).abs().max()
                bound = above / LEVELS[precision] * (1 + 2**-7)
                assert (decoded - matrix).abs().max() <= bound
            elif precision == "float32":
                assert torch.equal(decoded, matrix)
            elif rng is None:
                assert torch.equal(decoded, matrix.bfloat16().float())


def spectrum(seed, eigenvalues):
    """A float64 matrix of these eigenvalues, with random eigenvectors."""
    normal = np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2)
    vectors = torch.linalg.qr(torch.from_numpy(normal))[0]
    return (vectors * torch.tensor(eigenvalues, dtype=torch.float64)) @ vectors.T


@given(seeds, st.lists(st.floats(-9, 9), max_size=4), st.floats(-3, 3), st.integers(1, 6))
def test_rank_r_plus_a_multiple_of_the_identity_is_exact(seed, kept, rest, others):
    matrix = spectrum(seed, kept + [rest] * others).float()
    decoded = decode_symmetric(
        encode_symmetric(matrix, "float32", len(kept), None), len(matrix), "float32"
    )
    torch.testing.assert_close(decoded, matrix, rtol=0, atol=2e-5)


@given(seeds, st.lists(st.floats(-9, 9), min_size=6, max_size=6), st.integers(0, 5))
def test_no_other_eigenvalues_would_be_better_kept(seed, eigenvalues, rank):
    matrix = spectrum(seed, eigenvalues)
    decoded = decode_symmetric(
        encode_symmetric(matrix.float(), "float32", rank, None), 6, "float32"
    )
    error = (decoded - matrix).square().sum().item()
    best = min(
        sum((x - sum(rest) / len(rest)) ** 2 for x in rest)
        for rest in itertools.combinations(eigenvalues, 6 - rank)
    )
    assert math.sqrt(error) == pytest.approx(math.sqrt(best), abs=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@given(seed=seeds, dim=st.integers(1, 20), rank=st.integers(0, 19), stochastic=st.booleans())
def test_low_rank_keeps_trace_and_symmetry(precision, seed, dim, rank, stochastic):
    matrix = random_symmetric(seed, dim)
    rng = np.random.default_rng(seed) if stochastic else None
    decoded = decode_symmetric(encode_symmetric(matrix, precision, rank % dim, rng), dim, precision)
    assert torch.equal(decoded, decoded.T)
    assert decoded.trace().item() == pytest.approx(matrix.trace().item(), abs=1e-3)


def test_only_the_upper_triangle_is_read():
    matrix = random_symmetric(0, 7)
    below = torch.ones(7, 7).tril(-1).bool()
    for precision, rank in itertools.product(PRECISIONS, (None, 3)):
        expected = encode_symmetric(matrix, precision, rank, None)
        unread = matrix.masked_fill(below, torch.nan)
        assert same(encode_symmetric(unread, precision, rank, None), expected)


def test_bad_arguments_are_named():
    expected = "precision must be one of float32, bfloat16, int8, int4, not 'int2'"
    layout = (torch.Size([2, 2]),)
    for call in (
        lambda: encode_rows(torch.zeros(2, 2), "int2", None),
        lambda: encode_backbone(torch.zeros(4), layout, "int2", None),
        lambda: encode_symmetric(torch.zeros(2, 2), "int2", None, None),
        lambda: encode_symmetric(torch.zeros(2, 2), "int2", 1, None),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank must be from 0 to 1.* not {rank}"):
            encode_symmetric(torch.zeros(2, 2), "int8", rank, None)
    with pytest.raises(ValueError, match="the layout has 4 values, the vector 5"):
        encode_backbone(torch.zeros(5), layout, "float32", None)


def test_a_format_is_a_name_and_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(FORMATS) == get_args(Precision)
    int6 = dataclasses.replace(FORMATS["int8"], largest_code=31, longest=16)
    float16 = NumberFormat(lambda values, rng: values.half(), lambda packed, count: packed.float())
    monkeypatch.setitem(cast("dict[str, NumberFormat]", FORMATS), "int6", int6)
    monkeypatch.setitem(cast("dict[str, NumberFormat]", FORMATS), "float16", float16)
    rows, matrix = torch.randn(5, 32), torch.randn(32, 32)
    matrix, layout = matrix + matrix.T, (torch.Size((5, 32)),)
    for name, step in (("int6", 1 / 31), ("float16", 1 / 1024)):
        precision = cast(Precision, name)
        made = [
            decode_rows(encode_rows(rows, precision, None), 32, precision),
            decode_backbone(
                encode_backbone(rows.view(-1), layout, precision, None), layout, precision
            ).view(5, 32),
            decode_symmetric(encode_symmetric(matrix, precision, None, None), 32, precision),
        ]
        for decoded, exact in zip(made, (rows, rows, matrix), strict=True):
            assert 0 < (decoded - exact).abs().max() <= step * exact.abs().max()
