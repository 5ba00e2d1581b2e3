"""Where the logits of windows come from: a protocol, and a model in memory.

`streamed_model.py` and `reference.py` have the other two sources.

Legend: W windows, B windows at once, S tokens per window, T rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

import torch

#: A function of (first, stop) that returns the logits (T, V) of these tokens of a window.
Rows = Callable[[int, int], torch.Tensor]

#: Called with the number of windows done, and the number of all windows.
WindowProgress = Callable[[int, int], None]


class LogitsSource(Protocol):
    """A model that gives the logits of windows: `WholeModel`, `StreamedModel` or `Reference`.

    Attributes:
        dtype: dtype of the computation.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def check(self, ids: torch.Tensor, name: str) -> None:
        """Check that the model can score token ids (W, S); see `check_windows`."""
        ...

    def windows(
        self,
        ids: torch.Tensor,
        batch: int,
        progress: WindowProgress | None = None,
        compared: bool = False,
    ) -> Generator[Rows, None, None]:
        """The logits of every window, in order.

        The logits of a window can be read until the next window is taken.

        Args:
            ids: token ids (W, S), int64. With more ranks than batches, a rank may have no windows.
            progress: called after every batch or block. It counts shares of windows: half of the
                blocks for all W windows count as W / 2.
            compared: another model of this size gives its logits at the same time, so this one
                leaves half of the memory to it.
        """
        ...


class WholeModel:
    """A loaded causal language model that is scored as it is.

    Args:
        model: a transformers model. It is scored in evaluation mode, on its device and in its
            dtype, and left in the mode that it was in.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        embedding = model.get_input_embeddings()
        self._device: torch.device = embedding.weight.device
        # A packed embedding stores bytes, and says in which dtype it gives rows.
        self.dtype: torch.dtype = getattr(embedding, "dtype", embedding.weight.dtype)

    def check(self, ids: torch.Tensor, name: str) -> None:
        check_windows(self._model, ids, name)

    def windows(
        self,
        ids: torch.Tensor,
        batch: int,
        progress: WindowProgress | None = None,
        compared: bool = False,
    ) -> Generator[Rows, None, None]:
        was_training = self._model.training
        self._model.eval()
        done = 0
        try:
            for ids_BS in ids.split(batch) if len(ids) else ():
                yield from map(rows_of, self._logits(ids_BS))
                done += len(ids_BS)
                if progress is not None:
                    progress(done, len(ids))
        finally:
            self._model.train(was_training)

    # The mode ends before a window is handed out, so it never holds for the caller.
    @torch.inference_mode()
    def _logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(
            input_ids=ids_BS.to(self._device), use_cache=False
        ).logits
        return logits


def rows_of(logits_SV: torch.Tensor) -> Rows:
    """The logits of one window as a function of the first row and the row after the last."""
    return lambda first, stop: logits_SV[first:stop]


def check_windows(model: Any, ids: torch.Tensor, name: str) -> None:
    """Check that token ids (W, S) are in the vocabulary, and that windows fit in the context."""
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = int(ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"token id {largest} is outside {name}'s vocabulary of {vocabulary}; "
            "are these another tokenizer's ids?"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(
            f"windows of {ids.shape[1]} tokens are longer than {name}'s {positions} positions; "
            f"use a `seqlen` of {positions} or less"
        )
