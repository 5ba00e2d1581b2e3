"""Which input channels share a group of N:M: an order of the channels that keeps more score in all.

N:M keeps the best N of every M consecutive inputs, so channels that matter should not stand next to each other. Following
RIA (Zhang et al. 2024, arXiv 2402.17946, section 4.2) channels are sorted by their total score and dealt out to the
groups like cards; then, for one place in all groups at a time, the channels at that place are taken away and given
back in the best way there is, a linear assignment.

These are pure functions from scores to an order. An order must be folded into the weights that produce a linear's inputs,
so that the checkpoint stays an ordinary one; `Channels` says which orders can be, `engine/folding.py` does it.

Shape suffixes: O outputs (rows), I inputs (channels), G groups of M, C channels that change places. In `Channels`: G
groups of heads, R heads in a group, W channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunus.methods.base import Method, MethodOptions, Pruned
from prunus.methods.patterns import Pattern, check_shape, keep_mask
from prunus.methods.ria import ria_score
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score


@dataclass(frozen=True, slots=True)
class Channels:
    """Which of a linear's `groups`·`repeats`·`width` inputs can change places: within the last axis, all repeats alike.

    The inner channels of an MLP are one group of one. Of attention, heads that share one v are the repeats of a group.
    """

    groups: int
    repeats: int
    width: int

    def spread(self, within_GW: Tensor) -> Tensor:
        """From an order of each group's channels to one of all inputs, int64 (I,)."""
        first_GR1 = (
            torch.arange(self.groups * self.repeats).view(self.groups, self.repeats, 1) * self.width
        )
        return (first_GR1 + within_GW[:, None]).flatten()

    def within(self, order_I: Tensor) -> Tensor:
        """The way back: int64 (G, W)."""
        return order_I.view(self.groups, self.repeats, self.width)[:, 0] % self.width


def best_permutation(score_OI: Tensor, pattern: Pattern, channels: Channels) -> Tensor:
    """The order of the inputs that `deal` and `assign` find for each group, int64 (I,); as it was where that is better.

    Raises:
        ValueError: as `deal` and `assign`; the width of a head must be a multiple of M.
    """
    rows = len(score_OI)
    # Repeats share an order: to it they are more rows.
    score_GOW = score_OI.view(rows, channels.groups, channels.repeats, channels.width).permute(
        1, 0, 2, 3
    )
    orders = []
    for score_OW in score_GOW.reshape(channels.groups, -1, channels.width):
        order_W = assign(score_OW, pattern, deal(score_OW, pattern)).cpu()
        as_it_was_W = torch.arange(channels.width)
        better = kept_score(score_OW, pattern, order_W) > kept_score(score_OW, pattern, as_it_was_W)
        orders.append(order_W if better else as_it_was_W)
    return channels.spread(torch.stack(orders))


def with_permutation(method: Method, channels: Channels) -> tuple[Method, Callable[[], Tensor]]:
    """A method that prunes as `method` would with the inputs in their best order, and puts them back afterwards.

    The order is judged by RIA's score for `ria`, by magnitude where nothing is known of the inputs, by Wanda's score
    for all others. The second of the pair returns it, int64 (I,), once the method was called.
    """
    orders: list[Tensor] = []

    def prune(
        weight_OI: Tensor,
        statistics: InputStatistics | None,
        pattern: Pattern,
        sparsity: float,
        options: MethodOptions,
    ) -> Pruned:
        if method.name == "ria":
            score_OI = ria_score(weight_OI, statistics, options.ria_power)
        elif method.needs == "none" or statistics is None:
            score_OI = weight_OI.abs()
        else:
            score_OI = wanda_score(weight_OI, statistics)
        order_I = best_permutation(score_OI, pattern, channels).to(weight_OI.device)
        back_I = order_I.argsort()
        seen = statistics.reordered(order_I) if statistics is not None else None
        pruned = method.prune(weight_OI[:, order_I], seen, pattern, sparsity, options)
        orders.append(order_I.cpu())
        return Pruned(pruned.weight_OI[:, back_I], pruned.keep_OI[:, back_I], pruned.notes)

    return replace(method, prune=prune), lambda: orders[-1]


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
    """
    from scipy.optimize import linear_sum_assignment  # takes a moment, and few runs need it

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
    """Σ over rows of max(score of the channel, what it must beat), float64 (C, G).

    By way of max(a, b) = (a + b + |a − b|) / 2, whose last sum is a distance.
    """
    apart_CG = torch.cdist(score_OC.T.contiguous(), rival_OG.T.contiguous(), p=1).double()
    sums_C, sums_G = (x.sum(dim=0, dtype=torch.float64) for x in (score_OC, rival_OG))
    return (apart_CG + sums_C[:, None] + sums_G) / 2


def _width(score_OI: Tensor, pattern: Pattern) -> int:
    if pattern.m is None:
        raise ValueError(
            "only N:M has groups to permute channels between: give a pattern such as 2:4"
        )
    check_shape(pattern, (score_OI.shape[0], score_OI.shape[1]), "the score")
    return pattern.m
