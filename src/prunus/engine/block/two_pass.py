"""The walk of the original code: one pass to measure the unpruned block, one pass to propagate.

Linears late in the block do not see what was pruned before them. This walk exists to reproduce the
original's results; `lockstep` is better and needs one pass less.

Shape suffixes: T tokens, K experts per token.
"""

from __future__ import annotations

import torch

from prunus.engine.block.hooks import ExpertCounter, input_hooks, tokens_of
from prunus.engine.block.walk import BlockWalk
from prunus.model.linears import Linear


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
            walk.accumulate(statistics[linear.name], linear, batch, tokens_of(x))

        with input_hooks(walk.linears, collect):
            walk.forward(batch)
    for counter in walk.expert_counters:
        counter.reset()
    unreached = []
    for linear in walk.linears:
        inputs = statistics.pop(linear.name)
        inputs.complete(walk.ranks)
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
        counter.complete(walk.ranks)
