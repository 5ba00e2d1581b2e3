"""SparseGPT: prune by the cost of each weight after the others have answered, and let them answer.

Score (w_ij / U_jj)², in blocks of 128 columns from left to right, with U as in `obs.py` (Frantar and Alistarh 2023,
arXiv 2301.00774). Unstructured, all rows of a block compete together (group "layer") or each row on its own within
the block ("row"). N:M picks its mask as each group of M begins.
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.base import Method, Options, Pruned, masked
from prunus.methods.obs import span_and_block, sweep
from prunus.patterns import Pattern, keep_mask
from prunus.statistics import InputStatistics


def _prune(
    weight_OI: Tensor, statistics: InputStatistics | None, pattern: Pattern, sparsity: float, options: Options
) -> Pruned:
    assert statistics is not None and statistics.gram_II is not None, "SparseGPT needs a Gram matrix"
    if pattern.is_unstructured and sparsity == 0:
        return masked(weight_OI, weight_OI == weight_OI)

    def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor) -> Tensor:
        return keep_mask((weight_OB / diagonal_B).abs_(), pattern, sparsity)

    span, block = span_and_block(pattern, options.column_block)
    return sweep(weight_OI, statistics.gram_II, options.damping, choose, span, block)


SPARSEGPT = Method(
    name="sparsegpt",
    needs="gram",
    prune=_prune,
    default_group="layer",
    updates_weights=True,
    summary="remove by cost, and update what stays to make up for it",
)
