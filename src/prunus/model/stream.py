"""The hidden states of all windows between two blocks, and how blocks are run on them.

A stream does not know what is done to a block in between.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.hardware.numerics import all_finite
from prunus.model.calls import BlockCall, hidden_of
from prunus.model.checkpoint.writer import flat_bytes
from prunus.model.linears import refuse_not_finite
from prunus.model.skeleton import Skeleton
from prunus.model.source import Source


@dataclass(frozen=True)
class StatesPlace:
    """Where hidden states are kept between two blocks; see `HiddenStates`."""

    spill_to: Path | None
    on_device: bool


class HiddenStates:
    """One tensor per batch: (windows, tokens, hidden), or images (images, channels, height, width).

    They are in a file in the folder `spill_to`, which has no name, so that nothing is left behind
    when the process is killed. With None they are on `device`, or else in pinned host memory.

    >>> states = HiddenStates(1, spill_to=None, device=torch.device("cpu"))
    >>> states.put(0, torch.zeros(2, 5, 8))
    >>> states.put(0, torch.ones(2, 5, 8))
    >>> states.get(0).sum()
    tensor(80.)
    """

    def __init__(
        self, count: int, *, spill_to: Path | None, device: torch.device, on_device: bool = True
    ) -> None:
        self._device = device
        self._keep_on = device if on_device else torch.device("cpu")
        self._tensors: list[torch.Tensor | None] = [None] * count
        self._file = tempfile.TemporaryFile(dir=spill_to) if spill_to is not None else None
        # Per batch in the file: offset in bytes, shape and dtype.
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def put(self, index: int, tensor: torch.Tensor) -> None:
        """Store batch `index`, in order, or replace it by one of the same dtype, not larger."""
        if self._file is None:
            self._keep(index, tensor)
            return
        if index == len(self._places):
            end = os.fstat(self._file.fileno()).st_size
            self._places.append((end, tensor.shape, tensor.dtype))
        offset, shape, dtype = self._places[index]
        assert tensor.dtype == dtype, "a block must keep the dtype"
        # A stage of an image model makes grids smaller and channels more, but never the total.
        assert tensor.numel() <= shape.numel(), "a block must not make hidden states larger"
        self._places[index] = (offset, tensor.shape, dtype)
        self._file.seek(offset)
        self._file.write(flat_bytes(tensor).numpy().data)
        self._file.flush()

    def get(self, index: int) -> torch.Tensor:
        """Batch `index` on the device. In memory it is the stored tensor: do not write to it."""
        if self._file is None:
            tensor = self._tensors[index]
            assert tensor is not None, "batch was never filled"
            return tensor.to(self._device, non_blocking=True)
        offset, shape, dtype = self._places[index]
        host = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        self._file.seek(offset)
        self._file.readinto(host.numpy().data)
        return host.view(dtype).reshape(shape).to(self._device)

    def layout(self, index: int) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of batch `index`, without reading it."""
        tensor = self._tensors[index]
        return self._places[index][1:] if tensor is None else (tensor.shape, tensor.dtype)

    def close(self) -> None:
        self._tensors = [None] * len(self._tensors)
        if self._file is not None:
            self._file.close()

    def _keep(self, index: int, tensor: torch.Tensor) -> None:
        if self._keep_on.type != "cpu" or self._device.type != "cuda":
            self._tensors[index] = tensor.to(self._keep_on)
            return
        # Copies from and to pinned memory run next to other work. Nothing waits for them here: the
        # device does all copies and all computing in the order in which they were begun, and the
        # host never reads this memory. So the next `put` may write to the same memory.
        kept = self._tensors[index]
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._tensors[index] = kept.copy_(tensor.detach(), non_blocking=True)


class Stream:
    """The windows of one model in batches, all before the same block. Call `embed` first."""

    def __init__(self, skeleton: Skeleton, source: Source, device: torch.device) -> None:
        self.skeleton = skeleton
        self.source = source
        self.device = device
        #: The hidden states before the next block.
        self.states = HiddenStates(0, spill_to=None, device=device)
        # Number of windows in a batch -> how the model calls each block with it.
        self._calls: dict[int, list[BlockCall]] = {}

    def __len__(self) -> int:
        return len(self.states)

    def embed(
        self,
        batches: Sequence[torch.Tensor],
        spill_to: Path | None,
        on_device: bool = True,
        partial: Sequence[torch.Tensor] = (),
    ) -> None:
        """Run what precedes the blocks on `batches` of ids, and record how the model calls each
        block.

        No batches where no inputs are needed. For `spill_to` and `on_device` see `HiddenStates`.
        `partial` batches are not kept; blocks will be called with as many windows too.
        """
        self.states = HiddenStates(
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
                self.states.put(position, hidden)
                self._remember(len(ids), recorded)
            for ids in partial:
                if len(ids) and len(ids) not in self._calls:
                    self._remember(len(ids), self.skeleton.record(ids.to(self.device))[1])

    def _remember(self, windows: int, recorded: list[BlockCall]) -> None:
        """Keep one batch's calls for all of its size: masks, positions may not depend on text."""
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
        """A function that runs a block on hidden states of as many windows as an embedded batch."""
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
        forward = self.forward(index, self.skeleton.fill(index, stored, self.device))
        self.advance(self.checked(index, forward))
        self.skeleton.release(index)

    def checked(
        self, index: int, run: Callable[[Any], torch.Tensor]
    ) -> Callable[[Any], torch.Tensor]:
        """A function that runs a block, with an error where its outputs are not finite."""

        def run_checked(given: Any) -> torch.Tensor:
            output = run(given)
            if not all_finite(output):
                name = self.skeleton.block_name(index)
                linears = {f"{name}.{x.name}": x for x in self.skeleton.linears(index)}
                what = f"{name} gives hidden states that"
                refuse_not_finite(linears, lambda: run(given), what)
            return output

        return run_checked

    def advance(self, forward: Callable[[int], torch.Tensor]) -> None:
        """Replace the hidden states of every batch i by `forward(i)`."""
        for batch in range(len(self)):
            self.states.put(batch, forward(batch))

    def close(self) -> None:
        self.states.close()
