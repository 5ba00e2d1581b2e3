"""SparseGPT's score alone: the error of removing a weight, without the update of the others.

The score of w_ij is w_ij² / [(G + λI)⁻¹]_jj, the squared output error that is left once all other
weights of the row have corrected for w_ij (Frantar and Alistarh 2023, arXiv 2301.00774, equation
3). Here they do not correct. The Wanda paper compares this score with magnitude and with its own
for each group of competing weights (table 7 of arXiv 2306.11695).

The diagonal of the whole inverse is meant. SparseGPT itself divides by U_jj², which forgets the
columns to the left; see `solvers/obs.py`.
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.patterns import keep_mask
from prunus.methods.solvers.obs import shared_factor
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Pruned, Work, masked


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights with the largest scores, unchanged.

    Weights of inputs that are always 0 have the score 0, because any value of them does no harm.

    Args:
        weight_OI: float32, the trained weights.
        statistics: With a Gram matrix.
        work: Its `damping` is λ, a share of the mean diagonal; None means `obs.DAMPING`.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `obs.inverse_factor`.

    >>> import torch
    >>> statistics = InputStatistics(2, "gram")
    >>> statistics.add(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> prune(torch.tensor([[1.0, 2.0]]), statistics, Work(sparsity=0.5)).keep_OI
    tensor([[ True, False]])
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "the score needs a Gram matrix"
    factor_II, notes = shared_factor(statistics, work)
    # (G + λI)⁻¹ = UᵀU, so its diagonal has the squared norms of the columns of U.
    norms_I = factor_II.square().sum(dim=0).rsqrt()
    score_OI = weight_OI.abs() * norms_I.masked_fill(gram_II.diagonal() == 0, 0)
    return masked(weight_OI, keep_mask(score_OI, work.pattern, work.sparsity), dict(notes))
