"""What a pruning method is: a pure function from a weight and statistics to a weight and a mask.

Methods see tensors only. No module, tokenizer, path or configuration reaches them, so each can be
tested on small matrices and used outside of a run.

Shape suffixes in all files of this package: O outputs (rows), I inputs (columns), T tokens,
B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunus.methods.options import MethodOptions
from prunus.methods.patterns import Pattern
from prunus.methods.quantized import Quantized
from prunus.methods.statistics import InputStatistics, Needs

__all__ = ["Method", "PruneFunction", "Pruned", "masked", "unchanged"]


@dataclass(slots=True)
class Pruned:
    """The result for one linear.

    Attributes:
        weight_OI: float32, exactly 0 wherever `keep_OI` is False.
        keep_OI: bool, True where the weight is kept. A kept weight may happen to be 0.
        notes: values for the manifest's entry of this linear; JSON must be able to hold them.
        quantized: the same weight as integers and scales, if the run compresses.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    notes: dict[str, Any] = field(default_factory=dict)
    quantized: Quantized | None = None


#: From weight (O, I) float32, statistics, pattern, sparsity and options to the result.
PruneFunction = Callable[[Tensor, InputStatistics | None, Pattern, float, MethodOptions], Pruned]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to prune a linear.

    Attributes:
        name: the name on the command line.
        needs: the statistics that `prune` reads.
        prune: the method itself. It changes none of its arguments, and it expects that
            `check_options` and `patterns.check_shape` have passed.
        default_group: which weights compete in the method's paper, for unstructured sparsity.
        updates_weights: False where every kept weight stays as it was, to the bit.
        summary: one line for the help of the command line.
        needs_drift: True where it reads how the inputs differ from those of the dense model.
        needs_held_out: True where it evaluates on the statistics of tokens that are held out.
        adds_ridge: True where the Gram matrix gets a ridge that grows with features per token
            before it is inverted. Such a ridge keeps the rounding of the inputs small; a small
            fixed damping lets it grow.
    """

    name: str
    needs: Needs
    prune: PruneFunction
    default_group: str | int
    updates_weights: bool
    summary: str
    needs_drift: bool = False
    needs_held_out: bool = False
    adds_ridge: bool = False


def masked(weight_OI: Tensor, keep_OI: Tensor, notes: dict[str, Any] | None = None) -> Pruned:
    """The weight with 0 outside the mask, and nothing else changed.

    >>> keep_OI = torch.tensor([[True, False]])
    >>> masked(torch.tensor([[3.0, -1.0]]), keep_OI).weight_OI
    tensor([[3., 0.]])
    """
    return Pruned(weight_OI.masked_fill(~keep_OI, 0), keep_OI, notes or {})


def unchanged(weight_OI: Tensor) -> Pruned:
    """The result for sparsity 0: every weight is kept, so no update is needed."""
    return masked(weight_OI, torch.ones_like(weight_OI, dtype=torch.bool))
