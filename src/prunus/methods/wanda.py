"""Wanda: magnitude times the norm of the input, competing within each output row.

Score |W_ij| · ‖X_j‖₂ (Sun et al. 2023, arXiv 2306.11695, equation 1). Kept weights are not changed.
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.base import Method, MethodOptions, Pruned, masked
from prunus.methods.patterns import Pattern, keep_mask
from prunus.methods.statistics import InputStatistics


def wanda_score(weight_OI: Tensor, statistics: InputStatistics | None) -> Tensor:
    """|W_ij| · ‖X_j‖₂, (O, I) in the dtype of the weight."""
    assert statistics is not None, "Wanda scores need input norms"
    return weight_OI.abs().mul_(statistics.norms_I.to(weight_OI.dtype))


def _prune(
    weight_OI: Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    sparsity: float,
    options: MethodOptions,
) -> Pruned:
    return masked(weight_OI, keep_mask(wanda_score(weight_OI, statistics), pattern, sparsity))


WANDA = Method(
    name="wanda",
    needs="norms",
    prune=_prune,
    default_group="row",
    updates_weights=False,
    summary="remove by magnitude times input norm, row by row",
)
