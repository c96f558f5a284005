"""How a tensor travels in fewer bytes: bfloat16, 8 or 4 bits a value, or a few eigenvectors.

Every function that encodes takes an ``rng``. With one it rounds stochastically, so that a mean over
many clients loses nothing but variance (QSGD, Alistarh et al. 2017, arXiv 1610.02132); with
``None`` it rounds to nearest, ties to even. What comes out are named float32, bfloat16, int8 or
uint8 tensors whose sizes depend on shapes alone.

Shape suffixes: S rows, D their length or a matrix's side, P backbone parameters, N values that are
quantized together, K their scales, R eigenvectors, T a triangle's values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedss.choices import Precision
from fedss.core.rounding import to_bfloat16

Encoded = dict[str, Tensor]
Layout = tuple[torch.Size, ...]

# A scale is two bytes: with fewer values to share it, int8 saves too little on bfloat16 to lose
# sixteen times its resolution.
SHORTEST_CHANNEL = 8
# Two bytes for 32 codes are half a bit each. Of 288 Gaussian values the largest is 2.9 deviations
# on average, of 32 it is 2.1: half the squared error.
GROUP_INT4 = 32


@dataclass(frozen=True)
class NumberFormat:
    """How numbers travel: as they are, or as whole codes of values divided by a scale they share.

    Attributes:
        pack: ``pack(values, rng)``: float32 values, or ratios [N] to their scales, rounded.
        unpack: ``unpack(packed, N)``: the values or codes [N] in float32.
        largest_code: m, the largest code; None: values are not scaled.
        longest: values of a backbone that share a scale at most; None: a whole output channel.
    """

    pack: Callable[[Tensor, np.random.Generator | None], Tensor]
    unpack: Callable[[Tensor, int], Tensor]
    largest_code: int | None = None
    longest: int | None = None


def encode_rows(rows_SD: Tensor, precision: Precision, rng: np.random.Generator | None) -> Encoded:
    """Rows with one scale each.

    ``code = round(x / scale)`` with ``scale = max |row| / m``, m = 127 for int8 and 7 for int4, as
    bfloat16 rounded up, so that no code passes m and none is clamped; at least 2^-126. An int4
    message holds codes i and i + ceil(S D / 2) of the flattened rows in the low and high half of
    its byte i.

    A row, float32 and of one value or more, that is not finite decodes to a row without a finite
    value in the int formats, and to itself in the others. Within a part in 128 of float32's
    largest, 3.40e38, a finite value may decode to infinity. With an ``rng``,
    ``E[decode(encode(x))] = x`` (to float32's rounding); in bfloat16, finite values beyond its
    largest, 3.39e38, still go to nearest. In float32 it is the tensor itself, not a copy.

    Returns:
        ``values``, 4 S D bytes in float32 and 2 S D in bfloat16; or ``values`` and ``scale``,
        S D + 2 S in int8 and ceil(S D / 2) + 2 S in int4.

    Raises:
        ValueError: the precision is none of the four.

    Source: QSGD (arXiv 1610.02132), sections 3.1 and 4, with the largest value as the norm.
    """
    form = _format(precision)
    if form.largest_code is None:
        return {"values": form.pack(rows_SD, rng)}
    return _scaled([rows_SD], form, form.largest_code, rng)


def decode_rows(encoded: Mapping[str, Tensor], dim: int, precision: Precision) -> Tensor:
    """``x = code * scale``: float32 [S, dim] from what ``encode_rows`` made."""
    form = _format(precision)
    if form.largest_code is None:
        return form.unpack(encoded["values"], encoded["values"].numel())
    (rows_SD,) = _unscaled(encoded, [(len(encoded["scale"]), dim)], form)
    return rows_SD


def encode_backbone(
    theta_P: Tensor, layout: Layout, precision: Precision, rng: np.random.Generator | None
) -> Encoded:
    """A flat vector of parameters, with one scale per output channel, or part of one in int4.

    In the int formats a parameter of two or more dimensions is quantized as ``encode_rows`` does,
    a row being all that belongs to one index of its first dimension. In int4 that is cut into
    equal parts of at most ``GROUP_INT4`` values, where they divide it: with so few levels the
    largest of many values leaves too few of them to the rest. Other parameters, and those whose
    rows are shorter than ``SHORTEST_CHANNEL``, travel in bfloat16.

    ``layout`` has the shapes of the parameters in ``theta_P``, one after the other. In float32 it
    is the tensor itself, not a copy.

    Returns:
        ``values``, 4 P bytes in float32 and 2 P in bfloat16; or ``values``, ``scale`` and
        ``small``, with N values quantized in K channels or parts N + 2 K + 2 (P - N) bytes in
        int8 and ceil(N / 2) + 2 K + 2 (P - N) in int4.

    Raises:
        ValueError: the precision is none of the four, or the layout has not P values.
    """
    form = _format(precision)
    sizes = [shape.numel() for shape in layout]
    if sum(sizes) != len(theta_P):
        raise ValueError(f"the layout has {sum(sizes)} values, the vector {len(theta_P)}")
    if form.largest_code is None:
        return {"values": form.pack(theta_P, rng)}
    blocks, small = [theta_P.new_empty(0, 1)], [theta_P.new_empty(0)]
    for piece, shape in zip(theta_P.split_with_sizes(sizes), layout, strict=True):
        if block := _block(shape, form.longest):
            blocks.append(piece.view(block))
        else:
            small.append(piece)
    scaled = _scaled(blocks, form, form.largest_code, rng)
    return {**scaled, "small": to_bfloat16(torch.cat(small), rng)}


def decode_backbone(encoded: Mapping[str, Tensor], layout: Layout, precision: Precision) -> Tensor:
    """The flat vector, float32 [P], from what ``encode_backbone`` made with this layout."""
    form = _format(precision)
    if form.largest_code is None:
        return form.unpack(encoded["values"], encoded["values"].numel())
    blocks = [_block(shape, form.longest) for shape in layout]
    small_sizes = [s.numel() for s, block in zip(layout, blocks, strict=True) if not block]
    scaled = iter(_unscaled(encoded, [block for block in blocks if block], form))
    small = iter(encoded["small"].float().split_with_sizes(small_sizes))
    return torch.cat([next(scaled).view(-1) if b else next(small) for b in blocks])


def encode_symmetric(
    matrix_DD: Tensor, precision: Precision, rank: int | None, rng: np.random.Generator | None
) -> Encoded:
    """A symmetric matrix, definite or not: its upper triangle, or a few of its eigenvectors.

    Without a rank: the triangle row by row, T = D (D + 1) / 2 values. In the int formats the
    diagonal, in a covariance far larger than the rest, stays float32, and the D (D - 1) / 2 values
    above it are cut into floor(D / 2) rows of equal length (D, or D - 1 if D is even), each with
    a scale.

    With rank r: ``M ~ sum_i (l_i - g) u_i u_i' + g I``, where g is the mean of the eigenvalues
    left out. For a given g the best r to keep are those farthest from g, and g is best at the mean
    of the others (Eckart and Young 1936), so those left out are the D - r neighbours in sorted
    order with the least variance. The trace is kept. An ``rng`` makes the eigenvectors unbiased,
    not the matrix.

    The ``precision`` is that of the triangle or of the eigenvectors. What lies below the diagonal
    of the matrix, float32, is not read. If it is not finite, nor is what it decodes to.

    Returns:
        Without a rank ``values``, 4 T or 2 T bytes; or ``values``, ``scale`` and ``diagonal``,
        T - D + 2 floor(D / 2) + 4 D bytes in int8, ceil((T - D) / 2) + 2 floor(D / 2) + 4 D in
        int4. With rank r the bytes of ``encode_rows`` for [r, D], and ``eigenvalues`` (those kept,
        then g), 4 (r + 1).

    Raises:
        ValueError: the precision is none of the four, or the rank not in 0..D - 1.
    """
    form, dim = _format(precision), len(matrix_DD)
    if rank is not None:
        return _encode_eigenvectors(matrix_DD, precision, rank, rng)
    if form.largest_code is None:
        return {"values": form.pack(matrix_DD[_triangle(dim, 0)], rng)}
    above_KD = matrix_DD[_triangle(dim, 1)].view(dim // 2, dim - 1 + dim % 2)
    return {**encode_rows(above_KD, precision, rng), "diagonal": matrix_DD.diagonal().contiguous()}


def decode_symmetric(encoded: Mapping[str, Tensor], dim: int, precision: Precision) -> Tensor:
    """The matrix, float32 [dim, dim] and symmetric, from what ``encode_symmetric`` made."""
    if "eigenvalues" in encoded:
        # Rounded eigenvectors are not of unit norm, and the trace is kept only if they are.
        vectors_RD = F.normalize(decode_rows(encoded, dim, precision))
        kept_R, rest = encoded["eigenvalues"][:-1], encoded["eigenvalues"][-1]
        low_rank_DD = vectors_RD.T @ ((kept_R - rest)[:, None] * vectors_RD)
        return (low_rank_DD + low_rank_DD.T) / 2 + rest * torch.eye(dim, device=rest.device)
    upper_DD = torch.zeros(dim, dim, device=encoded["values"].device)
    if "diagonal" in encoded:
        above_KD = decode_rows(encoded, dim - 1 + dim % 2, precision)
        upper_DD[_triangle(dim, 1)] = above_KD.view(-1)
        upper_DD.diagonal().copy_(encoded["diagonal"])
    else:
        upper_DD[_triangle(dim, 0)] = decode_rows(encoded, dim, precision)
    return upper_DD + upper_DD.triu(1).T


def encode_payload(tensor: Tensor, precision: Precision, rank: int | None) -> Encoded:
    """A part of a method's payload: a vector [D] as a row, or a symmetric matrix [D, D]."""
    if tensor.ndim == 1:
        return encode_rows(tensor[None], precision, None)
    return encode_symmetric(tensor, precision, rank, None)


def decode_payload(encoded: Encoded, dim: int, precision: Precision) -> Tensor:
    """The vector or matrix that ``encode_payload`` was given, up to rounding."""
    triangle = _format(precision).largest_code is None and encoded["values"].ndim == 1
    if triangle or "diagonal" in encoded or "eigenvalues" in encoded:
        return decode_symmetric(encoded, dim, precision)
    return decode_rows(encoded, dim, precision)[0]


@lru_cache(maxsize=1024)
def _block(shape: torch.Size, longest: int | None) -> tuple[int, int] | None:
    """As what [channels, length] a parameter is quantized; None: it is not.

    Channels are cut into equal groups of at most ``longest`` values, where they can be.
    """
    if len(shape) < 2 or not shape.numel() >= SHORTEST_CHANNEL * shape[0] > 0:
        return None
    length = group = shape.numel() // shape[0]
    if longest is not None:
        group = max(g for g in range(1, min(length, longest) + 1) if length % g == 0)
        group = group if group >= SHORTEST_CHANNEL else length
    return shape[0] * (length // group), group


@lru_cache(maxsize=16)
def _triangle(dim: int, offset: int) -> tuple[Tensor, Tensor]:
    index_2T = torch.triu_indices(dim, dim, offset)
    return index_2T[0], index_2T[1]


def _format(precision: Precision) -> NumberFormat:
    if precision not in FORMATS:
        raise ValueError(f"precision must be one of {', '.join(FORMATS)}, not {precision!r}")
    return FORMATS[precision]


def _scaled(
    blocks: Sequence[Tensor], form: NumberFormat, largest_code: int, rng: np.random.Generator | None
) -> Encoded:
    """Blocks [channels, length] into one buffer of codes and one of scales."""
    largest_K = torch.cat([block.abs().amax(1) for block in blocks])
    exact_K = largest_K / largest_code
    exact_K.clamp_(min=torch.finfo(torch.float32).tiny)  # zero rows divide, none is subnormal
    scale_K = exact_K.bfloat16()
    above_K = torch.nextafter(scale_K, torch.full_like(scale_K, torch.inf))
    scale_K = torch.where(scale_K.float() < exact_K, above_K, scale_K)
    scales = scale_K.float().split_with_sizes([len(block) for block in blocks])
    ratio_N = torch.cat([(x / s[:, None]).reshape(-1) for x, s in zip(blocks, scales, strict=True)])
    return {"values": form.pack(ratio_N, rng), "scale": scale_K}


def _unscaled(
    encoded: Mapping[str, Tensor], shapes: Sequence[tuple[int, int]], form: NumberFormat
) -> list[Tensor]:
    sizes = [channels * length for channels, length in shapes]
    codes = form.unpack(encoded["values"], sum(sizes)).split_with_sizes(sizes)
    scales = encoded["scale"].float().split_with_sizes([channels for channels, _ in shapes])
    return [
        code.view(shape) * scale[:, None]
        for code, scale, shape in zip(codes, scales, shapes, strict=True)
    ]


def _codes(ratio_N: Tensor, rng: np.random.Generator | None) -> Tensor:
    """Rounded to int8, in place."""
    if rng is None:
        return ratio_N.round_().to(torch.int8)
    # As floor(ratio + u), but the float32 sum 127 + u may round to 128.
    u_N = torch.from_numpy(rng.random(len(ratio_N), dtype=np.float32)).to(ratio_N.device)
    floor_N = ratio_N.floor()
    return ratio_N.sub_(floor_N).sub_(u_N).ceil_().add_(floor_N).to(torch.int8)


def _pack_halves(ratio_N: Tensor, rng: np.random.Generator | None) -> Tensor:
    """Two's complement in 4 bits. Halves, not neighbours, share a byte: no strided access."""
    bits_N = _codes(ratio_N, rng).view(torch.uint8)
    half = (len(bits_N) + 1) // 2
    packed = bits_N[:half] & 15
    packed[: len(bits_N) - half] |= bits_N[half:] << 4
    return packed


def _unpack_halves(packed: Tensor, count: int) -> Tensor:
    # A signed shift to the right brings the sign along.
    low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    return torch.cat((low, high))[:count].float()


def _encode_eigenvectors(
    matrix_DD: Tensor, precision: Precision, rank: int, rng: np.random.Generator | None
) -> Encoded:
    dim = len(matrix_DD)
    if not 0 <= rank < dim:
        raise ValueError(f"rank must be from 0 to {dim - 1}, one less than the side, not {rank}")
    finite = bool(matrix_DD.triu().isfinite().all())
    # eigh stops at a NaN; it is to show in the result.
    value_D, vector_DD = torch.linalg.eigh(
        matrix_DD.double() if finite else torch.eye(dim).double(), UPLO="U"
    )
    rest = value_D.unfold(0, dim - rank, 1)
    low = int(rest.var(1, correction=0).argmin())
    kept_R = [*range(low), *range(low + dim - rank, dim)]
    eigenvalues = torch.cat((value_D[kept_R], rest[low].mean()[None])).float()
    return {
        **encode_rows(vector_DD[:, kept_R].T.float().contiguous(), precision, rng),
        "eigenvalues": eigenvalues if finite else torch.full_like(eigenvalues, torch.nan),
    }


def _float(packed: Tensor, count: int) -> Tensor:
    return packed.float()


FORMATS: dict[Precision, NumberFormat] = {
    "float32": NumberFormat(lambda values, rng: values.contiguous(), _float),
    "bfloat16": NumberFormat(to_bfloat16, _float),
    "int8": NumberFormat(_codes, _float, largest_code=127),
    "int4": NumberFormat(_pack_halves, _unpack_halves, largest_code=7, longest=GROUP_INT4),
}
