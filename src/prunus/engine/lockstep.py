"""Walking all calibration windows through one block and pruning its linears on the way.

The only forward hooks of prunus are here. Three ways lead through a block:

- `lockstep`: each batch's forward pass is a coroutine that pauses at every linear. When all of them stand
  at the same linear, its statistics are complete; it is pruned, and all go on with the pruned weight. One
  pass in all.
- `replay`: bit for bit the same result without paused coroutines: the block is run again from its start for
  every group of linears, so that only one batch is in flight. For when paused batches do not fit in memory.
- `two_pass`: the original's way. Statistics of all linears from the unpruned block, then a second pass to
  propagate. Linears late in the block do not see what was pruned before them.

None of them knows what a method does: `prune(linear, statistics)` changes the weight in place.

Where other ranks have windows too, all ranks stand at the same linear before its statistics are complete: they agree on
the one that comes first among all of them, and a rank that has nothing for it, or no windows at all, takes part with
empty hands.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import greenlet

from prunus.engine.meeting import LastFed, meet
from prunus.model.linears import Linear
from prunus.ranks import ALONE, Ranks
from prunus.statistics import InputStatistics

__all__ = ["input_hooks", "lockstep", "replay", "two_pass"]

Forward = Callable[[int], torch.Tensor]
Finish = Callable[[int, torch.Tensor], None]
Prune = Callable[[Linear, InputStatistics], None]
NewStatistics = Callable[[Linear], InputStatistics]
# Adds the input (tokens, in) of a linear in batch i to statistics.
Feed = Callable[[InputStatistics, Linear, int, torch.Tensor], None]


def plain_feed(statistics: InputStatistics, linear: Linear, batch: int, x_TI: torch.Tensor) -> None:
    """Add the input to the statistics, and nothing else."""
    statistics.add(x_TI)


def lockstep(
    linears: Sequence[Linear],
    count: int,
    forward: Forward,
    finish: Finish,
    new_statistics: NewStatistics,
    prune: Prune,
    feed: Feed = plain_feed,
    ranks: Ranks = ALONE,
) -> list[Linear]:
    """Take `count` batches through the block in lockstep.

    Args:
        linears: the linears to prune.
        count: number of batches, on this rank.
        forward: runs the block on batch i and returns its output hidden states.
        finish: stores the output of batch i; called as soon as the batch is through.
        new_statistics: an empty accumulator for the inputs of a linear.
        prune: called once per linear with the statistics of its inputs, in the order of execution.
        feed: adds the input of a linear, for one batch, to its statistics.
        ranks: who else has batches of the same run.

    Returns:
        The linears that no batch of any rank reached.
    """
    order = {linear.name: position for position, linear in enumerate(linears)}
    pending = {linear.name: linear for linear in linears}

    def pause(linear: Linear, x: torch.Tensor) -> None:
        if linear.name in pending:
            greenlet.getcurrent().parent.switch((linear.name, x))

    runners = [greenlet(forward) for _ in range(count)]
    waiting: dict[int, tuple[str, torch.Tensor]] = {}
    # Per batch the linear that its statistics were last made for, and the tensor that fed them.
    last: list[LastFed | None] = [None] * count
    # By the linear that they were made for.
    made: dict[str, InputStatistics] = {}

    def advance(index: int, *start: int) -> None:
        result = runners[index].switch(*start)
        if runners[index].dead:
            finish(index, result)
        else:
            waiting[index] = result

    try:
        with input_hooks(linears, pause):
            for index in range(count):
                advance(index, index)
            while True:
                # Where batches part (experts), the linear registered first goes first: blocks run their
                # experts in that order, so nobody can still arrive at it.
                meeting = meet(waiting, last, order, ranks)
                if meeting is None:
                    break
                name, leader = meeting.linear, meeting.leader
                arrived = [index for index, (at, _) in sorted(waiting.items()) if at == name]
                linear = pending[name]
                if leader is None:
                    leader, made[name] = name, new_statistics(linear)
                    for index in arrived:
                        feed(made[name], linear, index, _tokens(waiting[index][1]))
                    made[name].complete(ranks)
                statistics = made[leader]
                made = {key: kept for key, kept in made.items() if key in (*meeting.held, leader)}
                for index in arrived:
                    last[index] = (weakref.ref(waiting[index][1]), leader)
                prune(linear, statistics)
                del pending[name]
                for index in arrived:
                    del waiting[index]
                    advance(index)
    finally:
        for runner in runners:
            if not runner.dead:
                runner.throw()
    return list(pending.values())


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
    feed: Feed
    batch: int
    leader: str | None = None
    input: torch.Tensor | None = None

    def __call__(self, linear: Linear, x: torch.Tensor) -> None:
        if self.leader is None:
            self.leader, self.input = linear.name, x
            if linear.name not in self.groups:
                self.groups[linear.name] = _Group(self.new_statistics(linear), [linear.name])
            self.feed(self.groups[linear.name].statistics, linear, self.batch, _tokens(x))
            return
        if x is not self.input:
            raise _Stop
        members = self.groups[self.leader].members
        if linear.name not in members:
            members.append(linear.name)


def replay(
    linears: Sequence[Linear],
    count: int,
    forward: Forward,
    finish: Finish,
    new_statistics: NewStatistics,
    prune: Prune,
    feed: Feed = plain_feed,
    ranks: Ranks = ALONE,
) -> list[Linear]:
    """As `lockstep`, with one batch in flight: the block is run once per group of linears that share an input."""
    pending = {linear.name: linear for linear in linears}
    names = list(pending)
    while pending:
        # Per linear: its statistics and who fed them. A batch stops where a second input is asked for.
        groups: dict[str, _Group] = {}
        for index in range(count):
            with (
                input_hooks(list(pending.values()), _FirstGroup(groups, new_statistics, feed, index)),
                contextlib.suppress(_Stop),
            ):
                forward(index)
        mine = min((names.index(name) for name in groups), default=len(names))
        first = min(each for (each,) in ranks.gather([mine]))
        if first == len(names):
            break
        leader = names[first]
        group = groups.get(leader) or _Group(new_statistics(pending[leader]), [])
        group.statistics.complete(ranks)
        # In the order in which a rank that reached it met them.
        met = [names.index(name) for name in group.members]
        everybodys = ranks.gather(met + [-1] * (len(names) - len(met)))
        members = dict.fromkeys(position for row in everybodys for position in row if position >= 0)
        for position in members:
            prune(pending.pop(names[position]), group.statistics)
    for index in range(count):
        finish(index, forward(index))
    return list(pending.values())


def two_pass(
    linears: Sequence[Linear],
    count: int,
    forward: Forward,
    finish: Finish,
    new_statistics: NewStatistics,
    prune: Prune,
    feed: Feed = plain_feed,
    ranks: Ranks = ALONE,
) -> list[Linear]:
    """The original's two passes: statistics of the whole unpruned block, then the pruned block's outputs."""
    names = [linear.name for linear in linears]
    statistics: dict[str, InputStatistics] = {}
    leader_of: dict[str, str] = {}
    for index in range(count):
        previous: tuple[torch.Tensor, str] | None = None

        def collect(linear: Linear, x: torch.Tensor, index: int = index) -> None:
            nonlocal previous
            leader = previous[1] if previous is not None and previous[0] is x else linear.name
            known = leader_of.setdefault(linear.name, leader)
            if known == linear.name:
                if linear.name not in statistics:
                    statistics[linear.name] = new_statistics(linear)
                feed(statistics[linear.name], linear, index, _tokens(x))
            elif known != leader:
                raise _differently(linear.name, known)
            previous = (x, known)

        with input_hooks(linears, collect):
            forward(index)
        previous = None
    mine = [names.index(leader_of[name]) if name in leader_of else -1 for name in names]
    for name, leaders in zip(names, zip(*ranks.gather(mine), strict=True), strict=True):
        known = {leader for leader in leaders if leader >= 0}
        if len(known) > 1:
            raise _differently(name, names[min(known)])
        if known:
            leader_of[name] = names[known.pop()]
    reached = [linear for linear in linears if linear.name in leader_of]
    for linear in reached:
        if leader_of[linear.name] == linear.name:
            if linear.name not in statistics:  # other ranks have fed it, this one has not
                statistics[linear.name] = new_statistics(linear)
            statistics[linear.name].complete(ranks)
    for linear in reached:
        prune(linear, statistics[leader_of[linear.name]])
    for index in range(count):
        finish(index, forward(index))
    return [linear for linear in linears if linear.name not in leader_of]


def _differently(name: str, leader: str) -> RuntimeError:
    return RuntimeError(f"{name} shares its input with {leader} for some windows and not for others")


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(…, in) as (tokens, in)."""
    return x.reshape(-1, x.shape[-1])


@contextlib.contextmanager
def input_hooks(linears: Sequence[Linear], see: Callable[[Linear, torch.Tensor], object]) -> Iterator[None]:
    """While active, `see(linear, input)` is called before every forward of every linear."""

    def hook_for(linear: Linear) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            see(linear, args[0])

        return hook

    handles = [linear.module.register_forward_pre_hook(hook_for(linear)) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
