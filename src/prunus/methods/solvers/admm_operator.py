"""What a step of ALPS multiplies by: ωρ(H + ρI)⁻¹ + (1 − ω)I, for one penalty ρ after the other.

H is the scaled and damped Gram matrix of `lsq.py`, whose diagonal is 1 + λ. Two ways save an inverse for each ρ:

- `_inverses` has the first ρ and the last inverted for. In between stands the mixture of the two that is right for
  eigenvalues of H equal to ρ.
- `_spectrum` has none inverted for. The largest eigenvalues h of H get what is right for them, ρ/(h + ρ), by way of their
  eigenvectors; the others lie close together above λ, and share a straight line, a + bH. The larger λ, the straighter.

The second is for wide linears with few tokens (`lsq.is_data_limited`), whose inverses would take as long as a dozen iterations.
There, where λ is large, 5 iterations with a penalty that grows at each come about as far as 12: on `down` of
Qwen2.5-Coder-1.5B (8960 inputs, 16,384 tokens) a third of the time, for 1.5 % more error on tokens held out.

Shape suffixes: I inputs; R leading eigenvectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus.hardware.numerics import all_finite, coarse_factor, coarse_product
from prunus.methods.solvers.least_squares import ScaledGram
from prunus.methods.statistics import InputStatistics

__all__ = ["OVER_RELAXATION", "admm_operator", "leading_eigenvectors", "penalties"]

#: ω, a little over the mark: twelve iterations at 1.2 come as far as sixteen at 1, at 1.6 they are 1 % worse.
OVER_RELAXATION = 1.2
# ρ, against a diagonal of H of about 1: each for a quarter of the iterations. On four linears of SmolLM2 at 50 % and 2:4
# twice as many iterations with twice as many penalties, from 0.1 to 1.7, lower the error held out by 0.3 to 2 %.
_PENALTIES = (0.25, 0.4, 0.8, 1.6)
# Against the diagonal of H, from the first iteration to the last, where tokens are few.
_FIRST_SCARCE, _LAST_SCARCE = 0.5, 2.0
# Inverses beyond this many bytes are not kept for the next linear with the same input.
_MOST_KEPT = 2**28
# Of so many inputs one leading eigenvector is taken.
_ONE_LEADING_IN = 16


def penalties(scaled: ScaledGram, iterations: int) -> list[float]:
    """ρ of each iteration, growing."""
    if not scaled.is_data_limited:
        return [_PENALTIES[len(_PENALTIES) * i // iterations] for i in range(iterations)]
    growth = (_LAST_SCARCE / _FIRST_SCARCE) ** (1 / max(1, iterations - 1))
    return [(1 + scaled.damping) * _FIRST_SCARCE * growth**i for i in range(iterations)]


def admm_operator(
    statistics: InputStatistics, scaled: ScaledGram, rows: int
) -> Callable[[float], Tensor]:
    """From ρ to the matrix (I, I), as `coarse_factor` gives it for `rows` rows; to be asked as `penalties` grow."""
    return (_spectrum if scaled.is_data_limited else _inverses)(statistics, scaled, rows)


def _inverses(
    statistics: InputStatistics, scaled: ScaledGram, rows: int
) -> Callable[[float], Tensor]:
    mixture_II, last_II = _at_ends(statistics, scaled)
    share = 1.0

    def shrink(penalty: float) -> Tensor:
        nonlocal share
        before, share = share, _share_of_first(penalty)
        mixture_II.lerp_(last_II, 1 - share / before)
        return coarse_factor(mixture_II, rows)

    return shrink


def _share_of_first(penalty: float) -> float:
    """How much of the first ρ(H + ρI)⁻¹ is in the mixture for `penalty`; the rest is the last one's."""
    first, last = (end / (penalty + end) for end in (_PENALTIES[0], _PENALTIES[-1]))
    return (0.5 - last) / (first - last)


def _at_ends(statistics: InputStatistics, scaled: ScaledGram) -> tuple[Tensor, Tensor]:
    """For the first ρ and the last, float32 (I, I); the first may be written to.

    Kept beside the statistics, for linears with the same input, where both fit there.
    """

    def compute() -> tuple[Tensor, Tensor]:
        return _inverted(scaled, _PENALTIES[0]), _inverted(scaled, _PENALTIES[-1])

    if 2 * scaled.gram_II.nbytes > _MOST_KEPT:
        return compute()
    first_II, last_II = statistics.derived(("alps", scaled.damping), compute)
    return first_II.clone(), last_II


def _inverted(scaled: ScaledGram, penalty: float) -> Tensor:
    damped_II = scaled.gram_II.clone()
    damped_II.diagonal().add_(penalty)
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed):
        raise ValueError("the Gram matrix of the inputs cannot be inverted: is it finite?")
    relaxed_II = torch.cholesky_inverse(lower_II).mul_(OVER_RELAXATION * penalty)
    relaxed_II.diagonal().add_(1 - OVER_RELAXATION)
    return relaxed_II


def _spectrum(
    statistics: InputStatistics, scaled: ScaledGram, rows: int
) -> Callable[[float], Tensor]:
    if not all_finite(scaled.gram_II):
        raise ValueError("the Gram matrix of the inputs has no spectrum: is it finite?")

    def compute() -> tuple[Tensor, Tensor]:
        return leading_eigenvectors(scaled.gram_II, len(scaled.gram_II) // _ONE_LEADING_IN)

    vectors_IR, values_R = statistics.derived(("leading", scaled.damping), compute)
    # The least of the leading ones are the least exact. A line up to those a little above does no harm to others.
    tail = float(values_R[len(values_R) // 10])
    factor_II = coarse_factor(scaled.gram_II, rows)
    right_RI = vectors_IR.T.to(factor_II.dtype)

    def shrink(penalty: float) -> Tensor:
        constant, slope = _line(penalty, scaled.damping, tail)
        rest_R = penalty / (values_R + penalty) - constant - slope * values_R
        left_IR = (vectors_IR * (rest_R * OVER_RELAXATION)).to(factor_II.dtype)
        relaxed_II = torch.addmm(factor_II, left_IR, right_RI, beta=slope * OVER_RELAXATION)
        relaxed_II.diagonal().add_(constant * OVER_RELAXATION + 1 - OVER_RELAXATION)
        return relaxed_II

    return shrink


def _line(penalty: float, least: float, most: float) -> tuple[float, float]:
    """a and b of the line a + bh nearest to ρ/(h + ρ) from `least` to `most`; small h are frequent and weigh more."""
    values = torch.linspace(least, most, 50, dtype=torch.float64)
    basis = torch.stack(
        [1 / values, torch.ones_like(values)], dim=1
    )  # a, b times h; squares weighed by 1/h²
    wanted = penalty / (values + penalty) / values
    constant, slope = torch.linalg.lstsq(basis, wanted[:, None]).solution.flatten().tolist()
    return constant, slope


def leading_eigenvectors(matrix_II: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors (I, R) of the `count` largest eigenvalues of a symmetric matrix, and these (R,), growing.

    By iterating on a random subspace, always the same one (Halko, Martinsson and Tropp 2011, algorithm 4.4). The products
    are coarse: what the vectors have of others costs them second-order errors only.
    """
    start_IR = torch.randn(len(matrix_II), count, generator=torch.Generator().manual_seed(0))
    basis_IR = start_IR.to(matrix_II.device)
    factor_II = coarse_factor(matrix_II, count)
    for _ in range(3):
        basis_IR = torch.linalg.qr(basis_IR).Q
        basis_IR, before_IR = coarse_product(factor_II, basis_IR), basis_IR
    values_R, turn_RR = torch.linalg.eigh(before_IR.T @ basis_IR)
    return before_IR @ turn_RR, values_R
