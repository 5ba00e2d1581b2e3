"""The bits that belong to a packed linear besides those of its integers."""

from __future__ import annotations

import math


def side_bits(shape: tuple[int, int]) -> float:
    """The bits per weight of steps, scales and classes.

    Args:
        shape: (out, in) of the linear.

    >>> round(side_bits((1536, 576)), 4)
    0.0434
    """
    rows, columns = shape
    return (16 * rows + (16 + 8) * columns) / (rows * columns)


def zero_bits(sparsity: float) -> float:
    """The bits per weight that say which weights a mask keeps: the entropy of a coin.

    Args:
        sparsity: The share of weights that the mask removes, from 0 to 1.

    >>> zero_bits(0.5)
    1.0
    """
    return sum(-share * math.log2(share) for share in (sparsity, 1 - sparsity) if 0 < share < 1)
