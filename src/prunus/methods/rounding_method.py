"""The method of compress: no weight is removed, and each is rounded to a type of the format."""

from __future__ import annotations

from functools import partial

from prunus.methods.composition import on_dense_target
from prunus.methods.group_sweep import quantize_in_groups
from prunus.methods.method_options import MethodOptions
from prunus.methods.table import Method


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
    return Method(
        name="rounding",
        summary="round each weight to a type of the format",
        function=(
            partial(on_dense_target, quantize_in_groups)
            if uses_dense_target
            else quantize_in_groups
        ),
        needs="gram" if feedback else "none",
        updates_weights=True,
        needs_drift=uses_dense_target,
        # Its ridge is small against the inputs with the largest norms.
        adds_ridge=False,
    )
