"""Calibration windows, what a run asks of their source, and their first token.

Where a tokenizer puts a beginning-of-sequence (BOS) token before a text, only the first window of a
text would have one. A model that was trained with BOS first is then measured on inputs that it
never saw: the perplexity of Gemma 3 270M nearly triples. The papers' protocol is to cut windows
without BOS nevertheless, so it stays a choice. BOS takes the place of a window's first token. The
windows then hold the same text with and without it, and the same tokens are scored.

Shape suffixes: N samples (windows), S tokens per window (seqlen).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

#: What the user chooses. `auto` puts BOS first in every window if the tokenizer puts it before a
#: text, as generation and lm-eval do. `no` cuts windows as they come, as the papers do.
Bos = Literal["auto", "yes", "no"]
#: What windows have: BOS first, the text as it comes, or what a file or a caller gave.
UsedBos = Literal["yes", "no", "given"]


def bos_token(tokenizer: Any, bos: Bos) -> int | None:
    """The token that begins every window; None if windows begin with the text."""
    if bos == "no":
        return None
    token = getattr(tokenizer, "bos_token_id", None)
    if bos == "yes":
        if token is None:
            raise ValueError("`bos` is yes, and this tokenizer has no BOS token; use auto or no")
        return int(token)
    if token is None:
        return None
    ids = tokenizer("a", verbose=False)["input_ids"]
    return int(token) if len(ids) and ids[0] == token else None


def put_bos_first(windows_NS: torch.Tensor, token: int | None) -> torch.Tensor:
    """Windows with `token` in place of their first tokens; None leaves them as they are.

    >>> put_bos_first(torch.tensor([[5, 6, 7]]), 1)
    tensor([[1, 6, 7]])
    """
    if token is None:
        return windows_NS
    windows_NS = windows_NS.clone()
    windows_NS[..., 0] = token
    return windows_NS


def used_bos(token: int | None) -> UsedBos:
    """What windows have that begin with `token`."""
    return "no" if token is None else "yes"


def refuse_bos(source: str, bos: Bos) -> None:
    """Refuse "yes" for windows that are given as they are, such as token ids."""
    if bos == "yes":
        raise ValueError(
            f"`bos` is yes, and windows of {source} stay as they are given: put the BOS token into "
            "them, or use auto"
        )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The windows that a run asks for, and what a source may need to draw them."""

    samples: int = 1  #: number of windows, at least 1; a training text gives as many as are taken
    seqlen: int  #: tokens per window, at least 2; images have none
    seed: int = 0  #: the same seed gives the same windows
    bos: Bos = "auto"  #: whether BOS takes the place of every window's first token
    #: folder of local datasets. None means the folder in PRUNUS_DATA, or the hub if that is not
    #: set.
    data: Path | None = None
    #: returns the tokenizer of the model, or its image processor. Sources of token ids do not call
    #: it.
    tokenizer: Callable[[], Any] = lambda: None
    #: returns the loaded causal LM. Only the source `self` calls it.
    model: Callable[[], Any] | None = None
    #: rows of the model's embedding, which windows of a training text must not pass.
    vocabulary: int | None = None


@dataclass(frozen=True, eq=False)
class Windows:
    #: (samples, seqlen) int64, on the CPU. For an image classifier these are pixel values (samples,
    #: channels, height, width) float32.
    ids: torch.Tensor
    source: str  #: where they come from, for people
    sha256: str  #: of the shape and the ids; see `hash_ids`
    bos: UsedBos = "given"  #: whether every window begins with BOS; see `UsedBos`


def hash_ids(ids: torch.Tensor) -> str:
    """SHA-256 (hex) of the text `<rows>x<columns>:` and of the ids (N, S) as little-endian int32.

    Pixel values are little-endian float32, after all their sizes.
    The definition does not depend on torch or on the host, so that any program can check it.

    >>> hash_ids(torch.tensor([[1, 2, 3]]))[:8]
    '89c48fa8'
    """
    digest = hashlib.sha256(f"{'x'.join(map(str, ids.shape))}:".encode())
    digest.update(ids.numpy().astype("<f4" if ids.is_floating_point() else "<i4").tobytes())
    return digest.hexdigest()


def check_ids(ids: torch.Tensor, rows: int, what: str) -> None:
    """Check that an embedding of `rows` rows has one for every token id."""
    if not ids.numel():
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= rows:
        raise ValueError(
            f"{what} run from {smallest} to {largest}, but the model's embedding has {rows} rows: "
            "the tokenizer or the file of ids belongs to another model"
        )


def check_context(positions: int | None, seqlen: int) -> None:
    """Check that a window is no longer than the model's context."""
    if positions is not None and seqlen > positions:
        raise ValueError(
            f"windows of {seqlen} tokens do not fit: the model has {positions} positions. "
            f"Use `seqlen` {positions} or less"
        )
