"""What a pruning method is: a pure function from a weight and statistics to a weight and a mask.

No module, tokenizer, path or config comes near a method. Shape suffixes in all files here: O outputs (rows),
I inputs (columns), T tokens, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics, Needs


class RowShard(Protocol):
    """Some rows of a linear, while they are solved.

    Given the statistics of its inputs the rows of a linear are independent of each other, but where they compete, and
    where an iteration ends for all of them at once.
    """

    @property
    def rows(self) -> slice:
        """Which."""

    def keep_among_all_rows(self, score_OB: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
        """The mask of these rows where `keep` has seen the scores (all rows, B) of every part."""

    def sum(self, number: float) -> float:
        """The sum of the parts' numbers; asked for equally often in every part."""


class RowSharding(Protocol):
    """Where the rows of a linear are solved: all here, or some here and the others elsewhere."""

    def solve(self, count: int, together: int, solve: Callable[[RowShard], Pruned]) -> Pruned:
        """What `solve` makes of all `count` rows; parts hold whole runs of `together` rows."""


@dataclass(frozen=True)
class AllRows:
    """The only part."""

    rows: slice

    def keep_among_all_rows(self, score_OB: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
        return keep(score_OB)

    def sum(self, number: float) -> float:
        return number


#: All rows, however many they are.
EVERY_ROW: RowShard = AllRows(slice(None))


class _AllHere:
    """All rows in one part."""

    def solve(self, count: int, together: int, solve: Callable[[RowShard], Pruned]) -> Pruned:
        return solve(AllRows(slice(0, count)))


UNSHARDED: RowSharding = _AllHere()


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What only some methods ask for; see `prunus.methods.check_options` for the ranges.

    Attributes:
        mask_from: score of the mask that `obs` updates around.
        mask_order: `obs` fixes the mask "before" the update, or picks it "blockwise", anew for every column
            block from the weights updated so far.
        damping: λ as a fraction of the Gram's mean diagonal, where a Gram is inverted; None for the method's
            own: 0.01 as published, or by the number of tokens where `lsq.py` says so.
        column_block: columns that SparseGPT picks its mask for at once.
        ria_power: exponent of the input norms in RIA's score.
        iterations: of the splitting in `alps`; None for its own number.
        refine: what looks over the mask of whatever method: nothing, `dsnot.py` or `swaps.py`.
        refine_steps: most rounds of that; None for the refinement's own.
        weight_update: "least-squares" fits the kept weights of any method to the mask at the end.
        dense_weight: α of `refine/dense_targets.py`: the share of the dense model's inputs in the
            outputs that the weights approximate. 0 uses the pruned model's inputs only; "auto"
            chooses α per linear on held-out tokens.
        reference_order: update weights in the original code's order of operations, for its very masks; slower. See
            `obs_original.py`.
        rows: how solvers share the rows of a linear out.
    """

    mask_from: Literal["wanda", "magnitude"] = "wanda"
    mask_order: Literal["before", "blockwise"] = "before"
    damping: float | None = None
    column_block: int = 128
    ria_power: float = 0.5
    iterations: int | None = None
    refine: Literal["none", "dsnot", "swaps"] = "none"
    refine_steps: int | None = None
    weight_update: Literal["none", "least-squares"] = "none"
    dense_weight: float | Literal["auto"] = 0.0
    reference_order: bool = False
    rows: RowSharding = UNSHARDED


@dataclass(slots=True)
class Pruned:
    """What became of one linear.

    Attributes:
        weight_OI: float32; exactly 0 wherever `keep_OI` is False.
        keep_OI: bool, True where the weight was kept. A kept weight may happen to be 0.
        notes: what the manifest should tell of this linear, values that JSON can hold.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


PruneFunction = Callable[[Tensor, InputStatistics | None, Pattern, float, MethodOptions], Pruned]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to prune a linear.

    Attributes:
        name: what the command line calls it.
        needs: the statistics that `prune` reads.
        prune: from weight (O, I) float32, statistics, pattern, sparsity and options to `Pruned`. Changes none
            of its arguments, and expects that `check_options` and `check_shape` have passed.
        default_group: who competes in the paper, for unstructured sparsity.
        updates_weights: False where every kept weight stays as it was, to the bit.
        summary: one line for the help.
        needs_means: True where `prune` also reads the means of the inputs.
        needs_drift: True where it reads how the inputs differ from the dense model's.
        needs_held_out: True where it judges by the statistics of some tokens that it keeps apart.
        ridged: True where the Gram matrix gets a ridge by features per token before it is inverted, which keeps the
            rounding of the inputs small; False where a small fixed damping lets it grow.
        products: to how many matrix products (O, I) × (I, I) its time comes, for the estimate of a run's.
    """

    name: str
    needs: Needs
    prune: PruneFunction
    default_group: str | int
    updates_weights: bool
    summary: str
    needs_means: bool = False
    needs_drift: bool = False
    needs_held_out: bool = False
    adds_ridge: bool = False
    products: int = 0


def masked(weight_OI: Tensor, keep_OI: Tensor, notes: dict[str, Any] | None = None) -> Pruned:
    """The weight with everything outside the mask set to 0, and nothing else changed."""
    return Pruned(weight_OI.masked_fill(~keep_OI, 0), keep_OI, notes or {})


def unchanged(weight_OI: Tensor) -> Pruned:
    """Sparsity 0: nothing goes, so nothing has to be made up for."""
    return masked(weight_OI, torch.ones_like(weight_OI, dtype=torch.bool))
