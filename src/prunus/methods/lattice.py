"""Weights that lie on the values of a type already, and keep them.

Some checkpoints were rounded before, and are stored in bfloat16 all the same: after training for
four bits, or unpacked from a format of few bits. Then every span has a d, and perhaps a minimum,
with which

    weight = d · value − dmin,    rounded to the dtype of the checkpoint.

`on_lattice` finds these numbers. A search of scales would find others, which suit the measured
inputs better, and move weights that need not move.

Half the distance between neighbouring numbers of the checkpoint's dtype, h, says how far a stored
weight can be from d · value − dmin. So once the values v are known, each weight x leaves the
interval from (x + dmin − h) / v to (x + dmin + h) / v for d. If they have a number in common, the
span lies on the lattice. Values are known if one of them is: that of the largest weight. There are
as many candidates as values, and those with minima also have the candidates for dmin that are h or
less from the end of the span.

Shape suffixes: N spans, C columns of a span, V candidates, O outputs (rows), I inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunus.methods.group_quantizer import GroupedWeight, GroupQuantizer, Spans, over

# The spans that are looked at first, at equal distances, and those that are looked at together.
_SAMPLED, _TOGETHER = 64, 2**12
# Weights are at most this number of h from the values. The first finds exact scales. Beyond that,
# scales of the source may have been of a wider dtype than the type has.
_SLACKS = (1, 2)
# A level is known if the errors of the weight and of d are less than this part of a step.
_SURE = 0.45
# Whether a round counts only the levels that are known in spite of the error of d. With few values
# all of them are known, and the last round is enough.
_ROUNDS, _FEW = (True, True, False), 64
# A share of h, by which a number that is nearest to an odd one is nearer than h.
_LITTLE = 2.0**-10


class _Fit(NamedTuple):
    """The lattices of candidates: which fit, d, the offset −dmin (V, N), and levels (V, N, C)."""

    fits: Tensor
    d: Tensor
    base: Tensor
    levels: Tensor


def on_lattice(weight_OI: Tensor, quantizer: GroupQuantizer) -> GroupedWeight | None:
    """A weight in a type whose values it has already; None if it lies on no such lattice.

    Every value is then that of the weight, rounded to the dtype in which the numbers of the weight
    are exact: bfloat16, float16 or float32. If the scales of the type are coarser than those that
    the weight was rounded with, a value may be one such number away.

    A few spans say that ordinary weights lie on none, within milliseconds.

    Args:
        weight_OI: A weight of any float dtype.
        quantizer: The type. Types whose spans have several groups, or codebooks, have no lattice.

    >>> from prunus.formats.gguf.types import TYPES
    >>> weight = torch.arange(-8.0, 8).repeat(4, 2) * 0.013
    >>> kept = on_lattice(weight.bfloat16(), TYPES["Q4_0"])
    >>> torch.equal(kept.dense().bfloat16(), weight.bfloat16())
    True
    >>> on_lattice(torch.linspace(-0.1, 0.12, 128).view(4, 32), TYPES["Q4_0"]) is None
    True
    """
    if quantizer.codes != (1, 1) or quantizer.unit > 1 or weight_OI.shape[1] % quantizer.span:
        return None
    if order := list(quantizer.columns):
        weight_OI = weight_OI[:, order]
    weight_NC = weight_OI.reshape(-1, quantizer.span)
    some = torch.linspace(0, len(weight_NC) - 1, min(_SAMPLED, len(weight_NC))).long()
    few_NC = weight_NC[some]
    fullest = few_NC[few_NC.count_nonzero(1).argmax(), None]
    candidates, slack = _candidates(quantizer, dtype := _exact_dtype(fullest)), _SLACKS[-1]
    if not bool(_fit(fullest, candidates, quantizer, dtype, slack).fits.any()):
        return None
    if _spans(few_NC, quantizer, _exact_dtype(few_NC)) is None:
        return None
    dtype, parts = _exact_dtype(weight_NC), []
    for part_NC in weight_NC.split(_TOGETHER):
        if (spans := _spans(part_NC, quantizer, dtype)) is None:
            return None
        parts.append(quantizer.pack(spans))
    return GroupedWeight(quantizer, torch.cat(parts).view(len(weight_OI), -1))


def _exact_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the fewest bits in which all numbers of a weight are exact."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight.to(dtype).float(), weight.float()):
            return dtype
    return torch.float32


def _candidates(quantizer: GroupQuantizer, dtype: torch.dtype) -> Tensor:
    """For each candidate (V, 3), the likely ones first:

    - the value of the weight that is farthest from 0, or from the end of the span with value 0;
    - whether that end is the upper one;
    - how many numbers of the dtype of scales lie between that weight and the offset.
    """
    values = quantizer.values
    if not quantizer.has_minimum:
        # Both signs of d are the same lattice if values are symmetric.
        sides = values[len(values) // 2 :] if values[0] == -values[-1] else values
        far = sorted(filter(None, sides), key=abs, reverse=True)
        return torch.tensor([(value, 0, 0) for value in far])
    reach = int(torch.finfo(dtype).eps / torch.finfo(quantizer.dtype).eps / 2)
    # Below a power of two, numbers are half as far apart.
    shifts = sorted(
        (x / 2 for x in range(-2 * reach, 2 * reach + 1)), key=lambda x: (x % 1, abs(x))
    )
    rows = [(v, upper, shift) for v in values[:0:-1] for upper in (0, 1) for shift in shifts]
    return torch.tensor(rows)


def _spans(weight_NC: Tensor, quantizer: GroupQuantizer, dtype: torch.dtype) -> Spans | None:
    """The lattice of each span; None if one of them has none."""
    d_N, base_N = torch.zeros(2, len(weight_NC))
    levels_NC = torch.zeros(weight_NC.shape, dtype=torch.uint8)
    left = torch.arange(len(weight_NC))
    for slack in _SLACKS:
        for candidate in _candidates(quantizer, dtype):
            fit = _fit(weight_NC[left], candidate[None], quantizer, dtype, slack)
            fits = fit.fits[0]
            found = left[fits]
            d_N[found], base_N[found] = fit.d[0, fits], fit.base[0, fits]
            levels_NC[found] = fit.levels[0, fits].to(torch.uint8)
            if not len(left := left[~fits]):
                one_N1 = torch.ones(len(d_N), 1)
                return Spans(d_N, -base_N, one_N1, one_N1, levels_NC)
    return None


def _fit(
    weight_NC: Tensor,
    candidates_V3: Tensor,
    quantizer: GroupQuantizer,
    dtype: torch.dtype,
    slack: float,
) -> _Fit:
    """The lattice of each candidate that is nearest to each span, and whether it is near enough.

    Args:
        weight_NC: Spans of a weight.
        candidates_V3: What `_candidates` returned, or a part of it.
        quantizer: The type.
        dtype: The dtype to which the values were rounded.
        slack: How many h weights can be from the values.
    """
    weight_NC = weight_NC.to(torch.float64 if dtype == torch.float32 else torch.float32)
    below_NC, above_NC = _neighbourhood(weight_NC, dtype, slack)
    value_V1, upper_V1, shift_V1 = candidates_V3.T.to(weight_NC.dtype)[..., None]
    lowest_N, highest_N = weight_NC.amin(1), weight_NC.amax(1)
    if quantizer.has_minimum:
        edge_VN = torch.where(upper_V1 > 0, highest_N, lowest_N)
        far_VN = lowest_N + highest_N - edge_VN
        shift_VN = 2 * shift_V1 * _half_distance(edge_VN, quantizer.dtype)
        base_VN = quantizer.stored(edge_VN + shift_VN)
        error_VN = slack * (_half_distance(edge_VN, dtype) + _half_distance(far_VN, dtype))
    else:
        far_VN = torch.where(highest_N > -lowest_N, highest_N, lowest_N).expand(len(value_V1), -1)
        far_VN = far_VN.abs() if quantizer.values[0] == -quantizer.values[-1] else far_VN
        base_VN = torch.zeros(far_VN.shape)
        error_VN = slack * _half_distance(far_VN, dtype)
    base_VN1 = base_VN[..., None]
    below_VNC, above_VNC = below_NC - base_VN1, above_NC - base_VN1
    moved_VNC = weight_NC - base_VN1
    d_VN = over(far_VN - base_VN, value_V1)
    doubt_VN = error_VN / value_V1.abs()
    for narrows in _ROUNDS[2 * (len(quantizer.values) < _FEW) :]:
        value_VNC, levels_VNC = quantizer.nearest(over(moved_VNC, d_VN[..., None]))
        first_VNC, second_VNC = below_VNC / value_VNC, above_VNC / value_VNC
        counts = value_VNC != 0
        if narrows:
            error_VNC = above_VNC - moved_VNC + value_VNC.abs() * doubt_VN[..., None]
            counts &= error_VNC < _SURE * d_VN[..., None].abs()
        low_VN = torch.minimum(first_VNC, second_VNC).where(counts, -torch.inf).amax(-1)
        high_VN = torch.maximum(first_VNC, second_VNC).where(counts, torch.inf).amin(-1)
        d_VN = quantizer.stored(((low_VN + high_VN) / 2).nan_to_num_(0, 0, 0))
        doubt_VN = (high_VN - low_VN) / 2
    fits_VN = (low_VN <= d_VN) & (d_VN <= high_VN)
    fits_VN &= ((value_VNC != 0) | (below_VNC <= 0) & (above_VNC >= 0)).all(-1)
    return _Fit(fits_VN, d_VN, base_VN, levels_VNC)


def _neighbourhood(weight: Tensor, dtype: torch.dtype, slack: float) -> tuple[Tensor, Tensor]:
    """The least and the largest number that a dtype rounds to each weight, or to one near it."""
    bits = weight.to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)
    # A number in the middle between two is rounded to the even one.
    away = (slack - _LITTLE * (bits & 1)) * _half_distance(weight, dtype)
    # Towards 0, the next number below a power of two is half as far away.
    towards = torch.where(weight.frexp().mantissa.abs() == 0.5, away / 2, away)
    is_positive = weight > 0
    below = weight - torch.where(is_positive, towards, away)
    return below, weight + torch.where(is_positive, away, towards)


def _half_distance(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of each number to the next larger one of a dtype; 0 for 0."""
    info = torch.finfo(dtype)
    half = (info.eps / 4) * torch.exp2(numbers.frexp().exponent.to(numbers.dtype))
    return half.clamp_min_(info.smallest_normal * info.eps / 2).where(numbers != 0, 0.0)
