"""`obs`: a mask from magnitude or Wanda, or a given one, and SparseGPT's weight update around it.

These are the ablations of the Wanda paper (arXiv 2306.11695, section 5). They separate two
questions: how good is a mask, and what does the update add? The mask is either fixed before the
update, from the trained weights ("before"; the paper calls it "sequential"). Or it is chosen anew
from the updated weights for every 128 columns, and for every group of M if N:M ("blockwise"; the
paper calls it "iterative").
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.methods.magnitude import magnitude_mask
from prunus.methods.patterns import keep_mask
from prunus.methods.solvers.obs import block_mask, prune_by_obs
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score
from prunus.methods.work import Pruned, RowShard, Work


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights that the fixed or the blockwise mask keeps, corrected by the OBS sweep.

    Args:
        weight_OI: float32, the trained weights.
        statistics: With a Gram matrix.
        work: Its options `mask_from` and `mask_order` choose the mask, if it has none.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `obs.inverse_factor`.

    >>> statistics = InputStatistics(4, "gram")
    >>> statistics.add(torch.eye(4) + 0.5)
    >>> weight_OI = torch.tensor([[0.1, 1.0, 2.0, 0.2]])
    >>> pruned = prune(weight_OI, statistics, Work(sparsity=0.5))
    >>> pruned.keep_OI
    tensor([[False,  True,  True, False]])
    >>> bool(pruned.weight_OI[0, 1] > weight_OI[0, 1])  # it replaces what the first weight added
    True
    """
    options = work.options

    if options.mask_order == "before":
        scored_OI = work.without_zeros(weight_OI, slice(None))
        if work.given_OI is not None:
            keep_OI = ~work.given_OI.to(weight_OI.device)
        elif options.mask_from == "magnitude":
            keep_OI = magnitude_mask(scored_OI, work.pattern, work.sparsity)
        else:
            score_OI = wanda_score(scored_OI, statistics)
            keep_OI = keep_mask(score_OI, work.pattern, work.sparsity)

        def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor, shard: RowShard) -> Tensor:
            return keep_OI[shard.rows, start : start + weight_OB.shape[1]]
    else:
        # With norms of 1, Wanda's score is the magnitude.
        norms_I = (
            statistics.norms_I
            if options.mask_from == "wanda"
            else torch.ones_like(statistics.norms_I)
        )

        def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor, shard: RowShard) -> Tensor:
            score_OB = weight_OB.abs() * norms_I[start : start + weight_OB.shape[1]]
            return block_mask(score_OB, work, shard)

    return prune_by_obs(weight_OI, statistics, work, choose)
