"""The loss of one window, a few rows of logits at a time.

Legend: S tokens of the window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

__all__ = ["ROWS", "window_loss"]

#: Tokens whose logits are in float32 at the same time.
ROWS = 512


def window_loss(
    rows: Callable[[int, int], torch.Tensor], ids_S: torch.Tensor, window: int
) -> float:
    """The mean next-token cross entropy of one window in nats per token: float32, summed in float64.

    Args:
        rows: (first, stop) -> logits (stop - first, V) of these tokens, any floating dtype.
        ids_S: the window's tokens, at least 2.
        window: its number, for the message.

    Raises:
        ValueError: it is not finite.
    """
    total = 0.0
    last = len(ids_S) - 1
    for first in range(0, last, ROWS):
        stop = min(first + ROWS, last)
        logits = rows(first, stop).float()
        total += functional.cross_entropy(
            logits, ids_S[first + 1 : stop + 1], reduction="sum"
        ).item()
    if not math.isfinite(total):
        raise ValueError(
            f"the loss of window {window} is {total}: the model's outputs are not finite. "
            "Damaged weights, or a dtype too small for this model; try --dtype float32"
        )
    return total / last
