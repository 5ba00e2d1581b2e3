"""The work on one linear: what is asked of a method, and how it is done.

Once the statistics of its inputs are known, the rows (outputs) of a linear hardly depend on each
other. So several processes can split one linear by rows. Two things still connect the rows: a mask
for which all rows compete, and the decision when an iteration ends. `RowShard` offers both.

A solver is written once, for the rows of a shard. A single process gets a shard that holds all
rows, so solvers need no branch for it.

Shape suffixes: O outputs (rows), B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from prunus.methods.base import Pruned
from prunus.methods.options import MethodOptions
from prunus.methods.patterns import Pattern
from prunus.methods.quantized import LinearQuantization
from prunus.methods.statistics import InputStatistics


class RowShard(Protocol):
    """The rows of a linear that this process solves."""

    @property
    def rows(self) -> slice:
        """Which rows of the whole linear these are."""

    def joint_mask(self, score_OB: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Choose a mask for which all rows of the linear compete, and return this shard's rows.

        Args:
            choose: maps the scores of all rows (all rows, B) to a bool mask of the same shape.
        """

    def sum(self, number: float) -> float:
        """Add up one number of every shard. All shards must call it equally often."""


class RowSharding(Protocol):
    """How the rows of a linear are split into shards."""

    def solve(self, rows: int, rows_per_group: int, solve: Callable[[RowShard], Pruned]) -> Pruned:
        """Solve a linear shard by shard and return the result for all its rows."""


@dataclass(frozen=True)
class _AllRows:
    """The only shard of a linear that one process solves."""

    rows: slice

    def joint_mask(self, score_OB: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        return choose(score_OB)

    def sum(self, number: float) -> float:
        return number


#: A shard of all rows, for callers that do not know their number.
EVERY_ROW: RowShard = _AllRows(slice(None))


class _Unsharded:
    """All rows in one shard."""

    def solve(self, rows: int, rows_per_group: int, solve: Callable[[RowShard], Pruned]) -> Pruned:
        return solve(_AllRows(slice(0, rows)))


UNSHARDED: RowSharding = _Unsharded()


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked of a method for one linear, and how the work is done.

    Attributes:
        pattern: which weights compete, and for N:M how many of them stay.
        sparsity: the share of the weights to remove; N:M implies its own.
        options: what the user has chosen for the method and for the steps after it.
        rows: how the rows of the linear are split over processes.
        reference_order: update weights in the order of operations of the original code, which
            reproduces its masks and is slower; see `solvers/obs_reference_order.py`.
        quantization: how the weight is rounded to integers at the end; None where it is not.
    """

    pattern: Pattern = field(default_factory=Pattern)
    sparsity: float = 0.0
    options: MethodOptions = field(default_factory=MethodOptions)
    rows: RowSharding = UNSHARDED
    reference_order: bool = False
    quantization: LinearQuantization | None = None

    @property
    def removes_nothing(self) -> bool:
        """Whether every weight stays."""
        return self.pattern.removes_nothing(self.sparsity)


#: From a weight (O, I) float32, the statistics of its inputs and the work to the result.
PruneFunction = Callable[[Tensor, InputStatistics, Work], Pruned]
