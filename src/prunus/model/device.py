"""The device that a name stands for."""

from __future__ import annotations

import re

import torch
from torch import nn

__all__ = ["choose_device"]


def choose_device(name: str, loaded: nn.Module | None = None) -> torch.device:
    """The device called `name`.

    Args:
        name: "cpu", "cuda", "cuda:<number>" or "auto".
        loaded: for "auto", a loaded model, whose device is taken. Without one, "auto" is CUDA if
            there is any, and the CPU if not.

    Raises:
        ValueError: this is no name of a device, or that CUDA device does not exist.

    >>> choose_device("cpu")
    device(type='cpu')
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
            f"device {name!r} is not there: {available} CUDA devices are visible; use --device cpu "
            "or auto"
        )
    return device
