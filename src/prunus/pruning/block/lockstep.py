"""Walking all calibration windows through one block and pruning its linears on the way.

Three ways lead through a block:

- `lockstep`: each batch's forward pass is a coroutine that pauses at every linear. When all of them stand
  at the same linear, its statistics are complete; it is pruned, and all go on with the pruned weight. One
  pass in all.
- `replay`: bit for bit the same result without paused coroutines: the block is run again from its start for
  every group of linears, so that only one batch is in flight. For when paused batches do not fit in memory.
- `two_pass`: the original's way. Statistics of all linears from the unpruned block, then a second pass to
  propagate. Linears late in the block do not see what was pruned before them.

Before experts all batches stand still as well, until it is known how many tokens each expert gets; see `expert_counter`.

None of them knows what a method does: `prune(linear, statistics)` changes the weight in place.

Where other ranks have windows too, all ranks stand at the same linear before its statistics are complete: they agree on
the one that comes first among all of them, and a rank that has nothing for it, or no windows at all, takes part with
empty hands.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from greenlet import greenlet

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

__all__ = ["lockstep"]


def lockstep(
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
        routings: experts modules of the block whose tokens are to be counted before any of them is measured.

    Returns:
        The linears that no batch of any rank reached.
    """
    order = {
        name: position for position, name in enumerate(execution_order(linears, expert_counters))
    }
    uncounted = {expert_counter.name: expert_counter for expert_counter in expert_counters}
    pending = {linear.name: linear for linear in linears}

    def pause(linear: Linear, x: torch.Tensor) -> None:
        if linear.name in pending:
            greenlet.getcurrent().parent.switch((linear.name, x))

    def pause_before_experts(expert_counter: ExpertCounter, chosen_TK: torch.Tensor) -> None:
        if expert_counter.name in uncounted:
            greenlet.getcurrent().parent.switch((expert_counter.name, chosen_TK))

    runners = [greenlet(forward) for _ in range(count)]
    waiting: dict[int, tuple[str, torch.Tensor]] = {}
    # Per batch the linear that its statistics were last made for, and the tensor that fed them.
    last: list[LastInput | None] = [None] * count
    # By the linear that they were made for.
    made: dict[str, InputStatistics] = {}

    def advance(index: int, *start: int) -> None:
        result = runners[index].switch(*start)
        if runners[index].dead:
            finish(index, result)
        else:
            waiting[index] = result

    try:
        with input_hooks(linears, pause, expert_counters, pause_before_experts):
            for index in range(count):
                advance(index, index)
            while True:
                # Where batches part (experts), the linear registered first goes first: blocks run their
                # experts in that order, so nobody can still arrive at it.
                meeting = synchronize(waiting, last, order, ranks)
                if meeting is None:
                    break
                name, leader = meeting.linear, meeting.leader
                arrived = [index for index, (at, _) in sorted(waiting.items()) if at == name]
                if name in uncounted:
                    for index in arrived:
                        uncounted[name].see(index, waiting[index][1])
                    uncounted.pop(name).decide(ranks)
                    for index in arrived:
                        del waiting[index]
                        advance(index)
                    continue
                linear = pending[name]
                if leader is None:
                    leader, made[name] = name, new_statistics(linear)
                    for index in arrived:
                        feed(made[name], linear, index, tokens_of(waiting[index][1]))
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
        for expert_counter in expert_counters:
            expert_counter.end()
    return list(pending.values())


#: The tensor that a batch last gave to statistics, and the linear that those were made for.
LastInput = tuple[weakref.ref[torch.Tensor], str]


@dataclass(frozen=True)
class Rendezvous:
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


def synchronize(
    waiting: Mapping[int, tuple[str, torch.Tensor]],
    last: Sequence[LastInput | None],
    order: Mapping[str, int],
    ranks: Ranks,
) -> Rendezvous | None:
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
        order[entry[1]]
        if (entry := last[index]) is not None and entry[0]() is waiting[index][1]
        else -1
        for index in arrived
    }
    leader = sources.pop() if len(sources) == 1 else -1
    # How many batches each linear's statistics were the last of: all of them, and those that do not go on now.
    fed, stay = [0] * through, [0] * through
    for index, entry in enumerate(last):
        if entry is not None:
            fed[order[entry[1]]] += 1
            stay[order[entry[1]]] += index not in arrived
    said = ranks.gather_ints([mine, leader, len(arrived), *fed, *stay])
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
    held = {
        name for name, batches in zip(names, zip(*still, strict=True), strict=True) if any(batches)
    }
    if leader >= 0:
        held.add(names[leader])
    return Rendezvous(names[first], names[leader] if leader >= 0 else None, frozenset(held))
