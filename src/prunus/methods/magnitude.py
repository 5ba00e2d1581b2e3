"""Magnitude: remove the weights that are smallest in absolute value. It needs no data.

The score is |W_ij|. By default all weights of the matrix compete (Han et al. 2015, arXiv
1506.02626; the baseline of the Wanda paper, arXiv 2306.11695).
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.patterns import Pattern, keep_above_threshold, keep_mask
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Pruned, Work, masked


def magnitude_mask(weight_OI: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask of the weights with the largest magnitudes, bool (O, I).

    Where the whole matrix competes, equal magnitudes are treated equally: see
    `patterns.keep_above_threshold`.

    Args:
        weight_OI: A weight of any float dtype.
        pattern: Which weights compete.
        sparsity: The share to remove, in [0, 1); N:M ignores it.

    Raises:
        ValueError: The pattern does not fit the shape, or the sparsity is out of range.

    >>> import torch
    >>> magnitude_mask(torch.tensor([[0.5, -2.0, 1.0, -0.1]]), Pattern(), 0.5)
    tensor([[False,  True,  True, False]])
    """
    if pattern.is_unstructured and pattern.group == "layer":
        return keep_above_threshold(weight_OI.abs(), sparsity)
    return keep_mask(weight_OI.abs(), pattern, sparsity)


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights with the largest magnitudes, which keep their values; reads no statistics."""
    return masked(weight_OI, magnitude_mask(weight_OI, work.pattern, work.sparsity))
