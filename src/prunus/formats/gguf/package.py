"""llama.cpp's package `gguf`, which is an extra: no other file imports it."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def package() -> Any:
    """The package, whose numbers of types include that of Q2_0.

    Versions up to 0.19 do not know the type, and their readers refuse a file that has it.
    """
    import gguf

    numbers = gguf.GGMLQuantizationType
    if "Q2_0" not in numbers.__members__:
        member = int.__new__(numbers, 42)
        member._name_, member._value_ = "Q2_0", 42
        # An enumeration asks this for the member of a number that it does not have.
        numbers._missing_ = lambda number: member if number == 42 else None
        gguf.GGML_QUANT_SIZES[member] = 64, 18
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
