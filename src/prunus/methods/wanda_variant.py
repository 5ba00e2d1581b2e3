"""Wanda's variant: every row gives up the same share of its total score, not the same number of weights.

Scores as in Wanda. A row loses its lowest weights as long as their summed score is at most a fraction α of the
row's sum. One α serves the whole linear, found by bisection so that the linear's sparsity comes within 0.001 of the
target (appendix of arXiv 2306.11695). The start at 0.4 and the steps are those of the original code, because every
α within the tolerance gives another mask.

Shape suffixes: O outputs (rows), I inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prunus.methods.base import Method, MethodOptions, Pruned, masked
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score

_TOLERANCE = 0.001
_CEILING = 0.8
# Where equal scores make the sparsity jump over the target, the bisection ends here.
_FINEST_ALPHA = 1e-7


def _sorted_rows(score_OI: Tensor) -> Tensor:
    # On the CPU NumPy sorts five times faster, and carries no indices along.
    if score_OI.device.type == "cpu":
        return torch.from_numpy(np.sort(score_OI.numpy(), axis=1))
    return score_OI.sort(dim=1).values


def _thresholds(ascending_OI: Tensor, running_OI: Tensor, sum_O1: Tensor, alpha: float) -> Tensor:
    """Per row the highest score within the share α, (O, 1); -1 where even the lowest exceeds it."""
    count_O1 = torch.searchsorted(running_OI, sum_O1 * alpha, right=True)
    threshold_O1 = ascending_OI.gather(1, (count_O1 - 1).clamp_(min=0))
    return threshold_O1.masked_fill(count_O1 == 0, -1)


def _sparsity(ascending_OI: Tensor, threshold_O1: Tensor) -> float:
    return (
        int(torch.searchsorted(ascending_OI, threshold_O1, right=True).sum()) / ascending_OI.numel()
    )


def _prune(
    weight_OI: Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    sparsity: float,
    options: MethodOptions,
) -> Pruned:
    score_OI = wanda_score(weight_OI, statistics)
    if sparsity == 0:
        return masked(weight_OI, torch.ones_like(score_OI, dtype=torch.bool))
    ascending_OI = _sorted_rows(score_OI)
    running_OI = ascending_OI.cumsum(dim=1)
    sum_O1 = score_OI.sum(dim=1, keepdim=True)

    low, high, alpha = 0.0, _CEILING, 0.4
    if _sparsity(ascending_OI, _thresholds(ascending_OI, running_OI, sum_O1, high)) < sparsity:
        high = 1.0  # the original stops at 0.8 and misses high targets
    while True:
        threshold_O1 = _thresholds(ascending_OI, running_OI, sum_O1, alpha)
        reached = _sparsity(ascending_OI, threshold_O1)
        if abs(reached - sparsity) <= _TOLERANCE or high - low < _FINEST_ALPHA:
            return masked(weight_OI, score_OI > threshold_O1, {"alpha": alpha})
        if reached > sparsity:
            high = alpha
        else:
            low = alpha
        alpha = (low + high) / 2


WANDA_VARIANT = Method(
    name="wanda-variant",
    needs="norms",
    prune=_prune,
    default_group="row",
    updates_weights=False,
    summary="as wanda, but every row gives up the same share of its score",
)
