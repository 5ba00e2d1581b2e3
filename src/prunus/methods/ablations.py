"""`obs`: a mask from magnitude or Wanda, and SparseGPT's update around it (section 5 of arXiv 2306.11695).

The mask is fixed beforehand on the original weights ("before"; the paper's "sequential"), or chosen anew from the
updated weights for every 128 columns, or for every group of M ("blockwise"; its "iterative").
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.base import Method, Options, Pruned, masked
from prunus.methods.magnitude import magnitude_keep
from prunus.methods.obs import Choose, span_and_block, sweep
from prunus.methods.wanda import wanda_score
from prunus.patterns import Pattern, keep_mask
from prunus.statistics import InputStatistics


def _prune(
    weight_OI: Tensor, statistics: InputStatistics | None, pattern: Pattern, sparsity: float, options: Options
) -> Pruned:
    assert statistics is not None and statistics.gram_II is not None, "the update needs a Gram matrix"
    if pattern.is_unstructured and sparsity == 0:
        return masked(weight_OI, weight_OI == weight_OI)
    span, block = span_and_block(pattern, options.column_block)
    if options.mask_order == "before":
        choose = _fixed(weight_OI, statistics, pattern, sparsity, options)
    else:
        choose = _anew(statistics, pattern, sparsity, options)
    return sweep(weight_OI, statistics.gram_II, options.damping, choose, span, block)


def _fixed(
    weight_OI: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float, options: Options
) -> Choose:
    if options.mask_from == "magnitude":
        keep_OI = magnitude_keep(weight_OI, pattern, sparsity)
    else:
        keep_OI = keep_mask(wanda_score(weight_OI, statistics), pattern, sparsity)

    def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor) -> Tensor:
        return keep_OI[:, start : start + weight_OB.shape[1]]

    return choose


def _anew(statistics: InputStatistics, pattern: Pattern, sparsity: float, options: Options) -> Choose:
    norms_I = statistics.norms_I

    def choose(weight_OB: Tensor, start: int, diagonal_B: Tensor) -> Tensor:
        score_OB = weight_OB.abs()
        if options.mask_from == "wanda":
            score_OB = score_OB * norms_I[start : start + weight_OB.shape[1]]
        return keep_mask(score_OB, pattern, sparsity)

    return choose


OBS = Method(
    name="obs",
    needs="gram",
    prune=_prune,
    default_group="row",
    updates_weights=True,
    summary="a mask from wanda or magnitude, with sparsegpt's weight update",
)
