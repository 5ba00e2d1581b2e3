"""What a method learns about a linear's inputs: norms of the features, or their Gram matrix.

The statistics know nothing of models or methods. Batches of tokens are added as they pass, and
only sums are kept. A `StatisticsSpec` says which sums.

Shape suffixes: T tokens, I inputs (features), 2 the pair (squares, values), B batches. X_TI are the
inputs of a linear, Y_TI its inputs in the dense model for the same tokens. G_II = XᵀX, with the
diagonal d_j = ‖X_j‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from prunus.distributed import ranks, sum_ints
from prunus.hardware.numerics import all_finite, low_precision_product, tf32_products
from prunus.kernels import library as kernels

#: What a method reads of the inputs; see `StatisticsSpec`.
Needs = Literal["none", "norms", "gram"]
#: The values of `Needs`, from the least to the most.
NEEDS: tuple[Needs, ...] = ("none", "norms", "gram")
#: Whose drift from the dense model is summed: nobody's, that of some batches, or that of all.
Drift = Literal["none", "some", "all"]
_Value = TypeVar("_Value")
#: The share of the first token of a window in the squared inputs of linears that feed attention,
#: where folders are rounded. All queries look at that token, whose value is small, so errors in its
#: key and value reach all others; but its inputs are a thousandth of all. Shares of 0.1 and 0.5
#: were compared on three models. In GGUF files, whose types give keys and values two bits more, it
#: changed nothing; see docs/notes/rounding.md.
FIRST_SHARE = 0.1
# The least squared length of a first token.
_LEAST = 1e-30
# How many elements a CPU squares at once. The temporary must stay in the cache, which is ten times
# faster.
_CPU_ELEMENTS = 2**20
# How many elements a GPU squares at once. It is fast with long kernels only.
_GPU_ELEMENTS = 2**26
# A Gram matrix of at least this width is computed in blocks, because only the blocks on and above
# the diagonal are needed. The products for a narrower one would be too small to be fast.
_SYMMETRIC_FROM = 512
# The rows and the columns of such a matrix are each cut into this number of parts.
_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class StatisticsSpec:
    """Which sums over a linear's inputs are kept.

    Attributes:
        needs: "none" counts tokens only, "norms" also sums squares, "gram" also the Gram matrix.
        drift: Also sum how far the inputs have drifted from the dense model's. "some" is for runs
            that know the dense inputs of some batches only, and keeps the Gram of these apart.
        reference_order: Sum the Gram in the order of SparseGPT's code, to reproduce its masks.
        rounded: Wide inputs may be rounded to bfloat16 for the Gram, where that is faster.
        first_share: The first token of each window is multiplied until it has at least this share
            of Σ x²; see `FIRST_SHARE`. 0 leaves it as it is.
        distributed: Other ranks see the rest of the batches; see `InputStatistics.complete`.

    Raises:
        ValueError: `needs` is none of the three.
    """

    needs: Needs
    drift: Drift = "none"
    reference_order: bool = False
    rounded: bool = False
    first_share: float = 0.0
    distributed: bool = False

    def __post_init__(self) -> None:
        if self.needs not in NEEDS:
            raise ValueError(f"statistics can be {', '.join(NEEDS)}, not {self.needs!r}")


class InputStatistics:
    """Sums over all tokens that reached a linear. A sum that the spec does not ask for is None.

    Args:
        in_features: The number of inputs of the linear, at least 1.
        spec: Which sums; "norms" alone means `StatisticsSpec(needs="norms")`.
        device: Where the sums are stored.

    Attributes:
        in_features: As given.
        spec: As given, always as a `StatisticsSpec`.
        tokens: How many tokens were added, in rows of X_TI.
        sum_squares_I: Σ_t x², float64. Equal to the bit for "norms" and "gram", and zeros for
            "none". With `reference_order` and a Gram matrix it is what the original's ablations
            sum instead, a running mean in which window k counts 2/k; see
            `_add_in_reference_order`.
        gram_II: XᵀX, float32.
        drift_gram_II: Its share from tokens whose Y is known; where the drift is "some".
        drift_II: (Y − X)ᵀX, float32, over the tokens whose Y is known.

    Raises:
        ValueError: `needs` is unknown.

    >>> statistics = InputStatistics(2, "gram")
    >>> statistics.add(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    >>> statistics.norms_I
    tensor([5., 1.])
    >>> statistics.gram_II
    tensor([[25.,  4.],
            [ 4.,  1.]])
    """

    def __init__(
        self, in_features: int, spec: StatisticsSpec | Needs, device: torch.device | str = "cpu"
    ) -> None:
        self.spec = spec = spec if isinstance(spec, StatisticsSpec) else StatisticsSpec(needs=spec)

        def square(needed: bool) -> Tensor | None:
            return torch.zeros(in_features, in_features, device=device) if needed else None

        gram = spec.needs == "gram"
        self.in_features = in_features
        self.tokens = self._paired_tokens = self._windows = 0
        self.sum_squares_I = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.gram_II = square(gram)
        self.drift_gram_II = square(gram and spec.drift == "some")
        self.drift_II = square(spec.drift != "none")
        # The sums of squares of each batch until `complete`, where other ranks have more batches.
        # All batches then add up in one order, whichever rank has them.
        self._by_batch: list[Tensor] | None = [] if spec.distributed else None
        # Key of `derived` -> the value computed from the sums so far.
        self._derived: dict[Hashable, Any] = {}

    @classmethod
    def of_equal_inputs(
        cls, in_features: int, spec: StatisticsSpec, device: torch.device | str
    ) -> InputStatistics:
        """Statistics in which all features are equal: norm 1, and not correlated.

        They replace those of a linear that no token reached. Wanda's score is then the magnitude.

        Args:
            in_features: The number of inputs of the linear.
            spec: Which sums the other linears have; those of the drift are left out.
            device: Where the sums are stored.

        >>> InputStatistics.of_equal_inputs(2, StatisticsSpec(needs="gram"), "cpu").gram_II
        tensor([[1., 0.],
                [0., 1.]])
        """
        equal = cls(in_features, StatisticsSpec(needs=spec.needs), device)
        equal.sum_squares_I.fill_(1)
        if equal.gram_II is not None:
            equal.gram_II.fill_diagonal_(1)
        return equal

    @classmethod
    def of_sums(
        cls, tokens: int, sum_squares_I: Tensor, gram_II: Tensor | None = None
    ) -> InputStatistics:
        """Statistics from sums that were computed elsewhere, such as those in a file.

        Args:
            tokens: How many tokens they are of.
            sum_squares_I: Σ_t x².
            gram_II: XᵀX, float32; None for norms alone.

        >>> InputStatistics.of_sums(2, torch.tensor([25.0, 1.0])).norms_I
        tensor([5., 1.])
        """
        needs: Needs = "norms" if gram_II is None else "gram"
        # No matrix of zeros is made for the Gram matrix, which replaces it.
        found = cls(len(sum_squares_I), "norms", sum_squares_I.device)
        found.spec = StatisticsSpec(needs=needs)
        found.tokens, found.gram_II = tokens, gram_II
        found.sum_squares_I = sum_squares_I.double()
        return found

    @property
    def norms_I(self) -> Tensor:
        """The root of `sum_squares_I`, float32: ‖X_j‖₂ of every feature over all tokens.

        With `reference_order` and a Gram matrix it is up to 14 % off that, and scaled.
        """
        return self.sum_squares_I.sqrt().float()

    @property
    def drift_share(self) -> float:
        """The share of all tokens whose inputs in the dense model are known, 0 to 1."""
        return self._paired_tokens / self.tokens if self.tokens else 0.0

    def derived(self, key: Hashable, compute: Callable[[], _Value]) -> _Value:
        """The result of `compute`, computed once: linears with the same inputs share its cost.

        `add` and `complete` discard all results, because they change the sums.

        Args:
            key: Names the result, and all that it depends on beside these statistics.
            compute: Computes it. Callers must not write to the result.

        >>> statistics = InputStatistics(2, "norms")
        >>> statistics.derived("answer", lambda: 42), statistics.derived("answer", lambda: 43)
        (42, 42)
        """
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    @torch.no_grad()
    def add(self, x: Tensor, dense_TI: Tensor | None = None) -> None:
        """Add one batch of inputs.

        Args:
            x: The inputs of the linear (…, in), in any float dtype. Products are summed in float32.
                Three axes are (windows, tokens, in), and only they show which token is the first.
            dense_TI: Its inputs in the dense model for the same tokens; None where they are not
                known. Only sums of the drift use them.

        Raises:
            ValueError: `x` does not have `in_features` columns.
        """
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs (tokens, {self.in_features}), got {tuple(x.shape)}")
        X_TI = x.reshape(-1, self.in_features)
        if self.spec.first_share and x.dim() == 3:
            factors_T1 = _first_token_factors(x, self.spec.first_share)
            X_TI = X_TI * factors_T1
            dense_TI = None if dense_TI is None else dense_TI * factors_T1
        self.tokens += len(X_TI)
        # Values derived from the sums so far are out of date.
        self._derived.clear()
        if self.spec.reference_order and self.gram_II is not None:
            _add_in_reference_order(self.gram_II, self.sum_squares_I, X_TI, self._windows)
            self._windows += 1
            return
        squares_I = torch.zeros_like(self.sum_squares_I)
        if self.spec.needs != "none":
            _add_squares(squares_I, X_TI)
        if self._by_batch is None:
            self.sum_squares_I += squares_I
        else:
            self._by_batch.append(squares_I)
        if self.gram_II is not None:
            drift_gram_II = None if dense_TI is None else self.drift_gram_II
            rounded = self.spec.rounded and self.in_features >= _SYMMETRIC_FROM
            _add_gram(self.gram_II, drift_gram_II, X_TI, rounded)
        if self.drift_II is not None and dense_TI is not None:
            self.drift_II += _drift_product(X_TI, dense_TI)
            self._paired_tokens += len(X_TI)

    def add_uncorrelated(self, squares_I: Tensor) -> None:
        """Add inputs that are correlated with none: all that is known of them are their Σ x².

        Args:
            squares_I: Their sums of squares, float32 (I,), such as what errors in the columns of an
                embedding cost that is tied to the head.
        """
        self._derived.clear()
        squares_I = squares_I.to(self.sum_squares_I.device)
        self.sum_squares_I += squares_I
        if self.gram_II is not None:
            self.gram_II.diagonal().add_(squares_I)

    def complete(self) -> None:
        """Make these the statistics of all ranks' batches. All ranks call it at the same linear.

        Sums of squares add up batch by batch in the order of batches, so they equal those of one
        process to the bit. Gram and drift add up rank by rank: they are the same on all ranks, and
        equal one process's within rounding. Without `distributed` it does nothing.
        """
        if self._by_batch is None:
            return
        assert not self.spec.reference_order or self.gram_II is None, (
            "a running mean depends on the order of the windows, so ranks cannot split them"
        )
        self._derived.clear()
        local_BI = torch.stack([*self._by_batch, torch.zeros_like(self.sum_squares_I)])[:-1]
        self._by_batch = None
        for squares_I in ranks().all_gather(local_BI):
            self.sum_squares_I += squares_I
        self.tokens, self._paired_tokens = sum_ints([self.tokens, self._paired_tokens])
        # Every rank has the same sums, so all make the same calls in the same order.
        for sum_II in (self.gram_II, self.drift_gram_II, self.drift_II):
            if sum_II is not None:
                ranks().all_reduce(sum_II)

    def check_finite(self, name: str) -> None:
        """Check that no activation of linear `name` was infinite or NaN: it would show in sums.

        Raises:
            ValueError: One was; the message names the linear and says what to do.
        """
        bad = int((~self.sum_squares_I.isfinite()).sum())
        if bad == 0 and (self.gram_II is None or all_finite(self.gram_II)):
            return
        where = f"{bad} of its {self.in_features}" if bad else "products of its"
        raise ValueError(
            f"the activations that reach {name} are not finite ({where} input features): "
            "compute in bfloat16 or float32, or check the weights before it"
        )


def statistics_bytes(in_features: int, needs: Needs) -> int:
    """Bytes that the statistics of one linear hold, without drift.

    >>> statistics_bytes(1000, "norms"), statistics_bytes(1000, "gram")
    (8000, 4008000)
    """
    return 8 * in_features + (4 * in_features**2 if needs == "gram" else 0)


def _first_token_factors(x_BTI: Tensor, share: float) -> Tensor:
    """Factors of tokens (windows · tokens, 1) that give each first token a share of Σ x².

    They are 1 for all other tokens, and where the first token has that share. The dtype is that of
    `x_BTI` (windows, tokens, in).

    >>> _first_token_factors(torch.tensor([[[1.0], [3.0], [3.0]], [[5.0], [1.0], [0.0]]]), 0.5).T
    tensor([[4.2426, 1.0000, 1.0000, 1.0000, 1.0000, 1.0000]])
    >>> _first_token_factors(torch.tensor([[[0.0], [1.0]]]).half(), 0.5).isfinite().all()
    tensor(True)
    """
    squares_BT = x_BTI.float().square().sum(dim=2)
    first_B, others_B = squares_BT[:, 0], squares_BT[:, 1:].sum(dim=1)
    factors_BT = torch.ones_like(squares_BT)
    factors_B = (share / (1 - share) * others_B / first_B.clamp_min(_LEAST)).sqrt()
    # The factor of a first token of zeros is finite in any dtype, so that zeros stay zeros.
    factors_BT[:, 0] = factors_B.clamp(1, torch.finfo(x_BTI.dtype).max)
    return factors_BT.reshape(-1, 1).to(x_BTI.dtype)


def _add_squares(squares_I: Tensor, X_TI: Tensor) -> None:
    """Add Σ_t x² of one batch to float64 sums, in place."""
    elements = _CPU_ELEMENTS if X_TI.device.type == "cpu" else _GPU_ELEMENTS
    for part_TI in X_TI.split(max(1, elements // X_TI.shape[1])):
        # Convert before squaring: in float16 the square of anything above 256 overflows.
        part_TI = part_TI.float()
        squares_I += (part_TI * part_TI).sum(dim=0)


def _add_gram(gram_II: Tensor, drift_gram_II: Tensor | None, X_TI: Tensor, rounded: bool) -> None:
    """Add XᵀX of one batch to a matrix, or to two of them, in place.

    Args:
        gram_II: float32.
        drift_gram_II: float32, the second matrix; None where these tokens belong to the first only.
        X_TI: The inputs, in any float dtype.
        rounded: Whether inputs of more than 16 bits may be rounded to bfloat16 where that is
            faster. Rounding an input by at most 2⁻⁹ of it changes the sums a thousand times less
            than the choice of the tokens does, because the errors of tokens are independent.
    """
    # The product is computed once and added to both sums.
    part_II = gram_II if drift_gram_II is None else torch.zeros_like(gram_II)
    fits = rounded or X_TI.dtype == torch.bfloat16
    compiled = kernels.load_kernels() if X_TI.is_cpu and fits else None
    if compiled is not None and compiled.has_bfloat16:
        compiled.add_gram(part_II, X_TI.bfloat16())
    else:
        # Inputs of 16 bits fit into TF32, so that a CUDA device loses nothing by it.
        with tf32_products(X_TI.device.type == "cuda" and X_TI.dtype.itemsize == 2):
            _add_symmetric(part_II, X_TI.float())
    if drift_gram_II is not None:
        gram_II += part_II
        drift_gram_II += part_II


def _drift_product(X_TI: Tensor, dense_TI: Tensor) -> Tensor:
    """(Y − X)ᵀX of one batch, float32. It is small against the Gram, so it may be rounded."""
    if not X_TI.dtype == dense_TI.dtype == torch.bfloat16:
        X_TI, dense_TI = X_TI.float(), dense_TI.float()
    return low_precision_product((dense_TI - X_TI).T, X_TI)


def _add_in_reference_order(
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


def _add_symmetric(gram_II: Tensor, X_TI: Tensor) -> None:
    """Add XᵀX to `gram_II`; a CPU copies the blocks above the diagonal to the other side."""
    width = len(gram_II)
    parts = _PARTS if gram_II.device.type == "cpu" and width >= _SYMMETRIC_FROM else 1
    edges = [width * part // parts for part in range(parts + 1)]
    spans = [slice(start, stop) for start, stop in pairwise(edges)]
    for index, rows in enumerate(spans):
        for columns in spans[index:]:
            gram_II[rows, columns].addmm_(X_TI[:, rows].T, X_TI[:, columns])
            if columns != rows:
                gram_II[columns, rows] = gram_II[rows, columns].T
