"""The table of methods, and the checks of what a method can do.

To add a method, write its file, add its name to `options.MethodName`, and add its line here.
"""

from __future__ import annotations

from prunus.methods.alps import ALPS
from prunus.methods.base import Method
from prunus.methods.magnitude import MAGNITUDE
from prunus.methods.obs_ablations import OBS
from prunus.methods.options import MethodOptions, check_method_options
from prunus.methods.patterns import Pattern
from prunus.methods.ria import RIA
from prunus.methods.sparsegpt import SPARSEGPT
from prunus.methods.wanda import WANDA
from prunus.methods.wanda_variant import WANDA_VARIANT

__all__ = ["METHODS", "check_options", "default_group", "get_method"]

#: Name on the command line -> method.
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
        ValueError: there is no such method; the message lists all methods.

    >>> get_method("wanda").needs
    'norms'
    """
    if name not in METHODS:
        raise ValueError(f"the method {name!r} is unknown: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def default_group(name: str, options: MethodOptions | None = None) -> str | int:
    """Which weights compete by default: those that compete in the method's public code.

    For `obs` this depends on its mask: magnitude masks and blockwise masks compare all rows. `alps`
    is the exception: its public code compares all weights of a linear, and here each row keeps its
    share, as in Wanda. The group "layer" gives the choice of its code.

    Raises:
        ValueError: there is no such method.

    >>> default_group("wanda"), default_group("magnitude")
    ('row', 'layer')
    """
    options = options or MethodOptions()
    method = get_method(name)
    if method is OBS and (options.mask_from == "magnitude" or options.mask_order == "blockwise"):
        return "layer"
    return method.default_group


def check_options(
    name: str, pattern: Pattern, sparsity: float, options: MethodOptions | None = None
) -> None:
    """Check that a method supports a pattern, a sparsity and its options, before any work is done.

    `patterns.check_shape` checks for each linear whether an N:M pattern fits its width.

    Raises:
        ValueError: a value is out of range, or two choices exclude each other; the message says
            what to choose instead.
    """
    options = options or MethodOptions()
    method = get_method(name)
    if pattern.is_unstructured and not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity is {sparsity}: it must be at least 0 and less than 1")
    check_method_options(name, options)
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
    fixed = not method.updates_weights and options.weight_update == "none"
    if options.dense_weight != 0 and fixed and options.bits is None:
        raise ValueError(
            f"{name} keeps its weights as they are, so they cannot approximate the dense model's "
            "outputs: add --weight-update least-squares, choose a method that updates weights "
            "(alps, sparsegpt, obs), or leave --dense-weight out"
        )
    if options.refine != "none":
        _check_refinement(method, pattern, options)


def _check_refinement(method: Method, pattern: Pattern, options: MethodOptions) -> None:
    if method.updates_weights and options.weight_update == "none":
        raise ValueError(
            f"{method.name} fits the weights to its mask, and --refine {options.refine} changes "
            "that mask: add --weight-update least-squares, which fits them again"
        )
    if pattern.is_unstructured and pattern.group == "column":
        raise ValueError(
            f"--refine {options.refine} swaps weights within a row, which would break the equal "
            "counts of --group column: choose another group"
        )
