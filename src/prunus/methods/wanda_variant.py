"""Wanda's variant: every row gives up the same share of its total score, not as many weights.

The scores are Wanda's. A row loses its lowest weights as long as their summed score is at most a
fraction α of the row's sum. One α serves the whole linear. Bisection finds it, so that the sparsity
of the linear is within 0.001 of the target (appendix of arXiv 2306.11695).

Why the bisection starts at 0.4 and takes the steps of the original code: every α within the
tolerance gives another mask, and only the same steps end at the same one.

Shape suffixes: O outputs (rows), I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score
from prunus.methods.work import Pruned, Work, masked

_TOLERANCE = 0.001
# The original code searches α from 0 to this value.
_MAX_ALPHA = 0.8
# Where many scores are equal, the sparsity jumps over the target. The bisection then ends when the
# interval is as small as this.
_MIN_INTERVAL = 1e-7


def _thresholds(ascending_OI: Tensor, running_OI: Tensor, sum_O1: Tensor, alpha: float) -> Tensor:
    """The highest score that each row gives up, (O, 1); -1 where the row loses nothing.

    Args:
        ascending_OI: The scores of each row, rising.
        running_OI: Their running sums.
        sum_O1: The sum of each row's scores, in the order of the columns, as the original code has
            it. It may differ from the last running sum by rounding.
        alpha: The share of the sum that a row may give up.
    """
    # The running sums of a row are sorted, so a binary search counts those within the share.
    count_O1 = torch.searchsorted(running_OI, sum_O1 * alpha, right=True)
    threshold_O1 = ascending_OI.gather(1, (count_O1 - 1).clamp_(min=0))
    return threshold_O1.masked_fill(count_O1 == 0, -1)


def _sparsity(ascending_OI: Tensor, threshold_O1: Tensor) -> float:
    """The share of weights at or below the thresholds."""
    below = torch.searchsorted(ascending_OI, threshold_O1, right=True)
    return int(below.sum()) / ascending_OI.numel()


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights above the thresholds of their rows, which keep their values.

    Args:
        weight_OI: float32, the trained weights.
        statistics: With norms.
        work: Unstructured; its sparsity is that of the linear, not of each row.

    Returns:
        Mask and weights. The notes have `alpha`, the share that every row gives up.
    """
    score_OI = wanda_score(weight_OI, statistics)
    sparsity = work.sparsity
    ascending_OI = score_OI.sort(dim=1).values
    running_OI = ascending_OI.cumsum(dim=1)
    sum_O1 = score_OI.sum(dim=1, keepdim=True)

    low, high = 0.0, _MAX_ALPHA
    alpha = 0.4
    if _sparsity(ascending_OI, _thresholds(ascending_OI, running_OI, sum_O1, high)) < sparsity:
        # The original code stops at 0.8 and misses high targets.
        high = 1.0
    while True:
        threshold_O1 = _thresholds(ascending_OI, running_OI, sum_O1, alpha)
        reached = _sparsity(ascending_OI, threshold_O1)
        if abs(reached - sparsity) <= _TOLERANCE or high - low < _MIN_INTERVAL:
            return masked(weight_OI, score_OI > threshold_O1, {"alpha": alpha})
        if reached > sparsity:
            high = alpha
        else:
            low = alpha
        alpha = (low + high) / 2
