"""The original's way through a block: statistics of all linears from the unpruned block, then a pass to propagate.

Linears late in the block do not see what was pruned before them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

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
    input_hooks,
    tokens_of,
)

__all__ = ["two_pass"]


def two_pass(
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
    """The original's two passes: statistics of the whole unpruned block, then the pruned block's outputs."""
    names = [linear.name for linear in linears]
    _count(expert_counters, count, forward, ranks)
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
                feed(statistics[linear.name], linear, index, tokens_of(x))
            elif known != leader:
                raise _differently(linear.name, known)
            previous = (x, known)

        with input_hooks(linears, collect):
            forward(index)
        previous = None
    mine = [names.index(leader_of[name]) if name in leader_of else -1 for name in names]
    for name, leaders in zip(names, zip(*ranks.gather_ints(mine), strict=True), strict=True):
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
    for expert_counter in expert_counters:
        expert_counter.end()
    for linear in reached:
        prune(linear, statistics[leader_of[linear.name]])
    for index in range(count):
        finish(index, forward(index))
    return [linear for linear in linears if linear.name not in leader_of]


class _Counted(BaseException):
    """Ends a pass behind the last experts whose tokens are counted."""


def _count(
    expert_counters: Sequence[ExpertCounter], count: int, forward: Forward, ranks: Ranks
) -> None:
    """One pass of the unpruned block to see which experts the tokens choose, before anything is measured."""
    for index in range(count) if expert_counters else ():
        missing = {expert_counter.name for expert_counter in expert_counters}

        def see(
            expert_counter: ExpertCounter,
            chosen_TK: torch.Tensor,
            index: int = index,
            missing: set[str] = missing,
        ) -> None:
            expert_counter.see(index, chosen_TK)
            missing.discard(expert_counter.name)
            if not missing:
                raise _Counted

        with (
            input_hooks((), lambda _linear, _x: None, expert_counters, see),
            contextlib.suppress(_Counted),
        ):
            forward(index)
    for expert_counter in expert_counters:
        expert_counter.decide(ranks)


def _differently(name: str, leader: str) -> RuntimeError:
    return RuntimeError(
        f"{name} shares its input with {leader} for some windows and not for others"
    )
