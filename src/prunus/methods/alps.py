"""ALPS: mask and weights together, by splitting (ADMM), then least squares on the mask that was found.

Minimise tr (W − W₀)H(W − W₀)ᵀ over all W that the pattern allows, with W and H scaled and damped as in `lsq.py`. The
splitting asks for W = Z where Z alone must be sparse (Boža 2024, arXiv 2401.02938; Meng et al. 2024, arXiv
2406.07831, algorithm 1), and repeats

    Z ← the entries of W + U that the pattern keeps (the exact projection)
    U ← U + W − Z
    W ← (W₀H + ρ(Z − U))(H + ρI)⁻¹ = W₀ + (Z − U − W₀) · ρ(H + ρI)⁻¹
    W ← ωW + (1 − ω)Z, a little over the mark (Eckstein & Bertsekas 1992), which saves a quarter of the iterations

In the scaled weights the first mask is Wanda's. The penalty ρ grows by a fixed rule instead of ALPS's, which looks at how
much the mask still changes: all linears with the same input then share what takes the inverse's place, see `shrink.py`,
and each iteration is one matrix product (in the eigenbasis of H it would be two). These products may be coarse, since
every step makes up for the last one's rounding; conjugate gradients finish on the last mask, from a residual in float32
but where few tokens reach a wide linear.
Weights of inputs that were always 0 become 0, as in SparseGPT.

Shape suffixes: O outputs (rows), S some of them, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.hardware.numerics import coarse_product, row_spans
from prunus.methods.base import (
    UNSHARDED,
    Method,
    MethodOptions,
    Pruned,
    RowShard,
    masked,
    unchanged,
)
from prunus.methods.patterns import Pattern, keep_mask
from prunus.methods.solvers.admm_operator import OVER_RELAXATION, admm_operator, penalties
from prunus.methods.solvers.least_squares import ScaledGram, conjugate_gradients, scaled_gram
from prunus.methods.statistics import InputStatistics

#: Of the splitting, where nothing else is asked for; where wide inputs see few tokens, see `shrink.py`.
ITERATIONS, SCARCE_ITERATIONS = 12, 5
# Of four iterations this one takes the mask of the one before: a fifth of the solver's time for half a per cent of error.
_MASK_STAYS = 2
# Steps of conjugate gradients, and the share of the error that one must take away for another: where tokens are many one
# is enough, but with two for each input five take a tenth of the error away, and a fiftieth of that held out.
_FINAL_STEPS, _SCARCE_STEPS, _WORTHWHILE = 8, 2, 0.003


def _prune(
    weight_OI: Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    sparsity: float,
    options: MethodOptions,
) -> Pruned:
    assert statistics is not None, "ALPS needs a Gram matrix"
    if pattern.removes_nothing(sparsity):
        return unchanged(weight_OI)
    scaled = scaled_gram(statistics, options.damping)
    # Where all rows compete in every step, one process solves them all.
    compete = pattern.is_unstructured and pattern.group in ("layer", "column")
    rows = UNSHARDED if compete else options.rows
    together = pattern.group if pattern.is_unstructured and isinstance(pattern.group, int) else 1

    def split(shard: RowShard) -> Pruned:
        mine_OI = weight_OI[shard.rows]
        spans = [slice(0, len(mine_OI))] if compete else row_spans(mine_OI, together)
        return _split(mine_OI, spans, statistics, scaled, pattern, sparsity, options, shard)

    return rows.solve(len(weight_OI), together, split)


def _split(
    weight_OI: Tensor,
    spans: list[slice],
    statistics: InputStatistics,
    scaled: ScaledGram,
    pattern: Pattern,
    sparsity: float,
    options: MethodOptions,
    shard: RowShard,
) -> Pruned:
    target_OI = (weight_OI * scaled.scale_I).masked_fill_(scaled.dead_I, 0)
    # One matrix holds both: W + U is Z where it is kept, and the new U elsewhere.
    sum_OI = target_OI.clone()
    keep_OI = torch.empty_like(sum_OI, dtype=torch.bool)
    scarce = scaled.is_data_limited
    iterations = options.iterations or (SCARCE_ITERATIONS if scarce else ITERATIONS)
    shrink = admm_operator(statistics, scaled, len(sum_OI))
    penalty = 0.0
    for iteration, now in enumerate(penalties(scaled, iterations)):
        before, penalty = penalty, now
        if penalty != before:
            factor_II = shrink(penalty)
        picks = scarce or iteration % 4 != _MASK_STAYS
        for span in spans:
            sum_SI, target_SI = sum_OI[span], target_OI[span]
            if picks:
                keep_OI[span] = keep_mask(sum_SI.abs(), pattern, sparsity)
            kept_SI = keep_OI[span] * sum_SI
            dual_SI = sum_SI - kept_SI
            if penalty != before > 0:
                dual_SI.mul_(before / penalty)  # U is the multiplier in units of ρ
            kept_SI.sub_(dual_SI).sub_(target_SI)
            # ωW + (1 − ω)Z + U, with what is linear in Z − U − W₀ in the matrix
            torch.add(target_SI, dual_SI, alpha=2 - OVER_RELAXATION, out=sum_SI)
            sum_SI.add_(coarse_product(kept_SI, factor_II))
    for span in spans:
        keep_OI[span] = keep_mask(sum_OI[span].abs(), pattern, sparsity)
    solution_OI, steps = conjugate_gradients(
        sum_OI,
        target_OI,
        keep_OI,
        scaled.gram_II,
        _SCARCE_STEPS if scarce else _FINAL_STEPS,
        shard,
        coarse=True,
        worthwhile=_WORTHWHILE,
        coarse_start=scarce,
    )
    notes = {"ridge": scaled.damping, "conjugate_gradients": steps}
    return masked(solution_OI.div_(scaled.scale_I), keep_OI, notes)


ALPS = Method(
    name="alps",
    needs="gram",
    prune=_prune,
    default_group="row",
    updates_weights=True,
    summary="mask and weights together by ADMM, then least squares; loses least, takes longest",
    adds_ridge=True,
    products=21,
)
