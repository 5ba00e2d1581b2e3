"""ALPS: mask and weights together by ADMM, then least squares on the mask that ADMM found.

The goal is to minimise tr (W − W₀)H(W − W₀)ᵀ over all W that the pattern allows. W₀ are the trained
weights; W and the Gram matrix H are scaled and damped as in `solvers/least_squares.py`. Choosing
the mask and the weights at once is hard, so ADMM splits the problem in two copies: W is dense and
fits the outputs, Z is sparse, and a multiplier U pulls them together (Boža 2024, arXiv 2401.02938;
Meng et al. 2024, arXiv 2406.07831, algorithm 1). One iteration is

    Z ← the entries of W + U that the pattern keeps              (the exact projection)
    U ← U + W − Z
    W ← (W₀H + ρ(Z − U))(H + ρI)⁻¹ = W₀ + (Z − U − W₀) · ρ(H + ρI)⁻¹
    W ← ωW + (1 − ω)Z                                            (over-relaxation)

Why the inputs are scaled by √d: in the scaled weights |W_ij| is |w_ij|·‖x_j‖, Wanda's score. So the
first projection is Wanda's mask, and a single ρ suits all columns, because all diagonal entries of
H are equal.

Why the penalty ρ grows: with a small ρ the copies may differ, and the mask can still change much.
With a large ρ they must agree, and the mask settles. ALPS decides how fast ρ grows from how much
the mask still changes. Here ρ follows a fixed rule, so all linears with the same input share the
matrix that replaces the inverse (`solvers/admm_operator.py`), and an iteration is one matrix
product.

Why over-relaxation: a step a little beyond the minimum (ω > 1) converges in fewer
iterations (Eckstein and Bertsekas 1992). It saves a quarter of them here.

The products of the iterations may be computed in low precision, because every step corrects the
rounding of the one before. Conjugate gradients finish on the last mask. They start from a residual
in float32, except for wide linears with few tokens, where this product would take too long.
Weights of inputs that are always 0 become 0, as in SparseGPT.

Which weights compete: those of a row, which keeps the rows in shards and their scores apart. In the
public code of ALPS all weights of a linear compete. The group "layer" does that here too.

Shape suffixes: O outputs (rows), S some of them, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.hardware.numerics import low_precision_product, row_spans
from prunus.methods.base import Pruned, masked, unchanged
from prunus.methods.patterns import keep_mask
from prunus.methods.solvers.admm_operator import OVER_RELAXATION, admm_operator, penalties
from prunus.methods.solvers.least_squares import ScaledGram, conjugate_gradients, scaled_gram_of
from prunus.methods.statistics import InputStatistics
from prunus.methods.work import UNSHARDED, RowShard, Work

#: The default number of iterations, and the one for wide linears with few tokens, whose penalty
#: grows at every iteration; see `solvers/admm_operator.py`.
ITERATIONS, DATA_LIMITED_ITERATIONS = 12, 5
# Three of four iterations choose a new mask. The one at this place keeps the mask of the iteration
# before: that saves a fifth of the solver's time and costs half a per cent of error.
_KEEPS_MASK = 2
# The maximum number of conjugate gradient steps at the end, and the share of the error that a step
# must remove for another one to follow. With many tokens one step is enough. With two tokens per
# input five steps remove a tenth of the error, and a fiftieth of the error on held-out tokens.
_FINAL_STEPS, _DATA_LIMITED_STEPS, _MIN_GAIN = 8, 2, 0.003


def prune(weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
    """The weights that ADMM keeps, fitted to its mask."""
    if work.removes_nothing:
        return unchanged(weight_OI)
    pattern, scaled = work.pattern, scaled_gram_of(statistics, work.options.damping)
    # Where all rows compete, every iteration would need the scores of all processes. One process
    # solves all rows instead.
    rows_compete = pattern.is_unstructured and pattern.group in ("layer", "column")
    sharding = UNSHARDED if rows_compete else work.rows
    rows_per_group = 1
    if pattern.is_unstructured and isinstance(pattern.group, int):
        rows_per_group = pattern.group

    def solve(shard: RowShard) -> Pruned:
        own_OI = weight_OI[shard.rows]
        whole = [slice(0, len(own_OI))]
        spans = whole if rows_compete else row_spans(own_OI, rows_per_group)
        return _solve_shard(own_OI, spans, statistics, scaled, work, shard)

    return sharding.solve(len(weight_OI), rows_per_group, solve)


def _solve_shard(
    weight_OI: Tensor,
    spans: list[slice],
    statistics: InputStatistics,
    scaled: ScaledGram,
    work: Work,
    shard: RowShard,
) -> Pruned:
    """Run ADMM and conjugate gradients on the rows of one shard, some rows (`spans`) at a time."""
    target_OI = (weight_OI * scaled.scale_I).masked_fill_(scaled.dead_I, 0)
    # W and U are never needed apart, only their sum. It equals Z where a weight is kept, and the
    # new U elsewhere. So one matrix holds the whole state.
    sum_OI = target_OI.clone()
    keep_OI = torch.empty_like(sum_OI, dtype=torch.bool)
    data_limited = scaled.is_data_limited
    default_iterations = DATA_LIMITED_ITERATIONS if data_limited else ITERATIONS
    operator = admm_operator(statistics, scaled, len(sum_OI))
    penalty = 0.0
    for iteration, next_penalty in enumerate(
        penalties(scaled, work.options.iterations or default_iterations)
    ):
        previous, penalty = penalty, next_penalty
        if penalty != previous:
            operator_II = operator(penalty)
        updates_mask = data_limited or iteration % 4 != _KEEPS_MASK
        for span in spans:
            sum_SI, target_SI = sum_OI[span], target_OI[span]
            if updates_mask:
                keep_OI[span] = keep_mask(sum_SI.abs(), work.pattern, work.sparsity)
            kept_SI = keep_OI[span] * sum_SI
            dual_SI = sum_SI - kept_SI
            if penalty != previous > 0:
                # U is the multiplier divided by ρ. The multiplier stays, so U shrinks as ρ grows.
                dual_SI.mul_(previous / penalty)
            kept_SI.sub_(dual_SI).sub_(target_SI)
            # The new sum is ωW + (1 − ω)Z + U. The operator holds all that is linear in
            # Z − U − W₀; what is left of the sum is W₀ + (2 − ω)U.
            torch.add(target_SI, dual_SI, alpha=2 - OVER_RELAXATION, out=sum_SI)
            sum_SI.add_(low_precision_product(kept_SI, operator_II))
    for span in spans:
        keep_OI[span] = keep_mask(sum_OI[span].abs(), work.pattern, work.sparsity)
    solution_OI, steps = conjugate_gradients(
        sum_OI,
        target_OI,
        keep_OI,
        scaled.gram_II,
        _DATA_LIMITED_STEPS if data_limited else _FINAL_STEPS,
        shard,
        low_precision=True,
        min_gain=_MIN_GAIN,
        low_precision_start=data_limited,
    )
    notes = {"ridge": scaled.damping, "conjugate_gradients": steps}
    return masked(solution_OI.div_(scaled.scale_I), keep_OI, notes)
