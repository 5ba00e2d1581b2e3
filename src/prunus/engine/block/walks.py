"""The three walks through a block, and what they have in common: their arguments.

A walk takes all calibration windows through one block and has its linears pruned on the way:

- `lockstep` pauses the forward pass of every batch at every linear. When all batches wait at the
  same linear, its statistics are complete. It is pruned, and all batches continue with the pruned
  weight.
- `replay` gives the same bits with one batch in flight. It runs the block from its start again for
  every group of linears, for blocks whose paused batches do not fit in memory.
- `two_pass` is the way of the original code: statistics of all linears from the unpruned block,
  then a second pass. Linears late in the block do not see what was pruned before them.

No walk knows what a method does: `prune(linear, statistics)` changes the weight in place.

Shape suffixes: T tokens, I inputs of a linear, K experts per token.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from greenlet import greenlet

from prunus.distributed import ranks
from prunus.engine.block.hooks import ExpertCounter, input_hooks
from prunus.engine.run_record import Walk
from prunus.methods.statistics import InputStatistics
from prunus.model.calls import StopForward
from prunus.model.linears import Linear

#: Adds the input (…, in) of a linear in one batch, by number, to its statistics.
Accumulate = Callable[[InputStatistics, Linear, int, torch.Tensor], None]


def accumulate_inputs(
    statistics: InputStatistics, linear: Linear, batch: int, x: torch.Tensor
) -> None:
    """Add the input (…, in) of a linear in one batch to its statistics.

    This is the `Accumulate` of runs without a dense stream; `DenseBlockInputs` has the other.
    """
    statistics.add(x)


def called_again(name: str) -> NotImplementedError:
    """The error for a linear that the block calls a second time in one forward pass.

    The inputs of the second call depend on the linear's own new weight. So no walk that prunes on
    the way can see them before it prunes. `two_pass` can: it measures the unpruned block.
    """
    return NotImplementedError(
        f"the block calls {name} more than once, and only inputs of the first call are known when "
        "it is pruned: prune with `propagate` block, which measures all calls, or leave it dense "
        f"with `ignore` '*.{name}'"
    )


@dataclass(frozen=True, kw_only=True)
class BlockWalk:
    """The arguments of a walk, which returns the linears that no batch of any rank reached.

    Several processes that have batches of the same run all walk at once.
    All walks but `two_pass` refuse a linear that the block calls twice; see `called_again`.

    Attributes:
        linears: The linears to prune, in the order of registration in the block.
        count: Number of batches on this rank. It may be 0, if other ranks have batches.
        forward: Runs the block on batch i, from 0 to `count` − 1, with the weights of now, and
            returns its output: hidden states.
        finish: Stores the output of batch i. The walk calls it as soon as the batch is through.
        new_statistics: Makes empty statistics for the inputs of a linear.
        prune: Prunes a linear in place, given the complete statistics of its inputs. The walk calls
            it once per linear that a batch reaches, in the order of execution.
        accumulate: Adds the input of a linear in one batch to its statistics.
        expert_counters: The experts modules of the block whose tokens must be counted before any
            of their linears is measured.
    """

    linears: Sequence[Linear]
    count: int
    forward: Callable[[int], torch.Tensor]
    finish: Callable[[int, torch.Tensor], None]
    new_statistics: Callable[[Linear], InputStatistics]
    prune: Callable[[Linear, InputStatistics], None]
    accumulate: Accumulate = accumulate_inputs
    expert_counters: Sequence[ExpertCounter] = ()

    def execution_order(self) -> list[str]:
        """Names of all modules where a walk stops, in the order in which it takes them.

        These are the linears in the order of registration. The name of an experts module with a
        counter comes right before its first linear.
        """
        names: list[str] = []
        for linear in self.linears:
            names += [
                counter.name
                for counter in self.expert_counters
                if counter.owns(linear.name) and counter.name not in names
            ]
            names.append(linear.name)
        return names


# --- lockstep ---
#
# One pass through a block, in which every linear is pruned when all windows wait at it.
#
# The forward pass of each batch is a coroutine (a greenlet), which pauses at every linear:
#
#     batch 0  ──► q (pause) ──► o (pause) ──► up (pause) ──► down (pause) ──► output
#     batch 1  ──► q (pause) ──► o (pause) ──► up (pause) ──► down (pause) ──► output
#                  │
#                  └ all batches wait here: complete the statistics, prune q, resume all batches
#
# Python needs no change in the model for that: a greenlet switches in the middle of any call stack,
# here inside a forward pre-hook. So the statistics of every linear come from a block whose earlier
# linears are pruned already, and yet the block runs only once.
#
# Linears with the very same input (q, k and v; gate and up) share their statistics. Before experts
# all batches pause as well, until the tokens of each expert are counted; see `hooks.py`.
#
# With several ranks, all of them prune the same linear at the same time. `synchronize` finds the
# next linear, the first that any batch of any rank waits at. A rank without a batch there takes
# part with empty statistics.


class LastInput(NamedTuple):
    """The tensor that a batch last added to statistics, and the linear that these belong to.

    The reference is weak: an input must not stay in memory only to be compared with the next one.
    """

    input: weakref.ref[torch.Tensor]
    linear: str


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
                while meeting := synchronize(self.waiting, self.last, self.order):
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
            counter.complete()
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
                self.walk.accumulate(statistics, linear, batch, self.waiting[batch][1])
            statistics.complete()
            self.statistics[leader] = statistics
        statistics = self.statistics[leader]
        # A Gram matrix is large, so statistics go as soon as no later linear can reuse them.
        self.statistics = {
            name: sums for name, sums in self.statistics.items() if name in (*meeting.keep, leader)
        }
        for batch in arrived:
            self.last[batch] = LastInput(weakref.ref(self.waiting[batch][1]), leader)
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
) -> Meeting | None:
    """Find the first module that any batch of any rank waits at. All ranks call it at once.

    One exchange of integers decides: every rank tells its `_Standing`.

    Args:
        waiting: Per batch of this rank: the module that it waits at, and its input there.
        last: Per batch of this rank: the input that it last added to statistics.
        order: Name of a module where batches can wait -> its position in the order of execution.

    Returns:
        The same on all ranks; None once all batches of all ranks are through.
    """
    names = list(order)
    standings = _Standing.of(waiting, last, order).exchanged()
    first = min(each.position for each in standings)
    if first == len(names):
        return None
    there = [each for each in standings if each.position == first]
    leader = _common(each.leader for each in there)
    # A batch that is in the leader's statistics but does not wait here would leave its tokens in
    # them. Then this linear needs statistics of its own.
    if leader != _NONE and sum(each.added[leader] for each in standings) != sum(
        each.arrived for each in there
    ):
        leader = _NONE
    # On a rank that does not take part in this meeting, all batches stay.
    left = [each.staying if each.position == first else each.added for each in standings]
    keep = {name for place, name in enumerate(names) if any(counts[place] for counts in left)}
    if leader == _NONE:
        return Meeting(names[first], None, frozenset(keep))
    return Meeting(names[first], names[leader], frozenset(keep | {names[leader]}))


# In the place of the position of a module: there is none.
_NONE = -1


@dataclass(frozen=True)
class _Standing:
    """How far the batches of one rank are, in integers that ranks can exchange.

    A module is given by its position in the order of execution. The counts have one entry per
    module.

    Attributes:
        position: The first module that batches wait at; the number of modules if all batches are
            through.
        leader: The module whose statistics already hold the very input of all batches that wait
            there; `_NONE` if there is no such module.
        arrived: How many batches wait there.
        added: Of how many batches each module's statistics were the last.
        staying: How many of these batches do not wait at `position`, so that they stay where they
            are in a meeting there.
    """

    position: int
    leader: int
    arrived: int
    added: Sequence[int]
    staying: Sequence[int]

    @classmethod
    def of(
        cls,
        waiting: Mapping[int, tuple[str, torch.Tensor]],
        last: Sequence[LastInput | None],
        order: Mapping[str, int],
    ) -> _Standing:
        """That of this rank; the arguments are those of `synchronize`."""
        position = min((order[name] for name, _ in waiting.values()), default=len(order))
        arrived = {batch for batch, (name, _) in waiting.items() if order[name] == position}
        leader = _common(
            order[entry.linear]
            if (entry := last[batch]) is not None and entry.input() is waiting[batch][1]
            else _NONE
            for batch in arrived
        )
        added = Counter(order[entry.linear] for entry in last if entry is not None)
        staying = added - Counter(
            order[entry.linear] for batch in arrived if (entry := last[batch]) is not None
        )
        counts = [[count[place] for place in range(len(order))] for count in (added, staying)]
        return cls(position, leader, len(arrived), counts[0], counts[1])

    def exchanged(self) -> list[_Standing]:
        """Those of all ranks, in the order of ranks."""
        row = [self.position, self.leader, self.arrived, *self.added, *self.staying]
        split = 3 + len(self.added)
        return [
            _Standing(other[0], other[1], other[2], other[3:split], other[split:])
            for other in ranks().gather_ints(row)
        ]


def _common(positions: Iterable[int]) -> int:
    """The position that all of some are; `_NONE` if they differ or there are none."""
    different = {*positions}
    return different.pop() if len(different) == 1 else _NONE


# --- replay ---
#
# A walk through a block with one batch in flight, for when paused batches need too much memory.
#
# The result equals that of `lockstep` to the bit. Linears that get the very same input form a
# group, such as q, k and v. For every group the block runs once from its start on all batches:
#
#     pass 1   every batch runs up to q, k, v and stops     ──► prune q, k, v
#     pass 2   every batch runs up to o and stops           ──► prune o
#     pass 3   every batch runs up to gate, up and stops    ──► prune gate, up
#     ...
#     last     every batch runs through                     ──► outputs
#
# Earlier linears are pruned by then, so each pass sees the same values as lockstep does.


class _Group(NamedTuple):
    """Linears that get the very same input, and the statistics of that input."""

    statistics: InputStatistics  #: of all batches that have reached the group in this pass
    members: dict[str, None]  #: names of the linears, in the order in which batches reached them


def replay(walk: BlockWalk) -> list[Linear]:
    """Take all batches through the block, one at a time and once per group of linears.

    Args:
        walk: The block's linears, its forward pass and what happens to each linear.

    Returns:
        The linears that no batch of any rank reached. They are not pruned.

    Raises:
        NotImplementedError: The block calls a linear more than once.
    """
    pending = {linear.name: linear for linear in walk.linears}
    uncounted = {counter.name: counter for counter in walk.expert_counters}
    names = walk.execution_order()
    while pending:
        groups: dict[str, _Group] = {}
        reached = [
            _measure_group(walk, batch, pending, uncounted, groups) for batch in range(walk.count)
        ]
        # Batches may have reached different groups (experts). All ranks take the first one; the
        # others are measured again in a later pass, with its linears pruned.
        position = min((names.index(name) for name in reached if name), default=len(names))
        first = min(other for (other,) in ranks().gather_ints([position]))
        if first == len(names):
            break
        leader = names[first]
        if leader in uncounted:
            uncounted.pop(leader).complete()
            continue
        group = groups.get(leader) or _Group(walk.new_statistics(pending[leader]), {})
        group.statistics.complete()
        # Members in the order of the first rank that reached the group. Every rank sends a row of
        # the same length; -1 fills it up.
        positions = [names.index(name) for name in group.members]
        rows = ranks().gather_ints(positions + [-1] * (len(names) - len(positions)))
        members = dict.fromkeys(member for row in rows for member in row if member >= 0)
        for member in members:
            walk.prune(pending.pop(names[member]), group.statistics)
    for counter in walk.expert_counters:
        counter.reset()
    for batch in range(walk.count):
        # Nothing is measured any more, but a last linear may be called again.
        with input_hooks(walk.linears, partial(_call_once, set())):
            output = walk.forward(batch)
        walk.finish(batch, output)
    return list(pending.values())


def _measure_group(
    walk: BlockWalk,
    batch: int,
    pending: Mapping[str, Linear],
    uncounted: Mapping[str, ExpertCounter],
    groups: dict[str, _Group],
) -> str | None:
    """Run a batch up to its next group and through it, and measure the input of the group.

    Experts that no linear of a group comes before are where the batch stops, too: their tokens are
    counted.

    Args:
        walk: The walk.
        batch: Number of the batch.
        pending: The linears that are not pruned yet, by name.
        uncounted: The experts modules whose tokens are not counted yet, by name.
        groups: The groups that batches have reached in this pass, by their first linear. That of
            this batch is added.

    Returns:
        The first linear of the group, or the experts module; None if the batch reaches neither.
    """
    called = set[str]()
    reached: str | None = None
    shared: torch.Tensor | None = None

    def on_input(linear: Linear, x: torch.Tensor) -> None:
        nonlocal reached, shared
        _call_once(called, linear, x)
        if linear.name not in pending:
            return
        if reached is None:
            reached, shared = linear.name, x
            if reached not in groups:
                groups[reached] = _Group(walk.new_statistics(linear), {})
            walk.accumulate(groups[reached].statistics, linear, batch, x)
        if x is not shared:
            raise StopForward
        groups[reached].members[linear.name] = None

    def on_routing(counter: ExpertCounter, chosen_TK: torch.Tensor) -> None:
        nonlocal reached
        if reached is None:
            reached = counter.name
            counter.count(batch, chosen_TK)
        raise StopForward

    hooks = input_hooks(walk.linears, on_input, list(uncounted.values()), on_routing)
    with hooks, contextlib.suppress(StopForward):
        walk.forward(batch)
    return reached


def _call_once(called: set[str], linear: Linear, x: torch.Tensor) -> None:
    """Note that a batch has called a linear, which it may do once."""
    if linear.name in called:
        raise called_again(linear.name)
    called.add(linear.name)


# --- two passes ---
#
# The walk of the original code: one pass to measure the unpruned block, one pass to propagate.
#
# Linears late in the block do not see what was pruned before them. This walk exists to reproduce
# the original's results; `lockstep` is better and needs one pass less.


def two_pass(walk: BlockWalk) -> list[Linear]:
    """Measure all linears of the unpruned block, prune them, then run the pruned block.

    Every linear has statistics of its own, as in the original code.

    Args:
        walk: The block's linears, its forward pass and what happens to each linear.

    Returns:
        The linears that no batch of any rank reached. They are not pruned.
    """
    _count_expert_tokens(walk)
    statistics = {linear.name: walk.new_statistics(linear) for linear in walk.linears}
    for batch in range(walk.count):

        def collect(linear: Linear, x: torch.Tensor, batch: int = batch) -> None:
            walk.accumulate(statistics[linear.name], linear, batch, x)

        with input_hooks(walk.linears, collect):
            walk.forward(batch)
    for counter in walk.expert_counters:
        counter.reset()
    unreached = []
    for linear in walk.linears:
        inputs = statistics.pop(linear.name)
        inputs.complete()
        if inputs.tokens:
            walk.prune(linear, inputs)
        else:
            unreached.append(linear)
    for batch in range(walk.count):
        walk.finish(batch, walk.forward(batch))
    return unreached


def _count_expert_tokens(walk: BlockWalk) -> None:
    """Run the unpruned block to count every expert's tokens, before the measuring pass."""
    counters = walk.expert_counters
    for batch in range(walk.count) if counters else ():

        def count(counter: ExpertCounter, chosen_TK: torch.Tensor, batch: int = batch) -> None:
            counter.count(batch, chosen_TK)

        with input_hooks((), lambda _linear, _x: None, counters, count):
            walk.forward(batch)
    for counter in counters:
        counter.complete()


#: Name of a walk in records -> the walk. Each returns the linears that no token reached.
WALKS: dict[Walk, Callable[[BlockWalk], list[Linear]]] = {
    "lockstep": lockstep,
    "replay": replay,
    "two_pass": two_pass,
}
