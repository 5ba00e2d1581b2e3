"""How the learning rate runs over a training: up in a straight line, down along half a cosine."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(peak: float, share: float, warmup: float = 0.0) -> float:
    """The learning rate when `share` (0 to 1) of the training is done.

    Args:
        peak: the highest rate, reached at the end of the warm-up.
        share: of the budget, whatever that is counted in.
        warmup: share of the training over which the rate rises from 0.
    """
    if share < warmup:
        return peak * share / warmup
    left = (min(share, 1.0) - warmup) / (1.0 - warmup)
    return peak * (0.5 + 0.5 * math.cos(math.pi * left))
