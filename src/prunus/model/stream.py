"""The hidden states of all windows between two blocks, and how blocks are run on them.

A stream does not know what is done to a block in between.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from prunus.hardware.numerics import all_finite
from prunus.model.calls import BlockCall, hidden_of, same_arguments
from prunus.model.checkpoint.tensor_files import flat_bytes
from prunus.model.linears import refuse_not_finite
from prunus.model.skeleton import Skeleton
from prunus.model.source import WeightSource


@dataclass(frozen=True)
class StatesPlace:
    """Where hidden states are kept between two blocks; see `HiddenStates`."""

    spill_to: Path | None  #: folder for a file of them; None if they stay in memory
    on_device: bool  #: whether they stay in the memory of the device rather than of the host


class KeptStates(Protocol):
    """Hidden states that can be read batch by batch; see `HiddenStates`."""

    def get(self, index: int) -> torch.Tensor:
        """Batch `index` on the device."""

    def layout(self, index: int) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of batch `index`, without reading it."""


class HiddenStates:
    """One tensor per batch: (windows, tokens, hidden), or images (images, channels, height, width).

    Either in memory or in a file, `get` returns what `put` stored, bit for bit. `len` counts
    batches.

    Args:
        count: Number of batches.
        spill_to: Folder for a file of the tensors; None to keep them in memory. The file has no
            name, so nothing is left behind when the process is killed.
        device: Where `get` puts the tensors.
        on_device: Keep the tensors on `device`; otherwise in host memory, which is pinned if the
            device is a CUDA device.

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
        """Store batch `index`, or replace it by a tensor of the same dtype that is not larger.

        Batches must be stored in order for the first time.
        """
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
        """Release memory and file."""
        self._tensors = [None] * len(self._tensors)
        if self._file is not None:
            self._file.close()

    def _keep(self, index: int, tensor: torch.Tensor) -> None:
        """Store a batch in memory, of the device or of the host."""
        if self._keep_on.type != "cpu" or self._device.type != "cuda":
            self._tensors[index] = tensor.to(self._keep_on)
            return
        # Copies from and to pinned memory run next to other work. Nothing waits for them here: the
        # device does all copies and all computing in the order in which they were begun, and the
        # host never reads this memory. So the next `put` may write to the same memory.
        host = self._tensors[index]
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._tensors[index] = host.copy_(tensor.detach(), non_blocking=True)


class Stream:
    """The windows of one model in batches, all before the same block. `len` counts batches.

    Call `embed` first, then `propagate` or `advance` once per block in order, then `close`.

    Args:
        skeleton: The model without weights.
        source: Its weights.
        device: Where blocks run.

    Attributes:
        skeleton: As given.
        source: As given.
        device: As given.
        states: The hidden states before the next block.
    """

    def __init__(self, skeleton: Skeleton, source: WeightSource, device: torch.device) -> None:
        self.skeleton = skeleton
        self.source = source
        self.device = device
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
        """Run what precedes the blocks, and record how the model calls each block.

        Args:
            batches: Token ids (windows, tokens) per batch, or images. Empty if nobody needs the
                inputs of a block.
            spill_to: Folder for a file of hidden states; see `HiddenStates`.
            on_device: Keep hidden states on the device between blocks; see `HiddenStates`.
            partial: Token ids of batches whose hidden states are dropped. Blocks will be called
                with as many windows too, so their calls are recorded.

        Raises:
            ValueError: The embeddings give hidden states that are not finite.
            NotImplementedError: Blocks are called with arguments that depend on the text.
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
        """Keep the calls of the first batch of this size for all batches of the size.

        Their arguments, such as masks and positions, must therefore not depend on the text.
        """
        first = self._calls.setdefault(windows, recorded)
        for index, (call, other) in enumerate(zip(first, recorded, strict=True)):
            if not same_arguments(call, other):
                raise NotImplementedError(
                    f"block {index} is called with arguments that depend on the text itself; such "
                    "models cannot be pruned block by block yet"
                )

    def forward(self, index: int, block: nn.Module) -> Callable[[int], torch.Tensor]:
        """A function that runs a block on batch i. It does not change the hidden states.

        Args:
            index: Position of the block, which decides how the model calls it.
            block: The block with its weights in place; it can be a copy.
        """
        run = self.call(index, block)
        return lambda batch: run(self.states.get(batch))

    def call(
        self, index: int, block: nn.Module | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that runs a block on hidden states.

        Their number of windows must be that of a batch that was embedded. The function raises
        NotImplementedError for a block that changes its input in place.

        Args:
            index: Position of the block, which decides how the model calls it.
            block: The block with its weights in place; None for the skeleton's.
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
        forward = self.forward(index, self.skeleton.fill(index, stored, self.device))
        self.advance(self.checked(index, forward))
        self.skeleton.release(index)

    def checked(
        self, index: int, run: Callable[[Any], torch.Tensor]
    ) -> Callable[[Any], torch.Tensor]:
        """`run`, with a ValueError if the outputs of block `index` are not finite.

        The error names the first linear whose inputs are not finite; see `refuse_not_finite`.
        `run` can take hidden states or the number of a batch.
        """

        def run_checked(batch: Any) -> torch.Tensor:
            output = run(batch)
            if not all_finite(output):
                name = self.skeleton.block_name(index)
                linears = {f"{name}.{x.name}": x for x in self.skeleton.linears(index)}
                what = f"{name} gives hidden states that"
                refuse_not_finite(linears, lambda: run(batch), what)
            return output

        return run_checked

    def advance(self, forward: Callable[[int], torch.Tensor]) -> None:
        """Replace the hidden states of every batch i by `forward(i)`."""
        for batch in range(len(self)):
            self.states.put(batch, forward(batch))

    def close(self) -> None:
        """Release the hidden states."""
        self.states.close()
