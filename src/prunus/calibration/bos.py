"""The beginning-of-sequence (BOS) token of windows.

Windows are cut out of long texts. Where a tokenizer puts a BOS token before a text, only the first
window of a text would have one. A model that was trained with BOS first is then measured on inputs
that it never saw: the perplexity of Gemma 3 270M nearly triples. The papers' protocol is to cut
windows without BOS nevertheless, so it stays a choice.

BOS takes the place of a window's first token. The windows then hold the same text with and without
it, and the same tokens are scored.

Legend: N windows, S tokens per window (seqlen).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

#: What the user chooses. `auto` puts BOS first in every window if the tokenizer puts it before a
#: text, as generation and lm-eval do. `no` cuts windows as they come, as the papers do.
Bos = Literal["auto", "yes", "no"]
#: What windows have: BOS first, the text as it comes, or what a file or a caller gave.
UsedBos = Literal["yes", "no", "given"]


def check_bos(bos: str) -> None:
    """Raise ValueError unless `bos` is one of the choices."""
    if bos not in get_args(Bos):
        raise ValueError(f"bos must be one of {', '.join(get_args(Bos))}, not {bos!r}")


def bos_token(tokenizer: Any, bos: Bos) -> int | None:
    """The token that begins every window; None if windows begin with the text."""
    check_bos(bos)
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
