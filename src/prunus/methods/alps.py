"""ALPS: mask and weights together by ADMM, then least squares on the mask that ADMM found.

The goal is to minimise tr (W − W₀)H(W − W₀)ᵀ over all W that the pattern allows. W₀ are the trained
weights; W and the Gram matrix H are scaled and damped as in `solvers/least_squares.py`. Choosing
the mask and the weights at once is hard, so ADMM splits the problem in two copies: W is dense and
fits the outputs, Z is sparse, and a multiplier U pulls them together (Boža 2024, arXiv 2401.02938;
Meng et al. 2024, arXiv 2406.07831, algorithm 1, whose D is Z and whose V is ρU). One iteration is

    (1)  Z ← the entries of W + U that the pattern keeps              (the exact projection)
    (2)  U ← U + W − Z
    (3)  W ← (W₀H + ρ(Z − U))(H + ρI)⁻¹ = W₀ + (Z − U − W₀) · ρ(H + ρI)⁻¹
    (4)  W ← ωW + (1 − ω)Z                                            (over-relaxation)

`_solve_shard` has these numbers in its comments.

Why the inputs are scaled by √d: in the scaled weights |W_ij| is |w_ij|·‖x_j‖, Wanda's score. So the
first projection is Wanda's mask, and a single ρ suits all columns, because all diagonal entries of
H are equal.

Why the penalty ρ grows: with a small ρ the copies may differ, and the mask can still change much.
With a large ρ they must agree, and the mask settles. ALPS decides how fast ρ grows from how much
the mask still changes. Here ρ follows a fixed rule, so all linears with the same input share the
matrix that replaces the inverse, and an iteration is one matrix product.

Why over-relaxation: a step a little beyond the minimum (ω > 1) converges in fewer
iterations (Eckstein and Bertsekas 1992). It saves a quarter of them here.

The matrix of an iteration is ωρ(H + ρI)⁻¹ + (1 − ω)I. An inverse for every ρ would take most of the
solver's time, so two approximations replace it:

- `from_inverses` computes the resolvent ρ(H + ρI)⁻¹ of the first and of the last ρ. In between it
  mixes the two, with the share that is exact for the eigenvalues of H that equal ρ.
- `from_spectrum` computes no inverse. The resolvent has the eigenvectors of H, and maps an
  eigenvalue h to ρ/(h + ρ). The leading eigenvectors get exactly that. All other eigenvalues lie
  close together above λ, and a straight line a + bh is good enough there: a·I + b·H, which needs no
  eigenvectors. The larger λ, the straighter is the curve.

Why the second way exists: for wide linears an inverse takes as long as a dozen iterations, which
few tokens do not repay (`least_squares.is_data_limited`). A large λ also lets 5 iterations with a
penalty that grows at each are about as good as 12. On `down_proj` of Qwen2.5-Coder-1.5B (8960
inputs, 16,384 tokens) this takes a third of the time, for 1.5 % more error on held-out tokens.

The products of the iterations may be computed in low precision, because every step corrects the
rounding of the one before. Conjugate gradients finish on the last mask. They start from a residual
in float32, except for wide linears with few tokens, where this product would take too long.
Weights of inputs that are always 0 become 0, as in SparseGPT.

Which weights compete: those of a row, which keeps the rows in shards and their scores apart. In the
public code of ALPS all weights of a linear compete. The group "layer" does that here too.

The order of this file: the method (`prune`) and its iterations, the penalties, and the two ways to
the matrix of an iteration.

Shape suffixes: O outputs (rows), S some of them, I inputs; R leading eigenvectors.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from prunus.hardware.numerics import (
    all_finite,
    low_precision_factor,
    low_precision_product,
    row_spans,
)
from prunus.methods.patterns import keep_mask
from prunus.methods.solvers.least_squares import (
    Rounded,
    ScaledGram,
    conjugate_gradients,
    scaled_gram_of,
)
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import UNSHARDED, Pruned, RowShard, Work, masked

# The default number of iterations. With ω = 1.2 twelve are as good as sixteen without; ten lose 0.5
# to 1 % of the error, and nine with three penalties 2.9 to 3.2 %.
_ITERATIONS = 12
# The same for data-limited linears, whose penalty grows at every iteration. On `down_proj` of
# Qwen2.5-Coder-1.5B these five have a held-out error of 3.293 % and take 18 s; twelve with two
# inverses have 3.248 % and take 49 s.
_DATA_LIMITED_ITERATIONS = 5
# Three of four iterations choose a new mask. The iteration with this number of the four (from 0)
# keeps the mask of the one before, which saves a fifth of the solver's time. At 2, 6 and 10 that is
# free; any other mask that is kept costs half a per cent of error.
_KEEPS_MASK = 2
# The maximum number of conjugate gradient steps at the end. With many tokens one step is enough.
# With two tokens per input five steps remove a tenth of the error, and a fiftieth of the error on
# held-out tokens.
_FINAL_STEPS = 8
# The same for data-limited linears.
_DATA_LIMITED_STEPS = 2
# The share of the error that a step must remove for another one to follow. On SmolLM2 no step
# removes more than 0.12 %. On `down_proj` of Qwen2.5-Coder-1.5B six remove 1.37, 1.35, 0.96, 0.54,
# 0.27 and 0.12 %.
_MIN_GAIN = 0.003
#: ω. Twelve iterations at 1.2 have 0.06 % less error than sixteen at 1. At 1 they have 0.41 % more,
#: at 1.4 0.23 %, at 1.6 1.0 %.
OVER_RELAXATION = 1.2
# ρ relative to a diagonal of H of about 1; each serves a quarter of the iterations. The last one
# decides: sixteen iterations that end at 0.34 have an error of 2.869, and 2.370 if they end at 1.6.
# On four linears of SmolLM2 at 50 % and 2:4, twice as many iterations with twice as many penalties,
# from 0.1 to 1.7, lower the error on held-out tokens by 0.3 to 2 %.
_PENALTIES = (0.25, 0.4, 0.8, 1.6)
# The first ρ of data-limited linears, relative to the diagonal of H. Here λ makes the diagonal much
# larger than 1, and ρ must grow with it. No figure of other values is on record, for this one, the
# next one and the steps above.
_DATA_LIMITED_FIRST = 0.5
# The last ρ of data-limited linears, relative to the same diagonal.
_DATA_LIMITED_LAST = 2.0
# Inverses larger than this many bytes together are computed again for the next linear with the same
# input, so that they do not fill the memory.
_MAX_CACHED_BYTES = 2**28
# One leading eigenvector is computed for this many inputs. On the same `down_proj`, 560 of them
# with a line for the rest have a held-out error of 3.293 %, and 512 with a constant 3.625 %.
_INPUTS_PER_EIGENVECTOR = 16


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights that ADMM keeps, fitted to its mask.

    Args:
        weight_OI: float32, the trained weights W₀ (or a dense target).
        statistics: With a Gram matrix.
        work: Its options give λ (`damping`) and the number of `iterations`; None means the default
            of each, which depends on the number of tokens per input.

    Returns:
        Mask and weights. The notes have `ridge` (λ) and `conjugate_gradients` (final steps).

    Raises:
        ValueError: The Gram matrix is not finite.
    """
    pattern = work.pattern
    scaled = scaled_gram_of(statistics, work.options.damping)
    # Where all rows compete, every iteration would need the scores of all processes. One process
    # solves all rows instead.
    rows_compete = pattern.is_unstructured and pattern.group in ("layer", "column", "block")
    sharding = UNSHARDED if rows_compete else work.rows
    rows_per_group = 1
    if pattern.is_unstructured and isinstance(pattern.group, int):
        rows_per_group = pattern.group

    def solve(shard: RowShard) -> Pruned:
        shard_OI = weight_OI[shard.rows]
        whole = [slice(0, len(shard_OI))]
        spans = whole if rows_compete else row_spans(shard_OI, rows_per_group)
        return _solve_shard(shard_OI, spans, statistics, scaled, work, shard)

    return sharding.solve(len(weight_OI), rows_per_group, solve)


def _solve_shard(
    weight_OI: Tensor,
    spans: list[slice],
    statistics: InputStatistics,
    scaled: ScaledGram,
    work: Work,
    shard: RowShard,
) -> Pruned:
    """Run ADMM and conjugate gradients on the rows of one shard, some rows (`spans`) at a time.

    Args:
        weight_OI: float32, the trained weights of these rows.
        spans: Runs of rows that an iteration computes together. Short ones keep temporaries small;
            where all rows compete, one span holds all rows.
        statistics: Hold the matrices that linears with the same input share.
        scaled: The scaled and damped Gram matrix H.
        work: What is asked for.
        shard: Which rows of the linear these are.
    """
    target_OI = (weight_OI * scaled.scale_I).masked_fill_(scaled.dead_I, 0)
    # W and U are never needed apart, only their sum. It equals Z where a weight is kept, and the
    # new U elsewhere. So one matrix holds the whole state.
    sum_OI = target_OI.clone()
    keep_OI = torch.empty_like(sum_OI, dtype=torch.bool)
    data_limited = scaled.is_data_limited
    default_iterations = _DATA_LIMITED_ITERATIONS if data_limited else _ITERATIONS
    by_iteration = penalties(scaled, work.options.iterations or default_iterations)
    build = from_spectrum if data_limited else from_inverses
    operator = build(statistics, scaled, len(sum_OI))
    first_row = shard.rows.start or 0

    def mask(span: slice) -> Tensor:
        """The mask of a span of rows, by the sum W + U; zeros that stay are not in it."""
        rows = slice(first_row + span.start, first_row + span.stop)
        score_SI = work.without_zeros(sum_OI[span].abs(), rows)
        return work.without_zeros(keep_mask(score_SI, work.pattern, work.sparsity), rows)

    for iteration, (previous, penalty) in enumerate(pairwise([0.0, *by_iteration])):
        if penalty != previous:
            operator_II = operator(penalty)
        updates_mask = data_limited or iteration % 4 != _KEEPS_MASK
        for span in spans:
            sum_SI, target_SI = sum_OI[span], target_OI[span]
            # (1) the mask of Z; its entries are those of W + U.
            if updates_mask:
                keep_OI[span] = mask(span)
            # (1) `sparse` is Z. Below it becomes Z − U − W₀ in place.
            sparse_SI = keep_OI[span] * sum_SI
            # (2) `dual` is the new U: what the sum of U and W has more than Z.
            dual_SI = sum_SI - sparse_SI
            if penalty != previous > 0:
                # U is the multiplier divided by ρ. The multiplier stays, so U shrinks as ρ grows.
                dual_SI.mul_(previous / penalty)
            sparse_SI.sub_(dual_SI).sub_(target_SI)
            # (3) and (4): the new sum is ωW + (1 − ω)Z + U. The operator holds all that is linear
            # in Z − U − W₀; what is left of the sum is W₀ + (2 − ω)U.
            torch.add(target_SI, dual_SI, alpha=2 - OVER_RELAXATION, out=sum_SI)
            sum_SI.add_(low_precision_product(sparse_SI, operator_II))
    for span in spans:
        keep_OI[span] = mask(span)
    max_steps = _DATA_LIMITED_STEPS if data_limited else _FINAL_STEPS
    rounded: Rounded = "all" if data_limited else "steps"
    solution_OI, steps = conjugate_gradients(
        sum_OI, target_OI, keep_OI, scaled.gram_II, max_steps, shard, _MIN_GAIN, rounded
    )
    notes = {"ridge": scaled.damping, "conjugate_gradients": steps}
    return masked(solution_OI.div_(scaled.scale_I), keep_OI, notes)


def penalties(scaled: ScaledGram, iterations: int) -> list[float]:
    """The penalty ρ of each iteration, never falling.

    A linear with many tokens gets the four values of `_PENALTIES`, a quarter of the iterations
    each. A data-limited linear gets a geometric sequence relative to the diagonal 1 + λ of H.

    Args:
        scaled: The Gram matrix, whose width and λ decide which rule applies.
        iterations: The number of iterations, at least 1.

    >>> from prunus.methods.solvers.least_squares import scale_and_damp
    >>> penalties(scale_and_damp(torch.eye(2), damping=0.1), iterations=6)
    [0.25, 0.25, 0.4, 0.8, 0.8, 1.6]
    """
    if not scaled.is_data_limited:
        # Few different values: each costs a new matrix.
        return [_PENALTIES[len(_PENALTIES) * i // iterations] for i in range(iterations)]
    growth = (_DATA_LIMITED_LAST / _DATA_LIMITED_FIRST) ** (1 / max(1, iterations - 1))
    return [(1 + scaled.damping) * _DATA_LIMITED_FIRST * growth**i for i in range(iterations)]


def from_inverses(
    statistics: InputStatistics, scaled: ScaledGram, rows: int
) -> Callable[[float], Tensor]:
    """A function from ρ to the matrix ωρ(H + ρI)⁻¹ + (1 − ω)I of an ADMM step, (I, I).

    It mixes the exact matrices of the first and of the last ρ; see the top of this file. Call the
    function with the values of `penalties`, in their order: it updates the last matrix in place.

    Args:
        statistics: Hold what linears with the same input can share (`InputStatistics.derived`).
        scaled: The scaled and damped Gram matrix H of these statistics.
        rows: The rows that will be multiplied by the matrix. Their number decides whether the
            matrix is rounded, see `numerics.low_precision_factor`.

    Raises:
        ValueError: The Gram matrix is not finite.
    """

    def compute() -> tuple[Tensor, Tensor]:
        return _relaxed_resolvent(scaled, _PENALTIES[0]), _relaxed_resolvent(scaled, _PENALTIES[-1])

    # The mixture is overwritten, so it is a copy of the matrix that other linears use as well.
    if 2 * scaled.gram_II.nbytes > _MAX_CACHED_BYTES:
        mixture_II, last_II = compute()
    else:
        first_II, last_II = statistics.derived(("alps", scaled.damping), compute)
        mixture_II = first_II.clone()
    share = 1.0

    def operator(penalty: float) -> Tensor:
        """The matrix for ρ = `penalty`, which must not be smaller than the one before."""
        nonlocal share
        previous = share
        share = _share_of_first(penalty)
        # The mixture holds the share `previous` of the first matrix. Move it on in place: a third
        # matrix of this size is not needed.
        mixture_II.lerp_(last_II, 1 - share / previous)
        return low_precision_factor(mixture_II, rows)

    return operator


def _share_of_first(penalty: float) -> float:
    """The share of the first resolvent in the mixture for `penalty`; the rest is the last one's.

    The exact resolvent maps the eigenvalue h = `penalty` to 1/2, and so must the mixture.
    """
    first, last = (end / (penalty + end) for end in (_PENALTIES[0], _PENALTIES[-1]))
    return (0.5 - last) / (first - last)


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


def from_spectrum(
    statistics: InputStatistics, scaled: ScaledGram, rows: int
) -> Callable[[float], Tensor]:
    """As `from_inverses`, but for data-limited linears, and without an inverse.

    It applies ρ/(h + ρ) to the leading eigenvalues and a line to the rest; see the top of this
    file.

    Raises:
        ValueError: The Gram matrix is not finite.
    """
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
        """The matrix for ρ = `penalty`."""
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
    target = penalty / (values + penalty) / values
    constant, slope = torch.linalg.lstsq(basis, target[:, None]).solution.flatten().tolist()
    return constant, slope


def leading_eigenvectors(matrix_II: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix, approximately.

    Subspace iteration from a fixed random start, so the result is always the same (Halko,
    Martinsson and Tropp 2011, algorithm 4.4). Products are computed in low precision: what an
    approximate vector contains of other eigenvectors changes the result in second order only.

    Args:
        matrix_II: float32, symmetric and positive semi-definite.
        count: R, the number of eigenvectors.

    Returns:
        The vectors, which are the columns of a matrix (I, R), and their eigenvalues (R,), rising.

    >>> vectors_IR, values_R = leading_eigenvectors(torch.tensor([[9.0, 0.0], [0.0, 0.01]]), 1)
    >>> values_R.round(decimals=3), vectors_IR.abs().round(decimals=3).flatten()
    (tensor([9.]), tensor([1., 0.]))
    """
    start_IR = torch.randn(len(matrix_II), count, generator=torch.Generator().manual_seed(0))
    basis_IR = start_IR.to(matrix_II.device)
    factor_II = low_precision_factor(matrix_II, count)
    for _ in range(3):
        # Every product turns the subspace towards the leading eigenvectors. QR keeps its basis
        # vectors from all becoming the first one.
        basis_IR = torch.linalg.qr(basis_IR).Q
        before_IR = basis_IR
        basis_IR = low_precision_product(factor_II, before_IR)
    # Rayleigh-Ritz: the eigenvectors of the matrix within the subspace.
    values_R, rotation_RR = torch.linalg.eigh(before_IR.T @ basis_IR)
    return before_IR @ rotation_RR, values_R
