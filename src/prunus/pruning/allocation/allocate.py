"""The sparsity of every linear of a run, measured on a few windows before the run.

`prunus.methods.allocation` holds the formulas. This file feeds them with the layers of a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise

import torch

from prunus.methods.allocation import allocate_by_error, round_to_whole_weights
from prunus.model.stream import Stream
from prunus.pruning.allocation.sensitivity import (
    PROBE_PARTS,
    PROBE_STEPS,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    CurvePoint,
    Layer,
    layers_of,
    output_errors,
    pruned_models,
    sensitivity_curves,
)
from prunus.pruning.job import PruningJob

# A search never prunes one layer alone beyond this sparsity.
_MAX_PROBE = 0.95
# Interpolated curves have a point per this much sparsity.
_CURVE_STEP = 0.005


def allocate(job: PruningJob, ids: torch.Tensor | None) -> dict[str, float]:
    """The sparsity of every linear that is pruned: full name -> sparsity.

    Their mean over all weights is the recipe's sparsity. Every linear removes whole weights per
    row, so the mean may fall short by less than one column of one linear.

    Args:
        ids: Calibration windows (windows, tokens), of which a few are used. They may be None where
            nothing is measured.

    Returns:
        The sparsities; empty for "uniform".

    Raises:
        ValueError: The search cannot reach the sparsity, or its probes do not fit in memory.
    """
    recipe = job.recipe
    if not recipe.searches:
        return {}
    layers = layers_of(job.selected, recipe.allocation_by)
    shapes = [_shapes(job, layer) for layer in layers]
    weights = [sum(rows * columns for rows, columns in group) for group in shapes]
    by_layer = [0.0] * len(layers)
    if recipe.sparsity > 0:
        assert ids is not None, "a search needs calibration windows"
        by_layer = _measured(job, ids, layers, weights)
    names = [name for layer in layers for name in _full_names(job, layer)]
    by_linear = [value for value, group in zip(by_layer, shapes, strict=True) for _ in group]
    flat_shapes = [shape for group in shapes for shape in group]
    rounded = round_to_whole_weights(by_linear, flat_shapes, recipe.sparsity)
    return dict(zip(names, rounded, strict=True))


def _measured(
    job: PruningJob, ids: torch.Tensor, layers: list[Layer], weights: list[int]
) -> list[float]:
    """The sparsity of every layer, from a pass through the dense model."""
    sparsity = job.recipe.sparsity
    stream = Stream(job.skeleton, job.hashed_source, job.device)
    with torch.no_grad(), contextlib.closing(stream):
        windows = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
        probes = len(layers) * len(PROBE_STEPS)
        _check_room(job, probes * len(windows), windows.shape[1])
        stream.embed([windows], None)
        steps = [round(sparsity + step, 6) for step in PROBE_STEPS]
        points = [point for point in steps if 0 < point < _MAX_PROBE]
        curves = sensitivity_curves(stream, layers, points)
        found = allocate_by_error([_interpolated(c) for c in curves], weights, sparsity)
        return _best_part(job, ids, layers, found)


def _best_part(
    job: PruningJob, ids: torch.Tensor, layers: list[Layer], found: list[float]
) -> list[float]:
    """The part of the way from a uniform sparsity to the search's that harms the model least.

    The search prunes one layer at a time and adds up the errors of the hidden states. In some
    models that sum says little about the outputs of a model in which all layers are pruned. So
    whole models are pruned here, on windows that the search has not seen, and compared with the
    dense one.
    """
    sparsity = job.recipe.sparsity
    candidates = [[(1 - part) * sparsity + part * x for x in found] for part in PROBE_PARTS]
    unseen = ids[PROBE_WINDOWS : 2 * PROBE_WINDOWS, :PROBE_TOKENS]
    windows = unseen if len(unseen) else ids[:PROBE_WINDOWS, :PROBE_TOKENS]
    stream = Stream(job.skeleton, job.source, job.device)
    with contextlib.closing(stream):
        stream.embed([windows], None)
        errors = output_errors(stream, pruned_models(stream, layers, candidates))
    best = min(range(len(PROBE_PARTS)), key=errors.__getitem__)
    job.options.tell(
        f"allocation: {PROBE_PARTS[best]:.0%} of the search's differences, by whole models on "
        f"{len(windows)} windows"
    )
    return candidates[best]


def _interpolated(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The curve with a point per `_CURVE_STEP`, on an exponential between two measured points.

    The greedy search moves from point to point. On measured points alone it could only choose among
    the few sparsities that were measured.

    >>> [point.sparsity for point in _interpolated([CurvePoint(0.0, 0.0), CurvePoint(0.01, 0.2)])]
    [0.0, 0.005, 0.01]
    """
    points = list(curve[:1])
    for (left, low), (right, high) in pairwise(curve):
        steps = max(1, round((right - left) / _CURVE_STEP))
        for step in range(1, steps):
            share = step / steps
            # No exponential starts at an error of 0: there the curve is a straight line.
            exponential = low > 0 and high > 0
            error = low * (high / low) ** share if exponential else low + share * (high - low)
            points.append(CurvePoint(left + share * (right - left), error))
        points.append(CurvePoint(right, high))
    return points


def _check_room(job: PruningJob, windows: int, seqlen: int) -> None:
    """Check that the hidden states of all probes fit in memory."""
    tokens, hidden = job.skeleton.window_shape(0, seqlen)
    needed = windows * tokens * hidden * job.dtype.itemsize
    if needed > job.budget:
        raise ValueError(
            f"the probes of allocation 'search' hold {needed / 1e9:.1f} GB of hidden states at the "
            f"end, and the memory budget is {job.budget / 1e9:.1f} GB: raise memory, "
            "choose allocation 'uniform', or leave allocation_by at 'block'"
        )


def _shapes(job: PruningJob, layer: Layer) -> list[tuple[int, int]]:
    shapes = {linear.name: linear.shape for linear in job.skeleton.linears(layer.block)}
    return [shapes[name] for name in layer.linears]


def _full_names(job: PruningJob, layer: Layer) -> list[str]:
    return [f"{job.skeleton.block_name(layer.block)}.{name}" for name in layer.linears]
