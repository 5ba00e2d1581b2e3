"""Wanda: magnitude times the norm of the input; weights compete within each output row.

The score is |W_ij| · ‖X_j‖₂ (Sun et al. 2023, arXiv 2306.11695, equation 1). Kept weights do not
change.

Why the norm: removing W_ij alone changes the output i by W_ij·X_j, and the norm of that is the
score. So a small weight on a large input may matter more than a large weight on a small one.
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.patterns import keep_mask
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Pruned, Work, masked


def wanda_score(weight_OI: Tensor, statistics: InputStatistics) -> Tensor:
    """|W_ij| · ‖X_j‖₂, (O, I) in the dtype of the weight.

    Args:
        weight_OI: A weight of any float dtype.
        statistics: With norms.

    >>> import torch
    >>> statistics = InputStatistics(2, "norms")
    >>> statistics.add(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    >>> wanda_score(torch.tensor([[1.0, -4.0]]), statistics)
    tensor([[5., 4.]])
    """
    return weight_OI.abs().mul_(statistics.norms_I.to(weight_OI.dtype))


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights with the largest scores, which keep their values.

    Raises:
        ValueError: The pattern does not fit the shape, or the sparsity is out of range.
    """
    score_OI = wanda_score(weight_OI, statistics)
    return masked(weight_OI, keep_mask(score_OI, work.pattern, work.sparsity))
