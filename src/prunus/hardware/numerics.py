"""Tensor operations in which speed counts for more than the last digits.

A processor that multiplies bfloat16 natively does so about four times as fast as float32. A
"low-precision product" uses that: both factors and the result are rounded to bfloat16, which has 8
significant bits (a relative error of up to 0.4 % each, of either sign). Sums inside the product
stay float32.

A CUDA device has tensor cores that round the factors of a float32 product to TF32, which has 11
significant bits, and are about eight times as fast as its float32 units. There a low-precision
product uses them, and so does every product of 16-bit factors: both formats of 16 bits fit into
TF32, so that nothing is rounded.

A processor that does not multiply bfloat16 natively is faster in float32, also for 16-bit factors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prunus.hardware.process_state import replaced

# Below this number of multiplications, rounding the factors costs more time than it saves.
_MIN_MULTIPLICATIONS = 2**24
# The elements of a temporary on a processor: 16 MB as float32. glibc returns pieces larger than
# 32 MB to the system at once, and every new one starts with page faults. Those take a third of the
# time of a product and what follows it.
_ELEMENTS_AT_A_TIME = 2**22
#: Weights up to here have sums of squares in float32, with room for the inputs that they make.
LARGEST = 1e15
# From this number of tokens on, a product takes longer than the conversion of its weight.
_MIN_TOKENS = 8


@functools.cache
def native_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a processor with instructions that multiply bfloat16; never on CUDA."""
    return device.type == "cpu" and native_bfloat16()


def tf32_products(allowed: bool = True) -> contextlib.AbstractContextManager[None]:
    """While active, CUDA devices round the factors of float32 products to TF32, in any thread.

    Args:
        allowed: If False, nothing changes: a caller needs no branch for devices without TF32.
    """
    products = torch.backends.cuda.matmul
    return replaced(products, "fp32_precision", "tf32") if allowed else contextlib.nullcontext()


def low_precision_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right as float32, computed in bfloat16 or TF32 where that is faster.

    Use it for a result that is corrected later, such as a step of an iteration, or that is small
    against what it is added to. Both factors are float32, or both are rounded to bfloat16 already;
    one that comes from `low_precision_factor` may be either.

    Args:
        left: A matrix (rows, n).
        right: A matrix (n, columns).

    >>> low_precision_product(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.],
            [3.]])
    """
    if _is_rounded(left.shape[0], right):
        return (left.bfloat16() @ right.bfloat16()).float()
    with tf32_products(right.device.type == "cuda"):
        return left.float() @ right.float()


def low_precision_factor(right: Tensor, rows: int) -> Tensor:
    """Round a factor once for many calls of `low_precision_product`.

    Args:
        right: float32, the factor on the right of the products.
        rows: The number of rows of the factors to its left. With few rows the product stays in
            float32, and so does `right`.
    """
    return right.bfloat16() if _is_rounded(rows, right) else right


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear`, in float32 without native bfloat16: a seventh of the time (Zen 3)."""
    few = x.numel() < _MIN_TOKENS * x.shape[-1]
    if few or x.dtype.itemsize != 2 or x.device.type != "cpu" or native_bfloat16():
        return functional.linear(x, weight, bias)
    x_TI = x.float()
    y_TO = torch.cat([x_TI @ weight[rows].float().T for rows in row_spans(weight)], dim=-1)
    return (y_TO if bias is None else y_TO + bias).to(x.dtype)


def fast_linears() -> contextlib.AbstractContextManager[Any]:
    """While active, `linear` computes the linears of dense models, GPT-2's Conv1D included."""
    return contextlib.nullcontext() if native_bfloat16() else _FastLinears()


class _FastLinears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # transformers' Conv1D, the linear of GPT-2, calls addmm(bias_O, x_TI, weight_IO).
        if func is torch.addmm and len(args) == 3 and not kwargs and args[0].dim() == 1:
            return linear(args[1], args[2].T, args[0])
        return (linear if func is functional.linear else func)(*args, **(kwargs or {}))


def row_spans(matrix: Tensor, rows_per_group: int = 1) -> list[slice]:
    """Split the rows of a matrix into runs whose temporaries are cheap.

    Other devices than processors get a single run: they want large products.

    Args:
        matrix: Its shape and its device decide.
        rows_per_group: How many neighbouring rows must stay together. Every run but the last is a
            multiple of it.

    >>> row_spans(torch.empty(10, 2**20), rows_per_group=3)
    [slice(0, 3, None), slice(3, 6, None), slice(6, 9, None), slice(9, 10, None)]
    """
    rows, columns = matrix.shape
    if matrix.device.type != "cpu":
        return [slice(0, rows)]
    groups = max(1, _ELEMENTS_AT_A_TIME // max(1, columns * rows_per_group))
    run = groups * rows_per_group
    return [slice(start, min(start + run, rows)) for start in range(0, max(1, rows), run)]


def _is_rounded(rows: int, right: Tensor) -> bool:
    """Whether a product with this number of rows on the left is worth rounding to bfloat16."""
    return rows * right.numel() >= _MIN_MULTIPLICATIONS and multiplies_bfloat16(right.device)


def all_finite(tensor: Tensor, largest: float = torch.inf) -> bool:
    """Whether a tensor holds neither NaN nor infinity; True for one without elements.

    Args:
        tensor: Floats.
        largest: The largest magnitude that counts as finite.

    >>> all_finite(torch.tensor([1.0])), all_finite(torch.tensor([1.0, torch.nan]))
    (True, False)
    """
    if tensor.numel() == 0:
        return True
    # aminmax passes NaN on. On a CPU this takes a fortieth of the time of isfinite. Both ends are
    # not stacked: under torch's autocast for CPUs, stack and cat refuse float16.
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        # A matrix whose columns lie one after the other would be copied.
        tensor = tensor.T
    lowest, highest = torch.aminmax(tensor)
    within = torch.maximum(-lowest, highest) <= largest
    return bool(lowest.isfinite() & highest.isfinite() & within)


def check_finite(
    tensors: Mapping[str, Tensor], prefix: str = "", largest: float = torch.inf
) -> None:
    """Check that weights are numbers.

    Args:
        tensors: Weights by name. Integers and floats of 8 bits always pass.
        prefix: What precedes the names in the message.
        largest: The largest magnitude of a weight, such as `LARGEST`.

    Raises:
        ValueError: A weight is NaN, infinite or larger; the message names the first tensor.
    """
    for key, tensor in sorted(tensors.items()):
        is_checked = tensor.is_floating_point() and tensor.itemsize > 1
        if is_checked and not all_finite(tensor, largest):
            what = "NaN or infinity" if largest == torch.inf else f"NaN, or beyond {largest:.0e}"
            raise ValueError(
                f"{prefix}{key} holds weights that are not finite ({what}); the checkpoint is "
                "damaged: download or copy it again"
            )


def count_zeros(tensor: Tensor) -> int:
    """How many elements of a tensor are 0 or -0.

    >>> count_zeros(torch.tensor([0.0, -0.0, 1.0]))
    2
    """
    # count_nonzero branches at every float. Comparing first takes a tenth of its time.
    return tensor.numel() - int(torch.count_nonzero(tensor != 0))
