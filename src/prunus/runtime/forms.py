"""What both forms of a packed weight, bitmap and quantised, can do: be checked and be expanded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prunus.hardware.errors import naming
from prunus.runtime import bitmap, planes
from prunus.runtime.description import Description
from prunus.runtime.weight import Packed, QuantizedWeight


def check(weight: Packed, stored: int | None = None) -> torch.Tensor | None:
    """Check that the parts of a weight fit each other, before anything computes with them.

    Args:
        weight: The weight as it was read, on any device.
        stored: The declared number of entries of a bitmap; None leaves it unchecked.

    Returns:
        What the other functions need besides, as their argument `prepared`, and find again without
        it; see `bitmap.check` and `planes.check`.

    Raises:
        ValueError: They do not fit; the message says what is wrong.
    """
    if isinstance(weight, QuantizedWeight):
        return planes.check(weight)
    return bitmap.check(weight, stored)


def checked_weight(
    described: Description, linear: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[Packed, torch.Tensor | None]:
    """Return a linear's weight from the tensors of its checkpoint, and the result of `check`.

    Args:
        described: The packed linears of the checkpoint.
        linear: The name of one of them in the checkpoint.
        tensors: Holds the tensors that `described.tensors(linear)` names.

    Raises:
        ValueError: The weight is damaged; the message names the linear.
    """
    weight = described.weight(linear, tensors)
    with naming(f"{linear} is damaged"):
        return weight, check(weight, described.linears[linear].stored)


def expand(
    weight: Packed,
    dtype: torch.dtype | None = None,
    prepared: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weight (O, I) in `dtype` (None: that of a bitmap's entries, bfloat16 for integers).

    Args:
        weight: A weight that `check` accepted.
        dtype: bfloat16, float16 or float32, or None.
        prepared: What `check` returned; it saves a second scan.
        out: Contiguous memory (O, I) of that dtype to write to; None allocates it.
    """
    form = planes if isinstance(weight, QuantizedWeight) else bitmap
    return form.expand(weight, dtype, prepared, out)


def expand_rows(
    weight: Packed, rows: torch.Tensor, prepared: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return some rows of the dense weight, as `expand` would give them: (..., I) of `dtype`.

    Args:
        weight: A weight that `check` accepted.
        rows: Row numbers (...), integers. They may repeat and come in any order.
        prepared: What `check` returned.
        dtype: bfloat16, float16 or float32.

    Raises:
        IndexError: A row number is out of range.
    """
    form = planes if isinstance(weight, QuantizedWeight) else bitmap
    return form.expand_rows(weight, rows, prepared, dtype)


def relative_error(weight_OI: torch.Tensor, packed: Packed) -> float:
    """‖W − Ŵ‖² / ‖W‖² of a packed weight, computed in float64; 0 for a weight of zeros.

    >>> weight = torch.tensor([[0.0, 2.0]], dtype=torch.bfloat16)
    >>> relative_error(weight, bitmap.pack_weight(weight, torch.bfloat16))
    0.0
    """
    weight = weight_OI.double()
    total = weight.square().sum()
    if total == 0:
        return 0.0
    return float((weight - expand(packed, torch.float32).double()).square().sum() / total)
