"""The parts of a packed weight and their names; `docs/reference/packed-format.md` explains them.

`bitmap.py` and `coding.py` make, check and expand bitmaps; `planes.py` and `plane_codes.py` do so
for quantised weights; `forms.py` serves both.

Shape suffixes: O output features (rows), I input features (columns), K stored values, R rare
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch


class Coding(NamedTuple):
    """The high bytes of bfloat16 values, in four bits each."""

    #: uint8 (32 per group of 64 values). Byte i of a group holds the code of its value i in the low
    #: four bits, and the code of value i + 32 in the high four bits.
    codes: torch.Tensor
    #: uint8 (16,): the high byte that each code stands for.
    high_bytes: torch.Tensor
    #: int64 (R,), ascending: positions of the values whose high byte has no code.
    rare_at: torch.Tensor
    #: uint8 (R,): the high bytes of those values.
    rare: torch.Tensor


# A tuple: one is made for every linear and token, and a frozen dataclass takes four times as long.
class PackedWeight(NamedTuple):
    """A bitmap: a weight of which K entries are stored, and a mask says which ones."""

    #: (O, I)
    shape: tuple[int, int]
    #: (K,) the stored entries, row after row, left to right: bfloat16 or float16 as in the
    #: original, or int8. With a coding: uint8, K padded to whole groups of 64, the low bytes of
    #: bfloat16 in the order that `coding.py` describes.
    values: torch.Tensor
    #: uint8 (O, ceil(I / 8)); bit j % 8 of byte j // 8 is set where column j is stored. Bits beyond
    #: the last column are 0. None where all entries are stored: K is O · I.
    mask: torch.Tensor | None = None
    #: float32 (O,) for int8 values: entry = value · scale of its row; otherwise None.
    scales: torch.Tensor | None = None
    #: The high bytes of coded bfloat16 values; otherwise None.
    coding: Coding | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the entries: bfloat16 for coded values."""
        return self.values.dtype if self.coding is None else torch.bfloat16

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, as in a file."""
        return sum(part.nbytes for part in named_tensors("", self).values())


class PlaneCode(NamedTuple):
    """The code of one class of columns."""

    #: Low bits of every value that are stored as they are, 0 to 3.
    raw: int
    #: Bits that each layer gives to a value, 1 to 4 each; at most eight layers. Without layers
    #: every value takes a byte, and `raw` is 0.
    layers: tuple[int, ...]


class QuantizedWeight(NamedTuple):
    """A weight of small integers q: W_ij = scale_i · step_j · q_ij.

    Rows form chunks, and each chunk can be decoded without the others.
    """

    #: (O, I)
    shape: tuple[int, int]
    #: uint8 (bytes,): planes and escape bytes of all chunks, one chunk after the other.
    data: torch.Tensor
    #: uint8 (I,): the class of each column, an index of `codes`.
    classes: torch.Tensor
    #: bfloat16 (I,): the step of each column.
    steps: torch.Tensor
    #: bfloat16 (O,): the scale of each row.
    scales: torch.Tensor
    #: The code of each class.
    codes: tuple[PlaneCode, ...]
    #: Rows of each chunk; the last chunk may have fewer.
    rows_per_chunk: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, as in a file."""
        return sum(part.nbytes for part in named_tensors("", self).values())


#: A weight in either form.
Packed = PackedWeight | QuantizedWeight
#: Codes and rows per chunk of a quantised weight, which its tensors do not tell.
Layout = tuple[tuple[PlaneCode, ...], int]


def named_tensors(linear: str, weight: Packed) -> dict[str, torch.Tensor]:
    """Return the tensors that store the weight of `linear` in a file or, with "", in a module.

    >>> list(named_tensors("up", PackedWeight((1, 2), torch.ones(2))))
    ['up.weight']
    """
    parts: dict[str, torch.Tensor | None]
    if isinstance(weight, QuantizedWeight):
        parts = {"weight": weight.data, "weight_classes": weight.classes}
        parts |= {"weight_steps": weight.steps, "weight_scales": weight.scales}
    else:
        parts = {"weight": weight.values, "weight_mask": weight.mask}
        parts |= {"weight_scales": weight.scales}
        if weight.coding is not None:
            parts |= {f"weight_{field}": part for field, part in weight.coding._asdict().items()}
    prefix = f"{linear}." if linear else ""
    return {f"{prefix}{part}": tensor for part, tensor in parts.items() if tensor is not None}


def from_tensors(
    shape: tuple[int, int], tensors: Mapping[str, torch.Tensor | None], layout: Layout | None
) -> Packed:
    """Build a weight from what `named_tensors("", weight)` and `layout_of` return, unchecked.

    Args:
        shape: (O, I) of the dense weight.
        tensors: Name relative to the linear -> tensor; other names do not matter.
        layout: Codes and rows per chunk of a quantised weight; None for a bitmap.
    """
    get = tensors.get
    first = get("weight")
    scales = get("weight_scales")
    if layout is not None:
        parts = (first, get("weight_classes"), get("weight_steps"), scales)
        return QuantizedWeight(shape, *parts, *layout)  # type: ignore[arg-type]
    coding = None
    if (codes := get("weight_codes")) is not None:
        coding = Coding(codes, *map(get, _FURTHER_CODING))  # type: ignore[arg-type]
    return PackedWeight(shape, first, get("weight_mask"), scales, coding)  # type: ignore[arg-type]


# Tensors of a coding after the codes, in the order of the fields of `Coding`.
_FURTHER_CODING = ("weight_high_bytes", "weight_rare_at", "weight_rare")


def require(name: str, part: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Check dtype and shape of a part of a weight, which messages call `name`.

    Raises:
        ValueError: They differ.
    """
    if part.dtype != dtype or tuple(part.shape) != shape:
        expected, actual = (str(kind).removeprefix("torch.") for kind in (dtype, part.dtype))
        raise ValueError(f"the {name} must be {expected} {shape}, got {actual} {tuple(part.shape)}")


def layout_of(weight: Packed) -> Layout | None:
    """Return the layout of a quantised weight; None for a bitmap."""
    return (weight.codes, weight.rows_per_chunk) if isinstance(weight, QuantizedWeight) else None
