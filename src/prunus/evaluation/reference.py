"""The model that others are compared with, whose blocks run once for each text.

Its predictions are needed again for every model. They are not kept as log-probabilities, which take
V numbers per token, but as what the last block returns, which takes H: 576 instead of 49,152 in
SmolLM2-135M. Only the final norm and the head run again. They give the same logits each time, to
the last bit.

Legend: W windows, B windows at once, S tokens per window, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import nn

from prunus.evaluation.model_input import ComputeOptions, file_states, find_folder
from prunus.evaluation.streamed_model import StreamedModel, whole_only
from prunus.evaluation.window_scores import Rows, WholeModel, WindowProgress
from prunus.model.stream import HiddenStates


class Reference:
    """A model to compare others with. Pass it to `prunus.perplexity` for one model after another.

    Its blocks run for the first model on a text, and not again for the next models. What it has
    computed for a text is dropped when other texts follow, and at the end of the `with` block.

    Packed models, adapters, loaded models and models that prunus cannot read block by block are
    loaded once and run again for every model. So are mixtures of experts that are not streamed:
    their experts are one tensor, and one by one they would add in another order.

    Args:
        model: A folder, a hub id, or a loaded transformers model.
        texts: How many texts take turns. What was computed for this many is kept.

    Attributes:
        model: As above.
        folder: The checkpoint; None for a loaded model.
        watched: The files of the checkpoint, which must not change; none for a loaded model.

        with prunus.Reference("MODEL") as reference:
            for model in ("pruned", "packed"):
                print(prunus.perplexity(model, "wikitext2", reference=reference).divergence)
    """

    def __init__(self, model: Any, texts: int = 1) -> None:
        self.model = model
        self.folder = None if isinstance(model, nn.Module) else find_folder(model)
        self.watched = file_states(self.folder)
        self._texts = texts
        self._opened_with: tuple[ComputeOptions, bool] | None = None
        self._model: StreamedModel | WholeModel | None = None
        # What the last block returned, by the ids and the batch. The oldest comes first.
        self._states: dict[tuple[bytes, torch.Size, int], HiddenStates] = {}

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and what it has computed. `open` makes it ready again."""
        for states in self._states.values():
            states.close()
        self._states.clear()
        self._opened_with = None
        self._model = None

    def open(self, options: ComputeOptions, streamed: bool) -> None:
        """Choose how it computes, before the first window.

        A model that is loaded whole is loaded here. Of another one only headers are read.

        Args:
            options: How the model is computed.
            streamed: Whether the models that are compared with it may take the memory that the
                whole reference would need. Other values than before drop what was computed.
        """
        if (options, streamed) == self._opened_with:
            return
        self.close()
        self._model = self._by_blocks(options, streamed) or self._whole(options)
        self._opened_with = options, streamed

    def _by_blocks(self, options: ComputeOptions, streamed: bool) -> StreamedModel | None:
        """The model, whose blocks are read one by one; None for one that is loaded whole."""
        if self.folder is None or whole_only(self.folder) is not None:
            return None
        # Something else than a row of blocks is loaded whole. If the checkpoint is damaged, loading
        # it says so.
        with contextlib.suppress(NotImplementedError, ValueError, FileNotFoundError):
            model = StreamedModel(self.folder, options)
            if streamed or not model.splits_experts:
                return model
        return None

    def _whole(self, options: ComputeOptions) -> WholeModel:
        return WholeModel(self.model if self.folder is None else options.load(self.folder))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self._ready()[0].dtype

    def check(self, ids: torch.Tensor, name: str) -> None:
        """Check token ids; see `LogitsSource`."""
        self._ready()[0].check(ids, name)

    def windows(
        self, ids: torch.Tensor, batch: int, progress: WindowProgress, models: int
    ) -> Generator[Rows, None, None]:
        """The logits of every window; see `LogitsSource`. Blocks run only for new ids."""
        model, options, streamed = self._ready()
        if isinstance(model, StreamedModel) and len(ids):
            try:
                states = self._states_of(model, ids, batch, progress, models)
            except NotImplementedError:
                # Found out only by running the model: it is no plain row of blocks.
                self._model = model = self._whole(options)
            else:
                progress(len(ids), len(ids))
                yield from model.logits(states, ids, batch, by_rows=streamed)
                return
        yield from model.windows(ids, batch, progress, models)

    def _ready(self) -> tuple[StreamedModel | WholeModel, ComputeOptions, bool]:
        """The model, and how it was opened."""
        assert self._model is not None and self._opened_with is not None, "open it first"
        return self._model, *self._opened_with

    def _states_of(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        batch: int,
        progress: WindowProgress,
        models: int,
    ) -> HiddenStates:
        """Run the blocks, or return what they returned for the same ids before."""
        key = ids.numpy().tobytes(), ids.shape, batch
        if key not in self._states:
            while len(self._states) >= self._texts:
                oldest = next(iter(self._states))
                self._states.pop(oldest).close()
            self._states[key] = model.run_blocks(ids, batch, progress, models)
        return self._states[key]
