"""What the three walks through a block have in common: their arguments.

A walk takes all calibration windows through one block and has its linears pruned on the way.
`lockstep` runs the block once, `replay` gives the same bits in less memory, and `two_pass` is the
way of the original code. No walk knows what a method does: `prune(linear, statistics)` changes the
weight in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.pruning.block.hooks import ExpertCounter

Forward = Callable[[int], torch.Tensor]
Finish = Callable[[int, torch.Tensor], None]
Prune = Callable[[Linear, InputStatistics], None]
NewStatistics = Callable[[Linear], InputStatistics]
Accumulate = Callable[[InputStatistics, Linear, int, torch.Tensor], None]


def accumulate_inputs(
    statistics: InputStatistics, linear: Linear, batch: int, X_TI: torch.Tensor
) -> None:
    """Add the input X_TI (tokens, in) of a linear in one batch to its statistics."""
    statistics.add(X_TI)


def called_again(name: str) -> NotImplementedError:
    """The error for a linear called twice: its second input depends on its own new weight."""
    return NotImplementedError(
        f"the block calls {name} more than once, and only inputs of the first call are known when "
        "it is pruned: prune with `propagate` block, which measures all calls, or leave it dense "
        f"with `ignore` '*.{name}'"
    )


@dataclass(frozen=True, kw_only=True)
class BlockWalk:
    """The arguments of a walk, which returns the linears that no batch of any rank reached."""

    linears: Sequence[Linear]
    count: int
    forward: Forward
    finish: Finish  #: stores the output of batch i; called as soon as the batch is through
    new_statistics: NewStatistics
    #: prunes a linear, given the complete statistics of its inputs. It is called once per linear,
    #: in the order of execution.
    prune: Prune
    accumulate: Accumulate = accumulate_inputs
    ranks: Ranks = SINGLE_PROCESS
    #: the experts modules of the block whose tokens must be counted before any of their linears is
    #: measured.
    expert_counters: Sequence[ExpertCounter] = ()

    def execution_order(self) -> list[str]:
        """Names of the linears in the order of registration, experts modules before their own."""
        names: list[str] = []
        for linear in self.linears:
            names += [
                counter.name
                for counter in self.expert_counters
                if counter.owns(linear.name) and counter.name not in names
            ]
            names.append(linear.name)
        return names
