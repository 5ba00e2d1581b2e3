"""Pruning methods: pure tensor functions, a file each. To add one, write it and add its line to METHODS.

base.py           what a method is
magnitude.py      |W|
wanda.py          |W| · ‖X‖
wanda_variant.py  the same score, an equal share of it from every row
ria.py            a weight's share of its row and column, times a power of ‖X‖
obs.py            the column sweep with weight update that the next two share
sparsegpt.py      mask and update by OBS
ablations.py      mask from magnitude or Wanda, update by OBS
alps.py           mask and weights together by ADMM
lsq.py            the best weights for a mask, from whatever method
dsnot.py          refines a mask: the mean output of every row is right again
swaps.py          refines a mask: pairwise swaps that lower the output error
targets.py        what the weights are to give: the dense model's outputs, or a mixture
composition.py    a method, a refinement and an update in one
permutation.py    which channels share a group of N:M
"""

from __future__ import annotations

import math

from prunus.methods.alps import ALPS
from prunus.methods.base import Method, MethodOptions, Pruned
from prunus.methods.compose import compose
from prunus.methods.magnitude import MAGNITUDE
from prunus.methods.obs_ablations import OBS
from prunus.methods.patterns import Pattern
from prunus.methods.ria import RIA
from prunus.methods.sparsegpt import SPARSEGPT
from prunus.methods.wanda import WANDA
from prunus.methods.wanda_variant import WANDA_VARIANT

__all__ = [
    "METHODS",
    "Method",
    "MethodOptions",
    "Pruned",
    "check_options",
    "compose",
    "default_group",
    "get_method",
]

METHODS: dict[str, Method] = {
    "magnitude": MAGNITUDE,
    "wanda": WANDA,
    "wanda-variant": WANDA_VARIANT,
    "ria": RIA,
    "sparsegpt": SPARSEGPT,
    "obs": OBS,
    "alps": ALPS,
}


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"the method {name!r} is unknown: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def default_group(name: str, options: MethodOptions | None = None) -> str | int:
    """Who competes in the paper where the user does not say. For `obs` it is the mask that decides.

    Raises:
        ValueError: the method is unknown.
    """
    options = options or MethodOptions()
    method = get_method(name)
    if method is OBS and (options.mask_from == "magnitude" or options.mask_order == "blockwise"):
        return "layer"
    return method.default_group


def check_options(
    name: str, pattern: Pattern, sparsity: float, options: MethodOptions | None = None
) -> None:
    """See that a method can do what is asked of it, before any work is done.

    Whether an N:M pattern fits the widths is `patterns.check_shape`'s to say, linear by linear.

    Raises:
        ValueError: says what does not go together, and what would.
    """
    options = options or MethodOptions()
    method = get_method(name)
    if pattern.is_unstructured and not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity is {sparsity}: it must be at least 0 and less than 1")
    if options.mask_from not in ("wanda", "magnitude"):
        raise ValueError(f"the mask is from {options.mask_from!r}: choose wanda or magnitude")
    if options.mask_order not in ("before", "blockwise"):
        raise ValueError(f"the mask order is {options.mask_order!r}: choose before or blockwise")
    _check_ranges(options)

    if method is WANDA_VARIANT and not pattern.is_unstructured:
        raise ValueError(
            f"wanda-variant has no {pattern} form, its rows differ in sparsity: use wanda"
        )
    if method is WANDA_VARIANT and pattern.group != "row":
        raise ValueError(
            f"wanda-variant always works row by row, not by {pattern.group}: use wanda"
        )
    by_blocks = method is SPARSEGPT or (method is OBS and options.mask_order == "blockwise")
    if by_blocks and pattern.is_unstructured and pattern.group not in ("row", "layer"):
        raise ValueError(
            f"{name} chooses its mask in blocks of columns, where all rows compete (layer) "
            f"or each on its own (row), not by {pattern.group}"
        )
    if options.dense_weight != 0 and not method.updates_weights and options.weight_update == "none":
        raise ValueError(
            f"{name} keeps its weights as they are, so it has no targets to aim at: add --weight-update least-squares, choose a method "
            "that updates weights (alps, sparsegpt, obs), or leave --dense-weight out"
        )
    if options.refine != "none":
        _check_refinement(name, pattern, options)


def _check_ranges(options: MethodOptions) -> None:
    damping, power = options.damping, options.ria_power
    if damping is not None and not (math.isfinite(damping) and 0 <= damping <= 1):
        raise ValueError(
            f"the damping is {damping}: it is a fraction of the mean diagonal, from 0 to 1"
        )
    if options.column_block < 1:
        raise ValueError(f"the column block is {options.column_block}: it must be at least 1")
    if not (math.isfinite(power) and 0 <= power <= 2):
        raise ValueError(f"the power of the input norms is {power}: it must be from 0 to 2")
    if options.iterations is not None and options.iterations < 1:
        raise ValueError(f"the iterations are {options.iterations}: there must be at least 1")
    if options.refine not in ("none", "dsnot", "swaps"):
        raise ValueError(f"the refinement is {options.refine!r}: choose none, dsnot or swaps")
    if options.dense_weight != "auto" and not 0 <= float(options.dense_weight) <= 1:
        raise ValueError(
            f"the dense weight is {options.dense_weight}: it is the share of the dense model in the "
            "targets, from 0 to 1, or auto"
        )
    if options.weight_update not in ("none", "least-squares"):
        raise ValueError(
            f"the weight update is {options.weight_update!r}: choose none or least-squares"
        )
    if options.refine_steps is not None and options.refine_steps < 1:
        raise ValueError(
            f"the rounds of the refinement are {options.refine_steps}: there must be at least 1"
        )


def _check_refinement(name: str, pattern: Pattern, options: MethodOptions) -> None:
    if get_method(name).updates_weights and options.weight_update == "none":
        raise ValueError(
            f"{name} fits the weights to its mask, and --refine {options.refine} changes that mask: add --weight-update least-squares, "
            "which fits them again"
        )
    if pattern.is_unstructured and pattern.group == "column":
        raise ValueError(
            f"--refine {options.refine} swaps weights within a row, which would break the equal counts of "
            "--group column: choose another group"
        )
