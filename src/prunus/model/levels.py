"""Whether weights lie on a grid of a few levels, because they were rounded before and unpacked.

Formats of few bits keep a scale, and perhaps a smallest value, for each block of 32 weights or
more. Unpacked into bfloat16 such weights look like all others, but in every block the same few
values return. A quantiser with a similar grid finds these values again, and then seems to lose
nothing.

The count needs no types, so it also finds grids that `lattice.py` cannot name: those of types with
groups in groups (K types), whose scales are products, and those of formats that no result has.
"""

from __future__ import annotations

import math

import torch

#: Consecutive weights of a row that have one scale in nearly all formats.
_BLOCK = 32
#: Fewer pairs of weights that are not zero say nothing.
_LEAST_PAIRS = 1000
# Two weights of a block are equal with a chance of 1 in L. Random weights of several shapes, 128
# rows of 768, rounded to
#
#     4 bits (Q4_0, Q4_1, Q4_K, IQ4, int4)    L = 7 to 17      as few where half are pruned
#     5 bits (Q5_0, Q5_1, Q5_K)               L = 14 to 33
#     float8, e5m2 and e4m3                   L = 36 and 70
#     Q6_K, int8 per row, Q8_0                L = 107, 132, 108 to 258
#     bfloat16, and no grid                   L = 680 to 1400, and 146 where 95 % are pruned
#
# In bfloat16, weights of one size and both signs, within 5 %, have 61 and more. So the limit is
# where hardly anything but a grid is, and grids of 6 bits and more count as none: pruned weights
# look alike.
_MOST_LEVELS = 40


def value_bits(values: torch.Tensor) -> int | None:
    """The bits of the grid that values lie on, or None. Grids of 6 bits and more count as none.

    Args:
        values: Some rows of a matrix, flat, in any float dtype; a thousand blocks are enough.
    """
    blocks_BK = values[: len(values) // _BLOCK * _BLOCK].float().reshape(-1, _BLOCK)
    used_BK = blocks_BK != 0  # zeros of pruned weights are equal without any grid
    equal_BKK = (blocks_BK[:, :, None] == blocks_BK[:, None, :]) & used_BK[:, None, :]
    times_BK = equal_BKK.sum(dim=-1)  # how often each value is in its block
    count_B = used_BK.sum(dim=-1)
    pairs, equal = int((count_B * (count_B - 1)).sum()), int((times_BK - 1).clamp_min(0).sum())
    if pairs < _LEAST_PAIRS or equal * _MOST_LEVELS < pairs:
        return None
    distinct_B = (used_BK / times_BK.clamp_min(1)).sum(dim=-1)
    return max(1, math.ceil(math.log2(round(float(distinct_B.max())))))
