"""The sparsity of every linear of a run, from what its weights mean to the loss of the dense model.

`prunus.methods.allocation` holds the rule that distributes a budget by error curves. This file
feeds it with the curves of a model's linears.
"""

from __future__ import annotations

import torch

from prunus.engine.linear_plan import LinearPlan
from prunus.engine.loss_sensitivity import CURVE_STEP, LossMeasurement, measure_loss
from prunus.engine.session import Session
from prunus.methods.allocation import allocate_by_error, round_to_whole_weights

# No linear is pruned further from the recipe's sparsity than this before the next constant.
_MAX_DISTANCE = 0.25
# The part of the way from a uniform sparsity that is taken. The curves are those of small and
# independent errors, and the errors of a whole pruned model are neither.
_PART = 0.75


def allocate(
    plan: LinearPlan, session: Session, ids: torch.Tensor, digests: dict[str, str]
) -> dict[str, float]:
    """The sparsity of every linear that is pruned: full name -> sparsity.

    Their mean over all weights is the recipe's sparsity. Every linear removes whole weights per
    row, so the mean may fall short by less than one column of one linear.

    Args:
        plan: The run.
        session: Who hears of the measurement.
        ids: Its calibration windows (windows, tokens), of which the first few are used.
        digests: Name of a block -> SHA-256 of the weights that a measurement has read. Missing
            hashes are added.
    """
    sparsity = plan.work.sparsity
    shapes = {name: linear.shape for name, linear in plan.selected_linears().items()}
    sparsities = [sparsity] * len(shapes)
    if sparsity > 0:
        measured = measure_loss(
            plan,
            session,
            ids,
            digests,
            LossMeasurement(
                plan.selected, plan.work.options.damping, plan.recipe.seed, quantizes=False
            ),
        )
        # From the least to the most that a linear may lose, a curve has (sparsity, loss).
        low, high = (sparsity + side * _MAX_DISTANCE for side in (-1, 1))
        measured_at = [point * CURVE_STEP for point in range(round(1 / CURVE_STEP))]
        inner = [point for point in measured_at if low < point < high]
        points = sorted({max(low, 0.0), *inner, min(high, measured_at[-1])})
        curves = []
        for name in shapes:
            curve = measured[name].curve_P.tolist()
            curves.append([(point, _interpolated(curve, point)) for point in points])
        weights = [rows * columns for rows, columns in shapes.values()]
        best = allocate_by_error(curves, weights, sparsity)
        sparsities = [sparsity + _PART * (value - sparsity) for value in best]
    rounded = round_to_whole_weights(sparsities, list(shapes.values()), sparsity)
    return dict(zip(shapes, rounded, strict=True))


def _interpolated(curve: list[float], sparsity: float) -> float:
    """The loss at a sparsity between two points of a curve."""
    left = min(int(sparsity / CURVE_STEP + 1e-9), len(curve) - 2)
    return curve[left] + (sparsity / CURVE_STEP - left) * (curve[left + 1] - curve[left])
