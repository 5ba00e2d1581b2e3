"""The device that a name stands for."""

from __future__ import annotations

import re

import torch
from torch import nn

__all__ = ["choose_device"]


def choose_device(name: str, loaded: nn.Module | None = None, processes: int = 1) -> torch.device:
    """The device called `name`. Each of several processes on a host takes a CUDA device of its own.

    Args:
        name: "cpu", "cuda", "cuda:<number>" or "auto".
        loaded: for "auto", a loaded model, whose device is taken. Without one, "auto" is CUDA if
            there is any, and the CPU if not.
        processes: how many processes of the run are on this host.

    Raises:
        ValueError: this is no name of a device, that CUDA device does not exist, or processes would
            have to share one.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if loaded is not None:
            return next(loaded.parameters()).device
        if available:
            _check_one_each("auto", processes, available)
        return torch.device("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, not {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ValueError(
            f"device {name!r} is not there: {available} CUDA devices are visible; use --device cpu "
            "or auto"
        )
    if device.type == "cuda":
        _check_one_each(name, processes, available)
    return device


def _check_one_each(name: str, processes: int, available: int) -> None:
    if processes == 1:
        return
    if name not in ("auto", "cuda"):
        raise ValueError(
            f"device {name!r} would be shared by the {processes} processes on this host: "
            "give cuda, and each process takes a device of its own"
        )
    if processes > available:
        raise ValueError(
            f"there are {processes} processes on this host and {available} CUDA devices, "
            f"and each process needs a device of its own: start {available} with "
            "--nproc-per-node, or give --device cpu"
        )
