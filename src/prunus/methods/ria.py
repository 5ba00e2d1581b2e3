"""RIA: relative importance and activations; a weight counts by its share of its row and of its column.

Score (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ‖X_j‖₂^a with a = 0.5, over the whole matrix (Zhang et al. 2024,
arXiv 2402.17946, equations 3 and 5). Unlike Wanda's it spares rows and columns of small weights. Kept weights are not
changed. For N:M the paper also permutes the input channels: `--permute`, see `permutation.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.methods.base import Method, MethodOptions, Pruned, masked
from prunus.methods.patterns import Pattern, keep_mask
from prunus.methods.statistics import InputStatistics


def ria_score(weight_OI: Tensor, statistics: InputStatistics | None, power: float) -> Tensor:
    """The score, (O, I) in the dtype of the weight; 0 where a weight is 0, though its whole row or column be."""
    assert statistics is not None, "RIA scores need input norms"
    magnitude_OI = weight_OI.abs()
    smallest = torch.finfo(weight_OI.dtype).tiny
    column_I = magnitude_OI.sum(dim=0).clamp_(min=smallest)
    row_O1 = magnitude_OI.sum(dim=1, keepdim=True).clamp_(min=smallest)
    share_OI = magnitude_OI / column_I
    share_OI.add_(magnitude_OI.div_(row_O1))
    # Norms enter relative to the largest, so that no power of theirs can overflow.
    norms_I = statistics.norms_I / statistics.norms_I.max().clamp(min=smallest)
    return share_OI.mul_(norms_I.pow(power).to(weight_OI.dtype))


def _prune(
    weight_OI: Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    sparsity: float,
    options: MethodOptions,
) -> Pruned:
    score_OI = ria_score(weight_OI, statistics, options.ria_power)
    return masked(weight_OI, keep_mask(score_OI, pattern, sparsity))


RIA = Method(
    name="ria",
    needs="norms",
    prune=_prune,
    default_group="layer",
    updates_weights=False,
    summary="remove by a weight's share of its row and column, times a power of the input norm",
)
