"""Text for training: windows of a source one after the other, each token once before any comes a second time.

Calibration draws a few windows at random and passes over documents that are shorter than a window. Training
wants all of the text: documents are taken in random order, end to end, and cut where a window is full.

Legend: N windows, S tokens per window (seqlen).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.calibration import check_source, hash_ids, load_windows
from prunus.calibration.corpora import NAMES, load_corpus
from prunus.calibration.draw import encode
from prunus.calibration.files import kind, read_documents, read_ids

__all__ = ["TrainingText", "training_text"]

_AT_ONCE = 32  # documents tokenised per call


class TrainingText:
    """Windows to train on, and some that are held out from it.

    Windows depend on the source, the tokenizer, seqlen and seed alone, not on how many are asked for. Where the
    text ends it begins anew, in another order of windows.

    Args:
        windows: yields rows (S,) int64, as many as there are.
        source: where they are from, in words.
        held_out: how many of the first are never trained on.
        seed: of the order in which windows come again.

    Raises:
        ValueError: no window is left to train on.
    """

    def __init__(
        self, windows: Iterator[torch.Tensor], source: str, held_out: int, seed: int
    ) -> None:
        self.source = source
        self._windows = windows
        self._seed = seed
        self._rows: list[torch.Tensor] = []
        self._ended = False
        first: list[torch.Tensor] = []
        while len(first) < held_out and (row := next(windows, None)) is not None:
            first.append(row)
        if len(first) < held_out or not self._extend(1):
            raise ValueError(
                f"{source}: the text has {len(first)} windows, too few to hold {held_out} out and train on others. "
                "Use a smaller --seqlen, fewer --held-out or more text"
            )
        #: (held_out, S) int64.
        self.held_out = torch.stack(first)
        #: Tells texts apart: SHA-256 of the held-out windows and the first one to train on, see `hash_ids`.
        self.sha256 = hash_ids(torch.stack([*first, self._rows[0]]))

    def windows(self, first: int, count: int) -> torch.Tensor:
        """Windows `first` to `first + count` of the training, (count, S) int64."""
        return torch.stack([self._window(index) for index in range(first, first + count)])

    def _window(self, index: int) -> torch.Tensor:
        if self._extend(index + 1):
            return self._rows[index]
        times, place = divmod(index, len(self._rows))
        order = random.Random(f"{self._seed} {times}").sample(
            range(len(self._rows)), len(self._rows)
        )
        return self._rows[order[place] if times else place]

    def _extend(self, count: int) -> bool:
        """Whether the text has `count` windows to train on; reads on as far as needed."""
        while len(self._rows) < count and not self._ended:
            row = next(self._windows, None)
            if row is None:
                self._ended = True
            else:
                self._rows.append(row)
        return len(self._rows) >= count


def training_text(
    source: str,
    *,
    tokenizer: Any,
    seqlen: int,
    held_out: int,
    seed: int,
    data_dir: Path | None,
    model: Callable[[], Any] | None = None,
    windows: int | None = None,
) -> TrainingText:
    """The training text of a source.

    Args:
        source: a name of `prunus.calibration.SOURCES` or the path of a file.
        tokenizer: of the model; may be None for `.safetensors` and `self`.
        seqlen: tokens per window, at least 2.
        held_out: windows to hold out, at least 1.
        seed: the same one gives the same windows.
        data_dir: local copy of the corpora, see `load_windows`.
        model: returns the loaded causal LM that writes the text, for `self`.
        windows: how many windows will be trained on, for `self`, which writes that many and no more.

    Raises:
        ValueError: an unknown source, a missing tokenizer or model, too little text.
        FileNotFoundError, ModuleNotFoundError, OSError: see `load_windows`.
    """
    check_source(source, data_dir)
    if source == "self":
        if windows is None:
            raise ValueError(
                "the source 'self' writes a given number of tokens: give the budget in --tokens"
            )
        written = load_windows(
            source,
            tokenizer=tokenizer,
            samples=windows + held_out,
            seqlen=seqlen,
            seed=seed,
            data_dir=data_dir,
            model=model,
        )
        return TrainingText(iter(written.ids), written.source, held_out, seed)
    if source not in NAMES and kind(Path(source)) == "safetensors":
        rows = _shuffled(list(_cut(iter(read_ids(Path(source))), seqlen, across=False)), seed)
        return TrainingText(iter(rows), source, held_out, seed)
    if tokenizer is None:
        raise ValueError(
            f"{source} is text, and this model comes without a tokenizer; give a .safetensors of input_ids"
        )
    if source in NAMES:
        corpus = load_corpus(source, "calibration", data_dir)
        # Of the corpora, C4 alone is made of documents; the lines of the others are one text.
        documents = corpus.documents if source == "c4" else [corpus.text()]
        described = corpus.source
    else:
        documents, described = read_documents(Path(source)), source
    if len(documents) == 1:
        rows = _shuffled(list(_cut(iter([encode(tokenizer, documents[0])]), seqlen)), seed)
        return TrainingText(iter(rows), described, held_out, seed)
    return TrainingText(
        _cut(_in_random_order(documents, tokenizer, seed), seqlen), described, held_out, seed
    )


def _in_random_order(documents: Sequence[str], tokenizer: Any, seed: int) -> Iterator[torch.Tensor]:
    """Token ids of the documents, each with the tokenizer's end-of-text token behind it, where there is one."""
    end = tokenizer.eos_token_id
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    for batch in (order[first : first + _AT_ONCE] for first in range(0, len(order), _AT_ONCE)):
        for ids in tokenizer([documents[index] for index in batch], verbose=False)["input_ids"]:
            yield torch.tensor([*ids, end] if end is not None else ids, dtype=torch.int64)


def _cut(
    pieces: Iterator[torch.Tensor], seqlen: int, across: bool = True
) -> Iterator[torch.Tensor]:
    """Windows (S,) of the pieces end to end; what is left at the end is dropped, or, unless `across`, of each piece."""
    rest = torch.zeros(0, dtype=torch.int64)
    for piece in pieces:
        rest = torch.cat([rest, piece]) if across else piece
        whole = len(rest) // seqlen
        yield from rest[: whole * seqlen].view(whole, seqlen)
        rest = rest[whole * seqlen :]


def _shuffled(rows: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    return random.Random(seed).sample(rows, len(rows))
