"""Which linear comes next in a lockstep, and whose statistics it shares: agreed on by all batches of all ranks.

Knows names and tensors' identities; nothing of hooks, coroutines or what is done to a linear.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from prunus.ranks import Ranks

__all__ = ["LastFed", "Meeting", "meet"]

#: The tensor that a batch last gave to statistics, and the linear that those were made for.
LastFed = tuple[weakref.ref[torch.Tensor], str]


@dataclass(frozen=True)
class Meeting:
    """What all ranks agree on before a linear is pruned.

    Attributes:
        linear: the one whose turn it is.
        leader: an earlier linear whose statistics are this one's too, since every batch gives it the very same tensor
            (q, k, v; gate, up); None where there is none.
        held: linears whose statistics somebody may still ask for once this one is measured.
    """

    linear: str
    leader: str | None
    held: frozenset[str]


def meet(
    waiting: Mapping[int, tuple[str, torch.Tensor]],
    last: Sequence[LastFed | None],
    order: Mapping[str, int],
    ranks: Ranks,
) -> Meeting | None:
    """The first linear that any batch of any rank waits at; None once all are through.

    Args:
        waiting: by batch of this rank: the linear that it waits at, and its input there.
        last: by batch of this rank.
        order: the linears in the order in which they are registered, with their positions.
        ranks: who else has batches.
    """
    names, through = list(order), len(order)
    mine = min((order[name] for name, _ in waiting.values()), default=through)
    arrived = {index for index, (name, _) in waiting.items() if order[name] == mine}
    sources = {
        order[entry[1]] if (entry := last[index]) is not None and entry[0]() is waiting[index][1] else -1
        for index in arrived
    }
    leader = sources.pop() if len(sources) == 1 else -1
    # How many batches each linear's statistics were the last of: all of them, and those that do not go on now.
    fed, stay = [0] * through, [0] * through
    for index, entry in enumerate(last):
        if entry is not None:
            fed[order[entry[1]]] += 1
            stay[order[entry[1]]] += index not in arrived
    said = ranks.gather([mine, leader, len(arrived), *fed, *stay])
    first = min(row[0] for row in said)
    if first == through:
        return None
    there = [row for row in said if row[0] == first]
    leaders = {row[1] for row in there}
    leader = leaders.pop() if len(leaders) == 1 else -1
    # A batch that fed those statistics but is not here would leave its tokens in them.
    if leader >= 0 and sum(row[3 + leader] for row in said) != sum(row[2] for row in there):
        leader = -1
    still = [row[3 + through :] if row[0] == first else row[3 : 3 + through] for row in said]
    held = {name for name, batches in zip(names, zip(*still, strict=True), strict=True) if any(batches)}
    if leader >= 0:
        held.add(names[leader])
    return Meeting(names[first], names[leader] if leader >= 0 else None, frozenset(held))
