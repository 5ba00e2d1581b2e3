"""The walk of the original code: one pass to measure the unpruned block, one pass to propagate.

Linears late in the block do not see what was pruned before them. This walk exists to reproduce the
original's results; `lockstep` is better and needs one pass less.
"""

from __future__ import annotations

import contextlib

import torch

from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.pruning.block.hooks import ExpertCounter, input_hooks, tokens_of
from prunus.pruning.block.walk import BlockWalk


def two_pass(walk: BlockWalk) -> list[Linear]:
    """Measure all linears of the unpruned block, prune them, then run the pruned block."""
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

    It returns statistics by the linear that they were made for; and for every linear that was
    reached the one whose statistics are its own too, because both get the very same input.
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
            known = leaders.setdefault(linear.name, leader)
            if known == linear.name:
                if linear.name not in statistics:
                    statistics[linear.name] = walk.new_statistics(linear)
                walk.accumulate(statistics[linear.name], linear, batch, tokens_of(x))
            elif known != leader:
                raise _sharing_error(linear.name, known)
            previous = (x, known)

        with input_hooks(walk.linears, collect):
            walk.forward(batch)
        # Let the batch's last activation go before the next batch runs.
        previous = None
    return statistics, leaders


def _agree_on_leaders(walk: BlockWalk, leaders: dict[str, str]) -> dict[str, str]:
    """The leaders that all ranks have found; they must not contradict each other."""
    names = [linear.name for linear in walk.linears]
    own = [names.index(leaders[name]) if name in leaders else -1 for name in names]
    agreed: dict[str, str] = {}
    for name, each in zip(names, zip(*walk.ranks.gather_ints(own), strict=True), strict=True):
        found = {leader for leader in each if leader >= 0}
        if len(found) > 1:
            raise _sharing_error(name, names[min(found)])
        if found:
            agreed[name] = names[found.pop()]
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
