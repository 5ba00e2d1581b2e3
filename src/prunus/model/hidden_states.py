"""The hidden states of all calibration windows between two blocks.

They stay in memory where they fit, otherwise in one file. Either way `get` returns
what `put` stored, bit for bit.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class StatesPlace:
    """Where hidden states wait between two blocks; see `HiddenStates`.

    Attributes:
        spill_to: folder for a file of them, or None if they stay in memory.
        on_device: whether they stay in the memory of the device, and not of the host.
    """

    spill_to: Path | None
    on_device: bool


class HiddenStates:
    """One tensor per batch: (windows, tokens, hidden), or images (images, channels, height, width).

    Args:
        spill_to: folder for the file, or None to keep the tensors in memory. The
            file has no name, so nothing is left behind when the process is killed.
        on_device: keep the tensors on `device` between blocks; otherwise in pinned host memory.

    >>> states = HiddenStates(1, spill_to=None, device=torch.device("cpu"))
    >>> states.fill(0, torch.zeros(2, 5, 8))
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

    def fill(self, index: int, tensor: torch.Tensor) -> None:
        """Store batch `index` for the first time. Batches must be filled in order."""
        if self._file is None:
            self._keep(index, tensor)
            return
        assert index == len(self._places), "batches are filled in order"
        end = os.fstat(self._file.fileno()).st_size
        self._places.append((end, tensor.shape, tensor.dtype))
        self._file.seek(end)
        self._file.write(_bytes_of(tensor).data)
        self._file.flush()

    def put(self, index: int, tensor: torch.Tensor) -> None:
        """Replace batch `index` by a tensor of the same dtype that is not larger."""
        if self._file is None:
            self._keep(index, tensor)
            return
        offset, shape, dtype = self._places[index]
        assert tensor.dtype == dtype, "a block must keep the dtype"
        # A stage of an image model makes grids smaller and channels more, but never the total.
        assert tensor.numel() <= shape.numel(), "a block must not make hidden states larger"
        self._places[index] = (offset, tensor.shape, dtype)
        self._file.seek(offset)
        self._file.write(_bytes_of(tensor).data)
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
        if self._file is not None:
            return self._places[index][1:]
        tensor = self._tensors[index]
        assert tensor is not None, "batch was never filled"
        return tensor.shape, tensor.dtype

    def close(self) -> None:
        """Release memory and file."""
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


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
