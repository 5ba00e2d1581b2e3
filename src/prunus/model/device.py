"""The device that a name stands for."""

from __future__ import annotations

import re

import torch
from torch import nn

__all__ = ["choose_device"]


def choose_device(name: str, loaded: nn.Module | None = None) -> torch.device:
    """The device called `name`; for "auto" where the `loaded` model is, or else CUDA where there is one.

    Raises:
        ValueError: not a device name, or a CUDA device that is not there.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if loaded is not None:
            return next(loaded.parameters()).device
        return torch.device("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, not {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ValueError(
            f"device {name!r} is not there: {available} CUDA devices are visible; use --device cpu or auto"
        )
    return device
