"""What a pruning method gives back: a weight with its mask.

Methods are pure tensor functions. They see no module, tokenizer, path or configuration, so each can
be tested on small matrices and used outside of a run. `table.py` says what is known of each.

Shape suffixes in all files of this package: O outputs (rows), I inputs (columns), T tokens,
B columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunus.methods.quantized import Quantized


@dataclass(slots=True)
class Pruned:
    """The result for one linear.

    Attributes:
        weight_OI: float32, exactly 0 wherever `keep_OI` is False.
        keep_OI: bool, True where the weight is kept. A kept weight may happen to be 0.
        notes: values for the record of this linear; JSON must be able to hold them.
        quantized: the same weight as integers and scales, if the run compresses.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    notes: dict[str, Any] = field(default_factory=dict)
    quantized: Quantized | None = None


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
