"""The walk of the original code: one pass to measure the unpruned block, one pass to propagate.

Linears late in the block do not see what was pruned before them. This walk exists to reproduce the
original's results; `lockstep` is better and needs one pass less.

Shape suffixes: T tokens, K experts per token.
"""

from __future__ import annotations

import contextlib

import torch

from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.pruning.block.hooks import ExpertCounter, input_hooks, tokens_of
from prunus.pruning.block.walk import BlockWalk


def two_pass(walk: BlockWalk) -> list[Linear]:
    """Measure all linears of the unpruned block, prune them, then run the pruned block.

    Args:
        walk: The block's linears, its forward pass and what happens to each linear.

    Returns:
        The linears that no batch of any rank reached. They are not pruned.

    Raises:
        RuntimeError: Two linears share their input for some windows and not for others.
    """
    _count_expert_tokens(walk)
    statistics, leaders = _measure(walk)
    leaders = _agree_on_leaders(walk, leaders)
    reached = [linear for linear in walk.linears if linear.name in leaders]
    for linear in reached:
        if leaders[linear.name] == linear.name:
            # Only other ranks may have had batches for this linear.
            if linear.name not in statistics:
                statistics[linear.name] = walk.new_statistics(linear)
            statistics[linear.name].complete(walk.ranks)
    for counter in walk.expert_counters:
        counter.reset()
    for linear in reached:
        walk.prune(linear, statistics[leaders[linear.name]])
    for batch in range(walk.count):
        walk.finish(batch, walk.forward(batch))
    return [linear for linear in walk.linears if linear.name not in leaders]


def _measure(walk: BlockWalk) -> tuple[dict[str, InputStatistics], dict[str, str]]:
    """Run the unpruned block on all batches of this rank.

    Returns:
        Statistics by the name of the linear that they were made for. And for every linear that a
        batch reached, its leader: the linear whose statistics serve for it too, because both get
        the very same input. A linear can be its own leader.
    """
    statistics: dict[str, InputStatistics] = {}
    leaders: dict[str, str] = {}
    for batch in range(walk.count):
        # The last input of this batch, and the linear that its statistics were made for. Linears
        # with the same input follow each other, so one is enough to find them.
        previous: tuple[torch.Tensor, str] | None = None

        def collect(linear: Linear, x: torch.Tensor, batch: int = batch) -> None:
            nonlocal previous
            same_input = previous is not None and previous[0] is x
            leader = previous[1] if previous is not None and same_input else linear.name
            earlier_leader = leaders.setdefault(linear.name, leader)
            if earlier_leader == linear.name:
                if linear.name not in statistics:
                    statistics[linear.name] = walk.new_statistics(linear)
                walk.accumulate(statistics[linear.name], linear, batch, tokens_of(x))
            elif earlier_leader != leader:
                raise _sharing_error(linear.name, earlier_leader)
            previous = (x, earlier_leader)

        with input_hooks(walk.linears, collect):
            walk.forward(batch)
        # Let the batch's last activation go before the next batch runs.
        previous = None
    return statistics, leaders


def _agree_on_leaders(walk: BlockWalk, leaders: dict[str, str]) -> dict[str, str]:
    """The leaders of all ranks together; they must not contradict each other."""
    names = [linear.name for linear in walk.linears]
    # Per linear, the position of its leader; -1 if no batch of the rank reached the linear.
    positions = [names.index(leaders[name]) if name in leaders else -1 for name in names]
    agreed: dict[str, str] = {}
    by_linear = zip(*walk.ranks.gather_ints(positions), strict=True)
    for name, by_rank in zip(names, by_linear, strict=True):
        distinct = {leader for leader in by_rank if leader >= 0}
        if len(distinct) > 1:
            raise _sharing_error(name, names[min(distinct)])
        if distinct:
            agreed[name] = names[distinct.pop()]
    return agreed


class _Counted(BaseException):
    """Ends a forward pass after the last experts module whose tokens are counted."""


def _count_expert_tokens(walk: BlockWalk) -> None:
    """Run the unpruned block to count every expert's tokens, before the measuring pass."""
    counters = walk.expert_counters
    for batch in range(walk.count) if counters else ():
        missing = {counter.name for counter in counters}

        def count(
            counter: ExpertCounter,
            chosen_TK: torch.Tensor,
            batch: int = batch,
            missing: set[str] = missing,
        ) -> None:
            counter.count(batch, chosen_TK)
            missing.discard(counter.name)
            if not missing:
                raise _Counted

        with (
            input_hooks((), lambda _linear, _x: None, counters, count),
            contextlib.suppress(_Counted),
        ):
            walk.forward(batch)
    for counter in counters:
        counter.complete(walk.ranks)


def _sharing_error(name: str, leader: str) -> RuntimeError:
    return RuntimeError(
        f"{name} shares its input with {leader} for some windows and not for others, so their "
        "statistics cannot be told apart: prune with propagate linear instead of block"
    )
