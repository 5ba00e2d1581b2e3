"""One weight as a packed checkpoint stores it; `docs/reference/packed-format.md` is the reference.

This file defines the parts. `bitmap.py` and `coding.py` make, check and expand bitmaps; `planes.py`
and `plane_codes.py` do so for quantised weights.

Shape suffixes: O output features (rows), I input features (columns), K stored values, R rare
values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Coding", "PackedWeight", "PlaneCode", "QuantizedWeight"]


class Coding(NamedTuple):
    """The high bytes of bfloat16 values, in four bits each.

    Attributes:
        codes: uint8 (32 per group of 64 values). Byte i of a group holds the code of its value i in
            the low four bits, and the code of value i + 32 in the high four bits.
        high_bytes: uint8 (16,): the high byte that each code stands for.
        rare_at: int64 (R,), ascending: positions of the values whose high byte has no code.
        rare: uint8 (R,): the high bytes of those values.
    """

    codes: torch.Tensor
    high_bytes: torch.Tensor
    rare_at: torch.Tensor
    rare: torch.Tensor


# This is a tuple because one is made for every linear and token, and a frozen dataclass takes four
# times as long to make.
class PackedWeight(NamedTuple):
    """A weight of which K entries are stored.

    Attributes:
        shape: (O, I).
        values: (K,) the stored entries, row after row, left to right: bfloat16 or float16 as in the
            original, or int8. With a coding: uint8, K padded to whole groups of 64, the low bytes
            of bfloat16 in the order that `coding.py` describes.
        mask: uint8 (O, ceil(I / 8)); bit j % 8 of byte j // 8 is set where column j is stored. Bits
            beyond the last column are 0. None where all entries are stored: K is O · I.
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
        """The dtype of the entries: bfloat16 for coded values."""
        return self.values.dtype if self.coding is None else torch.bfloat16

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        parts = [self.values, self.mask, self.scales, *(self.coding or ())]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


class PlaneCode(NamedTuple):
    """The code of one class of columns.

    Attributes:
        raw: low bits stored as they are, 0 to 3.
        layers: bits that each layer gives to a value, 1 to 4 each; at most eight layers. Without
            layers every value takes a byte, and `raw` is 0.
    """

    raw: int
    layers: tuple[int, ...]


class QuantizedWeight(NamedTuple):
    """A weight of small integers with a scale per row and a step per column.

    Attributes:
        shape: (O, I).
        data: uint8 (bytes,): planes and escape bytes of all chunks.
        classes: uint8 (I,): the class of each column.
        steps: bfloat16 (I,).
        scales: bfloat16 (O,).
        codes: the code of each class.
        rows_per_chunk: rows of each chunk; the last one may have fewer.
    """

    shape: tuple[int, int]
    data: torch.Tensor
    classes: torch.Tensor
    steps: torch.Tensor
    scales: torch.Tensor
    codes: tuple[PlaneCode, ...]
    rows_per_chunk: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        parts = (self.data, self.classes, self.steps, self.scales)
        return sum(part.numel() * part.element_size() for part in parts)
