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
from prunus.model.calls import hidden_of, replaced_forward
from prunus.model.linears import find_block_list
from prunus.model.stream import HiddenStates


class _LastBlockDone(BaseException):
    """Ends a run early: only what the last block returns is needed."""


class Reference:
    """A model to compare others with. Pass it to `prunus.perplexity` for one model after another.

    Its blocks run for the first model on a text, and not again for the next models. What it has
    computed for a text is dropped when other texts follow, and at the end of the `with` block.

    Packed models, adapters, loaded models and models that prunus cannot read block by block are
    loaded once and run again for every model.

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
        self._options: ComputeOptions | None = None
        self._streamed = False
        self._by_blocks: StreamedModel | None = None
        self._whole: WholeModel | None = None
        # What the last block returned, by (ids, batch, dtype, streamed). The oldest comes first.
        self._states: list[tuple[tuple[Any, ...], HiddenStates]] = []

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the models and what they have computed. `open` makes it ready again."""
        while self._states:
            self._states.pop()[1].close()
        self._options = None
        self._by_blocks = None
        self._whole = None

    def open(self, options: ComputeOptions, streamed: bool) -> None:
        """Choose how it computes, before the first window. Reads headers only.

        Args:
            options: How the model is computed. Other options than before drop what was computed.
            streamed: Whether its blocks are read one by one. If not, the whole model is loaded
                once per text, and what its last block returns is kept.
        """
        self._streamed = streamed
        if options == self._options:
            return
        self.close()
        self._options = options
        if self.folder is not None and whole_only(self.folder) is None:
            # Something else than a row of blocks is loaded whole. If the checkpoint is damaged,
            # loading it says so.
            with contextlib.suppress(NotImplementedError, ValueError, FileNotFoundError):
                self._by_blocks = StreamedModel(self.folder, options)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self._opened.dtype

    def check(self, ids: torch.Tensor, name: str) -> None:
        """Check token ids; see `LogitsSource`."""
        self._opened.check(ids, name)

    def windows(
        self, ids: torch.Tensor, batch: int, progress: WindowProgress, compared: bool
    ) -> Generator[Rows, None, None]:
        """The logits of every window; see `LogitsSource`. Blocks run only for new ids."""
        if self._by_blocks is not None and len(ids):
            try:
                states = self._states_of(self._by_blocks, ids, batch, progress, compared)
            except NotImplementedError:
                # Found out only by running the model: it is no plain row of blocks.
                self._by_blocks = None
            else:
                progress(len(ids), len(ids))
                yield from self._by_blocks.logits(states, ids, batch, by_rows=self._streamed)
                return
        yield from self._opened.windows(ids, batch, progress, compared)

    @property
    def _opened(self) -> StreamedModel | WholeModel:
        """The model as it computes; loads it if it is computed whole."""
        if self._by_blocks is not None:
            return self._by_blocks
        if self._whole is None:
            self._whole = WholeModel(self.model if self.folder is None else self._load())
        return self._whole

    def _load(self) -> Any:
        assert self.folder is not None and self._options is not None
        return self._options.load(self.folder)

    def _states_of(
        self,
        by_blocks: StreamedModel,
        ids: torch.Tensor,
        batch: int,
        progress: WindowProgress,
        compared: bool,
    ) -> HiddenStates:
        """Run the blocks, or find what they returned for the same ids before."""
        settings = (batch, self.dtype, self._streamed)
        for (earlier_ids, *earlier_settings), states in self._states:
            if torch.equal(earlier_ids, ids) and (*earlier_settings,) == settings:
                return states
        while len(self._states) >= self._texts:
            self._states.pop(0)[1].close()
        if self._streamed:
            states = by_blocks.run_blocks(ids, batch, progress, compared)
        else:
            states = self._run_whole(by_blocks, ids, batch, progress)
        self._states.append(((ids, *settings), states))
        return states

    def _run_whole(
        self, by_blocks: StreamedModel, ids: torch.Tensor, batch: int, progress: WindowProgress
    ) -> HiddenStates:
        """Load the whole model, keep what its last block returns, and drop the model again."""
        loaded = self._load()
        last = find_block_list(loaded)[1][-1]
        forward = last.forward
        batches = ids.split(batch)
        storage = by_blocks.place_states(ids.shape, self._texts)
        states = HiddenStates(
            len(batches),
            spill_to=storage.spill_to,
            device=loaded.device,
            on_device=storage.on_device,
        )

        def keep(*args: Any, **kwargs: Any) -> Any:
            """The forward function of the last block, which keeps what it returns."""
            output = forward(*args, **kwargs)
            states.put(position, hidden_of(output))
            # Neither norm nor head is needed now. The first batch shows what they make of it.
            if position > 0:
                raise _LastBlockDone
            return output

        try:
            with replaced_forward(last, keep), torch.no_grad():
                for position, ids_BS in enumerate(batches):
                    ids_BS = ids_BS.to(loaded.device)
                    with contextlib.suppress(_LastBlockDone):
                        logits_BSV = loaded(input_ids=ids_BS, use_cache=False).logits
                    if position == 0:
                        _check_logits(by_blocks.logits(states, ids_BS, batch, False), logits_BSV)
                        del logits_BSV
                    progress(min((position + 1) * batch, len(ids)), len(ids))
        except BaseException:
            states.close()
            raise
        return states


def _check_logits(logits: Generator[Rows, None, None], expected_BSV: torch.Tensor) -> None:
    """Check that norm and head make the whole model's logits of what the last block returns.

    Raises:
        NotImplementedError: They do not, so the model has to run whole for every other model.
    """
    with contextlib.closing(logits) as windows:
        for rows, expected_SV in zip(windows, expected_BSV, strict=True):
            if not torch.equal(rows(0, len(expected_SV)), expected_SV):
                raise NotImplementedError("the logits are no function of the last block alone")
