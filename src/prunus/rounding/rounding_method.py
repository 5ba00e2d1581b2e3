"""The method of compress: no weight is removed, and each is rounded to a type of the format."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from prunus.methods.composition import on_dense_target
from prunus.methods.method_options import MethodOptions
from prunus.methods.statistics import InputStatistics
from prunus.methods.table import Method
from prunus.methods.work import Pruned, PruneFunction, Work
from prunus.rounding.group_sweep import GroupRounding, round_weight
from prunus.rounding.lattice import on_lattice


def rounding_method(rounding: str, options: MethodOptions) -> Method:
    """A method that removes nothing and rounds each weight, as `Work.rounding` says.

    Args:
        rounding: "feedback", where later columns correct the errors of earlier ones, or "nearest",
            each weight by itself, which reads no statistics of the inputs.
        options: The options that the `Work` of every linear will have too.

    >>> rounding_method("feedback", MethodOptions(dense_weight=0.25)).needs_drift
    True
    """
    feedback = rounding == "feedback"
    uses_dense_target = feedback and options.dense_weight != 0
    function = partial(on_dense_target, round_weight) if uses_dense_target else None
    return Method(
        name="rounding",
        summary="round each weight to a type of the format",
        function=partial(_keeping_values, function or round_weight),
        needs="gram" if feedback else "none",
        updates_weights=True,
        needs_drift=uses_dense_target,
        # Its ridge is small against the inputs with the largest norms.
        adds_ridge=False,
    )


def _keeping_values(
    step: PruneFunction, weight_OI: Tensor, statistics: InputStatistics, work: Work
) -> Pruned:
    """A step that leaves a weight alone if its values are those of its type; see `lattice`."""
    assert isinstance(work.rounding, GroupRounding)
    if (kept := on_lattice(weight_OI, work.rounding.quantizer)) is None:
        return step(weight_OI, statistics, work)
    dense_OI = kept.dense()
    return Pruned(dense_OI, dense_OI != 0, {"kept_values": True}, kept)
