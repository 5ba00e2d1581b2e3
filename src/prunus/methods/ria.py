"""RIA, relative importance and activations: a weight counts by its share of its row and column.

The score is (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ‖X_j‖₂^a with a = 0.5. By default the
whole matrix competes (Zhang et al. 2024, arXiv 2402.17946, equations 3 and 5). Kept weights do not
change.

Why shares: where the whole matrix competes, magnitudes would empty rows and columns whose weights
are all small. A share compares a weight with its own row and column, so no channel is lost. The
paper's permutation of input channels for N:M is not part of prunus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.methods.patterns import keep_mask
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Pruned, Work, masked


def ria_score(weight_OI: Tensor, statistics: InputStatistics, power: float) -> Tensor:
    """RIA's score, (O, I) in the dtype of the weight; 0 where a weight is 0.

    A common factor of all norms is left out: it does not change which scores are lowest.

    Args:
        weight_OI: A weight of any float dtype.
        statistics: With norms.
        power: A, the power of the norms; 0.5 in the paper, 0 leaves the inputs out.

    >>> statistics = InputStatistics(2, "norms")
    >>> statistics.add(torch.ones(1, 2))
    >>> ria_score(torch.tensor([[1.0, 3.0], [1.0, 0.0]]), statistics, 0.5)
    tensor([[0.7500, 1.7500],
            [1.5000, 0.0000]])
    """
    magnitude_OI = weight_OI.abs()
    # A row or column of zeros has the sum 0. Its shares are 0, not 0/0.
    smallest = torch.finfo(weight_OI.dtype).tiny
    column_I = magnitude_OI.sum(dim=0).clamp_(min=smallest)
    row_O1 = magnitude_OI.sum(dim=1, keepdim=True).clamp_(min=smallest)
    share_OI = magnitude_OI / column_I
    share_OI.add_(magnitude_OI.div_(row_O1))
    # Norms relative to the largest one: their powers cannot overflow, and the order stays the same.
    norms_I = statistics.norms_I / statistics.norms_I.max().clamp(min=smallest)
    return share_OI.mul_(norms_I.pow(power).to(weight_OI.dtype))


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights with the largest scores, which keep their values.

    Raises:
        ValueError: The pattern does not fit the shape, or the sparsity is out of range.
    """
    score_OI = ria_score(weight_OI, statistics, work.options.ria_power)
    return masked(weight_OI, keep_mask(score_OI, work.pattern, work.sparsity))
