"""Quantise an embedding or an output head to a given number of bits, without calibration.

The weight is rounded to the nearest of evenly spaced levels and coded by entropy, so the levels of
a row are as many as its values need. The distance between levels is `scale_i · step_j`. Where the
code adapts to the data, one distance for the whole weight has the smallest error in theory. On the
tied embedding of SmolLM2-135M it was best to let scales grow with the root of a row's root mean
square, and to choose the exponent of the columns for each weight (docs/notes/type-choice.md).

Shape suffixes: O output features (rows), I input features (columns), S rows of a sample.
"""

from __future__ import annotations

import math

import torch

from prunus.hardware.numerics import all_finite
from prunus.runtime.plane_codes import MAX_RAW, max_level
from prunus.runtime.planes import encode
from prunus.runtime.weight import QuantizedWeight

# Levels beyond this one cannot have all raw bits, without which large levels take more bits.
_MAX_LEVEL = max_level(MAX_RAW)
# The scale of a row grows with its root mean square to this power.
_ROW_EXPONENT = 0.5
# The powers to choose from with which the step of a column grows.
_COLUMN_EXPONENTS = (0.0, 0.25, 0.5)
# Weights on which the distance between levels is searched.
_SAMPLE = 1 << 20
# How often the search halves the range of distances.
_HALVINGS = 14
# How often the whole weight is encoded at most. The sample is only nearly as hard to encode.
_ATTEMPTS = 5
#: Memory while a weight is quantised: the weight in two bytes or four, its levels, and its code
#: in pieces and as a whole.
BYTES_PER_QUANTIZED_WEIGHT = 7
# Rows converted to float32 at a time.
_ROWS = 1024


def quantize_rows(weight_OI: torch.Tensor, bits: float) -> QuantizedWeight:
    """Round a weight so that its tensors take at most `bits` bits a weight, and little less.

    With 8 bits it takes fewer even at the finest levels there are, 247 between the extremes of each
    row.

    Args:
        weight_OI: A finite weight of any float dtype, on the CPU.
        bits: Bits per weight, all included.

    Raises:
        ValueError: The squares of the weight leave float32, or this many bits are too few.

    >>> weight = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    >>> quantised = quantize_rows(weight, 4)
    >>> 3.95 < quantised.nbytes * 8 / weight.numel() <= 4
    True
    """
    rows, columns = weight_OI.shape
    # Mean squares of rows, and sums of squares of columns in each run of rows.
    means, sums = [], []
    for part in weight_OI.split(_ROWS):
        squares = part.float().square()
        means.append(squares.mean(1))
        sums.append(squares.sum(0))
    rows_O = _relative(torch.cat(means).sqrt())
    columns_I = _relative(torch.stack(sums).sum(0).sqrt())
    if not (all_finite(rows_O) and all_finite(columns_I)):
        raise ValueError(
            "its weights are too large to be packed: their squares leave float32. Is the "
            "checkpoint whole? `head_bits` none keeps embeddings and head as they are"
        )
    sample_S = torch.linspace(0, rows - 1, min(rows, max(1, _SAMPLE // columns))).long()
    sample_SI = weight_OI[sample_S].float()
    best = (math.inf, 1.0, columns_I)
    for exponent in _COLUMN_EXPONENTS:
        steps_I = columns_I.pow(exponent).bfloat16().float()
        distance = _search(sample_SI, rows_O[sample_S], steps_I, bits)
        levels_SI, scales_S = _round(sample_SI, rows_O[sample_S], steps_I, distance)
        error = float((levels_SI * scales_S[:, None] * steps_I - sample_SI).square().sum())
        if error < best[0]:
            best = (error, distance, steps_I)
    _, distance, steps_I = best
    # The whole weight is encoded, with levels farther apart until it takes at most `bits` bits.
    scales_O, levels_OI = torch.empty(rows), torch.empty(weight_OI.shape, dtype=torch.int8)
    for _ in range(_ATTEMPTS):
        for first in range(0, rows, _ROWS):
            part = slice(first, first + _ROWS)
            levels, scales_O[part] = _round(weight_OI[part], rows_O[part], steps_I, distance)
            levels_OI[part] = levels
        weight = encode(levels_OI, steps_I, scales_O)
        excess = weight.nbytes * 8 / weight_OI.numel() - bits
        if excess <= 0:
            return weight
        distance *= 2 ** min(1.1 * excess + 0.002, 4)
    raise ValueError(
        f"a weight of {rows} x {columns} cannot be stored in {bits} bits a weight; it takes "
        f"{bits + excess:.2f}. Ask for more"
    )


def _relative(sizes: torch.Tensor) -> torch.Tensor:
    """Sizes divided by their mean; very small ones are raised, so that none is zero."""
    mean = float(sizes.mean()) or 1.0
    return (sizes / mean).clamp(min=1e-3)


def _round(
    rows_SI: torch.Tensor, sizes_S: torch.Tensor, steps_I: torch.Tensor, distance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, floats (S, I), and scales (S,), which are larger where 247 levels are too few."""
    scaled_SI = rows_SI.float() / steps_I
    target_S = sizes_S.pow(_ROW_EXPONENT) * distance
    scales_S = torch.maximum(target_S, scaled_SI.abs().amax(1) / _MAX_LEVEL).bfloat16().float()
    scaled_SI /= scales_S[:, None]
    return scaled_SI.round_().clamp_(-_MAX_LEVEL, _MAX_LEVEL), scales_S


def _search(
    sample_SI: torch.Tensor, sizes_S: torch.Tensor, steps_I: torch.Tensor, bits: float
) -> float:
    """Return the smallest distance between levels at which a sample takes `bits` bits a weight."""
    # A file has a class and a step for every column of the whole weight, not of the sample.
    data_bits = bits - 16 / sample_SI.shape[1] - 0.005
    # Below `low` every row has 247 levels, above `high` every level is 0.
    largest_S = (sample_SI / steps_I).abs().amax(1) / sizes_S.pow(_ROW_EXPONENT)
    if not bool(largest_S.any()):
        return 1.0
    low = math.log(float(largest_S[largest_S > 0].min()) / _MAX_LEVEL)
    high = math.log(2 * float(largest_S.max()))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        levels_SI, scales_S = _round(sample_SI, sizes_S, steps_I, math.exp(middle))
        data = encode(levels_SI.to(torch.int8), steps_I, scales_S).data
        if data.shape[0] * 8 / sample_SI.numel() <= data_bits:
            high = middle
        else:
            low = middle
    return math.exp(high)
