"""Calibration windows, and what a run asks of the source that gives them.

Shape suffixes: N samples (windows), S tokens per window (seqlen).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.bos import Bos, UsedBos


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The windows that a run asks for, and what a source may need to draw them.

    Attributes:
        samples: number of windows, at least 1; a training text gives as many as are taken.
        seqlen: tokens per window, at least 2; images have none.
        seed: the same seed gives the same windows.
        bos: whether BOS takes the place of every window's first token.
        data: folder of local datasets. None means the folder in PRUNUS_DATA, or the hub if that is
            not set.
        tokenizer: returns the tokenizer of the model, or its image processor. Sources of token ids
            do not call it.
        model: returns the loaded causal LM. Only the source `self` calls it.
    """

    samples: int = 1
    seqlen: int
    seed: int = 0
    bos: Bos = "auto"
    data: Path | None = None
    tokenizer: Callable[[], Any] = lambda: None
    model: Callable[[], Any] | None = None


@dataclass(frozen=True, eq=False)
class Windows:
    """Calibration windows.

    Attributes:
        ids: (samples, seqlen) int64, on the CPU. For an image classifier these are pixel values
            (samples, channels, height, width) float32.
        source: where they come from, for people.
        sha256: of the shape and the ids; see `hash_ids`.
        bos: whether every window begins with BOS; see `UsedBos`.
    """

    ids: torch.Tensor
    source: str
    sha256: str
    bos: UsedBos = "given"


def hash_ids(ids: torch.Tensor) -> str:
    """SHA-256 (hex) of the text `<rows>x<columns>:` and of the ids (N, S) as little-endian int32.

    The definition does not depend on torch or on the host, so that any program can check it.

    >>> hash_ids(torch.tensor([[1, 2, 3]]))[:8]
    '89c48fa8'
    """
    digest = hashlib.sha256(f"{ids.shape[0]}x{ids.shape[1]}:".encode())
    digest.update(ids.numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def check_context(positions: int | None, seqlen: int) -> None:
    """Check that a window is no longer than the model's context.

    >>> check_context(2048, 1024)
    """
    if positions is not None and seqlen > positions:
        raise ValueError(
            f"windows of {seqlen} tokens do not fit: the model has {positions} positions. "
            f"Use `seqlen` {positions} or less"
        )
