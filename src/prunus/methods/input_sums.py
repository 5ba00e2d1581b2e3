"""The sums that make up the statistics of a linear's inputs: token counts, features, Gram, drift.

Each part knows three things: how to add one batch, how to add up over ranks, and how to follow a
new order of the features. `InputStatistics` puts the parts together.

Shape suffixes: T tokens, I inputs (features), B batches, 2 the pair (squares, values).
X_TI are the inputs of a linear, Y_TI its inputs in the dense model for the same tokens.
G_II = XᵀX is the Gram matrix, its diagonal is d_j = ‖X_j‖².
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from prunus.distributed import Ranks
from prunus.hardware.numerics import low_precision_product, multiplies_bfloat16, tf32_products

__all__ = ["DriftSums", "FeatureSums", "GramSums", "TokenCounts", "add_in_reference_order"]

# How many elements are squared at once. On a CPU the temporary must stay in the cache, which is
# ten times faster. A GPU wants long kernels.
_CPU_ELEMENTS = 2**20
_GPU_ELEMENTS = 2**26
# A Gram matrix of at least this width is computed in `_PARTS` x `_PARTS` blocks, because only the
# blocks on and above the diagonal are needed. Smaller products would be too small to be fast.
_SYMMETRIC_FROM, _PARTS = 512, 4


@dataclass
class TokenCounts:
    """How many tokens the sums hold.

    Attributes:
        total: all tokens that were added.
        paired: those of them whose inputs in the dense model are known too.
        held_out: those of them that are held out.
    """

    total: int = 0
    paired: int = 0
    held_out: int = 0

    def reduce(self, ranks: Ranks) -> None:
        """Replace the counts by their sums over all ranks."""
        counts = ranks.gather_ints([self.total, self.paired, self.held_out])
        self.total, self.paired, self.held_out = (sum(each) for each in zip(*counts, strict=True))


class FeatureSums:
    """Sums over tokens for every feature: Σ x², and Σ x where means are needed.

    Args:
        in_features: width of the inputs.
        squares: sum the squares; otherwise they stay 0.
        means: sum the values too.
        by_batch: keep the sums of each batch apart until `reduce`. Batches then add up in one
            order, whichever rank has them, and the result equals one process's to the bit.
        device: where the sums live.

    Attributes:
        sum_squares_I: float64, Σ_t x².
        sum_I: float64, Σ_t x, or None.
    """

    def __init__(
        self,
        in_features: int,
        *,
        squares: bool,
        means: bool,
        by_batch: bool,
        device: torch.device | str,
    ) -> None:
        self._squares = squares
        self.sum_squares_I = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.sum_I: Tensor | None = torch.zeros_like(self.sum_squares_I) if means else None
        self._by_batch: list[Tensor] | None = [] if by_batch else None

    def add(self, X_TI: Tensor) -> Tensor:
        """Add one batch; returns the sums of its squares, float64 (I,), for the Gram's diagonal."""
        # The batch is summed on its own first, so that batches add up in the same order whether
        # one process or several ranks have them.
        sums_2I = torch.zeros(2, X_TI.shape[1], dtype=torch.float64, device=X_TI.device)
        if self.sum_I is not None:
            sums_2I[1] = X_TI.sum(dim=0, dtype=torch.float64)
        if self._squares:
            elements = _CPU_ELEMENTS if X_TI.device.type == "cpu" else _GPU_ELEMENTS
            for part_TI in X_TI.split(max(1, elements // X_TI.shape[1])):
                # Convert before squaring: in float16 the square of anything above 256 overflows.
                part_TI = part_TI.float()
                sums_2I[0] += (part_TI * part_TI).sum(dim=0)
        if self._by_batch is None:
            self._add_sums(sums_2I)
        else:
            self._by_batch.append(sums_2I)
        return sums_2I[0]

    def reduce(self, ranks: Ranks) -> None:
        """Add up the batches of all ranks, in the order of ranks and of their batches."""
        assert self._by_batch is not None, "only sums that were kept by batch can be reduced"
        nothing_2I = self.sum_squares_I.new_zeros(2, len(self.sum_squares_I))
        own_B2I = torch.stack([*self._by_batch, nothing_2I])[:-1]
        # The sums of values travel only where means are needed.
        all_B2I = ranks.all_gather(own_B2I if self.sum_I is not None else own_B2I[:, :1])
        self._by_batch = None
        for sums_2I in all_B2I:
            self._add_sums(sums_2I)

    def _add_sums(self, sums_2I: Tensor) -> None:
        self.sum_squares_I += sums_2I[0]
        if self.sum_I is not None:
            self.sum_I += sums_2I[1]


class GramSums:
    """The Gram matrix XᵀX of the inputs, and the shares of it that some tokens contribute.

    Args:
        in_features: width of the inputs.
        paired: keep the share of tokens whose dense inputs are known.
        hold_out: keep the share of tokens that are held out.
        low_precision: multiply bfloat16 inputs in bfloat16 where the processor supports it, and
            round each batch's products to 8 bits. The diagonal keeps its full precision.
        device: where the matrices live.

    Attributes:
        gram_II: float32, XᵀX over all tokens.
        paired_II: float32, the same over tokens whose dense inputs are known, or None.
        held_II: float32, the same over held-out tokens, or None.
    """

    def __init__(
        self,
        in_features: int,
        *,
        paired: bool,
        hold_out: bool,
        low_precision: bool,
        device: torch.device | str,
    ) -> None:
        self._low_precision = low_precision
        self.gram_II = torch.zeros(in_features, in_features, device=device)
        self.paired_II: Tensor | None = torch.zeros_like(self.gram_II) if paired else None
        self.held_II: Tensor | None = torch.zeros_like(self.gram_II) if hold_out else None

    def add(self, X_TI: Tensor, squares_I: Tensor, *, paired: bool, held_out: bool) -> None:
        """Add one batch; `squares_I`, float64, are the sums of its squares."""
        shares = [
            share_II
            for share_II, belongs in ((self.held_II, held_out), (self.paired_II, paired))
            if share_II is not None and belongs
        ]
        if not shares:
            self._add_product(self.gram_II, X_TI, squares_I)
            return
        # The product is computed once and added to every sum that these tokens belong to.
        part_II = torch.zeros_like(self.gram_II)
        self._add_product(part_II, X_TI, squares_I)
        for sum_II in (self.gram_II, *shares):
            sum_II += part_II

    def reduce(self, ranks: Ranks) -> None:
        """Replace every matrix by its sum over all ranks: equal on all, rounded rank by rank."""
        for matrix_II in (self.gram_II, self.paired_II, self.held_II):
            if matrix_II is not None:
                ranks.all_reduce(matrix_II)

    def _add_product(self, sum_II: Tensor, X_TI: Tensor, squares_I: Tensor) -> None:
        in_bfloat16 = X_TI.dtype == torch.bfloat16 and multiplies_bfloat16(X_TI.device)
        if not (self._low_precision and in_bfloat16):
            # Inputs of 16 bits fit into TF32, so that a CUDA device loses nothing by it.
            with tf32_products(X_TI.device.type == "cuda" and X_TI.dtype.itemsize == 2):
                _add_gram(sum_II, X_TI.float())
            return
        # Whatever inverts the Gram depends on its diagonal most, so that is kept exact.
        diagonal_I = sum_II.diagonal() + squares_I
        _add_gram(sum_II, X_TI)
        sum_II.diagonal().copy_(diagonal_I)


class DriftSums:
    """How far the inputs have drifted from the dense model's: (Y − X)ᵀX.

    Args:
        in_features: width of the inputs.
        hold_out: keep the share of tokens that are held out.
        device: where the matrices live.

    Attributes:
        drift_II: float32, (Y − X)ᵀX over the tokens whose Y is known.
        held_II: float32, the same over held-out tokens, or None.
    """

    def __init__(self, in_features: int, *, hold_out: bool, device: torch.device | str) -> None:
        self.drift_II = torch.zeros(in_features, in_features, device=device)
        self.held_II: Tensor | None = torch.zeros_like(self.drift_II) if hold_out else None

    def add(self, X_TI: Tensor, dense_TI: Tensor, *, held_out: bool) -> None:
        """Add one batch whose inputs in the dense model are `dense_TI`."""
        if not X_TI.dtype == dense_TI.dtype == torch.bfloat16:
            X_TI, dense_TI = X_TI.float(), dense_TI.float()
        # The drift is small against the Gram that it is solved with, so it may be rounded.
        part_II = low_precision_product((dense_TI - X_TI).T, X_TI)
        self.drift_II += part_II
        if held_out and self.held_II is not None:
            self.held_II += part_II

    def reduce(self, ranks: Ranks) -> None:
        """Replace every matrix by its sum over all ranks: equal on all, rounded rank by rank."""
        for matrix_II in (self.drift_II, self.held_II):
            if matrix_II is not None:
                ranks.all_reduce(matrix_II)


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
