"""Targets from the dense model: weights whose outputs approximate what the dense model computed.

Once earlier linears are pruned, a linear gets inputs X̂ where the dense model had X. Pruning the
trained weights W₀ for X̂ alone preserves outputs X̂W₀ᵀ that are already wrong. Approximating XW₀ᵀ
repairs them as far as X̂ allows, but it fits noise where tokens are few. The mixture of both is

    minimise over W   ‖X̂Wᵀ − (αX + (1 − α)X̂)W₀ᵀ‖² + λ‖(W − W₀)D‖²

with the ridge λ and the scales D of `solvers/least_squares.py`. Its solution for dense W is

    W* = W₀ + α·W₀(X − X̂)ᵀX̂ · (X̂ᵀX̂ + λD²)⁻¹.

The error of any other W exceeds the minimum by tr (W − W*)(X̂ᵀX̂ + λD²)(W − W*)ᵀ. That is what every
method on a Gram matrix minimises, with W* in place of W₀. So a method just gets W* as its weight.

Why a ridge: X − X̂ is small, and the solution divides it by small eigenvalues of X̂ᵀX̂, so noise
would grow there. Why α: the exact target (α = 1) also fits the noise of few tokens. With half of
the change, the squared error that this noise causes is only a quarter.

Shape suffixes: O outputs (rows), I inputs. In the statistics, the drift is (X − X̂)ᵀX̂.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunus.hardware.numerics import all_finite, low_precision_product
from prunus.methods.solvers.least_squares import (
    ScaledGram,
    is_data_limited,
    ridge,
    scale_and_damp,
    scaled_gram_of,
)
from prunus.methods.statistics import InputStatistics

#: At least one of this many batches also runs through the dense model.
MAX_DRIFT_STRIDE = 4


def dense_target(
    weight_OI: Tensor, statistics: InputStatistics, dense_weight: float, damping: float | None
) -> Tensor:
    """The target W*, float32 (O, I); the weight itself where dense inputs are not known.

    Args:
        weight_OI: float32, the trained weights W₀.
        statistics: With a Gram matrix and the drift.
        dense_weight: α, from 0 to 1.
        damping: λ, or None for `least_squares.ridge`.

    Raises:
        ValueError: The Gram matrix or the drift is not finite.
    """
    if not has_drift(statistics):
        return weight_OI
    drift_II = statistics.drift_II
    assert drift_II is not None
    scaled = _scaled_gram_with_drift(statistics, damping)
    lower_II = statistics.derived(
        ("dense_factor", scaled.damping), lambda: _factor(scaled.gram_II, drift_II)
    )
    # The change of the weights is W₀ · drift · (X̂ᵀX̂ + λD²)⁻¹. Solving for the rows of few outputs
    # is cheaper than computing the product of the last two, which other linears could share.
    if 2 * len(weight_OI) <= len(drift_II):
        right_OI = low_precision_product(weight_OI, drift_II).div_(scaled.scale_I)
        change_OI = torch.cholesky_solve(right_OI.T, lower_II).T
    else:
        shift_II = statistics.derived(
            ("dense_target", scaled.damping), lambda: _shift(lower_II, drift_II, scaled.scale_I)
        )
        change_OI = low_precision_product(weight_OI * scaled.scale_I, shift_II)
    # Back from inputs of norm 1 to the real ones. The change is linear in α.
    return weight_OI + change_OI.div(scaled.scale_I).mul_(dense_weight)


def _scaled_gram_with_drift(statistics: InputStatistics, damping: float | None) -> ScaledGram:
    """The scaled Gram matrix of the tokens whose dense inputs are known.

    Why only these: Gram matrix and drift are then sums over the same tokens, so the choice of the
    tokens cancels out.

    Args:
        statistics: With a Gram matrix; where the drift is sampled, also with that of its tokens.
        damping: λ, or None for `least_squares.ridge` of these tokens.
    """
    gram_II = statistics.drift_gram_II
    if gram_II is None:
        return scaled_gram_of(statistics, damping)
    tokens = round(statistics.drift_share * statistics.tokens)
    damping = ridge(statistics.in_features, tokens) if damping is None else damping
    return statistics.derived(
        ("scaled_drift_gram", damping), lambda: scale_and_damp(gram_II, damping)
    )


def drift_is_worthwhile(in_features: int, tokens: int) -> bool:
    """Whether a linear of this width repays a dense target, with this number of tokens.

    False for wide linears with a large ridge: W* then barely differs from W₀, and computing it
    would cost more than for all other linears together.

    >>> drift_is_worthwhile(576, 16384), drift_is_worthwhile(8960, 16384)
    (True, False)
    """
    return not is_data_limited(in_features, ridge(in_features, tokens))


def has_drift(statistics: InputStatistics) -> bool:
    """Whether the dense inputs are known for enough tokens.

    Where the drift is sampled, one of `MAX_DRIFT_STRIDE` tokens is enough. Otherwise all are
    needed: an expert, for example, must get the same tokens in both models.
    """
    return statistics.drift_share >= (
        1 if statistics.drift_gram_II is None else 1 / MAX_DRIFT_STRIDE
    )


def target_notes(statistics: InputStatistics) -> dict[str, Any]:
    """What the record says of a linear that has no dense target: why there is none."""
    if statistics.drift_II is None:
        return {"dense_targets": "pruned: too few tokens for this many inputs"}
    if not has_drift(statistics):
        return {"dense_targets": "pruned: other tokens reach this linear in the dense model"}
    return {}


def _factor(damped_II: Tensor, drift_II: Tensor) -> Tensor:
    """The lower Cholesky factor of A + λI; the drift is only checked, because it is solved next."""
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed) or not all_finite(drift_II):
        raise ValueError(
            "the outputs of the dense model cannot be approximated: are its inputs finite?"
        )
    return lower_II


def _shift(lower_II: Tensor, drift_II: Tensor, scale_I: Tensor) -> Tensor:
    """D⁻¹(X − X̂)ᵀX̂D⁻¹ · (A + λI)⁻¹, where `lower_II` is the factor of A + λI.

    A + λI is symmetric, so the transposed problem is solved from the left.
    """
    scaled_II = (drift_II / scale_I[:, None]).div_(scale_I)
    return torch.cholesky_solve(scaled_II.T, lower_II).T.contiguous()
