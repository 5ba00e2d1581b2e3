"""One pass through a block, in which every linear is pruned when all windows wait at it.

The forward pass of each batch is a coroutine (a greenlet), which pauses at every linear:

    batch 0  ──► q (pause) ──► o (pause) ──► up (pause) ──► down (pause) ──► output
    batch 1  ──► q (pause) ──► o (pause) ──► up (pause) ──► down (pause) ──► output
                 │
                 └ all batches wait here: complete the statistics, prune q, resume all batches

Python needs no change in the model for that: a greenlet switches in the middle of any call stack,
here inside a forward pre-hook. So the statistics of every linear come from a block whose earlier
linears are pruned already, and yet the block runs only once.

Linears with the very same input (q, k and v; gate and up) share their statistics. Before experts
all batches pause as well, until the tokens of each expert are counted; see `hooks.py`.

With several ranks, all of them prune the same linear at the same time. `synchronize` finds the
next linear, the first that any batch of any rank waits at. A rank without a batch there takes part
with empty statistics.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from greenlet import greenlet

from prunus.distributed import Ranks
from prunus.engine.block.hooks import ExpertCounter, input_hooks, tokens_of
from prunus.engine.block.walk import BlockWalk, called_again
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear

#: The tensor that a batch last added to statistics, and the linear that these belong to. The
#: reference is weak: an input must not stay in memory only to be compared with the next one.
LastInput = tuple[weakref.ref[torch.Tensor], str]


def lockstep(walk: BlockWalk) -> list[Linear]:
    """Take all batches through the block in lockstep.

    Args:
        walk: The block's linears, its forward pass and what happens to each linear.

    Returns:
        The linears that no batch of any rank reached. They are not pruned.

    Raises:
        NotImplementedError: The block calls a linear more than once.
    """
    return _Lockstep(walk).run()


class _Lockstep:
    """The state of one lockstep pass: which batch waits where, and what is left to prune."""

    def __init__(self, walk: BlockWalk) -> None:
        self.walk = walk
        # Name of a module where batches can wait -> its position in the order of execution.
        self.order = {name: position for position, name in enumerate(walk.execution_order())}
        # Experts modules whose tokens are not counted yet.
        self.uncounted = {counter.name: counter for counter in walk.expert_counters}
        # Linears that are not pruned yet.
        self.pending = {linear.name: linear for linear in walk.linears}
        # The forward pass of each batch.
        self.runners = [greenlet(walk.forward) for _ in range(walk.count)]
        # Batch -> the module that it waits at, and its input there: of a linear the tensor (…, in),
        # of an experts module the numbers of the chosen experts (T, K).
        self.waiting: dict[int, tuple[str, torch.Tensor]] = {}
        # Per batch, what it last added to statistics; None before it added anything.
        self.last: list[LastInput | None] = [None] * walk.count
        # Statistics that are complete, by the linear that they were made for.
        self.statistics: dict[str, InputStatistics] = {}

    def run(self) -> list[Linear]:
        """Take the batches from meeting to meeting, and return the linears that none reached."""
        walk = self.walk
        try:
            with input_hooks(
                walk.linears, self._pause, walk.expert_counters, self._pause_at_experts
            ):
                for batch in range(walk.count):
                    # The argument with which `walk.forward` begins is the number of the batch.
                    self._advance(batch, batch)
                # Batches may take different ways through experts. The linear registered first
                # goes first: blocks run their experts in that order, so that no batch can still
                # arrive at a linear after it was pruned.
                while meeting := synchronize(self.waiting, self.last, self.order, walk.ranks):
                    self._meet(meeting)
        finally:
            # After an error, paused batches end here, so that none keeps its activations alive.
            for runner in self.runners:
                if not runner.dead:
                    runner.throw()
            for counter in walk.expert_counters:
                counter.reset()
        return list(self.pending.values())

    def _meet(self, meeting: Meeting) -> None:
        """Count the experts' tokens or prune the linear, then resume the batches there."""
        arrived = [batch for batch, (at, _) in sorted(self.waiting.items()) if at == meeting.name]
        if meeting.name in self.uncounted:
            counter = self.uncounted.pop(meeting.name)
            for batch in arrived:
                counter.count(batch, self.waiting[batch][1])
            counter.complete(self.walk.ranks)
        else:
            self._prune(meeting, arrived)
        for batch in arrived:
            del self.waiting[batch]
            self._advance(batch)

    def _prune(self, meeting: Meeting, arrived: Sequence[int]) -> None:
        """Complete the statistics of the linear of this meeting, or reuse its leader's, and prune.

        `arrived` are the batches of this rank that wait at the linear. There may be none.
        """
        linear = self.pending[meeting.name]
        leader = meeting.leader
        if leader is None:
            leader = linear.name
            statistics = self.walk.new_statistics(linear)
            for batch in arrived:
                self.walk.accumulate(statistics, linear, batch, tokens_of(self.waiting[batch][1]))
            statistics.complete(self.walk.ranks)
            self.statistics[leader] = statistics
        statistics = self.statistics[leader]
        # A Gram matrix is large, so statistics go as soon as no later linear can reuse them.
        self.statistics = {
            name: sums for name, sums in self.statistics.items() if name in (*meeting.keep, leader)
        }
        for batch in arrived:
            self.last[batch] = (weakref.ref(self.waiting[batch][1]), leader)
        self.walk.prune(linear, statistics)
        del self.pending[linear.name]

    def _advance(self, batch: int, *start: int) -> None:
        """Run a batch until it pauses or ends; `start` is the argument of its forward."""
        result = self.runners[batch].switch(*start)
        if self.runners[batch].dead:
            self.walk.finish(batch, result)
        else:
            self.waiting[batch] = result

    def _pause(self, linear: Linear, x: torch.Tensor) -> None:
        """Hand over to `_advance`, in the middle of a batch's forward pass."""
        if linear.name not in self.pending:
            raise called_again(linear.name)
        greenlet.getcurrent().parent.switch((linear.name, x))

    def _pause_at_experts(self, counter: ExpertCounter, chosen_TK: torch.Tensor) -> None:
        if counter.name in self.uncounted:
            greenlet.getcurrent().parent.switch((counter.name, chosen_TK))


@dataclass(frozen=True)
class Meeting:
    """What all ranks do next.

    Attributes:
        name: The linear to prune, or the experts module whose tokens are counted.
        leader: An earlier linear whose statistics serve for this one too, because every batch gives
            both the very same tensor (q, k, v; gate, up). None if there is none.
        keep: Linears whose statistics a later linear may reuse, so they must stay in memory.
    """

    name: str
    leader: str | None
    keep: frozenset[str]


def synchronize(
    waiting: Mapping[int, tuple[str, torch.Tensor]],
    last: Sequence[LastInput | None],
    order: Mapping[str, int],
    ranks: Ranks,
) -> Meeting | None:
    """Find the first module that any batch of any rank waits at. All ranks call it at once.

    One exchange of integers decides. A rank tells the position of its first waiting batch, the
    leader that its batches there have in common, and two counts per linear that show which
    statistics can still be reused.

    Args:
        waiting: Per batch of this rank: the module that it waits at, and its input there.
        last: Per batch of this rank: the input that it last added to statistics.
        order: Name of a module where batches can wait -> its position in the order of execution.
        ranks: The processes that have batches of the same run.

    Returns:
        The same on all ranks; None once all batches of all ranks are through.
    """
    names = list(order)
    through = len(order)  # the position of a rank whose batches are all through
    position = min((order[name] for name, _ in waiting.values()), default=through)
    arrived = {batch for batch, (name, _) in waiting.items() if order[name] == position}
    # The statistics that already hold this very tensor. All batches must agree on them; -1 stands
    # for none.
    sources = {
        order[entry[1]]
        if (entry := last[batch]) is not None and entry[0]() is waiting[batch][1]
        else -1
        for batch in arrived
    }
    leader = sources.pop() if len(sources) == 1 else -1
    # Per linear: of how many batches its statistics were the last, and how many of these batches
    # stay where they are in this meeting.
    added = [0] * through
    staying = [0] * through
    for batch, entry in enumerate(last):
        if entry is not None:
            added[order[entry[1]]] += 1
            staying[order[entry[1]]] += batch not in arrived
    rows = ranks.gather_ints([position, leader, len(arrived), *added, *staying])
    first = min(row[0] for row in rows)
    if first == through:
        return None
    there = [row for row in rows if row[0] == first]
    leaders = {row[1] for row in there}
    leader = leaders.pop() if len(leaders) == 1 else -1
    # A batch that is in the leader's statistics but does not wait here would leave its tokens in
    # them. Then this linear needs statistics of its own.
    if leader >= 0 and sum(row[3 + leader] for row in rows) != sum(row[2] for row in there):
        leader = -1
    # On a rank that does not take part in this meeting, all batches stay.
    remaining = [row[3 + through :] if row[0] == first else row[3 : 3 + through] for row in rows]
    keep = {
        name
        for name, batches in zip(names, zip(*remaining, strict=True), strict=True)
        if any(batches)
    }
    if leader >= 0:
        keep.add(names[leader])
    return Meeting(names[first], names[leader] if leader >= 0 else None, frozenset(keep))
