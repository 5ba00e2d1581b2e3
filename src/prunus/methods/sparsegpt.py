"""SparseGPT: prune by the error that is left once all other weights have corrected for it.

The score is (w_ij / U_jj)², with U as in `solvers/obs.py`. It is computed in blocks of 128 columns
from left to right, from weights that earlier blocks have already corrected (Frantar and Alistarh
2023, arXiv 2301.00774). For unstructured sparsity all rows of a block compete together (group
"block"), or each row competes within the block for itself (group "block-row"). N:M chooses its mask
when each group of M begins.
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.solvers.obs import block_mask, prune_by_obs
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Pruned, RowShard, Work


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights with the largest errors, which also correct for the removed ones.

    Args:
        weight_OI: float32, the trained weights.
        statistics: With a Gram matrix.
        work: Its `damping` is λ, a share of the mean diagonal; None means `obs.DAMPING`.

    Raises:
        ValueError: The Gram matrix cannot be inverted, see `obs.inverse_factor`.
    """

    def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor, shard: RowShard) -> Tensor:
        # The square is left out: it does not change the order.
        return block_mask((weight_OB / diagonal_B).abs_(), work, shard)

    return prune_by_obs(weight_OI, statistics, work, choose)
