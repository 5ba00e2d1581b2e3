"""One weight as a packed checkpoint stores it. `docs/bitmap-format.md` is the reference.

Knows tensors and their places; how they are made, checked and expanded is in `bitmap.py` and `coding.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Coding", "PackedWeight"]


class Coding(NamedTuple):
    """The high bytes of bfloat16 values in four bits each.

    Attributes:
        codes: uint8 (32 per group of 64 values); byte i holds the code of low byte i of the group in its four low bits,
            that of low byte i + 32 in its four high bits.
        high_bytes: uint8 (16,): the high byte that a code stands for.
        rare_at: int64 (R,), ascending: numbers of the values whose high byte no code stands for.
        rare: uint8 (R,): and what it is.
    """

    codes: torch.Tensor
    high_bytes: torch.Tensor
    rare_at: torch.Tensor
    rare: torch.Tensor


# A tuple, not a dataclass: one is made for every linear and token, and a frozen dataclass takes four times as long.
class PackedWeight(NamedTuple):
    """A weight, of whose entries K are stored.

    Attributes:
        shape: (O, I).
        values: (K,) the stored entries, row after row, left to right: bfloat16 or float16 as in the original, or int8.
            Where there is a coding, uint8 (K filled up to whole groups of 64): the low bytes of bfloat16, in
            the order that `coding.py` describes.
        mask: uint8 (O, ceil(I / 8)); bit j % 8 of byte j // 8 is set where column j is stored. Bits beyond
            the last column are 0. None where all are stored: K is O · I.
        scales: float32 (O,) for int8 values: entry = value · scale of its row; otherwise None.
        coding: the high bytes of coded bfloat16 values; otherwise None.
    """

    shape: tuple[int, int]
    values: torch.Tensor
    mask: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    coding: Coding | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries as they are stored: bfloat16 for coded ones."""
        return self.values.dtype if self.coding is None else torch.bfloat16

    @property
    def nbytes(self) -> int:
        parts = [self.values, self.mask, self.scales, *(self.coding or ())]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)
