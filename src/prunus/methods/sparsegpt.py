"""SparseGPT: prune by the cost of each weight after the others have answered, and let them answer.

Score (w_ij / U_jj)², in blocks of 128 columns from left to right, with U as in `obs.py` (Frantar and Alistarh
2023, arXiv 2301.00774). Unstructured, all rows of a block compete together (group "layer") or each row on its own
within the block ("row"). N:M picks its mask as each group of M begins.
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.base import Method, MethodOptions, Pruned, RowShard, unchanged
from prunus.methods.patterns import Pattern
from prunus.methods.solvers.obs import block_keep, prune_by_obs
from prunus.methods.statistics import InputStatistics


def _prune(
    weight_OI: Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    sparsity: float,
    options: MethodOptions,
) -> Pruned:
    assert statistics is not None, "SparseGPT needs a Gram matrix"
    if pattern.removes_nothing(sparsity):
        return unchanged(weight_OI)

    def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor, shard: RowShard) -> Tensor:
        return block_keep((weight_OB / diagonal_B).abs_(), pattern, sparsity, shard)

    return prune_by_obs(weight_OI, statistics, pattern, options, choose)


SPARSEGPT = Method(
    name="sparsegpt",
    needs="gram",
    prune=_prune,
    default_group="layer",
    updates_weights=True,
    summary="remove by cost, and update what stays to make up for it",
    products=1,
)
