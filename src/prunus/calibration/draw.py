"""Windows of token ids cut out of a text: random ones from documents, random ones from a stream.

Knows nothing of where text comes from. All randomness is the `random.Random` that is handed in.

Legend: N windows, S tokens per window (seqlen), T tokens of a text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_AT_ONCE = (
    32  # documents tokenised per call: fast tokenizers work on them in parallel, few are wasted
)


class TextTooShort(ValueError):  # noqa: N818
    """No document has more than `seqlen` tokens. `longest` is the length of the longest, in tokens."""

    def __init__(self, longest: int, seqlen: int, documents: int) -> None:
        super().__init__(
            f"none of the {documents} documents is longer than {seqlen} tokens; the longest has {longest}. "
            f"Use a smaller --seqlen (less than {longest}) or longer text"
        )
        self.longest = longest


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids of a text, (T,) int64, with the special tokens that the tokenizer adds by default."""
    # verbose=False: a text is longer than the model's context on purpose, and windows are cut from it.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def windows_from_documents(
    documents: Sequence[str], tokenizer: Any, *, samples: int, seqlen: int, rng: random.Random
) -> tuple[torch.Tensor, int]:
    """Random windows of random documents, (N, S) int64, and how many documents gave one.

    As the calibration of SparseGPT and Wanda, where a document is drawn, dropped unless it has more than
    `seqlen` tokens, and a window starts at any of its first T - S tokens. Two differences, so that the
    search always ends: documents are looked at in random order without replacement, and only when all have
    been are those that are long enough used again, each time with a window that starts elsewhere. Tokenises
    no more than it looks at.

    Raises TextTooShort where no document is long enough, ValueError where there are fewer different windows
    than `samples`.
    """
    rows: list[torch.Tensor] = []
    unused: list[tuple[torch.Tensor, Iterator[int]]] = []
    different = 0
    longest = 0
    order = rng.sample(range(len(documents)), len(documents))
    for batch in (order[first : first + _AT_ONCE] for first in range(0, len(order), _AT_ONCE)):
        for ids in tokenizer([documents[index] for index in batch], verbose=False)["input_ids"]:
            longest = max(longest, len(ids))
            starts = len(ids) - seqlen
            if starts <= 0:
                continue
            different += starts
            tokens = torch.tensor(ids, dtype=torch.int64)
            start, *more = rng.sample(range(starts), min(starts, samples))
            rows.append(tokens[start : start + seqlen])
            unused.append((tokens, iter(more)))
            if len(rows) == samples:
                return torch.stack(rows), len(unused)
    if not unused:
        raise TextTooShort(longest, seqlen, len(documents))
    _check_enough(different, samples, seqlen)
    while len(rows) < samples:  # each round takes at least one start, and there are enough of them
        rng.shuffle(unused)
        for tokens, starts_left in unused:
            next_start = next(starts_left, None)
            if next_start is not None and len(rows) < samples:
                rows.append(tokens[next_start : next_start + seqlen])
    return torch.stack(rows), len(unused)


def windows_from_stream(
    tokens_T: torch.Tensor, *, samples: int, seqlen: int, rng: random.Random
) -> torch.Tensor:
    """Random windows of one text with different starts, (N, S) int64; they may overlap.

    Raises ValueError where the text has no more than `seqlen` tokens or fewer different windows than
    `samples`.
    """
    starts = len(tokens_T) - seqlen
    if starts <= 0:
        raise ValueError(
            f"the whole text has {len(tokens_T)} tokens, and windows of {seqlen} need more than that. "
            f"Use a smaller --seqlen or more text"
        )
    _check_enough(starts, samples, seqlen)
    return torch.stack(
        [tokens_T[start : start + seqlen] for start in rng.sample(range(starts), samples)]
    )


def _check_enough(different: int, samples: int, seqlen: int) -> None:
    if different < samples:
        raise ValueError(
            f"the text has only {different} different windows of {seqlen} tokens, {samples} were asked for. "
            f"Use fewer --samples, a smaller --seqlen or more text"
        )
