"""A whole model in memory, which gives the logits of windows batch by batch.

Legend: W windows, B windows at once, S tokens per window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch

from prunus.evaluation.loss import Rows, WindowProgress

__all__ = ["WholeModel", "check_windows", "logits_of_windows", "rows_of"]


class WholeModel:
    """A loaded causal language model that is scored as it is.

    `StreamedModel` has the same methods for a checkpoint that does not fit in memory.

    Args:
        model: a transformers model. It is scored in evaluation mode, on its device and in its
            dtype, and left in the mode that it was in.

    Attributes:
        dtype: dtype of the computation.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        embedding = model.get_input_embeddings()
        self._device: torch.device = embedding.weight.device
        # A packed embedding stores bytes, and says in which dtype it gives rows.
        self.dtype: torch.dtype = getattr(embedding, "dtype", embedding.weight.dtype)

    def check(self, ids: torch.Tensor, name: str) -> None:
        """Check that the model can score token ids (W, S); see `check_windows`."""
        check_windows(self._model, ids, name)

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
            ids: token ids (W, S), int64.
            batch: B, the number of windows in one forward pass.
            progress: called with the number of windows done, and the number of all windows.
            compared: a whole model does not need to know whether it is compared.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            yield from logits_of_windows(self._logits, ids, batch, progress)
        finally:
            self._model.train(was_training)

    # The mode ends before a window is handed out, so it never holds for the caller.
    @torch.inference_mode()
    def _logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(
            input_ids=ids_BS.to(self._device), use_cache=False
        ).logits
        return logits


def logits_of_windows(
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    batch: int,
    progress: WindowProgress | None,
) -> Generator[Rows, None, None]:
    """The logits of every window, in order; see `WholeModel.windows`.

    Args:
        logits_fn: a function of ids (B, S) that returns logits (B, S, V).
        ids: token ids (W, S). With more ranks than batches, a rank may have no windows.
        batch: B, the number of windows per call.
        progress: called with the number of windows done, and the number of all windows.
    """
    done = 0
    for ids_BS in ids.split(batch) if len(ids) else ():
        for logits_SV in logits_fn(ids_BS):
            yield rows_of(logits_SV)
        done += len(ids_BS)
        if progress is not None:
            progress(done, len(ids))


def rows_of(logits_SV: torch.Tensor) -> Rows:
    """The logits of one window as a function of the first row and the row behind the last."""
    return partial(_rows, logits_SV)


def _rows(logits_SV: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    return logits_SV[first:stop]


def check_windows(model: Any, ids: torch.Tensor, name: str) -> None:
    """Check that the token ids are in the vocabulary, and that the windows fit in the context.

    Args:
        model: a transformers model, which may be on the meta device.
        ids: token ids (W, S).
        name: what to call the model in an error.

    Raises:
        ValueError: a token id is outside the vocabulary, or the windows are too long.
    """
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
            f"use --seqlen {positions} or less"
        )
