"""What both forms of a packed weight, bitmap and quantised, can do: be checked and be expanded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prunus.packed import bitmap, planes
from prunus.packed.description import Description
from prunus.packed.weight import Packed, QuantizedWeight


def check(weight: Packed, stored: int | None = None) -> torch.Tensor | None:
    """Check that the parts of a weight fit each other, before anything computes with them.

    `stored` is the declared number of entries of a bitmap. It returns what the other functions need
    besides and find again without it; see `bitmap.check` and `planes.check`.
    """
    if isinstance(weight, QuantizedWeight):
        return planes.check(weight)
    return bitmap.check(weight, stored)


def checked_weight(
    described: Description, linear: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[Packed, torch.Tensor | None]:
    """Return a linear's weight from the tensors of its checkpoint, and the result of `check`."""
    weight = described.weight(linear, tensors)
    try:
        return weight, check(weight, described.linears[linear].stored)
    except ValueError as fault:
        raise ValueError(f"{linear} is damaged: {fault}") from fault


def expand(
    weight: Packed,
    dtype: torch.dtype | None = None,
    prepared: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weight (O, I) in `dtype` (None: that of a bitmap's entries, bfloat16 for integers).

    It is written to `out`, contiguous memory of that dtype, if that is given.
    """
    form = planes if isinstance(weight, QuantizedWeight) else bitmap
    return form.expand(weight, dtype, prepared, out)


def expand_rows(
    weight: Packed, rows: torch.Tensor, prepared: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return some rows of the dense weight, as `expand` would give them: (..., I) of `dtype`."""
    form = planes if isinstance(weight, QuantizedWeight) else bitmap
    return form.expand_rows(weight, rows, prepared, dtype)


def relative_error(weight_OI: torch.Tensor, packed: Packed) -> float:
    """‖W − Ŵ‖² / ‖W‖² of a packed weight, computed in float64; 0 for a weight of zeros."""
    weight = weight_OI.double()
    total = weight.square().sum()
    if total == 0:
        return 0.0
    return float((weight - expand(packed, torch.float32).double()).square().sum() / total)
