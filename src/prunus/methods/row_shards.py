"""Where the rows of a linear are solved: all in this process, or a share of them in every process.

Once the statistics of its inputs are known, the rows (outputs) of a linear hardly depend on each
other. So several processes can split one linear by rows. Two things still connect the rows: a mask
for which all rows compete, and the decision when an iteration ends. `RowShard` offers both.

A solver is written once, for the rows of a shard. A single process gets a shard that holds all
rows, so solvers need no branch for it. This file does not import torch when it is loaded, because
`MethodOptions` names these classes and a recipe is read without torch.

Shape suffixes: O outputs (rows), B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from prunus.methods.base import Pruned

__all__ = ["EVERY_ROW", "UNSHARDED", "AllRows", "RowShard", "RowSharding"]


class RowShard(Protocol):
    """The rows of a linear that this process solves."""

    @property
    def rows(self) -> slice:
        """Which rows of the whole linear these are."""

    def joint_mask(self, score_OB: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Choose a mask for which all rows of the linear compete, and return this shard's rows.

        Args:
            score_OB: the scores of this shard's rows.
            choose: maps the scores of all rows (all rows, B) to a bool mask of the same shape.
        """

    def sum(self, number: float) -> float:
        """Add up one number of every shard. All shards must call it equally often."""


class RowSharding(Protocol):
    """How the rows of a linear are split into shards."""

    def solve(self, rows: int, rows_per_group: int, solve: Callable[[RowShard], Pruned]) -> Pruned:
        """Solve a linear shard by shard and return the result for all its rows.

        Args:
            rows: how many rows the linear has.
            rows_per_group: rows that compete with each other; no shard splits such a group.
            solve: the solver of one shard.
        """


@dataclass(frozen=True)
class AllRows:
    """The only shard of a linear that one process solves."""

    rows: slice

    def joint_mask(self, score_OB: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `choose` directly: the shard already holds all rows."""
        return choose(score_OB)

    def sum(self, number: float) -> float:
        """Return `number`: there is no other shard."""
        return number


#: A shard of all rows, for callers that do not know their number.
EVERY_ROW: RowShard = AllRows(slice(None))


class _Unsharded:
    """All rows in one shard."""

    def solve(self, rows: int, rows_per_group: int, solve: Callable[[RowShard], Pruned]) -> Pruned:
        return solve(AllRows(slice(0, rows)))


UNSHARDED: RowSharding = _Unsharded()
