"""Put a run's method together: targets, a mask from any method, a refinement of it, the best weights for it.

Each step is a pure tensor function; so is the whole, and the engine need not know of what it consists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from prunus.methods.base import Method, MethodOptions, Pruned, RowShard, masked, unchanged
from prunus.methods.patterns import Pattern
from prunus.methods.refine.dense_targets import (
    DEFAULT_DENSE_WEIGHT,
    best_dense_weight,
    dense_target,
    has_drift,
)
from prunus.methods.refine.dsnot import refine_by_dsnot
from prunus.methods.refine.swaps import refine_by_swaps
from prunus.methods.solvers.least_squares import fit
from prunus.methods.statistics import NEEDS, InputStatistics, Needs

# From the trained weight (O, I), a mask (O, I), statistics, pattern, damping and rounds to a mask and notes.
Refine = Callable[
    [Tensor, Tensor, InputStatistics, Pattern, float | None, int | None],
    tuple[Tensor, dict[str, Any]],
]


@dataclass(frozen=True, slots=True)
class Refinement:
    """One way to look over a mask.

    Attributes:
        needs: the statistics that `refine` reads.
        needs_means: True where it also reads the means of the inputs.
        products: as of a `Method`.
        refine: the function; it changes none of its arguments.
    """

    needs: Needs
    needs_means: bool
    products: int
    refine: Refine


REFINEMENTS: dict[str, Refinement] = {
    "dsnot": Refinement("norms", True, 0, refine_by_dsnot),
    "swaps": Refinement("gram", False, 100, refine_by_swaps),
}


def compose(method: Method, options: MethodOptions) -> Method:
    """The method that aims as `options` say, prunes by `method`, then refines and updates as `options` say.

    It needs what the most demanding of its parts needs. `check_options` says what does not go together.
    """
    refinement = REFINEMENTS.get(options.refine)
    updates, uses_dense_target = options.weight_update == "least-squares", options.dense_weight != 0
    if refinement is None and not updates and not uses_dense_target:
        return method

    def prune(
        weight_OI: Tensor,
        statistics: InputStatistics | None,
        pattern: Pattern,
        sparsity: float,
        options: MethodOptions,
    ) -> Pruned:
        assert statistics is not None, "a refinement needs input statistics"
        if pattern.removes_nothing(sparsity):
            return unchanged(weight_OI)
        dense_weight = 0.0
        if uses_dense_target:
            dense_weight = _dense_weight(weight_OI, statistics, options)
            weight_OI = dense_target(weight_OI, statistics, dense_weight, options.damping)
        pruned = method.prune(weight_OI, statistics, pattern, sparsity, options)

        def finish(shard: RowShard) -> Pruned:
            mine_OI = weight_OI[shard.rows]
            found = Pruned(pruned.weight_OI[shard.rows], pruned.keep_OI[shard.rows], pruned.notes)
            if refinement is not None:
                keep_OI, notes = refinement.refine(
                    mine_OI,
                    found.keep_OI,
                    statistics,
                    pattern,
                    options.damping,
                    options.refine_steps,
                )
                found = masked(mine_OI, keep_OI, found.notes | notes)
            if updates:
                found = fit(mine_OI, found, statistics, options.damping, shard=shard)
            return found

        if refinement is not None or updates:
            pruned = options.rows.solve(len(weight_OI), 1, finish)
        if uses_dense_target and statistics.drift_II is None:
            pruned.notes["dense_targets"] = "pruned: too few tokens for so many inputs"
        elif uses_dense_target and not has_drift(statistics):
            pruned.notes["dense_targets"] = (
                "pruned: other tokens reach this linear in the dense model"
            )
        elif uses_dense_target and options.dense_weight == "auto":
            pruned.notes["dense_weight"] = round(dense_weight, 4)
        return pruned

    needs: list[Needs] = [
        method.needs,
        refinement.needs if refinement else "none",
        "gram" if updates or uses_dense_target else "none",
    ]
    return replace(
        method,
        prune=prune,
        needs=max(needs, key=NEEDS.index),
        needs_means=method.needs_means or (refinement is not None and refinement.needs_means),
        needs_drift=uses_dense_target,
        needs_held_out=uses_dense_target and options.dense_weight == "auto",
        adds_ridge=method.adds_ridge or method.needs != "gram",
        updates_weights=method.updates_weights or updates,
        products=method.products
        + (refinement.products if refinement else 0)
        + (25 if updates else 0)
        + uses_dense_target,
    )


def _dense_weight(weight_OI: Tensor, statistics: InputStatistics, options: MethodOptions) -> float:
    """α of the dense targets: the constant, as given, or by tokens held out where there are any."""
    if options.dense_weight != "auto":
        return options.dense_weight
    found = best_dense_weight(weight_OI, statistics, options.damping)
    return DEFAULT_DENSE_WEIGHT if found is None else found
