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

from collections.abc import Iterable

import torch
from torch import Tensor

from prunus.rounding.group_quantizer import GroupedWeight, GroupQuantizer, Spans, over

# The spans, at equal distances, that must lie on the lattice before all others are looked at.
_SAMPLES = (1, 16)
# Spans that are looked at together.
_TOGETHER = 2**12
# Weights are at most this number of h from the values. The first finds the values exactly; then
# come scales that the source had in a wider dtype than the type has.
_SLACKS = (1, 2)
# A share of h: by how much less than h the error of a number is that was rounded to an odd one.
_LITTLE = 2.0**-10
# A level is known if the errors of the weight and of d are less than this part of a step.
_SURE = 0.45
# With fewer values than these, every level is known from the first d.
_FEW = 64


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
    order = list(quantizer.columns)
    stored_OI = (weight_OI[:, order] if order else weight_OI).cpu()
    weight_NC = stored_OI.reshape(-1, quantizer.span)
    far = _farthest(quantizer)
    for count in _SAMPLES:
        some_NC = weight_NC[torch.linspace(0, len(weight_NC) - 1, count).long()]
        dtype = _exact_dtype(some_NC)
        fits_VN, *_ = _fit(
            some_NC, _candidates(far, quantizer, dtype), quantizer, dtype, _SLACKS[-1]
        )
        if not bool(fits_VN.any(0).all()):
            return None
    # The values that fit most of the few spans come first.
    hits = fits_VN.view(len(far), -1, count).any(1).sum(1)
    far = [far[x] for x in hits.argsort(descending=True, stable=True)]
    dtype = _exact_dtype(weight_NC)
    candidates_V3 = _candidates(far, quantizer, dtype)
    parts = []
    for part_NC in weight_NC.split(_TOGETHER):
        if (spans := _spans(part_NC, candidates_V3, quantizer, dtype)) is None:
            return None
        parts.append(quantizer.pack(spans))
    data_OB = torch.cat(parts).view(len(weight_OI), -1)
    return GroupedWeight(quantizer, data_OB.to(weight_OI.device))


def lossless_type(weight_OI: Tensor, quantizers: Iterable[GroupQuantizer]) -> GroupQuantizer | None:
    """The smallest of some types whose values a weight has already; None if it has those of none.

    Three ask it: the plan and the model card of a result (for a few rows of each weight), the
    choice of types (for all rows, since a few other ones would lose what the choice counts as
    nothing), and `inspect` of a GGUF file. `on_lattice` alone is asked where a weight is rounded.

    Args:
        weight_OI: A weight, or some of its rows, in any float dtype.
        quantizers: The types.
    """
    by_size = sorted(quantizers, key=lambda x: x.bits)
    return next((x for x in by_size if on_lattice(weight_OI, x) is not None), None)


def _exact_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the fewest bits in which all numbers of a weight are exact."""
    few = (torch.bfloat16, torch.float16)
    return next(
        (x for x in few if torch.equal(weight.to(x).float(), weight.float())), torch.float32
    )


def _farthest(quantizer: GroupQuantizer) -> list[float]:
    """The values that the weight which is farthest from value 0 can have, the largest first."""
    # Half the step and twice the value are the same, so integers from half the largest on will do.
    least = quantizer.values[-1] / 2 if quantizer.is_even else 0
    is_symmetric = quantizer.values[0] == -quantizer.values[-1]
    # Both signs of d are the same lattice if values are symmetric.
    far = {abs(x) if is_symmetric else x for x in quantizer.values if abs(x) > least}
    return sorted(far, key=lambda x: (-abs(x), x))


def _candidates(far: list[float], quantizer: GroupQuantizer, dtype: torch.dtype) -> Tensor:
    """For each candidate (V, 3), those of the first value first:

    - the value of the weight that is farthest from 0, or from the end of the span with value 0;
    - whether that end is the upper one;
    - how many numbers of the dtype of scales lie between that weight and the offset.
    """
    if not quantizer.has_minimum:
        return torch.tensor([(value, 0, 0) for value in far])
    reach = int(torch.finfo(dtype).eps / torch.finfo(quantizer.dtype).eps)
    # Below a power of two, numbers are half as far apart.
    shifts = sorted((x / 2 for x in range(-reach, reach + 1)), key=lambda x: (x % 1, abs(x)))
    return torch.tensor([(x, upper, shift) for x in far for upper in (0, 1) for shift in shifts])


def _spans(
    weight_NC: Tensor, candidates_V3: Tensor, quantizer: GroupQuantizer, dtype: torch.dtype
) -> Spans | None:
    """The lattice of each span; None if one of them has none."""
    d_N, base_N = torch.zeros(2, len(weight_NC))
    levels_NC, left = torch.zeros_like(weight_NC, dtype=torch.uint8), torch.arange(len(weight_NC))
    for slack in _SLACKS:
        for candidate_13 in candidates_V3.split(1):
            # With one candidate.
            (fits_N,), (d_L,), (base_L,), (levels_LC,) = _fit(
                weight_NC[left], candidate_13, quantizer, dtype, slack
            )
            found = left[fits_N]
            d_N[found], base_N[found] = d_L[fits_N].float(), base_L[fits_N]
            levels_NC[found] = levels_LC[fits_N].to(torch.uint8)
            left = left[~fits_N]
            if not len(left):
                one_N1 = torch.ones(len(d_N), 1)
                return Spans(d_N, -base_N, one_N1, one_N1, levels_NC)
    return None


def _fit(
    weight_NC: Tensor,
    candidates_V3: Tensor,
    quantizer: GroupQuantizer,
    dtype: torch.dtype,
    slack: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lattice of each candidate that is nearest to each span.

    Args:
        weight_NC: Spans of a weight.
        candidates_V3: What `_candidates` returned, or a part of it.
        quantizer: The type.
        dtype: The dtype to which the values were rounded.
        slack: How many h weights can be from the values.

    Returns:
        Whether the lattice fits, d, and −dmin, all (V, N), and the levels (V, N, C).
    """
    weight_NC = weight_NC.to(torch.float64 if dtype == torch.float32 else torch.float32)
    value_V1, upper_V1, shift_V1 = candidates_V3.T.to(weight_NC.dtype)[..., None]
    lowest_N, highest_N = weight_NC.aminmax(dim=1)
    if quantizer.has_minimum:
        edge_VN = torch.where(upper_V1 > 0, highest_N, lowest_N)
        far_VN = lowest_N + highest_N - edge_VN
        base_VN = quantizer.as_scale(edge_VN + 2 * shift_V1 * _half(edge_VN, quantizer.dtype))
    else:
        far_N = torch.where(highest_N > -lowest_N, highest_N, lowest_N)
        far_N = far_N.abs() if quantizer.values[0] == -quantizer.values[-1] else far_N
        base_VN = torch.zeros(len(value_V1), len(far_N))
        far_VN = far_N.expand_as(base_VN)
    low_NC, high_NC = _rounded_to(weight_NC, dtype, slack)
    low_VNC, moved_VNC, high_VNC = (x - base_VN[..., None] for x in (low_NC, weight_NC, high_NC))
    d_VN, doubt_VN = over(far_VN - base_VN, value_V1), slack * _half(far_VN, dtype) / value_V1.abs()
    for narrows in (True, True, False) if len(quantizer.values) >= _FEW else (False,):
        value_VNC, levels_VNC = quantizer.nearest(over(moved_VNC, d_VN[..., None]))
        ends = torch.stack([low_VNC / value_VNC, high_VNC / value_VNC])
        counts = value_VNC != 0
        if narrows:
            error_VNC = high_VNC - moved_VNC + value_VNC.abs() * doubt_VN[..., None]
            counts &= error_VNC < _SURE * d_VN[..., None].abs()
        least_VN = ends.amin(0).where(counts, -torch.inf).amax(-1)
        most_VN = ends.amax(0).where(counts, torch.inf).amin(-1)
        middle_VN, doubt_VN = (least_VN + most_VN) / 2, (most_VN - least_VN) / 2
        d_VN = torch.where(doubt_VN.isfinite(), quantizer.as_scale(middle_VN), d_VN)
    fits_VN = (least_VN <= d_VN) & (d_VN <= most_VN)
    fits_VN &= ((value_VNC != 0) | (low_VNC <= 0) & (high_VNC >= 0)).all(-1)
    return fits_VN, d_VN, base_VN, levels_VNC


def _half(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of each number to the next one of a dtype, away from 0; 0 for 0."""
    info = torch.finfo(dtype)
    half = (info.eps / 4) * torch.exp2(numbers.frexp().exponent.to(numbers.dtype))
    return half.clamp_min_(info.smallest_normal * info.eps / 2).where(numbers != 0, 0.0)


def _rounded_to(weight: Tensor, dtype: torch.dtype, slack: float) -> tuple[Tensor, Tensor]:
    """The least and the largest number that a dtype rounds to each weight; see `_SLACKS`."""
    bits = weight.to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)
    # A number in the middle between two is rounded to the even one.
    away = (slack - _LITTLE * (bits & 1)) * _half(weight, dtype)
    # Towards 0, the next number below a power of two is half as far away.
    towards = torch.where(weight.frexp().mantissa.abs() == 0.5, away / 2, away)
    up, down = torch.where(weight > 0, away, towards), torch.where(weight > 0, towards, away)
    return weight - down, weight + up
