"""Random windows of token ids, cut out of documents or out of one long text.

This file does not know where text is read. All randomness comes from the seed, or from the
`random.Random`, that the caller passes.

Shape suffixes: N windows, S tokens per window (seqlen), T tokens of a text.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunus.words import counted, naming

# Documents to tokenise per call. Fast tokenizers work on them in parallel, and few are wasted when
# the last window has been found.
_BATCH = 32


class TextTooShort(ValueError):  # noqa: N818
    """Documents have too few windows of `seqlen` tokens, or none."""


@dataclass(frozen=True)
class Text:
    """The text of a source, and how windows are drawn out of it.

    Attributes:
        documents: Documents, lines or sentences, as the source has them.
        joiner: What is between two of them in the whole text.
        source: Where they come from, for people.
        by_document: Whether windows are drawn out of single documents. If not, they are drawn out
            of the whole text.
        joins_short: With `by_document`: if too few documents are longer than a window, windows
            are drawn out of all documents together. If not, that is an error.
        from_start: Whether windows of single documents are their first tokens.
        share: The share of the windows of a source with several texts.
    """

    documents: Sequence[str]
    joiner: str
    source: str
    by_document: bool = False
    joins_short: bool = False
    from_start: bool = False
    share: float = 1.0

    def whole(self) -> str:
        """All documents as one string.

        >>> Text(["one", "two"], " ", "an example").whole()
        'one two'
        """
        return self.joiner.join(self.documents)


def in_turn(texts: Sequence[Text]) -> Iterator[int]:
    """Yield for each window, without end, the number of the text that it is cut out of.

    Every text has its share of each prefix, and also of the windows that a run holds out, such as
    every fourth one. So window n belongs to the text in whose part of [0, 1) there is point n of
    Sobol's second sequence. For two equal shares this is the Thue-Morse sequence:

    >>> list(itertools.islice(in_turn([Text([], "", "", share=0.5)] * 2), 12))
    [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1]
    """
    *ends, _ = itertools.accumulate(text.share for text in texts)
    for window in itertools.count():
        # The point in units of 2⁻³²: the exclusive or of the direction numbers of the set bits.
        point = 0
        direction = 2**31
        for bit in reversed(f"{window:b}"):
            if bit == "1":
                point ^= direction
            direction ^= direction >> 1
        yield bisect(ends, point / 2**32)


def draw_windows(
    texts: Sequence[Text], tokenizer: Any, *, samples: int, seqlen: int, seed: int
) -> tuple[torch.Tensor, str]:
    """Random windows of texts in turn.

    Args:
        texts: The texts, whose shares sum to 1.
        tokenizer: A tokenizer of transformers.
        samples: N, the number of windows of all texts.
        seqlen: S, the tokens per window.
        seed: Every text starts from the same seed, so its windows depend on their number alone.

    Returns:
        Windows (N, S) int64, and where they come from, for people.

    Raises:
        ValueError: A text is too short; the message names its source.
    """
    text_N = torch.tensor(list(itertools.islice(in_turn(texts), samples)))
    ids_NS = torch.empty((samples, seqlen), dtype=torch.int64)
    described = []
    for number, text in enumerate(texts):
        of_text_N = text_N == number
        if count := int(of_text_N.sum()):
            sizes = {"samples": count, "seqlen": seqlen, "rng": random.Random(seed)}
            ids_NS[of_text_N], source = _draw_windows(text, tokenizer, **sizes)
            described.append(source)
    return ids_NS, "; ".join(described)


def _draw_windows(text: Text, tokenizer: Any, **sizes: Any) -> tuple[torch.Tensor, str]:
    """Random windows (N, S) of one text, and where they come from, for people.

    `sizes` are `samples`, `seqlen` and `rng` of `windows_from_stream`.
    """
    with naming(text.source):
        if not text.by_document:
            return windows_from_stream(encode(tokenizer, text.whole()), **sizes), text.source
        try:
            ids, used = windows_from_documents(
                text.documents, tokenizer, from_start=text.from_start, **sizes
            )
            return ids, f"{text.source}; windows from {counted(used, 'document')}"
        except TextTooShort:
            if not text.joins_short:
                raise
        whole = text.joiner.join(document for document in text.documents if document.strip())
        ids = windows_from_stream(encode(tokenizer, whole), **sizes)
    joined = counted(len(text.documents), "document")
    return ids, f"{text.source}; {joined} joined, too few are longer than a window"


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids of a text, (T,) int64, with the special tokens that the tokenizer adds to it."""
    # verbose=False: transformers would warn that the text is longer than the model's context.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def encode_documents(
    documents: Sequence[str], order: Sequence[int], tokenizer: Any
) -> Iterator[torch.Tensor]:
    """Yield the token ids of documents in some order, (T,) int64 each; reads a few at a time.

    Args:
        documents: A document is read when it is indexed.
        order: Numbers of documents.
        tokenizer: A tokenizer of transformers.
    """
    for batch in (order[first : first + _BATCH] for first in range(0, len(order), _BATCH)):
        for ids in tokenizer([documents[index] for index in batch], verbose=False)["input_ids"]:
            yield torch.tensor(ids, dtype=torch.int64)


def windows_from_documents(
    documents: Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    rng: random.Random,
    from_start: bool = False,
) -> tuple[torch.Tensor, int]:
    """Random windows of random documents.

    This follows the calibration of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695): draw
    a document, drop it unless it has more than S tokens, and start a window at any of its first
    T - S tokens, or at the first one only (`from_start`).

    There are two differences, so that the search always ends. Documents are drawn without
    replacement. Only when all have been drawn, the long ones are used again, each time with a
    window that starts elsewhere. Only documents that are drawn are tokenised.

    Args:
        documents: A document is read when it is drawn.
        tokenizer: A tokenizer of transformers.
        samples: N, the number of windows.
        seqlen: S, the tokens per window.
        rng: Decides documents and starts.
        from_start: Whether a window can only start at the first token of its document.

    Returns:
        Windows (N, S) int64, and the number of documents that they come from.

    Raises:
        TextTooShort: The documents have fewer different windows than `samples`, perhaps none.

    Here every letter is a token:

    >>> def tokenizer(texts, verbose):
    ...     return {"input_ids": [[ord(letter) for letter in text] for text in texts]}
    >>> ids, used = windows_from_documents(
    ...     ["abcdefgh", "xy"], tokenizer, samples=2, seqlen=3, rng=random.Random(0)
    ... )
    >>> ["".join(map(chr, row)) for row in ids.tolist()], used
    (['abc', 'cde'], 1)
    """
    rows: list[torch.Tensor] = []
    # Per document that gave a window: its tokens, and other starts to use if windows run short.
    reserve: list[tuple[torch.Tensor, Iterator[int]]] = []
    # How many different windows the documents so far have.
    different = 0
    longest = 0
    order = rng.sample(range(len(documents)), len(documents))
    for tokens in encode_documents(documents, order, tokenizer):
        longest = max(longest, len(tokens))
        starts = len(tokens) - seqlen
        if starts <= 0:
            continue
        starts = 1 if from_start else starts
        different += starts
        start, *more = rng.sample(range(starts), min(starts, samples))
        rows.append(tokens[start : start + seqlen])
        reserve.append((tokens, iter(more)))
        if len(rows) == samples:
            return torch.stack(rows), len(reserve)
    if not reserve:
        raise TextTooShort(
            f"none of the {len(documents)} documents is longer than {seqlen} tokens; the longest "
            f"has {longest}. Use a smaller `seqlen` (less than {longest}) or longer text"
        )
    _check_enough(different, samples, seqlen)
    # Each round takes at least one start, and `_check_enough` has made sure that they suffice.
    while len(rows) < samples:
        rng.shuffle(reserve)
        for tokens, starts_left in reserve:
            next_start = next(starts_left, None)
            if next_start is not None and len(rows) < samples:
                rows.append(tokens[next_start : next_start + seqlen])
    return torch.stack(rows), len(reserve)


def windows_from_stream(
    tokens_T: torch.Tensor, *, samples: int, seqlen: int, rng: random.Random
) -> torch.Tensor:
    """Random windows of one long text, with different starts; they may overlap.

    Args:
        tokens_T: int64, the token ids of the text.
        samples: N, the number of windows.
        seqlen: S, the tokens per window.
        rng: Decides the starts.

    Returns:
        (N, S) int64.

    Raises:
        TextTooShort: The text has fewer different windows than `samples`.

    >>> windows_from_stream(torch.arange(100), samples=2, seqlen=4, rng=random.Random(0))
    tensor([[49, 50, 51, 52],
            [53, 54, 55, 56]])
    """
    starts = len(tokens_T) - seqlen
    if starts <= 0:
        raise ValueError(
            f"the whole text has {len(tokens_T)} tokens, and windows of {seqlen} need more than "
            "that. Use a smaller `seqlen` or more text"
        )
    _check_enough(starts, samples, seqlen)
    return torch.stack(
        [tokens_T[start : start + seqlen] for start in rng.sample(range(starts), samples)]
    )


def _check_enough(different: int, samples: int, seqlen: int) -> None:
    if different < samples:
        raise TextTooShort(
            f"the text has only {different} different windows of {seqlen} tokens, fewer than "
            f"the {samples} samples asked for. Use fewer `samples`, a smaller `seqlen` or more text"
        )
