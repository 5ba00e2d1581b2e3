"""How prune changes each linear: its method, masks and sparsities, as the engine takes them.

pruning_step   from a recipe to a `LinearStep`, without the model
fit_to_model   masks and sparsities by hand, once the linears of the model are known
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

from prunus.engine.linear_plan import LinearPlan, LinearSelection, LinearStep
from prunus.engine.run_options import RunOptions
from prunus.methods.allocation import ALLOCATION_NAMES, Share, check_rule, shares_by_hand
from prunus.methods.composition import compose
from prunus.methods.own_code import GIVEN
from prunus.methods.patterns import Pattern
from prunus.methods.table import METHOD_NAMES, Method, check_options, get_method
from prunus.methods.work import Work
from prunus.model.skeleton import Skeleton
from prunus.pruning.allocate_sparsity import allocate
from prunus.pruning.masks import Masks
from prunus.pruning.masks import masks as read_masks
from prunus.pruning.options import PruningOptions
from prunus.rounding.loss_sensitivity import measuring_bytes


def pruning_step(recipe: PruningOptions, options: RunOptions) -> LinearStep:
    """What a recipe asks for, before the model is opened; the user's own code is loaded.

    Args:
        recipe: The recipe.
        options: Options of the run, with the method, allocation and masks given in Python.

    Raises:
        ValueError, FileNotFoundError: A method or an allocation of the user's own cannot be loaded,
            or options do not fit the method.
    """
    method, work = _method_and_work(recipe, options.own_method)
    own = options.own_allocation
    if recipe.allocation not in ALLOCATION_NAMES.known:
        own = own or ALLOCATION_NAMES.load_object(recipe.allocation)
        check_rule(own, recipe.allocation)
    by_loss = recipe.measures == "loss"
    function = options.own_method and options.own_method.function
    return LinearStep(
        method=method,
        work=work,
        rule=recipe.allocation,
        allocate=None if recipe.measures == "nothing" else functools.partial(allocate, rule=own),
        measuring_bytes=_bytes_by_loss if by_loss else lambda plan: 0,
        given_sha256={
            "method_sha256": METHOD_NAMES.sha256(recipe.method, function),
            "allocation_sha256": ALLOCATION_NAMES.sha256(recipe.allocation, options.own_allocation),
            "masks_sha256": None,
        },
    )


def fit_to_model(
    recipe: PruningOptions,
    options: RunOptions,
    step: LinearStep,
    skeleton: Skeleton,
    linears: LinearSelection,
) -> tuple[LinearStep, LinearSelection]:
    """The step with its masks or its sparsities by hand, and the linears that are pruned.

    Args:
        recipe: The recipe.
        options: Options of the run, with masks given in Python.
        step: The step of the recipe.
        skeleton: The model.
        linears: The linears that `only` and `ignore` leave.

    Raises:
        ValueError, FileNotFoundError: The masks cannot be read or are those of another model, or a
            sparsity by hand is for no linear.
    """
    if recipe.masks is not None:
        masks, linears = _given_masks(recipe.masks, options, skeleton, linears)
        sparsity = masks.sparsity(linears.linears(skeleton))
        hashes = {**step.given_sha256, "masks_sha256": masks.sha256}
        step = replace(
            step, masks=masks, work=replace(step.work, sparsity=sparsity), given_sha256=hashes
        )
    return replace(step, shares=_shares(recipe, skeleton, linears)), linears


def _bytes_by_loss(plan: LinearPlan) -> int:
    """Bytes of the measurement of an allocation by loss."""
    return measuring_bytes(plan, feedback=False)


def _given_masks(
    path: Path, options: RunOptions, skeleton: Skeleton, linears: LinearSelection
) -> tuple[Masks, LinearSelection]:
    """The masks of a run, and the selected linears that have one; the others stay dense."""
    if options.own_masks is None and str(path) == GIVEN:
        raise ValueError("the masks of this run were given in Python: give them again as `masks`")
    given = path if options.own_masks is None else options.own_masks
    masks = read_masks(given, trust_remote_code=options.trust_remote_code)
    masks.check_fit({name: x.shape for name, (_, x) in skeleton.all_linears().items()})
    linears = linears.limited(skeleton, masks.__contains__)
    if not any(linears.selected):
        raise ValueError("`masks` has none for the linears that `only` and `ignore` leave")
    return masks, linears


def _method_and_work(recipe: PruningOptions, own_method: Method | None) -> tuple[Method, Work]:
    """The recipe's method with its weight update, and what the run asks of it."""
    published = own_method or get_method(recipe.method)
    options = published.read_options(recipe, recipe.method_options)
    method = compose(published, options) if options.adds_steps else published
    group = recipe.group
    if group is None:
        group = published.with_options(options).default_group
    n, m = recipe.n_of_m or (None, None)
    pattern = Pattern(n, m, group, options.block_size)
    check_options(published, pattern, options)
    # Two passes are the published procedure. There the published solvers also sum in its order.
    in_order = recipe.extras.two_passes and method is published and method.has_reference_order
    return method, Work(pattern, recipe.sparsity, options, reference_order=in_order)


def _shares(recipe: PruningOptions, skeleton: Skeleton, linears: LinearSelection) -> list[Share]:
    """The linears of every sparsity by hand; see `shares_by_hand`."""
    if not recipe.sparsity_of:
        return []
    every = skeleton.all_linears().items()
    blocks = [
        {name: math.prod(x.shape) for name, (i, x) in every if i == index and x.name in names}
        for index, names in enumerate(linears.selected)
    ]
    heads = [skeleton.vocabulary_weights.prunable_head] if recipe.extras.head else []
    outside = {head.name: math.prod(head.shape) for head in heads}
    return shares_by_hand(
        recipe.sparsity_of, blocks, recipe.sparsity, recipe.asked_sparsity, outside
    )
