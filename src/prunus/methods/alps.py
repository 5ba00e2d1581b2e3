"""ALPS: mask and weights together, by splitting (ADMM), then least squares on the mask that was found.

Minimise tr (W − W₀)H(W − W₀)ᵀ over all W that the pattern allows, with W and H scaled and damped as in `lsq.py`. The
splitting asks for W = Z where Z alone must be sparse (Boža 2024, arXiv 2401.02938; Meng et al. 2024, arXiv
2406.07831, algorithm 1), and repeats

    Z ← the entries of W + U that the pattern keeps (the exact projection)
    U ← U + W − Z
    W ← (W₀H + ρ(Z − U))(H + ρI)⁻¹ = W₀ + (Z − U − W₀) · ρ(H + ρI)⁻¹
    W ← ωW + (1 − ω)Z, a little over the mark (Eckstein & Bertsekas 1992), which saves a quarter of the iterations

In the scaled weights the first mask is Wanda's. The penalty ρ grows by a fixed rule instead of ALPS's, which looks at how
much the mask still changes: all linears with the same input then share the inverses, each iteration is one matrix
product (in the eigenbasis of H it would be two), and no eigenvectors are needed. Only the first and the last ρ are
inverted for; in between stands the mixture of the two that is right for eigenvalues of H equal to ρ. These products
may be coarse, since every step makes up for the last one's rounding; conjugate gradients finish on the last mask, from
a residual in float32.
Weights of inputs that were always 0 become 0, as in SparseGPT.

Shape suffixes: O outputs (rows), I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.methods.base import ALL_ROWS, Method, Options, Part, Pruned, masked, unchanged
from prunus.methods.lsq import ScaledGram, conjugate_gradients, scaled_gram
from prunus.patterns import Pattern, keep_mask
from prunus.products import coarse_factor, coarse_product
from prunus.statistics import InputStatistics

# ρ, against a diagonal of H of about 1: each for a quarter of the iterations. On four linears of SmolLM2 at 50 % and 2:4
# twice as many iterations with twice as many penalties, from 0.1 to 1.7, lower the error held out by 0.3 to 2 %.
_PENALTIES = (0.25, 0.4, 0.8, 1.6)
# ω: twelve iterations at 1.2 come as far as sixteen at 1, at 1.6 they are 1 % worse.
_OVER_RELAXATION = 1.2
#: Of the splitting, where nothing else is asked for.
ITERATIONS = 12
# Of four iterations this one takes the mask of the one before: a fifth of the solver's time for half a per cent of error.
_MASK_STAYS = 2
# Steps of conjugate gradients, and the share of the error that one must take away for another: where tokens are many one
# is enough, but with two for each input five take a tenth of the error away, and a fiftieth of that held out.
_FINAL_STEPS, _WORTHWHILE = 8, 0.003
# Inverses beyond this many bytes are not kept for the next linear with the same input.
_MOST_KEPT = 2**28


def _prune(
    weight_OI: Tensor, statistics: InputStatistics | None, pattern: Pattern, sparsity: float, options: Options
) -> Pruned:
    assert statistics is not None, "ALPS needs a Gram matrix"
    if pattern.removes_nothing(sparsity):
        return unchanged(weight_OI)
    scaled = scaled_gram(statistics, options.damping)
    # Where all rows compete in every step, one process solves them all.
    compete = pattern.is_unstructured and pattern.group in ("layer", "column")
    rows = ALL_ROWS if compete else options.rows
    together = pattern.group if pattern.is_unstructured and isinstance(pattern.group, int) else 1

    def split(part: Part) -> Pruned:
        return _split(weight_OI[part.rows], statistics, scaled, pattern, sparsity, options, part)

    return rows.share(len(weight_OI), together, split)


def _split(
    weight_OI: Tensor,
    statistics: InputStatistics,
    scaled: ScaledGram,
    pattern: Pattern,
    sparsity: float,
    options: Options,
    part: Part,
) -> Pruned:
    target_OI = (weight_OI * scaled.scale_I).masked_fill_(scaled.dead_I, 0)
    # One matrix holds both: W + U is Z where it is kept, and the new U elsewhere.
    sum_OI = target_OI.clone()
    dual_OI = torch.empty_like(sum_OI)
    iterations = options.iterations or ITERATIONS
    shrink_II, last_II = _shrink_at_ends(statistics, scaled)
    penalty, share = 0.0, 1.0
    for iteration in range(iterations):
        before, penalty = penalty, _PENALTIES[len(_PENALTIES) * iteration // iterations]
        if penalty != before:
            before_share, share = share, _share_of_first(penalty)
            shrink_II.lerp_(last_II, 1 - share / before_share)
            factor_II = coarse_factor(shrink_II, len(sum_OI))
        if iteration % 4 != _MASK_STAYS:
            keep_OI = keep_mask(sum_OI.abs(), pattern, sparsity)
        kept_OI = keep_OI * sum_OI
        torch.sub(sum_OI, kept_OI, out=dual_OI)
        if penalty != before > 0:
            dual_OI.mul_(before / penalty)  # U is the multiplier in units of ρ
        kept_OI.sub_(dual_OI).sub_(target_OI)
        # ωW + (1 − ω)Z + U, with what is linear in Z − U − W₀ in the matrix
        torch.add(target_OI, dual_OI, alpha=2 - _OVER_RELAXATION, out=sum_OI)
        sum_OI.add_(coarse_product(kept_OI, factor_II))
    keep_OI = keep_mask(sum_OI.abs(), pattern, sparsity)
    solution_OI, steps = conjugate_gradients(
        sum_OI,
        target_OI,
        keep_OI,
        scaled.gram_II,
        _FINAL_STEPS,
        part,
        coarse=True,
        worthwhile=_WORTHWHILE,
    )
    notes = {"ridge": scaled.damping, "conjugate_gradients": steps}
    return masked(solution_OI.div_(scaled.scale_I), keep_OI, notes)


def _share_of_first(penalty: float) -> float:
    """How much of the first ρ(H + ρI)⁻¹ is in the mixture for `penalty`; the rest is the last one's."""
    first, last = (end / (penalty + end) for end in (_PENALTIES[0], _PENALTIES[-1]))
    return (0.5 - last) / (first - last)


def _shrink_at_ends(statistics: InputStatistics, scaled: ScaledGram) -> tuple[Tensor, Tensor]:
    """ωρ(H + ρI)⁻¹ + (1 − ω)I for the first ρ and the last, float32 (I, I); the first may be written to.

    Kept beside the statistics, for linears with the same input, where both fit there.
    """

    def compute() -> tuple[Tensor, Tensor]:
        return _shrink(scaled, _PENALTIES[0]), _shrink(scaled, _PENALTIES[-1])

    if 2 * scaled.gram_II.nbytes > _MOST_KEPT:
        return compute()
    first_II, last_II = statistics.derived(("alps", scaled.damping), compute)
    return first_II.clone(), last_II


def _shrink(scaled: ScaledGram, penalty: float) -> Tensor:
    damped_II = scaled.gram_II.clone()
    damped_II.diagonal().add_(penalty)
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed):
        raise ValueError("the Gram matrix of the inputs cannot be inverted: is it finite?")
    relaxed_II = torch.cholesky_inverse(lower_II).mul_(_OVER_RELAXATION * penalty)
    relaxed_II.diagonal().add_(1 - _OVER_RELAXATION)
    return relaxed_II


ALPS = Method(
    name="alps",
    needs="gram",
    prune=_prune,
    default_group="row",
    updates_weights=True,
    summary="mask and weights together by ADMM, then least squares; loses least, takes longest",
    ridged=True,
    products=21,
)
