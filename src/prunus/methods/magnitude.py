"""Magnitude: the weights smallest in absolute value go. Needs no data.

Score |W_ij|, over the whole matrix unless told otherwise (Han et al. 2015, arXiv 1506.02626; the baseline of
the Wanda paper, arXiv 2306.11695).
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.base import Method, MethodOptions, Pruned, masked
from prunus.methods.patterns import Pattern, keep_above_threshold, keep_mask
from prunus.methods.statistics import InputStatistics


def magnitude_keep(weight_OI: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask, bool (O, I). Where the whole matrix competes, equal magnitudes share their fate."""
    if pattern.is_unstructured and pattern.group == "layer":
        return keep_above_threshold(weight_OI.abs(), sparsity)
    return keep_mask(weight_OI.abs(), pattern, sparsity)


def _prune(
    weight_OI: Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    sparsity: float,
    options: MethodOptions,
) -> Pruned:
    return masked(weight_OI, magnitude_keep(weight_OI, pattern, sparsity))


MAGNITUDE = Method(
    name="magnitude",
    needs="none",
    prune=_prune,
    default_group="layer",
    updates_weights=False,
    summary="remove the smallest weights; needs no calibration",
)
