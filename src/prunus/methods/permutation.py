"""Which input channels share a group of N:M: an order of the channels that keeps more score in all.

N:M keeps the best N of every M consecutive inputs, so channels that matter should not stand next to each other. Following
RIA (Zhang et al. 2024, arXiv 2402.17946, section 4.2) channels are sorted by their total score and dealt out to the
groups like cards; then, for one place in all groups at a time, the channels at that place are taken away and given
back in the best way there is, a linear assignment.

These are pure functions from scores to an order. A run does not use them yet: an order of a linear's inputs must be
folded into the weights that produce them, so that the checkpoint stays an ordinary one.

Shape suffixes: O outputs (rows), I inputs (channels), G groups of M, C channels that change places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.patterns import Pattern, check_shape, keep_mask

# Elements of the largest temporary.
_ELEMENTS = 2**24


def deal(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Channels in the order of their total score, dealt out to the groups in turn.

    Returns:
        int64 (I,): the channel at each place; places M·g to M·g + M − 1 are group g.

    Raises:
        ValueError: the pattern is not N:M or does not fit.
    """
    m = _width(score_OI, pattern)
    order_I = score_OI.sum(dim=0, dtype=torch.float64).argsort(descending=True, stable=True)
    return order_I.view(m, -1).T.flatten()


def assign(score_OI: Tensor, pattern: Pattern, order_I: Tensor) -> Tensor:
    """An order at least as good as `order_I`: for each of the M places, the best exchange between groups.

    Raises:
        ValueError: the pattern is not N:M or does not fit.
        ModuleNotFoundError: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ModuleNotFoundError(
            "the assignment of channels needs SciPy: pip install 'prunus[permute]'"
        ) from None
    m = _width(score_OI, pattern)
    order_GM = order_I.view(-1, m).clone()
    assert pattern.n is not None
    if pattern.n in (0, m) or len(order_GM) == 1:
        return order_I.clone()
    for place in range(m):
        others_GM = torch.cat([order_GM[:, :place], order_GM[:, place + 1 :]], dim=1)
        # The n-th best of the others is what a channel must beat; what is better stays, whoever comes.
        rival_OG = score_OI[:, others_GM].topk(pattern.n, dim=2).values[:, :, -1]
        gain_CG = _gain(score_OI[:, order_GM[:, place]], rival_OG)
        channel, group = linear_sum_assignment(gain_CG.cpu().numpy(), maximize=True)
        order_GM[torch.from_numpy(group), place] = order_GM[torch.from_numpy(channel), place]
    return order_GM.flatten()


def kept_score(score_OI: Tensor, pattern: Pattern, order_I: Tensor) -> float:
    """The sum of all scores that N:M keeps when the channels stand in this order."""
    ordered_OI = score_OI[:, order_I]
    return float((ordered_OI * keep_mask(ordered_OI, pattern, 0.0)).sum(dtype=torch.float64))


def _gain(score_OC: Tensor, rival_OG: Tensor) -> Tensor:
    """Σ over rows of max(score of the channel, what it must beat), float64 (C, G)."""
    gain_CG = torch.empty(score_OC.shape[1], rival_OG.shape[1], dtype=torch.float64)
    channels = max(1, _ELEMENTS // max(1, rival_OG.numel()))
    for first in range(0, len(gain_CG), channels):
        part_OC = score_OC[:, first : first + channels]
        best_OCG = torch.maximum(part_OC[:, :, None], rival_OG[:, None, :])
        gain_CG[first : first + channels] = best_OCG.sum(dim=0, dtype=torch.float64)
    return gain_CG


def _width(score_OI: Tensor, pattern: Pattern) -> int:
    if pattern.m is None:
        raise ValueError("only N:M has groups to permute channels between: give a pattern such as 2:4")
    check_shape(pattern, (score_OI.shape[0], score_OI.shape[1]), "the score")
    return pattern.m
