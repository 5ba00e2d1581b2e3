"""A way through a block with one batch in flight: for when paused batches do not fit in memory.

Bit for bit the result of `lockstep`: the block is run again from its start for every group of linears.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.pruning.block.expert_tokens import ExpertCounter
from prunus.pruning.block.hooks import (
    Accumulate,
    Finish,
    Forward,
    NewStatistics,
    Prune,
    accumulate_inputs,
    execution_order,
    input_hooks,
    tokens_of,
)

__all__ = ["replay"]


class _Stop(BaseException):
    """Ends a replay at the first linear behind the group that is being measured."""


@dataclass
class _Group:
    """Linears that get the very same input, and its statistics."""

    statistics: InputStatistics
    members: list[str]


@dataclass
class _FirstGroup:
    """Watches one batch: feeds the first linear it meets, notes who shares its input, stops at the next input."""

    groups: dict[str, _Group]
    new_statistics: NewStatistics
    feed: Accumulate
    batch: int
    counted: set[str]
    leader: str | None = None
    input: torch.Tensor | None = None

    def __call__(self, linear: Linear, x: torch.Tensor) -> None:
        if self.leader is None:
            self.leader, self.input = linear.name, x
            if linear.name not in self.groups:
                self.groups[linear.name] = _Group(self.new_statistics(linear), [linear.name])
            self.feed(self.groups[linear.name].statistics, linear, self.batch, tokens_of(x))
            return
        if x is not self.input:
            raise _Stop
        members = self.groups[self.leader].members
        if linear.name not in members:
            members.append(linear.name)

    def count(self, expert_counter: ExpertCounter, chosen_TK: torch.Tensor) -> None:
        """Experts whose tokens are to be counted before any of them is measured: a group of their own."""
        if self.leader is None:
            expert_counter.see(self.batch, chosen_TK)
            self.counted.add(expert_counter.name)
        raise _Stop


def replay(
    linears: Sequence[Linear],
    count: int,
    forward: Forward,
    finish: Finish,
    new_statistics: NewStatistics,
    prune: Prune,
    feed: Accumulate = accumulate_inputs,
    ranks: Ranks = SINGLE_PROCESS,
    expert_counters: Sequence[ExpertCounter] = (),
) -> list[Linear]:
    """As `lockstep`, with one batch in flight: the block is run once per group of linears that share an input."""
    pending = {linear.name: linear for linear in linears}
    uncounted = {expert_counter.name: expert_counter for expert_counter in expert_counters}
    names = execution_order(linears, expert_counters)
    while pending:
        # Per linear: its statistics and who fed them. A batch stops where a second input is asked for.
        groups: dict[str, _Group] = {}
        counted: set[str] = set()
        for index in range(count):
            watch = _FirstGroup(groups, new_statistics, feed, index, counted)
            with (
                input_hooks(list(pending.values()), watch, list(uncounted.values()), watch.count),
                contextlib.suppress(_Stop),
            ):
                forward(index)
        mine = min((names.index(name) for name in (*groups, *counted)), default=len(names))
        first = min(each for (each,) in ranks.gather_ints([mine]))
        if first == len(names):
            break
        leader = names[first]
        if leader in uncounted:
            uncounted.pop(leader).decide(ranks)
            continue
        group = groups.get(leader) or _Group(new_statistics(pending[leader]), [])
        group.statistics.complete(ranks)
        # In the order in which a rank that reached it met them.
        met = [names.index(name) for name in group.members]
        everybodys = ranks.gather_ints(met + [-1] * (len(names) - len(met)))
        members = dict.fromkeys(position for row in everybodys for position in row if position >= 0)
        for position in members:
            prune(pending.pop(names[position]), group.statistics)
    for expert_counter in expert_counters:
        expert_counter.end()
    for index in range(count):
        finish(index, forward(index))
    return list(pending.values())
