"""The loss of one window, a few rows of logits at a time.

Legend: S tokens of the window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

__all__ = ["ROWS", "WindowProgress", "window_loss"]

#: Rows of logits (one per token) that are in float32 at the same time. A whole window of 2048
#: tokens and a vocabulary of 128,000 would take 1 GB in float32.
ROWS = 512

#: Called with the number of windows done, and the number of all windows.
WindowProgress = Callable[[int, int], None]


def window_loss(
    rows: Callable[[int, int], torch.Tensor], ids_S: torch.Tensor, window: int
) -> float:
    """The mean next-token cross entropy of one window, in nats per token.

    The cross entropy is computed in float32 and summed in float64.

    >>> logits_SV = torch.zeros(5, 8)  # every token of a vocabulary of 8 is equally likely
    >>> loss = window_loss(lambda first, stop: logits_SV[first:stop], torch.arange(5), 0)
    >>> round(math.exp(loss), 4)
    8.0

    Args:
        rows: a function of (first, stop) that returns the logits (stop - first, V) of these tokens.
        ids_S: the window's tokens, at least 2.
        window: the number of the window, for the error message.

    Raises:
        ValueError: the loss is not finite.
    """
    total = 0.0
    last = len(ids_S) - 1
    for first in range(0, last, ROWS):
        stop = min(first + ROWS, last)
        logits = rows(first, stop).float()
        # Row t predicts token t + 1.
        total += functional.cross_entropy(
            logits, ids_S[first + 1 : stop + 1], reduction="sum"
        ).item()
    if not math.isfinite(total):
        raise ValueError(
            f"the loss of window {window} is {total}: the model's outputs are not finite. "
            "Damaged weights, or a dtype too small for this model; try --dtype float32"
        )
    return total / last
