"""The loss of one window, a few rows of logits at a time.

Legend: S tokens of the window, T rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import torch
from torch.nn import functional

__all__ = [
    "ROWS",
    "Rows",
    "WindowModel",
    "WindowProgress",
    "check_loss",
    "chunks",
    "rows_loss",
    "window_loss",
]

#: Rows of logits (one per token) that are in float32 at the same time. A whole window of 2048
#: tokens and a vocabulary of 128,000 would take 1 GB in float32.
ROWS = 512

#: A function of (first, stop) that returns the logits (stop - first, V) of these tokens.
Rows = Callable[[int, int], torch.Tensor]

#: Called with the number of windows done, and the number of all windows.
WindowProgress = Callable[[int, int], None]


class WindowModel(Protocol):
    """A model that gives the logits of windows: `WholeModel`, `StreamedModel` or `Reference`."""

    def windows(
        self,
        ids: torch.Tensor,
        batch: int,
        progress: WindowProgress | None = None,
        compared: bool = False,
    ) -> Generator[Rows, None, None]:
        """The logits of every window, in order; see `StreamedModel.windows`."""
        ...


def window_loss(rows: Rows, ids_S: torch.Tensor, window: int, start: int = 0) -> float:
    """The mean next-token cross entropy of one window, in nats per token.

    The cross entropy is computed in float32 and summed in float64.

    >>> logits_SV = torch.zeros(5, 8)  # every token of a vocabulary of 8 is equally likely
    >>> loss = window_loss(lambda first, stop: logits_SV[first:stop], torch.arange(5), 0)
    >>> round(math.exp(loss), 4)
    8.0

    Args:
        rows: the logits of the window.
        ids_S: the window's tokens, at least 2.
        window: the number of the window, for the error message.
        start: the first row that is scored. Rows before it are context only.

    Raises:
        ValueError: the loss is not finite.
    """
    total = 0.0
    for first, stop in chunks(start, len(ids_S)):
        total += rows_loss(rows(first, stop), ids_S[first + 1 : stop + 1])
    check_loss(total, window)
    return total / (len(ids_S) - 1 - start)


def chunks(start: int, seqlen: int) -> Iterator[tuple[int, int]]:
    """Pairs (first, stop) of the rows that are in float32 at the same time.

    Row t predicts token t + 1, so the last row of a window predicts nothing and is left out.

    >>> list(chunks(0, 1200))
    [(0, 512), (512, 1024), (1024, 1199)]
    """
    last = seqlen - 1
    for first in range(start, last, ROWS):
        yield first, min(first + ROWS, last)


def rows_loss(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> float:
    """The sum of the cross entropies of some rows of logits, in nats."""
    targets_T = targets_T.to(logits_TV.device)
    return functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum").item()


def check_loss(total: float, window: int) -> None:
    """Raise ValueError if the loss of a window is not finite."""
    if not math.isfinite(total):
        raise ValueError(
            f"the loss of window {window} is {total}: the model's outputs are not finite. "
            "Damaged weights, or a dtype too small for this model; try --dtype float32"
        )
