"""The options of pruning methods: what they mean, which values they take, which methods read them.

This is the only place that validates them. `prunus.pruning.recipe` calls it when a recipe is read,
and `prunus.methods.check_options` calls it before a method runs. A recipe is read without torch, so
this file must not import it.

    >>> check_method_options("ria", MethodOptions(ria_power=1.0))
    >>> check_method_options("wanda", MethodOptions(ria_power=1.0))
    Traceback (most recent call last):
    ValueError: ria_power belongs to method 'ria', not to 'wanda': drop it or choose --method ria
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from prunus.methods.row_shards import UNSHARDED, RowSharding

if TYPE_CHECKING:
    from prunus.methods.rate_distortion import LinearQuantization

__all__ = [
    "RULES",
    "MaskFrom",
    "MaskOrder",
    "MethodName",
    "MethodOptions",
    "Refine",
    "Rule",
    "WeightUpdate",
    "at_least",
    "check_method_options",
    "check_value",
    "in_range",
]

MethodName = Literal["magnitude", "wanda", "wanda-variant", "ria", "sparsegpt", "obs", "alps"]
MaskFrom = Literal["wanda", "magnitude"]
MaskOrder = Literal["before", "blockwise"]
Refine = Literal["none", "swaps"]
WeightUpdate = Literal["none", "least-squares"]


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """The options that methods, refinements and weight updates read; see `RULES` for the ranges.

    Attributes:
        mask_from: the score of the mask that `obs` updates the weights for.
        mask_order: `obs` fixes the whole mask "before" the update, or chooses it "blockwise": for
            every block of columns anew, from the weights as updated so far.
        damping: λ as a fraction of the mean diagonal of the Gram matrix, where a Gram matrix is
            inverted or solved. None takes the method's own: 0.01 as published for `sparsegpt` and
            `obs`, and `least_squares.ridge` for everything else.
        column_block: the number of columns that `sparsegpt` and a blockwise `obs` choose a mask for
            at once.
        ria_power: the exponent of the input norms in the score of `ria`.
        iterations: ADMM iterations of `alps`; None takes its own number.
        refine: how the mask of any method is improved afterwards; see `refine/swaps.py`.
        refine_steps: the maximum number of rounds of `refine`; None takes the refinement's own.
        weight_update: "least-squares" fits the kept weights of any method to its mask at the end.
        dense_weight: α of `refine/dense_targets.py`, the share of the dense model's inputs in the
            outputs that the weights approximate. 0 uses the inputs of the pruned model only.
            "auto" chooses α per linear on tokens that are held out.
        reference_order: update weights in the order of operations of the original code, which
            reproduces its masks and is slower; see `solvers/obs_reference_order.py`.
        bits: the bits per weight of the compressed checkpoint's linears. A number makes every
            method end with `rate_distortion.quantize`.
        quantization: how the linear at hand is quantised, where `bits` is given.
        row_sharding: how the rows of a linear are split over processes.

    >>> MethodOptions(damping=0.1).damping
    0.1
    """

    mask_from: MaskFrom = "wanda"
    mask_order: MaskOrder = "before"
    damping: float | None = None
    column_block: int = 128
    ria_power: float = 0.5
    iterations: int | None = None
    refine: Refine = "none"
    refine_steps: int | None = None
    weight_update: WeightUpdate = "none"
    dense_weight: float | Literal["auto"] = 0.0
    reference_order: bool = False
    bits: float | None = None
    quantization: LinearQuantization | None = None
    row_sharding: RowSharding = UNSHARDED


@dataclass(frozen=True, slots=True)
class Rule:
    """Which values an option takes, and who reads it.

    Attributes:
        allows: whether a value is in range.
        must: the range in words, after "must": "lie in (0, 1)".
        methods: the methods that own the option. Empty where every method may have it.
    """

    allows: Callable[[Any], bool]
    must: str
    methods: tuple[MethodName, ...] = ()


def at_least(minimum: int, what: str = "", methods: tuple[MethodName, ...] = ()) -> Rule:
    """The rule of a count: `minimum` or more. `what` continues the sentence."""
    return Rule(lambda value: value >= minimum, f"be at least {minimum}{what}", methods)


def in_range(text: str, what: str = "", methods: tuple[MethodName, ...] = ()) -> Rule:
    """The rule of a number in an interval such as "(0, 1)" or "[0, 1)".

    A bracket includes its end, a parenthesis leaves it out. No interval includes NaN.

    >>> in_range("[0, 1)").allows(0), in_range("[0, 1)").allows(1)
    (True, False)
    """
    low, high = (float(end) for end in text[1:-1].split(","))

    def allows(value: float) -> bool:
        above = value >= low if text[0] == "[" else value > low
        below = value <= high if text[-1] == "]" else value < high
        return above and below

    return Rule(allows, f"lie in {text}{what}", methods)


def _one_of(choices: Any, methods: tuple[MethodName, ...] = ()) -> Rule:
    names = get_args(choices)
    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    return Rule(lambda value: value in names, f"be {listed}", methods)


def _is_dense_weight(value: Any) -> bool:
    return value == "auto" or (isinstance(value, int | float) and 0 <= value <= 1)


#: Option -> its rule. A value of None stands for "the default" and needs no rule.
RULES: dict[str, Rule] = {
    "mask_from": _one_of(MaskFrom, ("obs",)),
    "mask_order": _one_of(MaskOrder, ("obs",)),
    "damping": in_range("(0, 1)", ": it is a fraction of the Gram matrix's mean diagonal"),
    "column_block": at_least(1, " column", ("sparsegpt", "obs")),
    "ria_power": in_range("[0, 2]", methods=("ria",)),
    "iterations": at_least(1, methods=("alps",)),
    "bits": in_range("[1, 7]", ": 3 makes the linears a fifth of their bfloat16 size"),
    "refine": _one_of(Refine),
    "refine_steps": at_least(1),
    "weight_update": _one_of(WeightUpdate),
    "dense_weight": Rule(
        _is_dense_weight, "lie in [0, 1], where 0 uses the pruned model only, or be auto"
    ),
}


def check_value(option: str, value: Any, rules: Mapping[str, Rule] = RULES) -> None:
    """Check the value of one option against its rule.

    Args:
        option: the name of the option, a key of `rules`.
        value: the value; None stands for the default and passes.
        rules: `RULES`, or the rules of other options that use the same form.

    Raises:
        ValueError: the value is out of range.

    >>> check_value("damping", 1.5)
    Traceback (most recent call last):
    ValueError: damping must lie in (0, 1): it is a fraction of the Gram matrix's mean diagonal; \
got 1.5
    """
    rule = rules[option]
    if value is not None and not rule.allows(value):
        raise ValueError(f"{option} must {rule.must}; got {value!r}")


def check_method_options(method: str, options: MethodOptions) -> None:
    """Check that every option is in range and belongs to `method`.

    An option that keeps its default is never refused, whatever the method is.

    Raises:
        ValueError: an option is out of range, or the method does not read it.
    """
    for name in RULES:
        check_value(name, getattr(options, name))
    for field in fields(MethodOptions):
        owners = RULES[field.name].methods if field.name in RULES else ()
        if owners and method not in owners and getattr(options, field.name) != field.default:
            listed = " and ".join(map(repr, owners))
            raise ValueError(
                f"{field.name} belongs to method {listed}, not to {method!r}: "
                f"drop it or choose --method {owners[0]}"
            )
    if options.refine == "none" and options.refine_steps is not None:
        raise ValueError("refine_steps belongs to refine 'swaps': drop it or choose refine='swaps'")
