"""A quantised weight, what a code of its integers costs, and how a weight is quantised.

Shape suffixes: O outputs (rows), S some of them, I inputs (columns), K classes of columns, V values
−127 to 127.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

#: Integers lie in [-MAX_LEVEL, MAX_LEVEL].
MAX_LEVEL = 127


class CodeLengths(NamedTuple):
    """The lengths of a code of integers.

    Attributes:
        lengths_KV: float32 (K, 255), the bits of −127 to 127 in every class of columns.
        classes_I: int64 (I,), the class of each column.
    """

    lengths_KV: Tensor
    classes_I: Tensor


class Quantized(NamedTuple):
    """A quantised weight: W_ij = scale_i · step_j · level_ij.

    Attributes:
        levels_OI: int8, from -127 to 127.
        steps_I: float32, exact in bfloat16.
        scales_O: float32, exact in bfloat16.
    """

    levels_OI: Tensor
    steps_I: Tensor
    scales_O: Tensor

    def dense(self) -> Tensor:
        """The weight, float32 (O, I).

        >>> import torch
        >>> levels = torch.tensor([[1, -2]], dtype=torch.int8)
        >>> Quantized(levels, torch.tensor([0.5, 2.0]), torch.tensor([2.0])).dense()
        tensor([[ 1., -8.]])
        """
        return self.levels_OI * self.steps_I * self.scales_O[:, None]


@dataclass(frozen=True, slots=True)
class LinearQuantization:
    """How one linear is quantised.

    Attributes:
        step: the step of a column with U_jj = 1 in a row of scale 1.
        scales_O: float32 (O,), positive: the scale of each row.
        code_of: from the integers of some rows, int8 (S, I), to a code that suits them.
    """

    step: float
    scales_O: Tensor
    code_of: Callable[[Tensor], CodeLengths]
