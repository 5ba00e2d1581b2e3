"""DSnoT: swap kept against pruned weights until the mean output of every row is right again. Needs no Gram matrix.

A row without its pruned weights is off by ε = Σ_pruned w_j·E[X_j] on average. Every round gives back the pruned weight
that cuts |ε| most for its variance, the highest sign(ε)·w_j·E[X_j] / Var[X_j], and takes the kept one of the lowest
Wanda score |w_j|·‖X_j‖₂ whose loss moves ε towards 0 as well (Zhang et al. 2023, arXiv 2310.08915, equations 4 to 6).
A row ends when a swap would not lower |ε|, when ε has changed its sign, or when |ε| is small. N:M swaps within a group.

The published code stops at |ε| < 0.1 in sums over a window, which depends on scale and length; here it is a share of the
root mean square of the row's outputs as Wanda sees them. A weight takes part in one swap at most.

Shape suffixes: O outputs (rows), I inputs; R rows still at work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics

_ROUNDS = 50
_SMALL = 1e-4


def refine_by_dsnot(
    weight_OI: Tensor,
    keep_OI: Tensor,
    statistics: InputStatistics,
    pattern: Pattern,
    damping: float | None = None,
    rounds: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A mask of the same counts per row, and per group of N:M, whose mean error |ε| is nowhere larger.

    Args:
        weight_OI: float32, the trained weights.
        keep_OI: bool, the mask to start from.
        statistics: norms and means of the inputs.
        damping: not used; every refinement is called alike.
        rounds: at most so many swaps a row; None for 50.

    Returns:
        The mask, bool (O, I), and notes: `swaps`, how many weights came back.
    """
    keep_OI = keep_OI.clone()
    shift_OI = weight_OI * statistics.mean_I.float()
    score_OI = weight_OI.abs() * statistics.norms_I
    variance_I = statistics.variance_I.float()
    small_O = _SMALL * score_OI.square().sum(dim=1).div_(max(1, statistics.tokens)).sqrt_()
    error_O = (shift_OI * ~keep_OI).sum(dim=1, dtype=torch.float64)
    free_OI = torch.ones_like(keep_OI)
    row_R = (error_O.abs() > small_O).nonzero().flatten()
    swaps = 0
    for _ in range(_ROUNDS if rounds is None else rounds):
        if not row_R.numel():
            break
        sign_R1 = error_O[row_R].sign().float()[:, None]
        shift_RI, keep_RI, free_RI = sign_R1 * shift_OI[row_R], keep_OI[row_R], free_OI[row_R]
        # A feature that never varies comes back for free: its effect is a constant.
        gain_RI = shift_RI / variance_I.clamp(min=torch.finfo(torch.float32).tiny)
        gain_RI.masked_fill_(keep_RI | ~free_RI, -torch.inf)
        may_go_RI = keep_RI & free_RI & (shift_RI < 0)
        if pattern.m is not None:
            # Only groups that have somebody to give for it.
            in_groups = (len(row_R), -1, pattern.m)
            has_RG1 = may_go_RI.view(in_groups).any(dim=2, keepdim=True)
            gain_RI.view(in_groups).masked_fill_(~has_RG1, -torch.inf)
        best_R, back_R = gain_RI.max(dim=1)
        cost_RI = score_OI[row_R].masked_fill_(~may_go_RI, torch.inf)
        if pattern.m is not None:
            group_I = torch.arange(keep_OI.shape[1], device=keep_OI.device) // pattern.m
            cost_RI.masked_fill_(group_I != (back_R // pattern.m)[:, None], torch.inf)
        least_R, gone_R = cost_RI.min(dim=1)
        found_R = best_R.isfinite() & (best_R > 0) & least_R.isfinite()
        row_R, back_R, gone_R = row_R[found_R], back_R[found_R], gone_R[found_R]
        before_R = error_O[row_R]
        after_R = before_R - shift_OI[row_R, back_R] + shift_OI[row_R, gone_R]
        better_R = after_R.abs() < before_R.abs()
        row_R, back_R, gone_R = row_R[better_R], back_R[better_R], gone_R[better_R]
        keep_OI[row_R, back_R], keep_OI[row_R, gone_R] = True, False
        free_OI[row_R, back_R], free_OI[row_R, gone_R] = False, False
        error_O[row_R] = after_R[better_R]
        swaps += len(row_R)
        goes_on_R = (after_R * before_R > 0)[better_R] & (error_O[row_R].abs() > small_O[row_R])
        row_R = row_R[goes_on_R]
    return keep_OI, {"swaps": swaps}
