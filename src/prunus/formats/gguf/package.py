"""llama.cpp's package `gguf`, which is an extra: no other file imports it."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def package() -> Any:
    """The package."""
    import gguf

    return gguf


@functools.cache
def grid(name: str) -> torch.Tensor:
    """All codewords of a type, float32 (codewords, columns): magnitudes in units of the smallest.

    They are llama.cpp's own, from `gguf.quants.IQ3_S.grid` and its siblings: prunus has no copy.

    Args:
        name: The name of a type with a codebook, such as "IQ3_S".
    """
    quants = getattr(package().quants, name)
    quants.init_grid()
    return torch.tensor(quants.grid / quants.grid.min()).flatten(0, -2)
