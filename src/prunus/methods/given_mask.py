"""`mask`: removes the weights that a mask names, whatever chose them.

It reproduces the zeros of another run, or takes a mask of one's own. The kept weights stay as they
are, and `weight_update` can fit them to the mask. Method obs takes the same masks and updates the
kept weights by its own sweep.
"""

from __future__ import annotations

from torch import Tensor

from prunus.methods.statistics import InputStatistics
from prunus.methods.work import Pruned, Work, masked


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weight with zeros where the given mask has them.

    Args:
        weight_OI: float32, the trained weights.
        statistics: Not read.
        work: With the mask; a recipe without any is refused before.

    >>> import torch
    >>> given_OI = torch.tensor([[True, False]])
    >>> work, weight_OI = Work(given_OI=given_OI), torch.tensor([[3.0, 1.0]])
    >>> prune(weight_OI, InputStatistics(2, "none"), work).weight_OI
    tensor([[0., 1.]])
    """
    assert work.given_OI is not None, "the method removes the weights of a given mask"
    return masked(weight_OI, ~work.given_OI.to(weight_OI.device))
