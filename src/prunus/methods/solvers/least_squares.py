"""The best weights for a given mask: ridge regression on the kept weights, all rows at once.

Among all weights that are 0 outside the mask, find those that minimise

    ‖(W − W₀)D‖²_A + λ‖(W − W₀)D‖²

W₀ are the trained weights and d is the diagonal of the Gram matrix G. D = diag(√d) scales every
input feature to norm 1, and A = D⁻¹GD⁻¹ holds the correlations of the features. The second term is
Tikhonov's ridge, centred on the trained weights instead of on 0. Why: the Gram matrix of few tokens
says little about directions that no token took. There the trained weights are the better guess.

Every row is a linear system of its own, because every row has its own mask. Factorising one matrix
per row would take far too long. Conjugate gradients solve all rows together with one matrix product
per step (Hestenes and Stiefel 1952). The scaling by D doubles as the Jacobi preconditioner of
arXiv 2406.07831, section 3.3. Against exact solutions for 12 linears of a real model, 20 steps from
the masked weights leave under 0.1 % of the gap.

The order of this file: λ, the scaled Gram matrix, conjugate gradients, and the fit of one linear.

Shape suffixes: O outputs (rows), S some of them, I inputs; 1 a dimension that is broadcast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunus.hardware.numerics import low_precision_factor, low_precision_product, row_spans
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import EVERY_ROW, Pruned, RowShard, masked

# The maximum number of conjugate gradient steps of `fit_least_squares`.
_MAX_STEPS = 30
# Steps end when the residual has fallen to this share of its first norm.
_TOLERANCE = 1e-3
# λ is this number times input features per token, within the bounds below; see `ridge`.
_RIDGE = 2.5
# The smallest λ: that of many tokens.
_MIN_RIDGE = 0.01
# The largest λ: that of very few tokens.
_MAX_RIDGE = 1.0
# A linear is data-limited from this many inputs on, if its λ is large too. From this width on a
# product (I, I) takes so long that few tokens do not repay the exact way.
_WIDE = 4096
# The λ of a data-limited linear is at least this. With the default ridge it means five tokens per
# input.
_DATA_LIMITED_RIDGE = 0.5

#: Which products of conjugate gradients are computed in low precision; see `conjugate_gradients`.
Rounded = Literal["nothing", "steps", "all"]
#: From some rows (S, I) to their product with the Gram matrix.
_Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ScaledGram:
    """The damped Gram matrix of inputs that are scaled to norm 1, and the scales.

    Attributes:
        gram_II: float32, A + λI; its diagonal is 1 + λ. Inputs that are always 0 count as
            uncorrelated with all others.
        scale_I: float32 √d, 1 where d is 0.
        dead_I: bool, True for inputs that are always 0.
        damping: λ.
    """

    gram_II: Tensor
    scale_I: Tensor
    dead_I: Tensor
    damping: float

    @property
    def is_data_limited(self) -> bool:
        """Whether the linear is wide and its tokens are few; see `is_data_limited`."""
        return is_data_limited(len(self.gram_II), self.damping)


def ridge(in_features: int, tokens: int) -> float:
    """The default λ: 2.5 input features per token, between 0.01 and 1.

    Least squares fit noise, and the noise grows with features per token, so the ridge does too. The
    factor is the best of those tried, by the error on held-out tokens (SmolLM2-135M, 16,384 tokens
    of C4); the error is flat within a factor of 3.

    >>> ridge(in_features=1024, tokens=16384)
    0.15625
    >>> ridge(in_features=1024, tokens=10**9)
    0.01
    """
    return min(_MAX_RIDGE, max(_MIN_RIDGE, _RIDGE * in_features / max(1, tokens)))


def is_data_limited(in_features: int, damping: float) -> bool:
    """Whether a linear is wide and has few tokens per input, judged by its λ.

    For such linears less work reaches about the same error, so solvers take cheaper ways.

    >>> is_data_limited(8960, ridge(8960, 16384)), is_data_limited(576, ridge(576, 16384))
    (True, False)
    """
    return in_features >= _WIDE and damping >= _DATA_LIMITED_RIDGE


def scaled_gram_of(statistics: InputStatistics, damping: float | None) -> ScaledGram:
    """Scale and damp the Gram matrix of these statistics, once for all linears that share them.

    Args:
        statistics: With a Gram matrix.
        damping: λ, or None for `ridge`.
    """
    gram_II = statistics.gram_II
    assert gram_II is not None, "least squares need a Gram matrix"
    damping = ridge(statistics.in_features, statistics.tokens) if damping is None else damping
    return statistics.derived(("scaled_gram", damping), lambda: scale_and_damp(gram_II, damping))


def scale_and_damp(gram_II: Tensor, damping: float) -> ScaledGram:
    """Scale a Gram matrix to a diagonal of 1 and add λ to it.

    Args:
        gram_II: float32, G; it is not changed.
        damping: λ. One smaller than the rounding of A is raised to it; the result has the λ used.

    >>> scale_and_damp(torch.tensor([[4.0, 3.0], [3.0, 9.0]]), 0.25).gram_II
    tensor([[1.2500, 0.5000],
            [0.5000, 1.2500]])
    """
    # Rounding can push the smallest eigenvalues of A below 0 by about this much.
    damping = max(damping, len(gram_II) * torch.finfo(torch.float32).eps)
    scale_I = gram_II.diagonal().sqrt()
    dead_I = scale_I == 0
    scale_I.masked_fill_(dead_I, 1)
    # Divide twice: the product of two small scales would underflow.
    gram_II = (gram_II / scale_I[:, None]).div_(scale_I)
    # Setting the diagonal, instead of adding to it, also removes rounding and serves dead inputs.
    gram_II.diagonal().fill_(1 + damping)
    return ScaledGram(gram_II, scale_I, dead_I, damping)


def conjugate_gradients(
    start_OI: Tensor,
    target_OI: Tensor,
    keep_OI: Tensor,
    gram_II: Tensor,
    max_steps: int,
    shard: RowShard = EVERY_ROW,
    min_gain: float = 0.0,
    rounded: Rounded = "nothing",
) -> tuple[Tensor, int]:
    """Minimise tr (Z − target) gram (Z − target)ᵀ over all Z (float32) that are 0 outside the mask.

    All rows take a step together, but every row has a step length of its own. Steps end when the
    norm of the residual has fallen to a thousandth.

    Args:
        start_OI: float32, the first guess; its values outside the mask are ignored.
        target_OI: float32, the weights that have no error.
        keep_OI: bool, the mask.
        gram_II: float32, symmetric and positive definite.
        max_steps: The maximum number of steps.
        shard: Which rows of the linear these are. All rows of a linear stop at the same step, also
            those of other shards.
        min_gain: Steps also end when one lowers the error by less than this share of it; 0 never
            ends them.
        rounded: Which products are computed in low precision: "nothing"; "steps", those of the
            directions, which is good for a few steps near the solution; or "all", with that of the
            first residual.

    Returns:
        Z, float32 (O, I), which may hold -0, and the number of steps.

    >>> weight_OI = torch.tensor([[1.0, 2.0]])
    >>> keep_OI = torch.tensor([[True, False]])
    >>> gram_II = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> conjugate_gradients(weight_OI, weight_OI, keep_OI, gram_II, max_steps=5)
    (tensor([[2., 0.]]), 1)
    """
    exact: _Product = functools.partial(torch.matmul, other=gram_II)
    multiply = exact
    if rounded != "nothing":
        factor_II = low_precision_factor(gram_II, len(start_OI))
        multiply = functools.partial(low_precision_product, right=factor_II)
    # Rows are independent, so each run of rows has a solver of its own, with small temporaries. All
    # solvers take the same number of steps: the checks below use sums over all rows.
    first = multiply if rounded == "all" else exact
    solvers = [
        _Descent(start_OI[span], target_OI[span], keep_OI[span], first)
        for span in row_spans(start_OI)
    ]
    error = shard.sum(sum(solver.error for solver in solvers)) if min_gain else 0.0
    # All values of `residual` are squared norms, so the tolerance is squared as well.
    residual = shard.sum(sum(float(solver.squared_residual_S1.sum()) for solver in solvers))
    small_enough = residual * _TOLERANCE**2
    steps = 0
    while steps < max_steps and residual > small_enough:
        gain = sum(solver.step(multiply) for solver in solvers)
        steps += 1
        if min_gain:
            gain = shard.sum(gain)
            error -= gain
            if gain < min_gain * error:
                break
        residual = shard.sum(sum(float(solver.squared_residual_S1.sum()) for solver in solvers))
    return torch.cat([solver.solution_SI for solver in solvers]), steps


class _Descent:
    """Conjugate gradients for some rows.

    Attributes:
        solution_SI: The weights so far.
        error: The quantity that is minimised, before the first step.
        squared_residual_S1: The squared norm of each row's residual, after the latest step.
    """

    def __init__(
        self, start_SI: Tensor, target_SI: Tensor, keep_SI: Tensor, multiply: _Product
    ) -> None:
        # Multiplying by a mask of 0 and 1 takes a fiftieth of the time of masked_fill, whose
        # branches a processor cannot predict.
        self._mask_SI = keep_SI.float()
        self.solution_SI = start_SI * self._mask_SI
        change_SI = target_SI - self.solution_SI
        self._residual_SI = multiply(change_SI)
        self.error = inner_product(change_SI, self._residual_SI)
        # Only kept weights can move, so only their part of the gradient counts.
        self._residual_SI.mul_(self._mask_SI)
        self._direction_SI = self._residual_SI.clone()
        self.squared_residual_S1 = self._residual_SI.square().sum(dim=1, keepdim=True)

    def step(self, multiply: _Product) -> float:
        """Go to the lowest point along each row's direction; return by how much the error falls."""
        direction_SI = self._direction_SI
        before_S1 = self.squared_residual_S1
        image_SI = multiply(direction_SI)
        # The gradient at a pruned weight does not matter: that weight stays 0.
        image_SI.mul_(self._mask_SI)
        curvature_S1 = torch.linalg.vecdot(direction_SI, image_SI).unsqueeze(1)
        # A row that has arrived has no direction left, and stays where it is.
        length_S1 = torch.where(curvature_S1 > 0, before_S1 / curvature_S1, 0)
        self.solution_SI.addcmul_(length_S1, direction_SI)
        # The residual is updated instead of computed anew, which would take a second product.
        self._residual_SI.addcmul_(length_S1, image_SI, value=-1)
        self.squared_residual_S1 = self._residual_SI.square().sum(dim=1, keepdim=True)
        # The next direction is conjugate to this one: it does not undo what this step gained.
        share_S1 = torch.where(before_S1 > 0, self.squared_residual_S1 / before_S1, 0)
        direction_SI.mul_(share_S1).add_(self._residual_SI)
        # On a parabola the gain is the step's length times the slope at its start.
        return inner_product(length_S1, before_S1)


def inner_product(left_OI: Tensor, right_OI: Tensor) -> float:
    """tr (left rightᵀ): within a row summed in float32, over rows in float64.

    >>> inner_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    11.0
    """
    return float(torch.linalg.vecdot(left_OI, right_OI).sum(dtype=torch.float64))


def fit_least_squares(
    weight_OI: Tensor,
    start: Pruned,
    statistics: InputStatistics,
    damping: float | None,
    shard: RowShard = EVERY_ROW,
) -> Pruned:
    """Fit the kept weights to the mask of `start`. Weights of inputs that are always 0 stay.

    Args:
        weight_OI: float32, the trained weights, or the dense target.
        start: The mask, and the first guess of the weights.
        statistics: With a Gram matrix.
        damping: λ, or None for `ridge`.
        shard: Which rows of the linear these are.

    Returns:
        The same mask with new weights. The notes gain `ridge` (λ) and `conjugate_gradients` (the
        number of steps).
    """
    # Solve for WD and divide by D at the end: in these units all inputs have norm 1.
    scaled = scaled_gram_of(statistics, damping)
    first_OI = start.weight_OI * scaled.scale_I
    target_OI = weight_OI * scaled.scale_I
    solution_OI, steps = conjugate_gradients(
        first_OI, target_OI, start.keep_OI, scaled.gram_II, _MAX_STEPS, shard
    )
    notes = start.notes | {"ridge": scaled.damping, "conjugate_gradients": steps}
    return masked(solution_OI.div_(scaled.scale_I), start.keep_OI, notes)
