"""Put a run's method together: targets, a mask from any method, a refinement of it, the best weights for it.

Each step is a pure tensor function; so is the whole, and the engine need not know of what it consists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from prunus.methods.base import Method, Options, Part, Pruned, masked, unchanged
from prunus.methods.patterns import Pattern
from prunus.methods.refine.dense_targets import MIX, dense_target, has_drift, held_out_mix
from prunus.methods.refine.dsnot import dsnot_keep
from prunus.methods.refine.swaps import swapped_keep
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
    "dsnot": Refinement("norms", True, 0, dsnot_keep),
    "swaps": Refinement("gram", False, 100, swapped_keep),
}


def compose(method: Method, options: Options) -> Method:
    """The method that aims as `options` say, prunes by `method`, then refines and updates as `options` say.

    It needs what the most demanding of its parts needs. `check_options` says what does not go together.
    """
    refinement = REFINEMENTS.get(options.refine)
    updates, aims = options.update == "lsq", options.targets == "dense"
    if refinement is None and not updates and not aims:
        return method

    def prune(
        weight_OI: Tensor,
        statistics: InputStatistics | None,
        pattern: Pattern,
        sparsity: float,
        options: Options,
    ) -> Pruned:
        assert statistics is not None, "a refinement needs input statistics"
        if pattern.removes_nothing(sparsity):
            return unchanged(weight_OI)
        mix = 0.0
        if aims:
            mix = _mix(weight_OI, statistics, options)
            weight_OI = dense_target(weight_OI, statistics, mix, options.damping)
        pruned = method.prune(weight_OI, statistics, pattern, sparsity, options)

        def finish(part: Part) -> Pruned:
            mine_OI = weight_OI[part.rows]
            found = Pruned(pruned.weight_OI[part.rows], pruned.keep_OI[part.rows], pruned.notes)
            if refinement is not None:
                keep_OI, notes = refinement.refine(
                    mine_OI,
                    found.keep_OI,
                    statistics,
                    pattern,
                    options.damping,
                    options.refine_rounds,
                )
                found = masked(mine_OI, keep_OI, found.notes | notes)
            if updates:
                found = fit(mine_OI, found, statistics, options.damping, part=part)
            return found

        if refinement is not None or updates:
            pruned = options.rows.share(len(weight_OI), 1, finish)
        if aims and statistics.drift_II is None:
            pruned.notes["targets"] = "pruned: too few tokens for so many inputs"
        elif aims and not has_drift(statistics):
            pruned.notes["targets"] = "pruned: other tokens reach this linear in the dense model"
        elif aims and options.mix == "auto":
            pruned.notes["mix"] = round(mix, 4)
        return pruned

    needs: list[Needs] = [
        method.needs,
        refinement.needs if refinement else "none",
        "gram" if updates or aims else "none",
    ]
    return replace(
        method,
        prune=prune,
        needs=max(needs, key=NEEDS.index),
        needs_means=method.needs_means or (refinement is not None and refinement.needs_means),
        needs_drift=aims,
        holds_out=aims and options.mix == "auto",
        ridged=method.ridged or method.needs != "gram",
        updates_weights=method.updates_weights or updates,
        products=method.products
        + (refinement.products if refinement else 0)
        + (25 if updates else 0)
        + aims,
    )


def _mix(weight_OI: Tensor, statistics: InputStatistics, options: Options) -> float:
    """α of the dense targets: the constant, as given, or by tokens held out where there are any."""
    if options.mix != "auto":
        return MIX if options.mix is None else options.mix
    found = held_out_mix(weight_OI, statistics, options.damping)
    return MIX if found is None else found
