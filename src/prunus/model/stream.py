"""The hidden states of all windows on their way through a model, block by block.

A stream knows blocks, how the model calls them, and hidden states. It does not know what is done to
a block in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from prunus.hardware.numerics import all_finite
from prunus.model.calls import BlockCall, hidden_of
from prunus.model.hidden_states import HiddenStates
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source


class Stream:
    """The windows of one model in batches; all wait at the same block. `len` counts batches.

    Call `embed` first.
    """

    def __init__(self, skeleton: Skeleton, source: Source, device: torch.device) -> None:
        self.skeleton = skeleton
        self.source = source
        self.device = device
        self._states: HiddenStates | None = None
        # Number of windows in a batch -> how the model calls each block with it.
        self._calls: dict[int, list[BlockCall]] = {}

    def __len__(self) -> int:
        return len(self.states)

    @property
    def states(self) -> HiddenStates:
        """The hidden states before the next block."""
        assert self._states is not None, "embed comes first"
        return self._states

    def embed(
        self,
        batches: Sequence[torch.Tensor],
        spill_to: Path | None,
        on_device: bool = True,
        partial: Sequence[torch.Tensor] = (),
    ) -> None:
        """Run what precedes the blocks, and record how the model calls each block.

        Args:
            batches: token ids (windows, tokens) per batch. Empty if no block's inputs are needed.
            spill_to: folder for a file of hidden states, or None to keep them in memory.
            on_device: keep hidden states on the device between blocks, rather than in pinned host
                memory.
            partial: token ids of batches that are not kept. Blocks will be called with as many
                windows too, so their calls are recorded.

        Raises:
            ValueError: the embeddings give hidden states that are not finite.
            NotImplementedError: blocks are called with arguments that depend on the text.
        """
        self._states = HiddenStates(
            len(batches), spill_to=spill_to, device=self.device, on_device=on_device
        )
        if not batches and not partial:
            return
        with self.skeleton.outside_blocks(self.source.read_outside, self.device):
            for position, ids in enumerate(batches):
                hidden, recorded = self.skeleton.record(ids.to(self.device))
                if not all_finite(hidden):
                    raise ValueError(
                        "the embeddings give hidden states that are not finite; "
                        "check the checkpoint's weights"
                    )
                self._states.fill(position, hidden)
                self._remember(len(ids), recorded)
            for ids in partial:
                if len(ids) and len(ids) not in self._calls:
                    self._remember(len(ids), self.skeleton.record(ids.to(self.device))[1])

    def _remember(self, windows: int, recorded: list[BlockCall]) -> None:
        """Keep the calls of the first batch of this size; all other batches of the size use them.

        Their arguments (masks, positions) must therefore not depend on the text.
        """
        known = self._calls.setdefault(windows, recorded)
        for index, (left, right) in enumerate(zip(known, recorded, strict=True)):
            if not left.same_as(right):
                raise NotImplementedError(
                    f"block {index} is called with arguments that depend on the text itself; such "
                    "models cannot be pruned block by block yet"
                )

    def forward(self, index: int, block: nn.Module) -> Callable[[int], torch.Tensor]:
        """A function that runs a block on batch i. It does not change the hidden states."""
        run = self.call(index, block)
        return lambda batch: run(self.states.get(batch))

    def call(
        self, index: int, block: nn.Module | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that runs a block on hidden states (windows, tokens, hidden).

        The number of windows must be that of a batch that was embedded.
        """
        block = block if block is not None else self.skeleton.blocks[index]

        def run(hidden: torch.Tensor) -> torch.Tensor:
            call = self._calls[hidden.shape[0]][index]
            # torch counts in-place changes of a tensor. The input must survive: replay and
            # reconstruction run the block on it again.
            version = hidden._version
            output = hidden_of(block(hidden, *call.args, **call.kwargs))
            if hidden._version != version:
                raise NotImplementedError(
                    f"{self.skeleton.block_name(index)} changes its input in place; such models "
                    "cannot be pruned yet"
                )
            return output

        return run

    def propagate(self, index: int, stored: Mapping[str, torch.Tensor]) -> None:
        """Take all batches through block `index` with the weights `stored` (by relative name)."""
        if not len(self):
            return
        self.advance(self.forward(index, self.skeleton.fill(index, stored, self.device)))
        self.skeleton.release(index)

    def advance(self, forward: Callable[[int], torch.Tensor]) -> None:
        """Replace the hidden states of every batch i by `forward(i)`."""
        for batch in range(len(self)):
            self.states.put(batch, forward(batch))

    def close(self) -> None:
        """Release the hidden states."""
        if self._states is not None:
            self._states.close()
