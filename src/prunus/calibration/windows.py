"""Calibration windows, what a run asks of their source, and their first token.

Where a tokenizer puts a beginning-of-sequence (BOS) token before a text, only the first window of a
text would have one. A model that was trained with BOS first is then measured on inputs that it
never saw: the perplexity of Gemma 3 270M nearly triples. The papers' protocol is to cut windows
without BOS nevertheless, so it stays a choice. BOS takes the place of a window's first token. The
windows then hold the same text with and without it, and the same tokens are scored.

Shape suffixes: N samples (windows), S tokens per window (seqlen), T tokens of a row.
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
    """The token that begins every window; None if windows begin with the text.

    Args:
        tokenizer: A tokenizer of transformers; None counts as one without BOS.
        bos: What the user chooses.

    Raises:
        ValueError: `bos` is "yes", and the tokenizer has no BOS token.
    """
    if bos == "no":
        return None
    token = getattr(tokenizer, "bos_token_id", None)
    if bos == "yes":
        if token is None:
            raise ValueError("`bos` is yes, and this tokenizer has no BOS token; use auto or no")
        return int(token)
    if token is None:
        return None
    # Some tokenizers have BOS and do not use it. Only a text shows that.
    ids = tokenizer("a", verbose=False)["input_ids"]
    return int(token) if len(ids) and ids[0] == token else None


def put_bos_first(windows_NS: torch.Tensor, token: int | None) -> torch.Tensor:
    """Windows with `token` in place of their first tokens; None leaves them as they are.

    A single window (S,) works as well. The argument is not changed.

    >>> put_bos_first(torch.tensor([[5, 6, 7]]), 1)
    tensor([[1, 6, 7]])
    """
    if token is None:
        return windows_NS
    windows_NS = windows_NS.clone()
    windows_NS[..., 0] = token
    return windows_NS


def used_bos(token: int | None) -> UsedBos:
    """What windows have that begin with `token`; None means that they begin with the text.

    >>> used_bos(1), used_bos(None)
    ('yes', 'no')
    """
    return "no" if token is None else "yes"


def refuse_bos(source: str, bos: Bos) -> None:
    """Refuse "yes" for windows that are given as they are, such as token ids.

    Raises:
        ValueError: `bos` is "yes"; the message names the `source`.
    """
    if bos == "yes":
        raise ValueError(
            f"`bos` is yes, and windows of {source} stay as they are given: put the BOS token into "
            "them, or use auto"
        )


def cut_rows(ids_NT: torch.Tensor, seqlen: int) -> torch.Tensor:
    """The windows (M, S) of rows of token ids, one row after the other, without overlap.

    The rest of each row is dropped; rows that are shorter than a window give none.

    >>> cut_rows(torch.arange(10).view(2, 5), 2)
    tensor([[0, 1],
            [2, 3],
            [5, 6],
            [7, 8]])
    """
    return ids_NT[:, : ids_NT.shape[1] // seqlen * seqlen].reshape(-1, seqlen)


@dataclass(frozen=True, kw_only=True)
class WindowRequest:
    """The windows that a run asks for, and what a source may need to draw them.

    Attributes:
        samples: The number of windows, at least 1. A training text gives as many as are taken.
        seqlen: The tokens per window, at least 2. Images have none.
        seed: The same seed gives the same windows.
        bos: Whether BOS takes the place of every window's first token.
        data: The folder of local datasets. None means the folder in PRUNUS_DATA, or the hub if that
            is not set.
        tokenizer: Returns the tokenizer of the model, or its image processor, or None if it has
            none. Sources of token ids do not call it.
        vocabulary: The number of rows of the model's embedding, which token ids of a training text
            must not reach; None for no check.
    """

    samples: int = 1
    seqlen: int
    seed: int = 0
    bos: Bos = "auto"
    data: Path | None = None
    tokenizer: Callable[[], Any] = lambda: None
    vocabulary: int | None = None


@dataclass(frozen=True, eq=False)
class Windows:
    """Calibration windows, and what the record of a run says of them.

    Attributes:
        ids: (samples, seqlen) int64, on the CPU. For an image classifier these are pixel values
            (samples, channels, height, width) float32.
        source: Where they come from, for people.
        sha256: The hash of the shape and the ids; see `hash_ids`.
        bos: Whether every window begins with BOS; see `UsedBos`.
    """

    ids: torch.Tensor
    source: str
    sha256: str
    bos: UsedBos = "given"


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
    """Check that an embedding of `rows` rows has one for every token id.

    Args:
        ids: int64 of any shape; no ids are accepted.
        rows: The number of rows of the embedding.
        what: What the ids are, in the plural, for the message.

    Raises:
        ValueError: An id is negative or too large.

    >>> check_ids(torch.tensor([0, 9]), 8, "the token ids")
    Traceback (most recent call last):
    ValueError: the token ids run from 0 to 9, but the model's embedding has 8 rows: the tokenizer \
or the file of ids belongs to another model
    """
    if not ids.numel():
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= rows:
        raise ValueError(
            f"{what} run from {smallest} to {largest}, but the model's embedding has {rows} rows: "
            "the tokenizer or the file of ids belongs to another model"
        )


def check_context(positions: int | None, seqlen: int, name: str = "the model") -> None:
    """Check that a window is no longer than the model's context.

    Args:
        positions: The number of positions of the model; None for no limit.
        seqlen: The tokens per window.
        name: What messages call the model.

    Raises:
        ValueError: The window is longer.
    """
    if positions is not None and seqlen > positions:
        raise ValueError(
            f"windows of {seqlen} tokens do not fit: {name} has {positions} positions. "
            f"Use `seqlen` {positions} or less"
        )
