"""The learning rate over one training: linear warm-up, then half a cosine down to zero."""

from __future__ import annotations

import math


def learning_rate(peak: float, fraction: float, warmup: float = 0.0) -> float:
    """Return the learning rate when `fraction` of the training is done.

    The shape is that of Loshchilov and Hutter (arXiv 1608.03983) without restarts.

    Args:
        fraction: how much of the budget is spent, from 0 to 1. The unit of the budget does not
            matter: steps, tokens or seconds. Values above 1 count as 1.
        warmup: fraction of the training over which the rate rises from 0, below 1.

    Example:
        >>> [round(learning_rate(2.0, f, warmup=0.1), 6) for f in (0.0, 0.05, 0.1, 0.55, 1.0)]
        [0.0, 1.0, 2.0, 1.0, 0.0]
    """
    if fraction < warmup:
        return peak * fraction / warmup
    decayed = (min(fraction, 1.0) - warmup) / (1.0 - warmup)
    return peak * (0.5 + 0.5 * math.cos(math.pi * decayed))
