"""Targets from the dense model: weights that give, on the pruned model's inputs, what the dense ones gave on theirs.

Once earlier linears are pruned, a linear gets inputs X̂ in place of the dense model's X. Pruning W₀ for X̂ alone keeps the
outputs that are wrong already; aiming at X W₀ᵀ repairs them as far as X̂ allows, and learns noise where tokens are few. In
between,

    minimise over W   ‖X̂Wᵀ − (αX + (1 − α)X̂)W₀ᵀ‖² + λ‖(W − W₀)D‖²

with the ridge λ and the scales D of `lsq.py`. For dense W the solution is W* = W₀ + α·W₀(X − X̂)ᵀX̂ · (X̂ᵀX̂ + λD²)⁻¹, and
the error of any other W exceeds it by tr (W − W*)(X̂ᵀX̂ + λD²)(W − W*)ᵀ: what every method that works on a Gram matrix
minimises, once it is handed W* in place of W₀.

How much of it to ask for, `best_dense_weight` says: the drift (X − X̂) of some windows is kept apart, W* is found from the
others, and its error on those kept apart is a parabola in α.

Shape suffixes: O outputs (rows), I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.hardware.numerics import all_finite, coarse_product
from prunus.methods.solvers.least_squares import (
    ScaledGram,
    inner_product,
    is_data_limited,
    ridge,
    scale_gram,
    scaled_gram,
)
from prunus.methods.statistics import InputStatistics

__all__ = [
    "DEFAULT_DENSE_WEIGHT",
    "MAX_STRIDE",
    "best_dense_weight",
    "dense_target",
    "drift_is_worthwhile",
    "has_drift",
]

#: α where none is given, or no tokens are held out to find it; see docs/pruning-better.md.
DEFAULT_DENSE_WEIGHT = 0.25
#: At least one batch in so many goes through the dense model as well.
MAX_STRIDE = 4


def dense_target(
    weight_OI: Tensor, statistics: InputStatistics, dense_weight: float, damping: float | None
) -> Tensor:
    """W*, float32 (O, I); the weight itself where nothing has drifted or the dense inputs are not known.

    Args:
        weight_OI: float32, the trained weights.
        statistics: with Gram and drift.
        dense_weight: α.
        damping: λ, or None for `lsq.ridge`.
    """
    if not has_drift(statistics):
        return weight_OI
    drift_II = statistics.drift_II
    assert drift_II is not None
    scaled = _scaled_gram(statistics, damping)
    lower_II = statistics.derived(
        ("dense_factor", scaled.damping), lambda: _factor(scaled.gram_II, drift_II)
    )
    # Few rows are solved for by themselves, sooner than for a shift that other linears could share.
    if 2 * len(weight_OI) <= len(drift_II):
        aimed_OI = coarse_product(weight_OI, drift_II).div_(scaled.scale_I)
        change_OI = torch.cholesky_solve(aimed_OI.T, lower_II).T
    else:
        shift_II = statistics.derived(
            ("dense_target", scaled.damping), lambda: _shift(lower_II, drift_II, scaled.scale_I)
        )
        change_OI = coarse_product(weight_OI * scaled.scale_I, shift_II)
    return weight_OI + change_OI.div(scaled.scale_I).mul_(dense_weight)


def _scaled_gram(statistics: InputStatistics, damping: float | None) -> ScaledGram:
    """Of the tokens whose dense inputs are known: what they happen to be is then in Gram and drift, and cancels."""
    gram_II = statistics.drift_gram_II
    if gram_II is None:
        return scaled_gram(statistics, damping)
    tokens = round(statistics.drift_share * statistics.tokens)
    damping = ridge(statistics.in_features, tokens) if damping is None else damping
    return statistics.derived(("scaled_drift_gram", damping), lambda: scale_gram(gram_II, damping))


def drift_is_worthwhile(in_features: int, tokens: int) -> bool:
    """Whether it is worth while to learn from so many tokens how a linear's inputs drift.

    Not where it is wide and the ridge is large: W* is then hardly another than W₀, and what is to be learnt would take
    longer than all other linears' drift together.
    """
    return not is_data_limited(in_features, ridge(in_features, tokens))


def has_drift(statistics: InputStatistics) -> bool:
    """Whether enough is known of the dense inputs: of an expert's tokens, say, only where all came its way."""
    return statistics.drift_share >= (1 if statistics.drift_gram_II is None else 1 / MAX_STRIDE)


def best_dense_weight(
    weight_OI: Tensor, statistics: InputStatistics, damping: float | None
) -> float | None:
    """The α whose W*, found without the tokens held out, comes closest to the dense model's outputs on these.

    With S = W₀(X − X̂)ᵀX̂ · (X̂ᵀX̂ + λD²)⁻¹ of the other tokens, the error ‖αX̂Sᵀ − (X − X̂)W₀ᵀ‖² on tokens held out
    is least at α = tr (W₀(X − X̂)ᵀX̂Sᵀ) / tr (SX̂ᵀX̂Sᵀ), sums that the statistics hold. Taken into [0, 1].

    Args:
        weight_OI: float32, the trained weights.
        statistics: with Gram and drift, and the shares of tokens held out.
        damping: λ, or None for `lsq.ridge` of the tokens that are left.

    Returns:
        None where no tokens were held out, nothing else is left, or the dense inputs are not known.
    """
    held_gram_II, held_drift_II = statistics.held_gram_II, statistics.held_drift_II
    gram_II, drift_II, tokens = statistics.gram_II, statistics.drift_II, statistics.held_tokens
    if statistics.drift_share < 1 or held_gram_II is None or held_drift_II is None:
        return None
    if not 0 < tokens < statistics.tokens:
        return None
    assert gram_II is not None and drift_II is not None
    scale_I = gram_II.diagonal().sqrt()
    scale_I = scale_I.masked_fill(scale_I == 0, 1)
    left = ridge(statistics.in_features, statistics.tokens - tokens) if damping is None else damping
    left = max(left, statistics.in_features * torch.finfo(torch.float32).eps)

    def compute() -> Tensor:
        share = 1 - tokens / statistics.tokens
        rest_II = ((gram_II - held_gram_II) / scale_I[:, None]).div_(scale_I)
        rest_II.diagonal().add_(left * share)
        rest_drift_II = drift_II - held_drift_II
        return _shift(_factor(rest_II, rest_drift_II), rest_drift_II, scale_I)

    shift_II = statistics.derived(("held_out_shift", left), compute)
    scaled_OI = weight_OI * scale_I
    found_OI = (scaled_OI @ shift_II).div_(scale_I)
    size = inner_product(found_OI @ held_gram_II, found_OI)
    gain = inner_product(weight_OI @ held_drift_II, found_OI)
    return min(1.0, max(0.0, gain / size)) if size > 0 else 0.0


def _factor(damped_II: Tensor, drift_II: Tensor) -> Tensor:
    """The lower Cholesky factor of A + λI."""
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed) or not all_finite(drift_II):
        raise ValueError("the inputs of the dense model cannot be matched: are they finite?")
    return lower_II


def _shift(lower_II: Tensor, drift_II: Tensor, scale_I: Tensor) -> Tensor:
    """D⁻¹(X − X̂)ᵀX̂D⁻¹ · (A + λI)⁻¹, by way of its transpose; A + λI is symmetric, `lower_II` its factor."""
    scaled_II = (drift_II / scale_I[:, None]).div_(scale_I)
    return torch.cholesky_solve(scaled_II.T, lower_II).T.contiguous()
