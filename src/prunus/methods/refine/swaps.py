"""Swaps of a kept against a pruned weight of the same row, as long as they lower the output error.

Let e hold the pruned weights of a row, and 0 elsewhere, and let c = Ge. Pruning p and restoring u
changes the row's squared output error eGe by

    Δ(p, u) = 2w_p c_p + w_p² G_pp − 2w_u c_u + w_u² G_uu − 2w_p w_u G_pu.

This is the move of SparseSwaps (Zimmer et al. 2025, arXiv 2512.10922). Trying all pairs takes I²
numbers per row. So a round looks at candidates only: the kept weights that cost least to prune
alone, and the pruned weights that gain most when restored alone. It forms the best disjoint pairs
of them and accepts one pair after the other while the error falls. Each decision counts the pairs
accepted before exactly. Then one matrix product renews c for all rows.

The first pair of a round is the best single swap among the candidates, so the error never rises.
For N:M, swaps stay within a group of M, and all pairs of a group are tried.

The Gram matrix is scaled and damped as in `solvers/least_squares.py`. Kept weights do not change.

Shape suffixes: O outputs (rows), I inputs; R rows that still improve, C candidates, S pairs
(swaps), F = 2S features of the pairs, G groups, M their width, K accepted pairs of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunus.methods.patterns import Pattern
from prunus.methods.solvers.least_squares import scaled_gram_of
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Work

# Rounds end after this many, also where rows still improve.
_MAX_ROUNDS = 100
_CANDIDATES = 32
# The maximum number of swaps per row and round.
_PAIRS = 16
# An improvement below this share of the row's error may be rounding only, and is not accepted.
_MIN_GAIN = 1e-5
# The maximum number of elements of a temporary tensor.
_ELEMENTS = 2**24


def refine_by_swaps(
    weight_OI: Tensor, keep_OI: Tensor, statistics: InputStatistics, work: Work
) -> tuple[Tensor, dict[str, Any]]:
    """Swap trained weights while that lowers the output error; it grows in no row.

    The number of kept weights stays the same in every row, and in every group of N:M. A round has
    up to 16 swaps per row.

    Args:
        weight_OI: float32, the trained weights (or a dense target).
        keep_OI: bool, the mask to start from; it is not changed.
        statistics: With a Gram matrix.
        work: Its options give λ (`damping`; None for `least_squares.ridge`).

    Returns:
        The mask, bool (O, I), and notes for the record: `swaps`, the number of restored weights of
        the whole linear, and `rounds`.
    """
    pattern = work.pattern
    scaled = scaled_gram_of(statistics, work.options.damping)
    weight_OI = weight_OI * scaled.scale_I
    keep_OI = keep_OI.clone()
    inputs = keep_OI.shape[1]
    largest = max(inputs * (pattern.m or 1), 4 * _PAIRS**2, _CANDIDATES**2)
    rows_at_once = max(1, _ELEMENTS // largest)
    swaps = 0
    rounds = 0
    # The rows that may still improve.
    row_R = torch.arange(len(keep_OI), device=keep_OI.device)
    while rounds < _MAX_ROUNDS and row_R.numel():
        improved = []
        for part_R in row_R.split(rows_at_once):
            keep_RI, count_R = _one_round(
                weight_OI[part_R], keep_OI[part_R], scaled.gram_II, pattern
            )
            keep_OI[part_R] = keep_RI
            swaps += int(count_R.sum())
            improved.append(part_R[count_R > 0])
        # A row without a swap would find none in the next round either.
        row_R = torch.cat(improved)
        rounds += 1
    return keep_OI, {"swaps": swaps, "rounds": rounds}


def _one_round(
    weight_RI: Tensor, keep_RI: Tensor, gram_II: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """One round: the new mask (R, I), and the number of swaps of each row (R,)."""
    # e of the formula is the error of the row's weights: what pruning has removed.
    error_RI = weight_RI * ~keep_RI
    c_RI = error_RI @ gram_II
    loss_R = torch.linalg.vecdot(error_RI, c_RI)
    # The change of the error when one weight alone is pruned (if kept) or restored (if pruned).
    sign_RI = keep_RI.to(weight_RI.dtype).mul_(2).sub_(1)
    alone_RI = (2 * sign_RI * c_RI).add_(weight_RI * gram_II.diagonal()).mul_(weight_RI)
    # Infinity marks weights that cannot be pruned or restored. A pair with one does not exist.
    prune_RI = alone_RI.masked_fill(~keep_RI, torch.inf)
    restore_RI = alone_RI.masked_fill(keep_RI, torch.inf)
    if pattern.m is None:
        pruned_RS, restored_RS, exists_RS = _pairs_in_rows(weight_RI, prune_RI, restore_RI, gram_II)
    else:
        pruned_RS, restored_RS, exists_RS = _pairs_in_groups(
            weight_RI, prune_RI, restore_RI, gram_II, pattern.m
        )
    accepted_RS = _accept_pairs(
        weight_RI, c_RI, gram_II, pruned_RS, restored_RS, exists_RS, _MIN_GAIN * loss_R
    )
    row_K, pair_K = accepted_RS.nonzero(as_tuple=True)
    keep_RI = keep_RI.clone()
    keep_RI[row_K, pruned_RS[row_K, pair_K]] = False
    keep_RI[row_K, restored_RS[row_K, pair_K]] = True
    return keep_RI, accepted_RS.sum(dim=1)


def _pairs_in_rows(
    weight_RI: Tensor, prune_RI: Tensor, restore_RI: Tensor, gram_II: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best disjoint pairs among the candidates of each row.

    Args:
        weight_RI: The weights of the rows.
        prune_RI: How pruning a weight alone changes the error; infinite for pruned weights.
        restore_RI: How restoring a weight alone changes it; infinite for kept weights.
        gram_II: The Gram matrix.

    Returns:
        The inputs to prune (p), the inputs to restore (u), and whether the pair exists, all (R, S).
    """
    candidates = min(_CANDIDATES, prune_RI.shape[1])
    prune_RC, p_RC = prune_RI.topk(candidates, dim=1, largest=False)
    restore_RC, u_RC = restore_RI.topk(candidates, dim=1, largest=False)
    cross_RCC = gram_II[p_RC[:, :, None], u_RC[:, None, :]]
    cross_RCC.mul_(weight_RI.gather(1, p_RC)[:, :, None]).mul_(
        weight_RI.gather(1, u_RC)[:, None, :]
    )
    # Δ(p, u) of all pairs of candidates: both changes alone, and the term that couples them.
    change_RCC = (prune_RC[:, :, None] + restore_RC[:, None, :]).sub_(cross_RCC, alpha=2)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(min(_PAIRS, candidates)):
        best_R, index_R = change_RCC.flatten(1).min(dim=1)
        p_R1, u_R1 = (index_R // candidates)[:, None], (index_R % candidates)[:, None]
        pairs.append((p_RC.gather(1, p_R1), u_RC.gather(1, u_R1), best_R.isfinite()[:, None]))
        # Pairs are disjoint: strike out the row and the column of the pair that was taken.
        change_RCC.scatter_(1, p_R1[:, :, None].expand(-1, 1, candidates), torch.inf)
        change_RCC.scatter_(2, u_R1[:, :, None].expand(-1, candidates, 1), torch.inf)
    pruned, restored, exists = zip(*pairs, strict=True)
    return torch.cat(pruned, dim=1), torch.cat(restored, dim=1), torch.cat(exists, dim=1)


def _pairs_in_groups(
    weight_RI: Tensor, prune_RI: Tensor, restore_RI: Tensor, gram_II: Tensor, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pair of each of the best groups of M, best first.

    Arguments and results are those of `_pairs_in_rows`; `m` is the width of a group.
    """
    groups = weight_RI.shape[1] // m
    # The blocks of the Gram matrix on its diagonal, one per group: pairs never leave their group.
    block_GMM = gram_II.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weight_RGM, prune_RGM, restore_RGM = (
        x.unflatten(1, (groups, m)) for x in (weight_RI, prune_RI, restore_RI)
    )
    cross_RGMM = weight_RGM[..., :, None] * weight_RGM[..., None, :] * block_GMM
    change_RGMM = (prune_RGM[..., :, None] + restore_RGM[..., None, :]).sub_(cross_RGMM, alpha=2)
    change_RG, index_RG = change_RGMM.flatten(2).min(dim=2)
    best_RS, group_RS = change_RG.topk(min(_PAIRS, groups), dim=1, largest=False)
    index_RS = index_RG.gather(1, group_RS)
    return group_RS * m + index_RS // m, group_RS * m + index_RS % m, best_RS.isfinite()


def _accept_pairs(
    weight_RI: Tensor,
    c_RI: Tensor,
    gram_II: Tensor,
    pruned_RS: Tensor,
    restored_RS: Tensor,
    exists_RS: Tensor,
    min_gain_R: Tensor,
) -> Tensor:
    """Which of the disjoint pairs to swap, bool (R, S).

    Greedy: one pair after the other, always the one that lowers the error most, given those already
    accepted.

    Args:
        weight_RI: The weights of the rows.
        c_RI: C = Ge of the rows.
        gram_II: The Gram matrix.
        pruned_RS: The inputs that the pairs prune.
        restored_RS: The inputs that the pairs restore.
        exists_RS: bool, False for pairs that do not exist.
        min_gain_R: By how much a pair must lower the error of its row to be accepted.
    """
    rows, pairs = pruned_RS.shape
    feature_RF = torch.cat([pruned_RS, restored_RS], dim=1)
    # A swap adds w_p at p and -w_u at u to the error vector e.
    step_RF = torch.cat([weight_RI.gather(1, pruned_RS), -weight_RI.gather(1, restored_RS)], dim=1)
    # How two swaps act on each other: their steps' inner product under G.
    cross_RFF = gram_II[feature_RF[:, :, None], feature_RF[:, None, :]]
    cross_RFF.mul_(step_RF[:, :, None]).mul_(step_RF[:, None, :])
    cross_RSS = cross_RFF.view(rows, 2, pairs, 2, pairs).sum(dim=(1, 3))
    # Swap s changes the error by 2·slope_s + cross_ss, and swaps s and t together by 2·cross_st
    # more.
    slope_RS = (c_RI.gather(1, feature_RF) * step_RF).view(rows, 2, pairs).sum(dim=1)
    change_RS = 2 * slope_RS + cross_RSS.diagonal(dim1=1, dim2=2)
    change_RS.masked_fill_(~exists_RS, torch.inf)
    accepted_RS = torch.zeros_like(exists_RS)
    for _ in range(pairs):
        best_R, pair_R = change_RS.min(dim=1)
        accepts_R = best_R < -min_gain_R
        if not bool(accepts_R.any()):
            break
        pair_R1 = pair_R[:, None]
        accepted_RS.scatter_(1, pair_R1, accepted_RS.gather(1, pair_R1) | accepts_R[:, None])
        # The accepted swap moved e, which changes what all other swaps would bring.
        row_RS = cross_RSS.gather(1, pair_R1[:, :, None].expand(-1, 1, pairs)).squeeze(1)
        change_RS.add_(row_RS * accepts_R[:, None], alpha=2)
        change_RS.scatter_(1, pair_R1, torch.inf)
    return accepted_RS
