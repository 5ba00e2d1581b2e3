"""What a pruning method is: a pure function from a weight and statistics to a weight and a mask.

No module, tokenizer, path or config comes near a method. Shape suffixes in all files here: O outputs (rows),
I inputs (columns), T tokens, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from prunus.patterns import Pattern
from prunus.statistics import InputStatistics, Needs


@dataclass(frozen=True, slots=True)
class Options:
    """What only some methods ask for; see `prunus.methods.check_options` for the ranges.

    Attributes:
        mask_from: score of the mask that `obs` updates around.
        mask_order: `obs` fixes the mask "before" the update, or picks it "blockwise", anew for every column
            block from the weights updated so far.
        damping: λ as a fraction of the Gram's mean diagonal, where a Gram is inverted.
        column_block: columns that SparseGPT picks its mask for at once.
        as_original: update weights in the original code's order of operations, for its very masks; slower. See
            `obs_original.py`.
    """

    mask_from: Literal["wanda", "magnitude"] = "wanda"
    mask_order: Literal["before", "blockwise"] = "before"
    damping: float = 0.01
    column_block: int = 128
    as_original: bool = False


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


PruneFunction = Callable[[Tensor, InputStatistics | None, Pattern, float, Options], Pruned]


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
    """

    name: str
    needs: Needs
    prune: PruneFunction
    default_group: str | int
    updates_weights: bool
    summary: str


def masked(weight_OI: Tensor, keep_OI: Tensor, notes: dict[str, Any] | None = None) -> Pruned:
    """The weight with everything outside the mask set to 0, and nothing else changed."""
    return Pruned(weight_OI.masked_fill(~keep_OI, 0), keep_OI, notes or {})
