"""What is remembered of a linear's inputs: norms of the features, or their whole Gram matrix; means where asked for.

It knows nothing of models or methods. Batches are added as they pass; nothing of them is kept.

Shape suffixes: T tokens, I inputs. X_TI are the inputs of a linear, G_II = XᵀX, its diagonal d_j = ‖X_j‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from prunus.distributed import Ranks
from prunus.hardware.numerics import all_finite, coarse_product, multiplies_bfloat16

Needs = Literal["none", "norms", "gram"]
NEEDS: tuple[Needs, ...] = ("none", "norms", "gram")
_Value = TypeVar("_Value")

# Elements squared at once: a CPU's temporary must stay in the cache (ten times faster), a GPU wants long kernels.
_CPU_ELEMENTS = 2**20
_GPU_ELEMENTS = 2**26
# Gram matrices from this width on are computed in blocks; smaller products would be too small to be fast.
_SYMMETRIC_FROM, _PARTS = 512, 4
# Sums over tokens of (I, I) products, those of them that were asked for.
_MATRICES = ("gram_II", "drift_II", "drift_gram_II", "held_gram_II", "held_drift_II")


class InputStatistics:
    """Sums over all tokens that reached a linear.

    Attributes:
        in_features: width of the inputs.
        needs: "none" counts tokens only, "norms" also sums squares, "gram" also the Gram matrix.
        tokens: rows of X_TI added so far.
        sum_squares_I: float64, Σ_t x², zeros for "none". The same to the bit for "norms" and "gram".
        gram_II: float32 XᵀX, or None unless needs is "gram".
        sum_I: float64, Σ_t x, or None unless `means` were asked for.
        drift_II: float32 (Y − X)ᵀX where Y_TI is what the dense model gives this linear for the same tokens, or None
            unless `drift` was asked for. Of those tokens only whose Y is known: see `drift_share`.
        drift_gram_II: the share of `gram_II` that comes from these tokens, or None unless `drift` is "some".
        held_gram_II, held_drift_II: the shares of `gram_II` and `drift_II` that come from tokens held out, or None unless
            `hold_out` was asked for.
        held_tokens: how many of the tokens these are.
        reference_order: sum a Gram in the order of SparseGPT's code; see `_add_in_reference_order`.
        coarse: whoever uses the Gram bears rounding beside its diagonal: inputs in bfloat16 are multiplied in it where
            the processor does so, and each batch's products rounded to 8 bits. The diagonal stays as it is.
        shared: these are of some batches only, others see the rest; see `complete`.
    """

    def __init__(
        self,
        in_features: int,
        needs: Needs,
        device: torch.device | str = "cpu",
        reference_order: bool = False,
        means: bool = False,
        drift: bool | Literal["some"] = False,
        hold_out: bool = False,
        shared: bool = False,
        coarse: bool = False,
    ) -> None:
        if needs not in NEEDS:
            raise ValueError(f"statistics can be {', '.join(NEEDS)}, not {needs!r}")
        if in_features < 1:
            raise ValueError(f"a linear with {in_features} inputs has no statistics")
        self.in_features = in_features
        self.needs: Needs = needs
        self.reference_order = reference_order and needs == "gram"
        self.coarse = coarse
        self.tokens = 0
        self._windows = 0
        self.sum_squares_I = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.gram_II = (
            torch.zeros(in_features, in_features, device=device) if needs == "gram" else None
        )
        self.sum_I = torch.zeros(in_features, dtype=torch.float64, device=device) if means else None
        self.drift_II = torch.zeros(in_features, in_features, device=device) if drift else None
        self.drift_gram_II = (
            torch.zeros_like(self.gram_II) if drift == "some" and self.gram_II is not None else None
        )
        self.held_gram_II = (
            torch.zeros_like(self.gram_II) if hold_out and self.gram_II is not None else None
        )
        self.held_drift_II = (
            torch.zeros_like(self.drift_II) if hold_out and self.drift_II is not None else None
        )
        self.held_tokens = 0
        self._paired = 0
        # What each batch added to the sums of squares and of values, where others have batches too.
        self._by_batch: list[Tensor] | None = [] if shared else None
        self._derived: dict[Hashable, Any] = {}

    @property
    def norms_I(self) -> Tensor:
        """‖X_j‖₂ of every input feature over all tokens, float32."""
        return self.sum_squares_I.sqrt().float()

    @property
    def drift_share(self) -> float:
        """Of how many of the tokens that were added the dense model's inputs are known, 0 to 1."""
        return self._paired / self.tokens if self.drift_II is not None and self.tokens else 0.0

    @property
    def mean_I(self) -> Tensor:
        """The mean of every input feature over all tokens, float64; 0 before any token."""
        assert self.sum_I is not None, "means were not asked for"
        return self.sum_I / max(1, self.tokens)

    @property
    def variance_I(self) -> Tensor:
        """The (biased) variance of every input feature over all tokens, float64, at least 0."""
        return (self.sum_squares_I / max(1, self.tokens) - self.mean_I.square()).clamp_(min=0)

    def derived(self, key: Hashable, compute: Callable[[], _Value]) -> _Value:
        """What `compute` makes of these statistics, made once: linears with the same input share its cost.

        Whoever calls must name in `key` everything else that the value depends on, and must not write to it.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    @torch.no_grad()
    def add(self, X_TI: Tensor, dense_TI: Tensor | None = None, held_out: bool = False) -> None:
        """Count one batch of tokens, any float dtype; squares and products are taken in float32.

        Args:
            X_TI: inputs of the linear.
            dense_TI: its inputs in the dense model for the same tokens, where `drift` was asked for and they are known.
            held_out: count these tokens in `held_gram_II` and `held_drift_II` too.

        Raises:
            ValueError: X_TI is not a matrix of `in_features` columns.
        """
        if X_TI.dim() != 2 or X_TI.shape[1] != self.in_features:
            raise ValueError(
                f"expected inputs (tokens, {self.in_features}), got {tuple(X_TI.shape)}"
            )
        self.tokens += X_TI.shape[0]
        self._derived.clear()
        if self.reference_order:
            self._add_in_reference_order(X_TI.float())
            return
        # Row 0 sums squares, row 1 values: of this batch first, so that batches add up in one order whoever has them.
        sums_2I = torch.zeros(2, self.in_features, dtype=torch.float64, device=X_TI.device)
        if self.sum_I is not None:
            sums_2I[1] = X_TI.sum(dim=0, dtype=torch.float64)
        if self.needs != "none":
            elements = _CPU_ELEMENTS if X_TI.device.type == "cpu" else _GPU_ELEMENTS
            for part_TI in X_TI.split(max(1, elements // self.in_features)):
                part_TI = (
                    part_TI.float()
                )  # before squaring: in float16 anything over 256 would overflow
                sums_2I[0] += (part_TI * part_TI).sum(dim=0)
        if self._by_batch is None:
            self._count(sums_2I)
        else:
            self._by_batch.append(sums_2I)
        if held_out:
            self.held_tokens += X_TI.shape[0]
        if self.gram_II is not None:
            held_II = self.held_gram_II if held_out else None
            known_II = self.drift_gram_II if dense_TI is not None else None
            if held_II is None and known_II is None:
                self._add_gram(self.gram_II, X_TI, sums_2I[0])
            else:
                part_II = torch.zeros_like(self.gram_II)
                self._add_gram(part_II, X_TI, sums_2I[0])
                for sum_II in (self.gram_II, held_II, known_II):
                    if sum_II is not None:
                        sum_II += part_II
        if self.drift_II is not None and dense_TI is not None:
            if not X_TI.dtype == dense_TI.dtype == torch.bfloat16:
                X_TI, dense_TI = X_TI.float(), dense_TI.float()
            part_II = coarse_product((dense_TI - X_TI).T, X_TI)
            self.drift_II += part_II
            if held_out and self.held_drift_II is not None:
                self.held_drift_II += part_II
            self._paired += X_TI.shape[0]

    def _add_gram(self, gram_II: Tensor, X_TI: Tensor, squares_I: Tensor) -> None:
        """Add XᵀX to `gram_II`; `squares_I`, float64, is its diagonal."""
        if self.coarse and X_TI.dtype == torch.bfloat16 and multiplies_bfloat16(X_TI.device):
            diagonal_I = gram_II.diagonal() + squares_I
            _add_gram(gram_II, X_TI)
            gram_II.diagonal().copy_(diagonal_I)
        else:
            _add_gram(gram_II, X_TI.float())

    def complete(self, ranks: Ranks) -> None:
        """Make these the statistics of all ranks' batches, where they are shared. All ranks call it at once.

        Sums of squares and of values add up batch by batch in the order of batches, and are those of one process to the
        bit. Grams and drifts are summed rank by rank: the same on all ranks, and one process' but for rounding.
        """
        if self._by_batch is None:
            return
        assert not self.reference_order, "a running mean knows its windows' order"
        self._derived.clear()
        nothing_2I = self.sum_squares_I.new_zeros(2, self.in_features)
        mine_B2I = torch.stack([*self._by_batch, nothing_2I])[:-1]
        # Values travel only where they were asked for.
        everybodys = ranks.all_gather(mine_B2I if self.sum_I is not None else mine_B2I[:, :1])
        self._by_batch = None
        for sums in everybodys:
            self._count(sums)
        counts = ranks.gather_ints([self.tokens, self._paired, self.held_tokens])
        self.tokens, self._paired, self.held_tokens = (
            sum(each) for each in zip(*counts, strict=True)
        )
        for name in _MATRICES:
            if (matrix_II := getattr(self, name)) is not None:
                ranks.all_reduce(matrix_II)

    def _count(self, sums_2I: Tensor) -> None:
        """Add one batch's sums, squares in row 0 and values in row 1."""
        self.sum_squares_I += sums_2I[0]
        if self.sum_I is not None:
            self.sum_I += sums_2I[1]

    def _add_in_reference_order(self, X_TI: Tensor) -> None:
        """Count one window as the code of SparseGPT and of Wanda's ablations does.

        The Gram is a running mean of 2·xᵀx over windows, float32. The squares are taken of inputs that are scaled
        already, so that the k-th window counts 2/k in them: the original's slip, without which its masks cannot
        be had. Only ratios between features matter to either.
        """
        assert self.gram_II is not None
        self.gram_II *= self._windows / (self._windows + 1)
        self.sum_squares_I *= self._windows / (self._windows + 1)
        self._windows += 1
        X_IT = math.sqrt(2 / self._windows) * X_TI.T
        self.gram_II += X_IT @ X_IT.T
        self.sum_squares_I += X_IT.norm(p=2, dim=1).square() / self._windows

    def reordered(self, order_I: Tensor) -> InputStatistics:
        """The statistics of the same inputs in another order: feature j is what `order_I[j]` was."""
        other = InputStatistics(self.in_features, self.needs, self.sum_squares_I.device)
        other.tokens, other.held_tokens, other._paired = self.tokens, self.held_tokens, self._paired
        other.sum_squares_I = self.sum_squares_I[order_I]
        other.sum_I = self.sum_I[order_I] if self.sum_I is not None else None
        for name in _MATRICES:
            matrix_II = getattr(self, name)
            setattr(other, name, matrix_II[order_I][:, order_I] if matrix_II is not None else None)
        return other

    def check_finite(self, name: str) -> None:
        """See that no activation was infinite or NaN; any that was shows in the sums.

        Raises:
            ValueError: names the linear.
        """
        bad = int((~self.sum_squares_I.isfinite()).sum())
        if bad == 0 and (self.gram_II is None or all_finite(self.gram_II)):
            return
        where = (
            f"{bad} of its {self.in_features} input features"
            if bad
            else "products of its input features"
        )
        raise ValueError(
            f"the activations that reach {name} are not finite ({where}): compute in bfloat16 or float32, "
            "or check the weights before it"
        )


def _add_gram(gram_II: Tensor, X_TI: Tensor) -> None:
    """Add XᵀX, of which a processor computes only the blocks on and above the diagonal, and mirrors the rest."""
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


def statistics_bytes(in_features: int, needs: Needs) -> int:
    """Bytes that the statistics of one linear hold."""
    return 8 * in_features + 4 * in_features**2 * (needs == "gram")
