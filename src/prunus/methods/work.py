"""The work on one linear: what is asked of a method, how it is done, and what the method returns.

Methods are pure tensor functions. They see no module, tokenizer, path or configuration, so each can
be tested on small matrices and used outside of a run. `table.py` says what each needs.

Once the statistics of its inputs are known, the rows (outputs) of a linear hardly depend on each
other. So several processes can split one linear by rows. Two things still connect the rows: a mask
for which all rows compete, and the decision when an iteration ends. `RowShard` offers both.

A solver is written once, for the rows of a shard. A single process gets a shard that holds all
rows, so solvers need no branch for it.

Shape suffixes in all files of this package: O outputs (rows), S some of them, I inputs (columns),
T tokens, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from prunus.methods.method_options import MethodOptions
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics


class Rounded(Protocol):
    """A weight as a type of a format stores it. What rounds and what writes know more of it."""

    @property
    def bits(self) -> float:
        """Bits per weight, with all scales."""


@dataclass(slots=True)
class Pruned:
    """The result for one linear.

    Attributes:
        weight_OI: float32, exactly 0 wherever `keep_OI` is False.
        keep_OI: bool, True where the weight is kept. A kept weight may happen to be 0.
        notes: Values for the record of this linear; JSON must be able to hold them.
        rounded: The same weight as a type stores it; None for a method that rounds nothing.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    notes: dict[str, Any] = field(default_factory=dict)
    rounded: Rounded | None = None


@dataclass(slots=True)
class RoundedRows:
    """Some rows of a weight as a type of a format stores them.

    Attributes:
        data_OB: uint8, the bytes of each row.
        notes: As those of `Pruned`.
    """

    data_OB: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


#: What is known of the rows of a shard.
SolvedRows = TypeVar("SolvedRows", Pruned, RoundedRows)


def masked(weight_OI: Tensor, keep_OI: Tensor, notes: dict[str, Any] | None = None) -> Pruned:
    """The weight with 0 outside the mask, and nothing else changed.

    Args:
        weight_OI: The trained weights.
        keep_OI: bool, True where a weight is kept.
        notes: Values for the record of this linear; None for no values.

    >>> keep_OI = torch.tensor([[True, False]])
    >>> masked(torch.tensor([[3.0, -1.0]]), keep_OI).weight_OI
    tensor([[3., 0.]])
    """
    return Pruned(weight_OI.masked_fill(~keep_OI, 0), keep_OI, notes or {})


def unchanged(weight_OI: Tensor) -> Pruned:
    """The result for sparsity 0: every weight is kept, so no update is needed."""
    return masked(weight_OI, torch.ones_like(weight_OI, dtype=torch.bool))


class RowShard:
    """The rows of a linear that this process solves: all of them, as one process does.

    Where several processes share a linear, each has a subclass with a part of the rows.

    Attributes:
        rows: Which rows of the whole linear these are.
    """

    rows: slice = slice(None)

    def joint_mask(self, score_OB: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """The rows of this shard of the mask that `choose` makes of the scores of all rows.

        All shards must call it equally often, because their processes exchange the scores.

        Args:
            score_OB: The scores of the rows of this shard.
            choose: From the scores of all rows (O, B) to their mask, bool (O, B).
        """
        return choose(score_OB)

    def sum(self, number: float) -> float:
        """Add up one number of every shard. All shards must call it equally often."""
        return number


class RowSharding:
    """How the rows of a linear are split into shards: here one shard has all of them."""

    def solve(
        self, rows: int, rows_per_group: int, solve: Callable[[RowShard], SolvedRows]
    ) -> SolvedRows:
        """Solve a linear shard by shard and return the result for all its rows.

        Args:
            rows: The number of rows of the linear.
            rows_per_group: How many neighbouring rows must be in one shard, because they compete.
            solve: From a shard to the result for its rows.
        """
        return solve(EVERY_ROW)


class LinearPlace(NamedTuple):
    """Which linear of a model a method prunes.

    Attributes:
        name: Its full name, such as "model.layers.3.self_attn.q_proj".
        block: The number of its block, from 0; None for the output head.
        inner: Its name inside the block, such as "self_attn.q_proj".
        kind: "attention", "mlp", "expert" or "other".
    """

    name: str
    block: int | None = None
    inner: str = ""
    kind: str = "other"


#: The shard with all rows of a linear.
EVERY_ROW = RowShard()
#: One process solves all rows.
UNSHARDED = RowSharding()


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked of a method for one linear, and how the work is done.

    Attributes:
        pattern: Which weights compete, and for N:M how many of them stay.
        sparsity: The share of the weights to remove; N:M implies its own.
        options: What the user has chosen for the method and for the steps after it; of the class
            `Method.options`.
        rows: How the rows of the linear are split over processes.
        reference_order: Update weights in the order of operations of the original code, which
            reproduces its masks and is slower; see `solvers/obs.py`.
        rounding: How the weight is rounded, a value that only the method which rounds can read;
            None for a run that rounds nothing.
        linear: Which linear it is; None if a method is called without a run around it.
        zero_OI: bool, True for weights that are zero and stay zero; None if zeros may change.
        given_OI: The mask that was given for the linear, bool, True where a weight is removed; None
            in a run without masks.
    """

    pattern: Pattern = field(default_factory=Pattern)
    sparsity: float = 0.0
    options: MethodOptions = field(default_factory=MethodOptions)
    rows: RowSharding = UNSHARDED
    reference_order: bool = False
    rounding: object = None
    linear: LinearPlace | None = None
    zero_OI: Tensor | None = None
    given_OI: Tensor | None = None

    def without_zeros(self, tensor_OB: Tensor, rows: slice, start: int = 0) -> Tensor:
        """Values with 0, or a mask with False, for the weights that stay zero.

        Of such values the scores are lowest, so that these weights are the first to be removed.

        Args:
            tensor_OB: Values or a mask for some rows and columns of the linear.
            rows: Which rows these are.
            start: The first of the columns.

        >>> work = Work(zero_OI=torch.tensor([[True, False]]))
        >>> work.without_zeros(torch.tensor([[3.0, 4.0]]), slice(None))
        tensor([[0., 4.]])
        """
        if self.zero_OI is None:
            return tensor_OB
        return tensor_OB.masked_fill(self.zero_OI[rows, start : start + tensor_OB.shape[1]], 0)


#: From a weight (O, I) float32, the statistics of its inputs and the work to the result.
PruneFunction = Callable[[Tensor, InputStatistics, Work], Pruned]
