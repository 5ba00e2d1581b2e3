"""A walk through a block with one batch in flight, for when paused batches need too much memory.

The result equals that of `lockstep` to the bit. Linears that get the very same input form a group,
such as q, k and v. For every group the block runs once from its start on all batches:

    pass 1   every batch runs up to q, k, v and stops     ──► prune q, k, v
    pass 2   every batch runs up to o and stops           ──► prune o
    pass 3   every batch runs up to gate, up and stops    ──► prune gate, up
    ...
    last     every batch runs through                     ──► outputs

Earlier linears are pruned by then, so each pass sees the same values as lockstep does.

Shape suffixes: T tokens, K experts per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from prunus.engine.block.hooks import ExpertCounter, StopForward, input_hooks, tokens_of
from prunus.engine.block.walk import BlockWalk, called_again
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear


@dataclass
class _Group:
    """Linears that get the very same input, and the statistics of that input."""

    statistics: InputStatistics  #: of all batches that have reached the group in this pass
    members: list[str]  #: names of the linears, in the order in which the batches reached them


@dataclass
class _FirstGroup:
    """Observes one batch: measures the first linear that it reaches, and finds its group.

    All batches of a pass share `groups` and `counted`; the other fields are those of one batch.

    Attributes:
        walk: The walk.
        batch: Number of the batch.
        groups: The groups that batches have reached in this pass, by their first linear.
        counted: Names of the experts modules that batches have reached first in this pass.
        pending: The linears that are not pruned yet, by name.
        leader: The first of these that the batch has reached; None before it reaches one.
        input: The input of `leader`.
        called: Names of all linears that the batch has reached.
    """

    walk: BlockWalk
    batch: int
    groups: dict[str, _Group]
    counted: set[str]
    pending: Mapping[str, Linear]
    leader: str | None = None
    input: torch.Tensor | None = None
    called: set[str] = field(default_factory=set)

    def on_input(self, linear: Linear, x: torch.Tensor) -> None:
        """Add the first input to its group's statistics; stop at the first input that differs."""
        if linear.name in self.called:
            raise called_again(linear.name)
        self.called.add(linear.name)
        if linear.name not in self.pending:
            return
        if self.leader is None:
            self.leader, self.input = linear.name, x
            if linear.name not in self.groups:
                self.groups[linear.name] = _Group(self.walk.new_statistics(linear), [linear.name])
            group = self.groups[linear.name]
            self.walk.accumulate(group.statistics, linear, self.batch, tokens_of(x))
            return
        if x is not self.input:
            raise StopForward
        members = self.groups[self.leader].members
        if linear.name not in members:
            members.append(linear.name)

    def on_routing(self, counter: ExpertCounter, chosen_TK: torch.Tensor) -> None:
        """Count the tokens of experts that no linear comes before; such experts are a group."""
        if self.leader is None:
            counter.count(self.batch, chosen_TK)
            self.counted.add(counter.name)
        raise StopForward


def replay(walk: BlockWalk) -> list[Linear]:
    """Take all batches through the block, one at a time and once per group of linears.

    Args:
        walk: The block's linears, its forward pass and what happens to each linear.

    Returns:
        The linears that no batch of any rank reached. They are not pruned.

    Raises:
        NotImplementedError: The block calls a linear more than once.
    """
    ranks = walk.ranks
    pending = {linear.name: linear for linear in walk.linears}
    uncounted = {counter.name: counter for counter in walk.expert_counters}
    names = walk.execution_order()
    while pending:
        groups: dict[str, _Group] = {}
        counted: set[str] = set()
        for batch in range(walk.count):
            observer = _FirstGroup(walk, batch, groups, counted, pending)
            hooks = input_hooks(
                walk.linears, observer.on_input, list(uncounted.values()), observer.on_routing
            )
            with hooks, contextlib.suppress(StopForward):
                walk.forward(batch)
        # Batches may have reached different groups (experts). All ranks take the first one; the
        # others are measured again in a later pass, with its linears pruned.
        position = min((names.index(name) for name in (*groups, *counted)), default=len(names))
        first = min(other for (other,) in ranks.gather_ints([position]))
        if first == len(names):
            break
        leader = names[first]
        if leader in uncounted:
            uncounted.pop(leader).complete(ranks)
            continue
        group = groups.get(leader) or _Group(walk.new_statistics(pending[leader]), [])
        group.statistics.complete(ranks)
        # Members in the order of the first rank that reached the group. Every rank sends a row of
        # the same length; -1 fills it up.
        positions = [names.index(name) for name in group.members]
        rows = ranks.gather_ints(positions + [-1] * (len(names) - len(positions)))
        members = dict.fromkeys(member for row in rows for member in row if member >= 0)
        for member in members:
            walk.prune(pending.pop(names[member]), group.statistics)
    for counter in walk.expert_counters:
        counter.reset()
    for batch in range(walk.count):
        # Nothing is measured any more, but a last linear may be called again.
        observer = _FirstGroup(walk, batch, {}, set(), pending={})
        with input_hooks(walk.linears, observer.on_input):
            output = walk.forward(batch)
        walk.finish(batch, output)
    return list(pending.values())
