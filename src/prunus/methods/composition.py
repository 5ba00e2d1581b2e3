"""One method out of several steps: dense targets, a mask, weights.

Every step is a pure tensor function, and so is their composition. The rest of the program calls
the composed method and does not know its steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from prunus.methods.dense_targets import dense_target, target_notes
from prunus.methods.method_options import MethodOptions
from prunus.methods.solvers.least_squares import fit_least_squares
from prunus.methods.statistics import InputStatistics
from prunus.methods.table import Method
from prunus.methods.work import Pruned, PruneFunction, RowShard, Work


def compose(method: Method, options: MethodOptions) -> Method:
    """Add the steps that `options` choose to a method: zeros that stay, dense targets, update.

    Args:
        method: The method that chooses the mask.
        options: The options that the `Work` of every linear will have too. `check_options` refuses
            choices that exclude each other.

    Returns:
        A new method, which needs the statistics of its most demanding step, or `method` itself
        where nothing is added.

    >>> from prunus.methods.table import METHODS
    >>> compose(METHODS["wanda"], MethodOptions(weight_update="least-squares")).needs
    'gram'
    """
    if not options.adds_steps:
        return method
    updates = options.weight_update == "least-squares"
    uses_dense_target = options.dense_weight != 0
    function: PruneFunction = method.apply
    if updates:
        function = partial(_then_update, function)
    if uses_dense_target:
        function = partial(on_dense_target, function)
    if options.keep_zeros:
        function = partial(_keeping_zeros, function)
    if not (updates or uses_dense_target):
        return replace(method, function=function)
    return replace(
        method,
        function=function,
        # Every added step reads the Gram matrix.
        needs="gram",
        needs_drift=uses_dense_target,
        # All added steps use a ridge. Only a method that inverts a Gram matrix without one, such as
        # SparseGPT, keeps the composed method from having it.
        adds_ridge=method.adds_ridge or method.needs != "gram",
        updates_weights=method.updates_weights or updates,
    )


# --- the steps: each takes what comes before or after it as a function of one linear ---
#
# As the file of a method, what a step computes with is loaded for the first linear.


def _keeping_zeros(
    step: PruneFunction, weight_OI: Tensor, statistics: InputStatistics, work: Work
) -> Pruned:
    """A step for which the zeros of the trained weight stay zero.

    A method of one's own may know nothing of such zeros. So whatever it makes of them is removed.
    """
    work = replace(work, zero_OI=weight_OI == 0)
    pruned = step(weight_OI, statistics, work)
    weight_OI = work.without_zeros(pruned.weight_OI, slice(None))
    keep_OI = work.without_zeros(pruned.keep_OI, slice(None))
    return replace(pruned, weight_OI=weight_OI, keep_OI=keep_OI)


def on_dense_target(
    step: PruneFunction, weight_OI: Tensor, statistics: InputStatistics, work: Work
) -> Pruned:
    """A step on the dense target, as if that were the trained weight."""
    options = work.options
    target_OI = dense_target(weight_OI, statistics, options.dense_weight, options.damping)
    pruned = step(target_OI, statistics, work)
    pruned.notes.update(target_notes(statistics))
    return pruned


def _then_update(
    step: PruneFunction, weight_OI: Tensor, statistics: InputStatistics, work: Work
) -> Pruned:
    """A step that chooses a mask, and then the kept weights that fit the outputs best.

    Masks may compare all rows, but the update works within a row. So the step runs on its own, and
    the update is split over processes.
    """
    pruned = step(work.without_zeros(weight_OI, slice(None)), statistics, work)
    pruned.keep_OI = work.without_zeros(pruned.keep_OI, slice(None))
    return work.rows.solve(
        len(weight_OI),
        1,
        partial(_update_rows, weight_OI, pruned, statistics, work.options.damping),
    )


def _update_rows(
    weight_OI: Tensor,
    pruned: Pruned,
    statistics: InputStatistics,
    damping: float | None,
    shard: RowShard,
) -> Pruned:
    """The kept weights of some rows, fitted; `weight_OI` and `pruned` have all rows."""
    start = Pruned(pruned.weight_OI[shard.rows], pruned.keep_OI[shard.rows], pruned.notes)
    return fit_least_squares(weight_OI[shard.rows], start, statistics, damping, shard)
