"""How the sums over a linear's inputs are computed: squares, Gram matrix, drift.

Shape suffixes: T tokens, I inputs (features), 2 the pair (squares, values).
X_TI are the inputs of a linear, Y_TI its inputs in the dense model for the same tokens.
G_II = XᵀX is the Gram matrix, its diagonal is d_j = ‖X_j‖².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from prunus.hardware.numerics import low_precision_product, multiplies_bfloat16, tf32_products

# How many elements are squared at once. On a CPU the temporary must stay in the cache, which is
# ten times faster. A GPU wants long kernels.
_CPU_ELEMENTS = 2**20
_GPU_ELEMENTS = 2**26
# A Gram matrix of at least this width is computed in `_PARTS` x `_PARTS` blocks, because only the
# blocks on and above the diagonal are needed. Smaller products would be too small to be fast.
_SYMMETRIC_FROM, _PARTS = 512, 4


def feature_sums(X_TI: Tensor, *, squares: bool, means: bool) -> Tensor:
    """Σ_t x² and Σ_t x of one batch, float64 (2, I); zeros for what is not asked for."""
    sums_2I = torch.zeros(2, X_TI.shape[1], dtype=torch.float64, device=X_TI.device)
    if means:
        sums_2I[1] = X_TI.sum(dim=0, dtype=torch.float64)
    if squares:
        elements = _CPU_ELEMENTS if X_TI.device.type == "cpu" else _GPU_ELEMENTS
        for part_TI in X_TI.split(max(1, elements // X_TI.shape[1])):
            # Convert before squaring: in float16 the square of anything above 256 overflows.
            part_TI = part_TI.float()
            sums_2I[0] += (part_TI * part_TI).sum(dim=0)
    return sums_2I


def add_gram(
    sums_II: Sequence[Tensor], X_TI: Tensor, squares_I: Tensor, low_precision: bool
) -> None:
    """Add XᵀX of one batch to every matrix of `sums_II`.

    Args:
        sums_II: float32; changed in place.
        squares_I: float64, the sums of its squares.
        low_precision: multiply bfloat16 inputs in bfloat16 where the processor supports it, and
            round the products to 8 bits. The diagonal keeps its full precision.
    """
    if len(sums_II) == 1:
        _add_batch(sums_II[0], X_TI, squares_I, low_precision)
        return
    # The product is computed once and added to every sum that these tokens belong to.
    part_II = torch.zeros_like(sums_II[0])
    _add_batch(part_II, X_TI, squares_I, low_precision)
    for sum_II in sums_II:
        sum_II += part_II


def _add_batch(sum_II: Tensor, X_TI: Tensor, squares_I: Tensor, low_precision: bool) -> None:
    in_bfloat16 = X_TI.dtype == torch.bfloat16 and multiplies_bfloat16(X_TI.device)
    if not (low_precision and in_bfloat16):
        # Inputs of 16 bits fit into TF32, so that a CUDA device loses nothing by it.
        with tf32_products(X_TI.device.type == "cuda" and X_TI.dtype.itemsize == 2):
            _add_gram(sum_II, X_TI.float())
        return
    # Whatever inverts the Gram depends on its diagonal most, so that is kept exact.
    diagonal_I = sum_II.diagonal() + squares_I
    _add_gram(sum_II, X_TI)
    sum_II.diagonal().copy_(diagonal_I)


def drift_product(X_TI: Tensor, dense_TI: Tensor) -> Tensor:
    """(Y − X)ᵀX of one batch, float32. It is small against the Gram, so it may be rounded."""
    if not X_TI.dtype == dense_TI.dtype == torch.bfloat16:
        X_TI, dense_TI = X_TI.float(), dense_TI.float()
    return low_precision_product((dense_TI - X_TI).T, X_TI)


def add_in_reference_order(
    gram_II: Tensor, sum_squares_I: Tensor, X_TI: Tensor, window: int
) -> None:
    """Add window number `window` (from 0) as the code of SparseGPT and of Wanda's ablations does.

    The Gram is a running mean of 2·xᵀx over windows, in float32. The original takes the squares of
    inputs that are scaled already, so that the k-th window counts 2/k in them. That is a slip, but
    without it the original's masks cannot be reproduced. Only the ratios between features matter.
    """
    gram_II *= window / (window + 1)
    sum_squares_I *= window / (window + 1)
    X_IT = math.sqrt(2 / (window + 1)) * X_TI.float().T
    gram_II += X_IT @ X_IT.T
    sum_squares_I += X_IT.norm(p=2, dim=1).square() / (window + 1)


def _add_gram(gram_II: Tensor, X_TI: Tensor) -> None:
    """Add XᵀX to `gram_II`.

    A CPU computes only the blocks on and above the diagonal, and copies them to the other side:
    XᵀX is symmetric, so the blocks below are their transposes.
    """
    width = len(gram_II)
    if gram_II.device.type != "cpu" or width < _SYMMETRIC_FROM:
        _add_product(gram_II, X_TI.T, X_TI)
        return
    edges = [width * part // _PARTS for part in range(_PARTS + 1)]
    spans = [slice(start, stop) for start, stop in pairwise(edges)]
    for place, rows in enumerate(spans):
        for columns in spans[place:]:
            _add_product(gram_II[rows, columns], X_TI[:, rows].T, X_TI[:, columns])
            if columns != rows:
                gram_II[columns, rows] = gram_II[rows, columns].T


def _add_product(sum_II: Tensor, left_IT: Tensor, right_TI: Tensor) -> None:
    if right_TI.dtype == sum_II.dtype:
        sum_II.addmm_(left_IT, right_TI)
    else:
        sum_II.add_(left_IT @ right_TI)
