"""What the three walks through a block have in common: their arguments.

A walk takes all calibration windows through one block and has its linears pruned on the way:

- `lockstep` pauses the forward pass of every batch at every linear. When all batches wait at the
  same linear, its statistics are complete. It is pruned, and all batches continue with the pruned
  weight.
- `replay` gives the same bits with one batch in flight. It runs the block from its start again for
  every group of linears, for blocks whose paused batches do not fit in memory.
- `two_pass` is the way of the original code: statistics of all linears from the unpruned block,
  then a second pass. Linears late in the block do not see what was pruned before them.

No walk knows what a method does: `prune(linear, statistics)` changes the weight in place.

Shape suffixes: T tokens, I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear
from prunus.pruning.block.hooks import ExpertCounter

#: From the number of a batch to the block's output: hidden states, with the weights of now.
Forward = Callable[[int], torch.Tensor]
#: Stores the output of a batch, given the batch's number and the output.
Finish = Callable[[int, torch.Tensor], None]
#: Prunes a linear in place, by the complete statistics of its inputs.
Prune = Callable[[Linear, InputStatistics], None]
#: Makes the empty statistics that a linear needs.
NewStatistics = Callable[[Linear], InputStatistics]
#: Adds the input X_TI (tokens, in) of a linear in one batch, by number, to its statistics.
Accumulate = Callable[[InputStatistics, Linear, int, torch.Tensor], None]


def accumulate_inputs(
    statistics: InputStatistics, linear: Linear, batch: int, X_TI: torch.Tensor
) -> None:
    """Add the input X_TI (tokens, in) of a linear in one batch to its statistics.

    This is the `Accumulate` of runs without a dense stream. `accumulate_with_drift` is the other.
    """
    statistics.add(X_TI)


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

    All walks but `two_pass` refuse a linear that the block calls twice; see `called_again`.

    Attributes:
        linears: The linears to prune, in the order of registration in the block.
        count: Number of batches on this rank. It may be 0, if other ranks have batches.
        forward: Runs the block on batch i, from 0 to `count` − 1, and returns its output.
        finish: Stores the output of batch i. The walk calls it as soon as the batch is through.
        new_statistics: Makes empty statistics for the inputs of a linear.
        prune: Prunes a linear, given the complete statistics of its inputs. The walk calls it once
            per linear that a batch reaches, in the order of execution.
        accumulate: Adds the input of a linear in one batch to its statistics.
        ranks: The processes that have batches of the same run. All of them walk at once.
        expert_counters: The experts modules of the block whose tokens must be counted before any
            of their linears is measured.
    """

    linears: Sequence[Linear]
    count: int
    forward: Forward
    finish: Finish
    new_statistics: NewStatistics
    prune: Prune
    accumulate: Accumulate = accumulate_inputs
    ranks: Ranks = SINGLE_PROCESS
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
