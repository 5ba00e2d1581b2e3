"""The sparsity of every linear of a run, from a measurement of the dense model.

`prunus.methods.allocation` holds the rules that distribute a budget. This file feeds them with what
is measured of a model's linears: how the loss depends on each, or the norms of its inputs.

A function of the user's own takes the latter: full name of each linear -> `InputStatistics` with
norms. It returns full name -> sparsity. If it has parameters of these names, it also gets

    sparsity    the sparsity of the recipe
    weight_of   a function from a full name to the dense weight, (out, in), read from the checkpoint
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import fail_together, on_rank_0
from prunus.engine.block.collect_statistics import collect_statistics
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.run_plan import HashedSource
from prunus.engine.session import Session
from prunus.methods.allocation import (
    allocate_by_error,
    allocate_by_outliers,
    check_sparsities,
    round_to_whole_weights,
)
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import wanda_score
from prunus.rounding.loss_sensitivity import (
    CURVE_STEP,
    LinearSensitivity,
    LossMeasurement,
    measure_loss,
)

# No linear is pruned further from the recipe's sparsity than this before the next constant.
_MAX_DISTANCE = 0.25
# The part of the way from a uniform sparsity that is taken. The curves are those of small and
# independent errors, and the errors of a whole pruned model are neither.
_PART = 0.75
# A weight is an outlier if its score is more than this number of times the mean of its block: M in
# the paper of OWL.
_OUTLIER = 5


def allocate(
    plan: LinearPlan,
    session: Session,
    ids: Tensor,
    digests: dict[str, str],
    spill_folder: Path | None = None,
    rule: Callable[..., Any] | None = None,
) -> dict[str, float]:
    """The sparsity of every linear that is pruned: full name -> sparsity.

    With "fisher" every linear removes whole weights per row, so that the mean over all weights
    falls short of the recipe's sparsity by less than one column of one linear. All processes call
    it.

    Args:
        plan: The run.
        session: Who hears of the measurement.
        ids: Its calibration windows (windows, tokens). "fisher" uses the first few.
        digests: Name of a block -> SHA-256 of the weights that a measurement has read. Missing
            hashes are added.
        spill_folder: Folder for hidden states that do not fit in memory; None to keep them.
        rule: The user's own function; None for the rule that the recipe names.

    Raises:
        ValueError: The user's own function does not give every linear a sparsity in [0, 1).
    """
    if plan.recipe.measures == "inputs":
        statistics: dict[str, InputStatistics] = {}
        collect_statistics(
            plan,
            session,
            ids,
            digests,
            "norms",
            lambda name, _, inputs: statistics.update({name: inputs}),
            spill_folder,
        )
        return dict(on_rank_0(lambda: _by_inputs(plan, rule, statistics, digests)))
    with fail_together():
        found = _by_loss(plan, session, ids, digests)
    return dict(on_rank_0(lambda: found))


def _by_inputs(
    plan: LinearPlan,
    rule: Callable[..., Any] | None,
    statistics: dict[str, InputStatistics],
    digests: dict[str, str],
) -> dict[str, float]:
    """The sparsities that OWL or the user's own function gives to the linears."""
    read = functools.lru_cache(maxsize=1)(HashedSource(plan.source, plan.skeleton, digests).block)
    places = plan.skeleton.all_linears()

    def weight_of(name: str) -> Tensor:
        index, linear = places[name]
        stored = read(index)[f"{linear.name}.weight"]
        return (stored.T if linear.transposed else stored).to(plan.device, torch.float32)

    rule, sparsity = rule or functools.partial(_owl, plan), plan.work.sparsity
    known: dict[str, Any] = {"sparsity": sparsity, "weight_of": weight_of}
    taken = inspect.signature(rule).parameters
    found = rule(dict(statistics), **{name: x for name, x in known.items() if name in taken})
    return check_sparsities(found, statistics, plan.step.rule)


def _owl(
    plan: LinearPlan,
    statistics: dict[str, InputStatistics],
    sparsity: float,
    weight_of: Callable[[str], Tensor],
) -> dict[str, float]:
    """OWL: the linears of a block have one sparsity, by the outliers among their Wanda scores."""
    blocks, outliers, weights = [], [], []
    for index, linears in enumerate(plan.selected):
        names = [f"{plan.skeleton.block_name(index)}.{linear}" for linear in linears]
        if not names:
            continue

        def scores(names: list[str] = names) -> Iterator[Tensor]:
            return (wanda_score(weight_of(name), statistics[name]) for name in names)

        count = sum(score_OI.numel() for score_OI in scores())
        mean = sum(float(score_OI.double().sum()) for score_OI in scores()) / count
        above = sum(int((score_OI > _OUTLIER * mean).sum()) for score_OI in scores())
        blocks.append(names)
        outliers.append(above / count)
        weights.append(count)
    by_block = allocate_by_outliers(outliers, weights, sparsity)
    return {name: x for names, x in zip(blocks, by_block, strict=True) for name in names}


def _by_loss(
    plan: LinearPlan, session: Session, ids: Tensor, digests: dict[str, str]
) -> dict[str, float]:
    """The sparsities at which the slopes of all curves of the loss are equal."""
    sparsity = plan.work.sparsity
    shapes = {name: linear.shape for name, linear in plan.selected_linears().items()}
    measured = measured_curves(plan, session, ids, digests)
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


def measured_curves(
    plan: LinearPlan, session: Session, ids: Tensor, digests: dict[str, str]
) -> dict[str, LinearSensitivity]:
    """Full name -> the curve of the loss of each linear; the arguments are as of `measure_loss`."""
    aim = LossMeasurement(
        plan.selected, plan.work.options.damping, plan.recipe.seed, feedback=False
    )
    return measure_loss(plan, session, ids, digests, aim)


def _interpolated(curve: list[float], sparsity: float) -> float:
    """The loss at a sparsity between two points of a curve."""
    left = min(int(sparsity / CURVE_STEP + 1e-9), len(curve) - 2)
    return curve[left] + (sparsity / CURVE_STEP - left) * (curve[left + 1] - curve[left])
