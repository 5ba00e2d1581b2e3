"""An order of the input channels that suits N:M: more of the total score is kept.

N:M keeps the best N of every M consecutive inputs. If all important channels stand next to each
other, most of them are removed. RIA therefore permutes the channels first (Zhang et al. 2024, arXiv
2402.17946, section 4.2), in two steps that keep the paper's terms:

- `deal` sorts the channels by their total score and deals them out to the groups in turn, as cards
  are dealt to players. Every group gets its share of important channels. The public code of RIA
  reverses the direction after every round, which makes the groups' totals more alike. Here every
  round has the same direction, because `assign` chooses among the channels anew.
- `assign` improves that order. For one place in all groups at a time it takes the channels at that
  place out of their groups, and returns them in the best possible way. That is a linear assignment
  problem, which has an exact solution.

Both are pure functions from scores to an order. A run folds the order into the weights that produce
a linear's inputs, so that the checkpoint stays an ordinary one (`pruning/block/permute.py`).
`Channels` describes the orders that can be folded.

Shape suffixes: O outputs (rows), I inputs (channels), G groups of M, M places of a group, C
channels that change groups. In `Channels`: G groups of heads, R heads in a group, W channels of a
head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunus.methods.base import Method, Pruned
from prunus.methods.options import MethodOptions
from prunus.methods.patterns import Pattern, check_shape, keep_mask
from prunus.methods.ria import ria_score
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score

__all__ = ["Channels", "assign", "best_permutation", "deal", "kept_score", "with_permutation"]


@dataclass(frozen=True, slots=True)
class Channels:
    """Which of a linear's `groups`·`repeats`·`width` inputs can change places.

    Channels can move within the last axis only, and in all repeats of a group alike. The inner
    channels of an MLP are one group with one repeat. In attention, the heads that share one value
    projection are the repeats of a group.

    Attributes:
        groups: groups of heads; each has an order of its own.
        repeats: heads of a group; they share their order.
        width: channels of a head.
    """

    groups: int
    repeats: int
    width: int

    def spread(self, within_GW: Tensor) -> Tensor:
        """From an order of each group's channels to an order of all inputs, int64 (I,).

        >>> Channels(groups=1, repeats=2, width=3).spread(torch.tensor([[2, 0, 1]]))
        tensor([2, 0, 1, 5, 3, 4])
        """
        first_GR1 = (
            torch.arange(self.groups * self.repeats).view(self.groups, self.repeats, 1) * self.width
        )
        return (first_GR1 + within_GW[:, None]).flatten()

    def within(self, order_I: Tensor) -> Tensor:
        """The inverse of `spread`: int64 (G, W)."""
        return order_I.view(self.groups, self.repeats, self.width)[:, 0] % self.width


def best_permutation(score_OI: Tensor, pattern: Pattern, channels: Channels) -> Tensor:
    """The order of the inputs that `deal` and `assign` find for each group of channels.

    A group keeps its order where the new one would not keep more score.

    Args:
        score_OI: scores, at least 0.
        pattern: an N:M pattern.
        channels: which inputs can change places.

    Returns:
        int64 (I,): the input at each place.

    Raises:
        ValueError: as `deal` and `assign`; the width of a head must be a multiple of M.
    """
    rows = len(score_OI)
    # Repeats share an order, so for the order their scores count like additional rows.
    score_GOW = score_OI.view(rows, channels.groups, channels.repeats, channels.width).permute(
        1, 0, 2, 3
    )
    orders = []
    for score_OW in score_GOW.reshape(channels.groups, -1, channels.width):
        order_W = assign(score_OW, pattern, deal(score_OW, pattern)).cpu()
        present_W = torch.arange(channels.width)
        better = kept_score(score_OW, pattern, order_W) > kept_score(score_OW, pattern, present_W)
        orders.append(order_W if better else present_W)
    return channels.spread(torch.stack(orders))


def with_permutation(method: Method, channels: Channels) -> tuple[Method, Callable[[], Tensor]]:
    """A method that prunes with the inputs in their best order, and then restores their order.

    The order is chosen by RIA's score for `ria`, by magnitude where nothing is known of the inputs,
    and by Wanda's score for all other methods.

    Args:
        method: the method to wrap.
        channels: which inputs of the linear can change places.

    Returns:
        The wrapped method, and a function that returns its last order, int64 (I,).
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
        # Sorting an order gives the order that undoes it.
        inverse_I = order_I.argsort()
        reordered = statistics.reordered(order_I) if statistics is not None else None
        pruned = method.prune(weight_OI[:, order_I], reordered, pattern, sparsity, options)
        orders.append(order_I.cpu())
        return Pruned(pruned.weight_OI[:, inverse_I], pruned.keep_OI[:, inverse_I], pruned.notes)

    return replace(method, prune=prune), lambda: orders[-1]


def deal(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Sort the channels by their total score and deal them out to the groups in turn.

    Args:
        score_OI: scores, at least 0.
        pattern: an N:M pattern.

    Returns:
        int64 (I,): the channel at each place; places M·g to M·g + M − 1 are group g.

    Raises:
        ValueError: the pattern is not N:M or does not fit.

    >>> deal(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), Pattern(1, 2))
    tensor([1, 3, 2, 0])
    """
    m = _group_width(score_OI, pattern)
    order_I = score_OI.sum(dim=0, dtype=torch.float64).argsort(descending=True, stable=True)
    # Row k of the view holds the k-th card of every group. Transposed, each row is a group.
    return order_I.view(m, -1).T.flatten()


def assign(score_OI: Tensor, pattern: Pattern, order_I: Tensor) -> Tensor:
    """Improve an order: for each of the M places, find the best exchange between the groups.

    Args:
        score_OI: scores, at least 0.
        pattern: an N:M pattern.
        order_I: int64, the order to start from.

    Returns:
        An order that keeps at least as much score, int64 (I,).

    Raises:
        ValueError: the pattern is not N:M or does not fit.
    """
    # Imported here because the import takes a moment, and few runs need it.
    from scipy.optimize import linear_sum_assignment

    m = _group_width(score_OI, pattern)
    order_GM = order_I.view(-1, m).clone()
    assert pattern.n is not None
    # If all or no channels of a group stay, or if there is one group, no order is better.
    if pattern.n in (0, m) or len(order_GM) == 1:
        return order_I.clone()
    for place in range(m):
        others_GM = torch.cat([order_GM[:, :place], order_GM[:, place + 1 :]], dim=1)
        # In each row, a channel that joins a group competes with the group's n-th best other
        # channel only. The channels better than that stay in any case.
        rival_OG = score_OI[:, others_GM].topk(pattern.n, dim=2).values[:, :, -1]
        gain_CG = _gain(score_OI[:, order_GM[:, place]], rival_OG)
        channel, group = linear_sum_assignment(gain_CG.cpu().numpy(), maximize=True)
        order_GM[torch.from_numpy(group), place] = order_GM[torch.from_numpy(channel), place]
    return order_GM.flatten()


def kept_score(score_OI: Tensor, pattern: Pattern, order_I: Tensor) -> float:
    """The sum of all scores that N:M keeps when the channels stand in this order.

    >>> score_OI = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    >>> kept_score(score_OI, Pattern(1, 2), torch.tensor([0, 1, 2, 3]))
    6.0
    >>> kept_score(score_OI, Pattern(1, 2), torch.tensor([0, 2, 1, 3]))
    7.0
    """
    ordered_OI = score_OI[:, order_I]
    return float((ordered_OI * keep_mask(ordered_OI, pattern, 0.0)).sum(dtype=torch.float64))


def _gain(score_OC: Tensor, rival_OG: Tensor) -> Tensor:
    """The score that is kept if channel c joins group g: Σ_rows max(score, rival), float64 (C, G).

    It uses max(a, b) = (a + b + |a − b|) / 2. The sum of |a − b| is a distance, for which there is
    a fast function that needs no temporary of size O·C·G.
    """
    distance_CG = torch.cdist(score_OC.T.contiguous(), rival_OG.T.contiguous(), p=1).double()
    sums_C, sums_G = (x.sum(dim=0, dtype=torch.float64) for x in (score_OC, rival_OG))
    return (distance_CG + sums_C[:, None] + sums_G) / 2


def _group_width(score_OI: Tensor, pattern: Pattern) -> int:
    if pattern.m is None:
        raise ValueError(
            "only N:M has groups to permute channels between: give a pattern such as 2:4"
        )
    check_shape(pattern, (score_OI.shape[0], score_OI.shape[1]), "the score")
    return pattern.m
