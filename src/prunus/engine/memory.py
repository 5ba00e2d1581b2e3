"""How much memory there is, how much was used, and how much a block will need."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["BlockCost", "available_memory", "peak_memory"]


def peak_memory(device: torch.device | None = None) -> int:
    """Peak memory of this process so far in bytes: resident on the host, allocated on a CUDA device."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes that can still be taken without swapping, the limit of the process' cgroup included."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return available


@dataclass(frozen=True)
class BlockCost:
    """What one block asks of memory, in bytes.

    Attributes:
        weights: the block in the dtype of the computation, its stored form, and the pruned copies that wait
            to be written.
        working: temporaries of the largest linear while it is pruned, and its input statistics.
        hidden: hidden states of all windows between blocks.
        paused: what the windows that stand at a linear hold beside that: the residual, the linear's input
            and its output (about two hidden states and two widths of the widest linear per token).
        transient: one batch's forward pass, in whatever way the windows are walked through the block.
    """

    weights: int
    working: int
    hidden: int
    paused: int
    transient: int

    @property
    def lockstep_in_memory(self) -> int:
        return self.weights + self.working + self.hidden + self.paused + self.transient

    @property
    def lockstep_spilled(self) -> int:
        return self.weights + self.working + self.paused + self.transient

    @property
    def replay_in_memory(self) -> int:
        return self.weights + self.working + self.hidden + self.transient

    @property
    def least(self) -> int:
        """Hidden states on disk, one batch at a time."""
        return self.weights + self.working + self.transient
