"""`obs`: a mask from magnitude or Wanda, and SparseGPT's update around it (section 5 of arXiv 2306.11695).

The mask is fixed beforehand on the original weights ("before"; the paper's "sequential"), or chosen anew from
the updated weights for every 128 columns, for every group of M if N:M ("blockwise"; its "iterative").
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.methods.base import Method, MethodOptions, Pruned, RowShard, unchanged
from prunus.methods.magnitude import magnitude_keep
from prunus.methods.patterns import Pattern, keep_mask
from prunus.methods.solvers.obs import block_keep, prune_by_obs
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score


def _prune(
    weight_OI: Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    sparsity: float,
    options: MethodOptions,
) -> Pruned:
    assert statistics is not None, "the update needs a Gram matrix"
    if pattern.removes_nothing(sparsity):
        return unchanged(weight_OI)

    if options.mask_order == "before":
        if options.mask_from == "magnitude":
            keep_OI = magnitude_keep(weight_OI, pattern, sparsity)
        else:
            keep_OI = keep_mask(wanda_score(weight_OI, statistics), pattern, sparsity)

        def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor, shard: RowShard) -> Tensor:
            return keep_OI[shard.rows, start : start + weight_OB.shape[1]]
    else:
        norms_I = (
            statistics.norms_I
            if options.mask_from == "wanda"
            else torch.ones_like(statistics.norms_I)
        )

        def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor, shard: RowShard) -> Tensor:
            score_OB = weight_OB.abs() * norms_I[start : start + weight_OB.shape[1]]
            return block_keep(score_OB, pattern, sparsity, shard)

    return prune_by_obs(weight_OI, statistics, pattern, options, choose)


OBS = Method(
    name="obs",
    needs="gram",
    prune=_prune,
    default_group="row",
    updates_weights=True,
    summary="a mask from wanda or magnitude, with sparsegpt's weight update",
    products=1,
)
