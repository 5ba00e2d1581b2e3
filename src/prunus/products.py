"""Matrix products where speed counts for more than the last digits.

A processor that multiplies bfloat16 natively is about four times as fast in it as in float32. Sums stay float32 inside
the product; factors, and the result, are rounded to 8 bits (a relative error of up to 0.4 % each, of either sign).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["coarse_product", "native_bfloat16"]

# Below so many multiplications, rounding costs more time than it saves.
_WORTHWHILE = 2**24


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def coarse_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of float32 matrices, float32: by way of bfloat16 where that is faster, else exactly as it stands.

    For what is corrected afterwards anyway, such as the steps of an iteration, or is small against what it is added to.
    """
    multiplications = left.shape[0] * left.shape[1] * right.shape[1]
    if left.device.type == "cpu" and multiplications >= _WORTHWHILE and native_bfloat16():
        return (left.bfloat16() @ right.bfloat16()).float()
    return left @ right
