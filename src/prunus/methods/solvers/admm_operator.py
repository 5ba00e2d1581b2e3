"""The matrix of an ADMM step of ALPS, ωρ(H + ρI)⁻¹ + (1 − ω)I, for growing penalties ρ.

H is the scaled and damped Gram matrix of `least_squares.py`; its diagonal is 1 + λ. The matrix
combines the resolvent ρ(H + ρI)⁻¹ with over-relaxation by ω. An inverse for every ρ would take most
of the solver's time, so two approximations replace it:

- `_from_inverses` computes the resolvent of the first and of the last ρ. In between it mixes the
  two, with the share that is exact for the eigenvalues of H that equal ρ.
- `_from_spectrum` computes no inverse. The resolvent has the eigenvectors of H, and maps an
  eigenvalue h to ρ/(h + ρ). The leading eigenvectors get exactly that. All other eigenvalues lie
  close together above λ, and a straight line a + bh is good enough there: a·I + b·H, which needs no
  eigenvectors. The larger λ, the straighter is the curve.

Why the second way exists: for wide linears an inverse takes as long as a dozen iterations, which
few tokens do not repay (`least_squares.is_data_limited`). A large λ also lets 5 iterations with a
penalty that grows at each are about as good as 12. On `down_proj` of Qwen2.5-Coder-1.5B (8960
inputs, 16,384 tokens) this takes a third of the time, for 1.5 % more error on held-out tokens.

Shape suffixes: I inputs; R leading eigenvectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus.hardware.numerics import all_finite, low_precision_factor, low_precision_product
from prunus.methods.solvers.least_squares import ScaledGram
from prunus.methods.statistics import InputStatistics

#: ω. Twelve iterations at 1.2 are as good as sixteen at 1; at 1.6 the error is 1 % larger.
OVER_RELAXATION = 1.2
# ρ relative to a diagonal of H of about 1; each serves a quarter of the iterations. On four linears
# of SmolLM2 at 50 % and 2:4, twice as many iterations with twice as many penalties, from 0.1 to
# 1.7, lower the error on held-out tokens by 0.3 to 2 %.
_PENALTIES = (0.25, 0.4, 0.8, 1.6)
# The first and the last ρ of data-limited linears, relative to the diagonal of H. Here λ makes the
# diagonal much larger than 1, and ρ must grow with it.
_DATA_LIMITED_FIRST, _DATA_LIMITED_LAST = 0.5, 2.0
# Inverses larger than this many bytes are not kept for the next linear with the same input.
_MAX_KEPT_BYTES = 2**28
# One leading eigenvector is computed for this many inputs.
_INPUTS_PER_EIGENVECTOR = 16


def penalties(scaled: ScaledGram, iterations: int) -> list[float]:
    """The penalty ρ of each iteration, never falling.

    Args:
        iterations: how many penalties to return, at least 1.
    """
    if not scaled.is_data_limited:
        # Few different values: each costs a new matrix.
        return [_PENALTIES[len(_PENALTIES) * i // iterations] for i in range(iterations)]
    growth = (_DATA_LIMITED_LAST / _DATA_LIMITED_FIRST) ** (1 / max(1, iterations - 1))
    return [(1 + scaled.damping) * _DATA_LIMITED_FIRST * growth**i for i in range(iterations)]


def admm_operator(
    statistics: InputStatistics, scaled: ScaledGram, rows: int
) -> Callable[[float], Tensor]:
    """A function from ρ to the matrix (I, I) of an ADMM step.

    Call it with the values of `penalties`, in their order: it may update the last matrix in place.

    Args:
        statistics: the inputs; what linears with the same input can share is kept next to them.
        rows: the rows that will be multiplied by the matrix. They decide whether it is rounded, see
            `numerics.low_precision_factor`.
    """
    return (_from_spectrum if scaled.is_data_limited else _from_inverses)(statistics, scaled, rows)


def _from_inverses(
    statistics: InputStatistics, scaled: ScaledGram, rows: int
) -> Callable[[float], Tensor]:
    mixture_II, last_II = _first_and_last(statistics, scaled)
    share = 1.0

    def operator(penalty: float) -> Tensor:
        nonlocal share
        previous, share = share, _share_of_first(penalty)
        # The mixture holds `previous` of the first matrix. Move it on in place: a third matrix of
        # this size is not needed.
        mixture_II.lerp_(last_II, 1 - share / previous)
        return low_precision_factor(mixture_II, rows)

    return operator


def _share_of_first(penalty: float) -> float:
    """The share of the first resolvent in the mixture for `penalty`; the rest is the last one's.

    The exact resolvent maps the eigenvalue h = `penalty` to 1/2, and so must the mixture.
    """
    first, last = (end / (penalty + end) for end in (_PENALTIES[0], _PENALTIES[-1]))
    return (0.5 - last) / (first - last)


def _first_and_last(statistics: InputStatistics, scaled: ScaledGram) -> tuple[Tensor, Tensor]:
    """The matrices for the first and the last ρ, float32 (I, I). The caller may change the first.

    They are kept next to the statistics for other linears with the same input, if they are small
    enough.
    """

    def compute() -> tuple[Tensor, Tensor]:
        return _relaxed_resolvent(scaled, _PENALTIES[0]), _relaxed_resolvent(scaled, _PENALTIES[-1])

    if 2 * scaled.gram_II.nbytes > _MAX_KEPT_BYTES:
        return compute()
    first_II, last_II = statistics.derived(("alps", scaled.damping), compute)
    return first_II.clone(), last_II


def _relaxed_resolvent(scaled: ScaledGram, penalty: float) -> Tensor:
    """ωρ(H + ρI)⁻¹ + (1 − ω)I, exactly, by a Cholesky factorisation."""
    damped_II = scaled.gram_II.clone()
    damped_II.diagonal().add_(penalty)
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed):
        raise ValueError("the Gram matrix of the inputs cannot be inverted: is it finite?")
    relaxed_II = torch.cholesky_inverse(lower_II).mul_(OVER_RELAXATION * penalty)
    relaxed_II.diagonal().add_(1 - OVER_RELAXATION)
    return relaxed_II


def _from_spectrum(
    statistics: InputStatistics, scaled: ScaledGram, rows: int
) -> Callable[[float], Tensor]:
    if not all_finite(scaled.gram_II):
        raise ValueError("the Gram matrix of the inputs has no spectrum: is it finite?")

    def compute() -> tuple[Tensor, Tensor]:
        count = len(scaled.gram_II) // _INPUTS_PER_EIGENVECTOR
        return leading_eigenvectors(scaled.gram_II, count)

    vectors_IR, values_R = statistics.derived(("leading", scaled.damping), compute)
    # The line has to fit up to the smallest leading eigenvalue. The smallest ones are the least
    # accurate, so it is fitted up to a somewhat larger one, which hurts the others little.
    line_end = float(values_R[len(values_R) // 10])
    factor_II = low_precision_factor(scaled.gram_II, rows)
    right_RI = vectors_IR.T.to(factor_II.dtype)

    def operator(penalty: float) -> Tensor:
        constant, slope = _fit_line(penalty, scaled.damping, line_end)
        # The line is applied to all eigenvalues. The leading eigenvectors get the difference
        # between the exact value and the line.
        rest_R = penalty / (values_R + penalty) - constant - slope * values_R
        left_IR = (vectors_IR * (rest_R * OVER_RELAXATION)).to(factor_II.dtype)
        relaxed_II = torch.addmm(factor_II, left_IR, right_RI, beta=slope * OVER_RELAXATION)
        relaxed_II.diagonal().add_(constant * OVER_RELAXATION + 1 - OVER_RELAXATION)
        return relaxed_II

    return operator


def _fit_line(penalty: float, low: float, high: float) -> tuple[float, float]:
    """a and b of the line a + bh that is nearest to ρ/(h + ρ) for h from `low` to `high`.

    Small eigenvalues are frequent, so the squared distance is weighted by 1/h².
    """
    values = torch.linspace(low, high, 50, dtype=torch.float64)
    # Both sides are divided by h, which is the weight under the square.
    basis = torch.stack([1 / values, torch.ones_like(values)], dim=1)
    wanted = penalty / (values + penalty) / values
    constant, slope = torch.linalg.lstsq(basis, wanted[:, None]).solution.flatten().tolist()
    return constant, slope


def leading_eigenvectors(matrix_II: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix, approximately.

    Subspace iteration from a fixed random start, so the result is always the same (Halko,
    Martinsson and Tropp 2011, algorithm 4.4). Products are computed in low precision: what an
    approximate vector contains of other eigenvectors changes the result in second order only.

    Args:
        matrix_II: float32, symmetric.

    Returns:
        The vectors (I, R) as columns, and their eigenvalues (R,), growing.
    """
    start_IR = torch.randn(len(matrix_II), count, generator=torch.Generator().manual_seed(0))
    basis_IR = start_IR.to(matrix_II.device)
    factor_II = low_precision_factor(matrix_II, count)
    for _ in range(3):
        # Every product turns the subspace towards the leading eigenvectors. QR keeps its basis
        # vectors from all becoming the first one.
        basis_IR = torch.linalg.qr(basis_IR).Q
        basis_IR, before_IR = low_precision_product(factor_II, basis_IR), basis_IR
    # Rayleigh-Ritz: the eigenvectors of the matrix within the subspace.
    values_R, turn_RR = torch.linalg.eigh(before_IR.T @ basis_IR)
    return before_IR @ turn_RR, values_R
