"""Matrix products where speed counts for more than the last digits.

A processor that multiplies bfloat16 natively is about four times as fast in it as in float32. Sums stay float32 inside
the product; factors, and the result, are rounded to 8 bits (a relative error of up to 0.4 % each, of either sign).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "all_finite",
    "coarse_factor",
    "coarse_product",
    "count_zeros",
    "multiplies_bfloat16",
    "native_bfloat16",
    "row_spans",
]

# Below so many multiplications, rounding costs more time than it saves.
_WORTHWHILE = 2**24
# Elements of a temporary on a processor: 16 MB as float32. glibc gives back at once what is larger than 32 MB, and each
# new one begins with page faults, a third of the time of a product and what is done with it.
_AT_A_TIME = 2**22


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether that is a processor which does."""
    return device.type == "cpu" and native_bfloat16()


def coarse_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, float32: by way of bfloat16 where that is faster, else exactly as it stands.

    Both are float32, or both are rounded already.

    For what is corrected afterwards anyway, such as the steps of an iteration, or is small against what it is added to.
    """
    if _rounds(left.shape[0], right):
        return (left.bfloat16() @ right.bfloat16()).float()
    return left.float() @ right.float()


def coarse_factor(right: Tensor, rows: int) -> Tensor:
    """`right`, float32, rounded once for many a `coarse_product` with `rows` rows to its left, where these round it."""
    return right.bfloat16() if _rounds(rows, right) else right


def row_spans(matrix: Tensor, together: int = 1) -> list[slice]:
    """The rows of a matrix in runs whose temporaries are cheap; each run but the last a multiple of `together` rows."""
    rows, width = matrix.shape
    if matrix.device.type != "cpu":
        return [slice(0, rows)]
    run = max(1, _AT_A_TIME // max(1, width * together)) * together
    return [slice(start, min(start + run, rows)) for start in range(0, max(1, rows), run)]


def _rounds(rows: int, right: Tensor) -> bool:
    return rows * right.numel() >= _WORTHWHILE and multiplies_bfloat16(right.device)


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN, which aminmax passes on, nor infinity: a fortieth of isfinite's time on a CPU."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def count_zeros(tensor: Tensor) -> int:
    """How many numbers of `tensor` are 0 (or -0)."""
    # count_nonzero of floats branches at each of them, and takes ten times as long as comparing first.
    return tensor.numel() - int(torch.count_nonzero(tensor != 0))
