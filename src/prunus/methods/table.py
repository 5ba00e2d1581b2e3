"""Methods by their names: what each needs and supports. Imports no torch.

METHODS is the only list of methods. To add one, write its file with a function `prune`, and add its
entry here. A user's own method is in a Python file, which is only loaded where the user names it;
see docs/how-to/add-a-method.md.

The order of this file: what a `Method` is, the list of methods, checks of a method and its options
before any work, and methods by their names (also a user's own).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunus.methods.method_options import MethodOptions
from prunus.methods.own_code import OwnCode

if TYPE_CHECKING:
    from torch import Tensor

    from prunus.methods.patterns import Pattern
    from prunus.methods.statistics import InputStatistics, Needs
    from prunus.methods.work import Pruned, PruneFunction, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to prune a linear.

    Attributes:
        name: The name of the option `method`.
        summary: One line for people.
        function: The method itself, or where it is, as "module:name". It changes none of its
            arguments, and expects that `check_options` and `patterns.check_shape` have passed.
        needs: The statistics of the inputs that it reads: "none", "norms" or "gram".
        default_group: Which weights compete in the method's paper, for unstructured sparsity.
        updates_weights: False where every kept weight stays as it was, to the bit.
        options: The class of `Work.options`. A method with options of its own declares them in a
            class derived from `MethodOptions`.
        reads_options: Of the options in `MethodOptions` those that belong to single methods and
            that this one reads. What a Gram matrix serves reads `damping`, also a step after a
            method; any other method that reads it names it here.
        groups: Which groups of unstructured sparsity it supports; empty for all.
        n_of_m: Whether it has an N:M form.
        why_not: Why it does not support the others, as the end of a sentence.
        changed_by: From options to the entries above that they change.
        has_reference_order: Whether it can repeat the order of operations of its original code.
        needs_drift: True where it reads how the inputs differ from those of the dense model.
        adds_ridge: True where the Gram matrix gets a ridge that grows with features per token
            before it is inverted. Such a ridge keeps the rounding of the inputs small; a small
            fixed damping lets it grow.
    """

    name: str
    summary: str
    function: str | PruneFunction
    needs: Needs
    default_group: str | int = "row"
    updates_weights: bool = False
    options: type[MethodOptions] = MethodOptions
    reads_options: tuple[str, ...] = ()
    groups: tuple[str | int, ...] = ()
    n_of_m: bool = True
    why_not: str = ""
    changed_by: Callable[[MethodOptions], dict[str, Any]] | None = None
    has_reference_order: bool = False
    needs_drift: bool = False
    adds_ridge: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.options, type) and issubclass(self.options, MethodOptions)):
            raise ValueError(
                f"method {self.name}: options must be a class derived from MethodOptions, got "
                f"{self.options!r}. Name options of other methods in `reads`"
            )

    def read_options(self, shared: MethodOptions, own: Mapping[str, Any]) -> MethodOptions:
        """The options of a run, as an object of the class that the method declares.

        Args:
            shared: The options that all methods have, such as a recipe; only what was set counts.
            own: The values of the method's own options, by name.

        Raises:
            ValueError: The method has no such option, or a value is out of range.

        >>> METHODS["wanda"].read_options(MethodOptions(), {"power": 1})
        Traceback (most recent call last):
        ValueError: method wanda: unknown option 'power'; did you mean ria_power?
        """
        given = {name: getattr(shared, name) for name in shared.model_fields_set}
        names = {*MethodOptions.model_fields}
        try:
            return self.options(**{k: v for k, v in given.items() if k in names}, **own)
        except (TypeError, ValueError) as fault:
            raise ValueError(f"method {self.name}: {fault}") from None

    def prune(
        self,
        weight_OI: Tensor,
        statistics: InputStatistics,
        pattern: Pattern,
        sparsity: float,
        options: MethodOptions | None = None,
    ) -> Pruned:
        """Prune the weight of one linear in this process, without a run around it.

        Args:
            weight_OI: Float32.
            statistics: Of the linear's inputs, with what the method `needs`.
            pattern: Which weights compete.
            sparsity: The share to remove, in [0, 1); N:M ignores it.
            options: The options of the method; None for their defaults.

        Raises:
            ValueError: The pattern does not fit the shape, the sparsity is out of range, or the
                Gram matrix cannot be inverted.

        >>> import torch
        >>> from prunus.methods import InputStatistics, Pattern
        >>> nothing = InputStatistics(4, "none")
        >>> weight_OI = torch.tensor([[0.5, -2.0, 1.0, -0.1]])
        >>> METHODS["magnitude"].prune(weight_OI, nothing, Pattern(), 0.5).weight_OI
        tensor([[ 0., -2.,  1.,  0.]])
        """
        # Recipes read this table, and must not wait for torch.
        from prunus.methods.work import Work

        work = Work(pattern, sparsity, self.options() if options is None else options)
        return self.apply(weight_OI, statistics, work)

    def apply(self, weight_OI: Tensor, statistics: InputStatistics, work: Work) -> Pruned:
        """Call the function of the method, which is imported if it is not yet.

        If nothing is removed and nothing rounded, the weight stays as it is, whatever the method.
        """
        from prunus.methods.work import unchanged  # It imports torch, as above.

        if work.rounding is None and work.pattern.removes_nothing(work.sparsity):
            return unchanged(weight_OI)
        function = self.function
        if isinstance(function, str):
            module, _, name = function.partition(":")
            function = getattr(import_module(module), name)
        return function(weight_OI, statistics, work)

    def with_options(self, options: MethodOptions) -> Method:
        """The method as it is under these options, which may change what it supports.

        >>> METHODS["obs"].with_options(MethodOptions(mask_from="magnitude")).default_group
        'layer'
        """
        return self if self.changed_by is None else replace(self, **self.changed_by(options))


def _obs_changes(options: MethodOptions) -> dict[str, Any]:
    """Masks by magnitude, and masks that are chosen in blocks of columns, compare all rows."""
    if options.mask_order == "blockwise":
        return {"default_group": "block", "groups": _BLOCKS, "why_not": _BY_BLOCKS}
    return {"default_group": "layer"} if options.mask_from == "magnitude" else {}


# The groups of methods that choose a mask block after block, and the end of a sentence that says
# why they support no others.
_BLOCKS = ("block", "block-row")
_BY_BLOCKS = (
    "it chooses its mask in blocks of columns, in which all rows compete (block) or each on its "
    "own (block-row)"
)

_ALL = (
    Method(
        name="magnitude",
        summary="remove the smallest weights; needs no calibration",
        function="prunus.methods.magnitude:prune",
        needs="none",
        default_group="layer",
    ),
    Method(
        name="wanda",
        summary="remove by magnitude times input norm, row by row",
        function="prunus.methods.wanda:prune",
        needs="norms",
    ),
    Method(
        name="wanda-variant",
        summary="as wanda, but every row gives up the same share of its score",
        function="prunus.methods.wanda_variant:prune",
        needs="norms",
        groups=("row",),
        n_of_m=False,
        why_not="each row gives up a share of its own score, so rows differ in sparsity",
    ),
    Method(
        name="ria",
        summary="remove by a weight's share of its row and column, times a power of the input norm",
        function="prunus.methods.ria:prune",
        needs="norms",
        default_group="layer",
        reads_options=("ria_power",),
    ),
    Method(
        name="sparsegpt",
        summary="remove by error, and update the kept weights to correct it",
        function="prunus.methods.sparsegpt:prune",
        needs="gram",
        default_group="block",
        updates_weights=True,
        groups=_BLOCKS,
        why_not=_BY_BLOCKS,
        has_reference_order=True,
    ),
    Method(
        name="sparsegpt-score",
        summary="remove by sparsegpt's score, without its weight update",
        function="prunus.methods.sparsegpt_score:prune",
        needs="gram",
        default_group="block",
    ),
    Method(
        name="obs",
        summary="a mask from wanda or magnitude, or a given one, with sparsegpt's weight update",
        function="prunus.methods.obs_ablations:prune",
        needs="gram",
        updates_weights=True,
        reads_options=("masks", "mask_from", "mask_order"),
        changed_by=_obs_changes,
        has_reference_order=True,
    ),
    # The public code of ALPS compares all weights of a linear. Here each row keeps its share, as in
    # Wanda. The group "layer" gives the choice of its code.
    Method(
        name="alps",
        summary="mask and weights together by ADMM, then least squares; smallest error, slowest",
        function="prunus.methods.alps:prune",
        needs="gram",
        updates_weights=True,
        reads_options=("iterations",),
        adds_ridge=True,
    ),
    Method(
        name="mask",
        summary="remove the weights that given masks name",
        function="prunus.methods.given_mask:prune",
        needs="none",
        reads_options=("masks",),
    ),
)

#: Value of the option `method` -> method.
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def check_owners(method: Method, options: MethodOptions) -> None:
    """Check that every option of single methods belongs to `method`.

    An option that has its default is never refused, whatever the method is.

    Raises:
        ValueError: An option belongs to other methods; the message names them.

    >>> check_owners(METHODS["wanda"], MethodOptions(ria_power=1.0))
    Traceback (most recent call last):
    ValueError: ria_power belongs to method ria, not to wanda: drop it, or choose method ria
    """
    for name, field in MethodOptions.model_fields.items():
        owners = [candidate.name for candidate in _ALL if name in candidate.reads_options]
        is_set = getattr(options, name) != field.default
        if owners and is_set and name not in method.reads_options:
            raise ValueError(
                f"{name} belongs to method {' and '.join(owners)}, not to {method.name}: drop it, "
                f"or choose method {owners[0]}"
            )


def check_options(
    method: Method,
    pattern: Pattern,
    options: MethodOptions | None = None,
) -> None:
    """Check that a method supports a pattern and its options, before any work is done.

    `patterns.check_shape` checks for each linear whether an N:M pattern fits its width.

    Args:
        method: A method as it is in the table, without `with_options`.
        pattern: Which weights compete.
        options: The options of the method and of the steps after it; None for their defaults.

    Raises:
        ValueError: Two choices exclude each other; the message says what to choose instead.

    >>> from prunus.methods.patterns import Pattern
    >>> check_options(METHODS["wanda"], Pattern())
    """
    options = options or MethodOptions()
    check_owners(method, options)
    method = method.with_options(options)
    if not pattern.is_unstructured and not method.n_of_m:
        raise ValueError(
            f"{method.name} has no {pattern} form: {method.why_not}. Use another method"
        )
    if pattern.is_unstructured and method.groups and pattern.group not in method.groups:
        supported = " or ".join(map(str, method.groups))
        raise ValueError(
            f"{method.name} does not support the group {pattern.group}: {method.why_not}. "
            f"Use group {supported}, or another method"
        )
    reads_damping = method.needs == "gram" or "damping" in method.reads_options
    if options.damping is not None and options.weight_update == "none" and not reads_damping:
        readers = ", ".join(other.name for other in _ALL if other.needs == "gram")
        raise ValueError(
            f"{method.name} inverts no Gram matrix, so it does not read damping: drop it, choose "
            f"a method that does ({readers}), or set weight_update to least-squares"
        )
    fixed = not method.updates_weights and options.weight_update == "none"
    if options.dense_weight != 0 and fixed:
        raise ValueError(
            f"{method.name} keeps its weights as they are, so they cannot approximate the dense "
            "model's outputs: set weight_update to least-squares, choose a method that updates "
            "weights (alps, sparsegpt, obs), or leave dense_weight out"
        )


#: The names of methods, also of a user's own.
METHOD_NAMES = OwnCode(
    option="method",
    known=METHODS,
    must="Method",
    path="a prunus.methods.Method",
    fits=lambda value: isinstance(value, Method),
)


def get_method(method: str) -> Method:
    """The method of this name. A file that it names is loaded, which runs its code.

    Raises:
        ValueError: The name is unknown, the method was given in Python and is not in a file, or
            the file cannot be loaded or has no method of this name.
        FileNotFoundError: The file cannot be read.

    >>> get_method("wanda").needs
    'norms'
    >>> get_method("wandb")
    Traceback (most recent call last):
    ValueError: the method 'wandb' is unknown: choose one of magnitude, wanda, wanda-variant, ria, \
sparsegpt, sparsegpt-score, obs, alps, mask, or name your own as FILE.py:NAME; did you mean wanda?
    """
    return METHODS[method] if method in METHODS else METHOD_NAMES.load_object(method)
