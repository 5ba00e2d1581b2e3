"""The devices and the dtypes that names stand for."""

from __future__ import annotations

import re

import torch
from torch import nn

from prunus.distributed import ranks
from prunus.words import did_you_mean

#: The dtypes that users can name, for computation and storage.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, loaded: nn.Module | None = None) -> torch.device:
    """The device called `name`. Each of several processes on a host takes a CUDA device of its own.

    Args:
        name: "cpu", "cuda", "cuda:<number>" or "auto".
        loaded: For "auto", a loaded model, whose device is taken. Without one, "auto" is CUDA if
            there is any, and the CPU if not.

    Raises:
        ValueError: This is no name of a device, that CUDA device does not exist, or processes would
            have to share one.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if loaded is not None:
            return next(loaded.parameters()).device
        name = "cuda" if available else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(
            f"device must be auto, cpu, cuda or cuda:<number>, not {name!r}"
            f"{did_you_mean('cuda' if name == 'gpu' else name, ('auto', 'cpu', 'cuda'))}"
        )
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if (device.index or 0) >= available:
        raise ValueError(
            f"device {name!r} is not there: {available} CUDA devices are visible; use cpu or auto"
        )
    processes = ranks().local_size
    if processes > 1 and name != "cuda":
        raise ValueError(
            f"device {name!r} would be shared by the {processes} processes on this host: "
            "give cuda, and each process takes a device of its own"
        )
    if processes > available:
        raise ValueError(
            f"there are {processes} processes on this host and {available} CUDA devices, "
            f"and each process needs a device of its own: start {available} with "
            "--nproc-per-node of torchrun, or use cpu"
        )
    return device
