"""Text for training: the windows of a source in order, each once before any comes a second time.

Calibration draws a few windows at random and leaves out documents that are shorter than a window.
Training needs all of the text. So documents come in random order, one after the other, and the text
is cut wherever a window is full.

Shape suffixes: N windows, S tokens per window (seqlen).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.draw import Text, encode, encode_documents, in_turn
from prunus.calibration.files import read_ids
from prunus.calibration.sources import IdsFile, TextSource, find_source
from prunus.calibration.windows import (
    UsedBos,
    WindowRequest,
    bos_token,
    check_ids,
    cut_rows,
    hash_ids,
    put_bos_first,
    used_bos,
)
from prunus.words import counted


class TrainingText:
    """Windows to train on, and held-out windows that are never trained on.

    The windows depend on the source, the tokenizer, seqlen and seed alone, not on how many are
    taken. A run that is resumed, or made longer, therefore sees the same ones. After the end of
    the text it begins again, in another order of windows.

    Args:
        windows: Yields all windows once, (S,) int64 each. The first ones are held out.
        source: Where they come from, for people.
        held_out: How many windows are held out, at least 1.
        seed: Decides the order of windows after the end of the text.
        bos: Whether every window begins with BOS.

    Attributes:
        source: As given.
        bos: As given.
        held_out: The held-out windows, (held_out, S) int64.
        sha256: `hash_ids` of the held-out windows and the first training window; tells texts apart.

    Raises:
        ValueError: The text ends before there is a window to train on.

    >>> rows = torch.arange(8).view(4, 2)
    >>> text = TrainingText(iter(rows), "an example", held_out=1, seed=0)
    >>> text.held_out.tolist()
    [[0, 1]]
    >>> text.windows(0, 3).tolist()
    [[2, 3], [4, 5], [6, 7]]
    """

    def __init__(
        self,
        windows: Iterator[torch.Tensor],
        source: str,
        held_out: int,
        seed: int,
        bos: UsedBos = "given",
    ) -> None:
        self.source = source
        self.bos = bos
        self._windows = windows
        self._seed = seed
        self._rows: list[torch.Tensor] = []
        first = list(itertools.islice(windows, held_out))
        if len(first) < held_out or not self._extend(1):
            raise ValueError(
                f"{source}: the text has {counted(len(first), 'window')}, too few to hold "
                f"{held_out} out and train on others. Use a smaller `seqlen`, fewer `held_out` or "
                "more text"
            )
        self.held_out = torch.stack(first)
        self.sha256 = hash_ids(torch.stack([*first, self._rows[0]]))

    def windows(self, first: int, count: int) -> torch.Tensor:
        """Training windows `first` to `first + count - 1`, (count, S) int64.

        Args:
            first: The number of the first window, from 0.
            count: How many windows, at least 1.
        """
        return torch.stack([self._window(index) for index in range(first, first + count)])

    def _window(self, index: int) -> torch.Tensor:
        """Training window `index`, (S,)."""
        if self._extend(index + 1):
            return self._rows[index]
        epoch, position = divmod(index, len(self._rows))
        order = random.Random(f"{self._seed} {epoch}").sample(
            range(len(self._rows)), len(self._rows)
        )
        return self._rows[order[position] if epoch else position]

    def _extend(self, count: int) -> bool:
        """Read on until there are `count` training windows; false if the text ends before."""
        self._rows += itertools.islice(self._windows, max(0, count - len(self._rows)))
        return len(self._rows) >= count


def training_text(source: str, request: WindowRequest, held_out: int) -> TrainingText:
    """The training text of a source.

    Args:
        source: A name of `SOURCES` or a path, except of images.
        request: Seqlen, seed, BOS, tokenizer, and whatever else the source needs. Its `samples` are
            not used.
        held_out: How many windows are held out, at least 1.

    Raises:
        ValueError: The text is too short or damaged, or its tokens do not fit the vocabulary. The
            last is raised when a window is read.
        OSError, ModuleNotFoundError: As `WindowSource.check` and `WindowSource.draw`.
    """
    text_source = find_source(source)
    seqlen, seed = request.seqlen, request.seed
    text_source.check(request)

    def checked(row: torch.Tensor) -> torch.Tensor:
        """A window, which is checked when it is read."""
        if request.vocabulary is not None:
            check_ids(row, request.vocabulary, "the training token ids")
        return row

    if isinstance(text_source, IdsFile):
        rows = _shuffled(cut_rows(read_ids(Path(source)), seqlen), seed)
        return TrainingText(map(checked, rows), source, held_out, seed)
    assert isinstance(text_source, TextSource), "`check` refuses images"
    tokenizer = text_source.tokenizer(request)
    token = bos_token(tokenizer, request.bos)
    texts = text_source.read(request)
    rows_with_bos = (put_bos_first(row, token) for row in _windows(texts, tokenizer, seqlen, seed))
    sources = "; ".join(text.source for text in texts)
    return TrainingText(map(checked, rows_with_bos), sources, held_out, seed, used_bos(token))


def _windows(texts: list[Text], tokenizer: Any, seqlen: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the windows of texts in turn, up to the end of the first text that ends."""
    rows = []
    for text in texts:
        if text.by_document:
            rows.append(_cut(_in_random_order(text.documents, tokenizer, seed), seqlen))
        else:
            # One text has no order of documents to draw, so its windows are shuffled instead.
            windows = cut_rows(encode(tokenizer, text.whole())[None], seqlen)
            rows.append(iter(_shuffled(windows, seed)))
    for number in in_turn(texts):
        if (row := next(rows[number], None)) is None:
            return
        yield row


def _in_random_order(documents: Sequence[str], tokenizer: Any, seed: int) -> Iterator[torch.Tensor]:
    """Yield the token ids of each document, with the end-of-text token of the tokenizer, if any."""
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for ids in encode_documents(documents, order, tokenizer):
        yield torch.cat([ids, ids.new_tensor(end)])


def _cut(pieces: Iterator[torch.Tensor], seqlen: int) -> Iterator[torch.Tensor]:
    """Cut pieces of token ids into windows (S,), which run on from one piece into the next."""
    rest = torch.zeros(0, dtype=torch.int64)
    for piece in pieces:
        rest = torch.cat([rest, piece])
        windows = cut_rows(rest[None], seqlen)
        yield from windows
        rest = rest[windows.numel() :]


def _shuffled(windows_NS: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """The windows in a random order, which the seed decides."""
    return random.Random(seed).sample(list(windows_NS), len(windows_NS))
