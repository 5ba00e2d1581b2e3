"""Swaps of one kept against one pruned weight of the same row, as long as they lower the output error.

With e the pruned weights of a row and c = Ge, pruning p and giving u back changes the row's squared output error by

    Δ(p, u) = 2w_p c_p + w_p² G_pp − 2w_u c_u + w_u² G_uu − 2w_p w_u G_pu

which is the move of SparseSwaps (Zimmer et al. 2025, arXiv 2512.10922). To look at all pairs takes I² numbers a row. Here
every round looks at the kept weights that cost least alone and the pruned ones that bring most, forms the best disjoint
pairs of them, and accepts pairs one after the other as long as the error falls, with the pairs accepted before taken into
account exactly. Then c is renewed by one matrix product for all rows. The first pair of a round is the best single swap
among the candidates, so the error never rises. N:M swaps within a group, where all pairs are looked at.

The Gram matrix is scaled and damped as in `lsq.py`. Kept weights are not changed.

Shape suffixes: O outputs (rows), I inputs; R rows still at work, C candidates, S pairs (swaps), G groups, M their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunus.methods.patterns import Pattern
from prunus.methods.solvers.least_squares import scaled_gram
from prunus.methods.statistics import InputStatistics

_ROUNDS = 100
_CANDIDATES = 32
_PAIRS = 16
# An improvement below this share of the row's error is rounding.
_WORTH = 1e-5
# Elements of the largest temporary.
_ELEMENTS = 2**24


def refine_by_swaps(
    weight_OI: Tensor,
    keep_OI: Tensor,
    statistics: InputStatistics,
    pattern: Pattern,
    damping: float | None = None,
    rounds: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A mask of the same counts per row, and per group of N:M, with no larger output error in any row.

    Args:
        weight_OI: float32, the trained weights.
        keep_OI: bool, the mask to start from.
        statistics: with a Gram matrix.
        damping: of the Gram matrix, or None for `lsq.ridge`.
        rounds: at most so many, with up to 16 swaps a row; None for 100.

    Returns:
        The mask, bool (O, I), and notes: `swaps`, how many weights came back; `rounds`.
    """
    scaled = scaled_gram(statistics, damping)
    weight_OI = weight_OI * scaled.scale_I
    keep_OI = keep_OI.clone()
    width = keep_OI.shape[1]
    at_once = max(1, _ELEMENTS // max(width * (pattern.m or 1), 4 * _PAIRS**2, _CANDIDATES**2))
    most, swaps, taken = (_ROUNDS if rounds is None else rounds), 0, 0
    row_R = torch.arange(len(keep_OI), device=keep_OI.device)
    while taken < most and row_R.numel():
        went_on = []
        for part_R in row_R.split(at_once):
            keep_RI, count_R = _round(weight_OI[part_R], keep_OI[part_R], scaled.gram_II, pattern)
            keep_OI[part_R] = keep_RI
            swaps += int(count_R.sum())
            went_on.append(part_R[count_R > 0])
        row_R = torch.cat(went_on)
        taken += 1
    return keep_OI, {"swaps": swaps, "rounds": taken}


def _round(
    weight_RI: Tensor, keep_RI: Tensor, gram_II: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """One round: the new mask, and how many pairs each row swapped."""
    error_RI = weight_RI * ~keep_RI
    pull_RI = error_RI @ gram_II
    loss_R = torch.linalg.vecdot(error_RI, pull_RI)
    # What it costs to change one weight alone: to prune it where it is kept, to give it back where it is not.
    side_RI = keep_RI.to(weight_RI.dtype).mul_(2).sub_(1)
    alone_RI = (2 * side_RI * pull_RI).add_(weight_RI * gram_II.diagonal()).mul_(weight_RI)
    go_RI, come_RI = (
        alone_RI.masked_fill(~keep_RI, torch.inf),
        alone_RI.masked_fill(keep_RI, torch.inf),
    )
    if pattern.m is None:
        gone_RS, back_RS, possible_RS = _pairs_in_rows(weight_RI, go_RI, come_RI, gram_II)
    else:
        gone_RS, back_RS, possible_RS = _pairs_in_groups(
            weight_RI, go_RI, come_RI, gram_II, pattern.m
        )
    accepted_RS = _accept(
        weight_RI, pull_RI, gram_II, gone_RS, back_RS, possible_RS, _WORTH * loss_R
    )
    row_K, pair_K = accepted_RS.nonzero(as_tuple=True)
    keep_RI = keep_RI.clone()
    keep_RI[row_K, gone_RS[row_K, pair_K]] = False
    keep_RI[row_K, back_RS[row_K, pair_K]] = True
    return keep_RI, accepted_RS.sum(dim=1)


def _pairs_in_rows(
    weight_RI: Tensor, go_RI: Tensor, come_RI: Tensor, gram_II: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best disjoint pairs (p, u) of each row's candidates, best first, and which of them exist; three (R, S)."""
    candidates = min(_CANDIDATES, go_RI.shape[1])
    go_RC, from_RC = go_RI.topk(candidates, dim=1, largest=False)
    come_RC, to_RC = come_RI.topk(candidates, dim=1, largest=False)
    both_RCC = gram_II[from_RC[:, :, None], to_RC[:, None, :]]
    both_RCC.mul_(weight_RI.gather(1, from_RC)[:, :, None]).mul_(
        weight_RI.gather(1, to_RC)[:, None, :]
    )
    change_RCC = (go_RC[:, :, None] + come_RC[:, None, :]).sub_(both_RCC, alpha=2)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(min(_PAIRS, candidates)):
        best_R, place_R = change_RCC.flatten(1).min(dim=1)
        p_R1, u_R1 = (place_R // candidates)[:, None], (place_R % candidates)[:, None]
        found.append((from_RC.gather(1, p_R1), to_RC.gather(1, u_R1), best_R.isfinite()[:, None]))
        change_RCC.scatter_(1, p_R1[:, :, None].expand(-1, 1, candidates), torch.inf)
        change_RCC.scatter_(2, u_R1[:, :, None].expand(-1, candidates, 1), torch.inf)
    gone, back, possible = zip(*found, strict=True)
    return torch.cat(gone, dim=1), torch.cat(back, dim=1), torch.cat(possible, dim=1)


def _pairs_in_groups(
    weight_RI: Tensor, go_RI: Tensor, come_RI: Tensor, gram_II: Tensor, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pair (p, u) of the best groups of M, best first, and which of them exist; three (R, S)."""
    rows, groups = len(weight_RI), weight_RI.shape[1] // m
    block_GMM = gram_II.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weight_RGM, go_RGM, come_RGM = (x.view(rows, groups, m) for x in (weight_RI, go_RI, come_RI))
    both_RGMM = weight_RGM[..., :, None] * weight_RGM[..., None, :] * block_GMM
    change_RGMM = (go_RGM[..., :, None] + come_RGM[..., None, :]).sub_(both_RGMM, alpha=2)
    change_RG, place_RG = change_RGMM.flatten(2).min(dim=2)
    best_RS, group_RS = change_RG.topk(min(_PAIRS, groups), dim=1, largest=False)
    place_RS = place_RG.gather(1, group_RS)
    return group_RS * m + place_RS // m, group_RS * m + place_RS % m, best_RS.isfinite()


def _accept(
    weight_RI: Tensor,
    pull_RI: Tensor,
    gram_II: Tensor,
    gone_RS: Tensor,
    back_RS: Tensor,
    possible_RS: Tensor,
    worth_R: Tensor,
) -> Tensor:
    """Which disjoint pairs to swap, bool (R, S): one after the other, each time what lowers the error most by now."""
    rows, pairs = gone_RS.shape
    feature_RF = torch.cat([gone_RS, back_RS], dim=1)
    # What a swap adds to the error vector e: w_p at p, -w_u at u.
    step_RF = torch.cat([weight_RI.gather(1, gone_RS), -weight_RI.gather(1, back_RS)], dim=1)
    meet_RFF = gram_II[feature_RF[:, :, None], feature_RF[:, None, :]]
    meet_RFF.mul_(step_RF[:, :, None]).mul_(step_RF[:, None, :])
    meet_RSS = meet_RFF.view(rows, 2, pairs, 2, pairs).sum(dim=(1, 3))
    pulled_RS = (pull_RI.gather(1, feature_RF) * step_RF).view(rows, 2, pairs).sum(dim=1)
    change_RS = 2 * pulled_RS + meet_RSS.diagonal(dim1=1, dim2=2)
    change_RS.masked_fill_(~possible_RS, torch.inf)
    accepted_RS = torch.zeros_like(possible_RS)
    for _ in range(pairs):
        best_R, pair_R = change_RS.min(dim=1)
        accepts_R = best_R < -worth_R
        if not bool(accepts_R.any()):
            break
        pair_R1 = pair_R[:, None]
        accepted_RS.scatter_(1, pair_R1, accepted_RS.gather(1, pair_R1) | accepts_R[:, None])
        row_RS = meet_RSS.gather(1, pair_R1[:, :, None].expand(-1, 1, pairs)).squeeze(1)
        change_RS.add_(row_RS * accepts_R[:, None], alpha=2)
        change_RS.scatter_(1, pair_R1, torch.inf)
    return accepted_RS
