"""The sparsity of every linear of a run: by rule, or measured on a few windows before it starts.

`allocation.py` has the formulas; here is what they are given of a model.
"""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import Any

import torch

from prunus.methods.allocation import (
    allocate_by_error,
    arithmetic,
    dlp,
    median_score,
    outlier_share,
    owl,
    round_to_whole_weights,
    uniform,
)
from prunus.model.stream import Stream
from prunus.pruning.job import PruningJob
from prunus.pruning.recipe import MEASURED_ALLOCATIONS
from prunus.pruning.sensitivity import (
    PROBE_STEPS,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    Layer,
    layer_scores,
    layers_of,
    sensitivity_curves,
)

__all__ = ["allocate", "planned_allocation"]

_SURVEY_WINDOWS = 8
_SPREADS = {"owl": 0.08, "dlp": 0.15, "arithmetic": 0.05}


def planned_allocation(job: PruningJob) -> dict[str, Any]:
    """What is known of the sparsities before a run, for `prunus plan`.

    `rule`; `measured`: whether the model has to be run first; `linears`: full name -> sparsity and `blocks`: mean
    sparsity per block, where it has not.
    """
    recipe = job.recipe
    found: dict[str, Any] = {
        "rule": recipe.allocation,
        "measured": recipe.allocation in MEASURED_ALLOCATIONS and recipe.sparsity > 0,
    }
    if recipe.allocation == "uniform" or found["measured"]:
        return found
    shared = allocate(job, None)
    blocks = []
    for index in range(len(job.skeleton)):
        layer = Layer(index, tuple(job.selected[index]))
        sizes = [rows * columns for rows, columns in _shapes(job, layer)]
        values = [shared[f"{job.skeleton.block_name(index)}.{name}"] for name in layer.linears]
        if sizes:
            blocks.append(sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes))
    return found | {"linears": shared, "blocks": blocks}


def allocate(job: PruningJob, ids: torch.Tensor | None) -> dict[str, float]:
    """Full name -> sparsity of every linear that is pruned; their mean by weights is the recipe's sparsity.

    It misses that by less than one column of one linear, since whole weights go. Empty for "uniform".

    Args:
        job: the checked run.
        ids: calibration windows (windows, tokens), of which a few are used; None where nothing is measured.

    Raises:
        ValueError: the sparsity leaves no room for what was asked for.
    """
    recipe = job.recipe
    if recipe.allocation == "uniform":
        return {}
    layers = layers_of(job.selected, job.recipe.allocation_by)
    shapes = [_shapes(job, layer) for layer in layers]
    weights = [sum(rows * columns for rows, columns in shape) for shape in shapes]
    spread = recipe.allocation_spread
    if spread is None:
        spread = _SPREADS.get(recipe.allocation, 0.0)
    if recipe.sparsity == 0:
        shared = uniform(weights, 0)
    elif recipe.allocation == "arithmetic":
        shared = arithmetic(weights, recipe.sparsity, 2 * spread / max(1, len(layers) - 1))
    else:
        assert ids is not None, "measured allocations need calibration windows"
        shared = _measured(job, ids, layers, weights, spread)
    flat = [shape for group in shapes for shape in group]
    each = [value for value, group in zip(shared, shapes, strict=True) for _ in group]
    names = [
        f"{job.skeleton.block_name(layer.block)}.{linear}"
        for layer in layers
        for linear in layer.linears
    ]
    return dict(zip(names, round_to_whole_weights(each, flat, recipe.sparsity), strict=True))


def _measured(
    job: PruningJob, ids: torch.Tensor, layers: list[Layer], weights: list[int], spread: float
) -> list[float]:
    recipe = job.recipe
    stream = Stream(job.skeleton, job.source, job.device)
    with torch.no_grad(), contextlib.closing(stream):
        if recipe.allocation == "search":
            some = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
            _check_room(job, len(layers) * len(PROBE_STEPS) * len(some), some.shape[1])
            stream.embed([some], None)
            points = [
                s for step in PROBE_STEPS if 0 < (s := round(recipe.sparsity + step, 6)) < 0.95
            ]
            curves = sensitivity_curves(stream, layers, points)
            return allocate_by_error([_finely(curve) for curve in curves], weights, recipe.sparsity)
        stream.embed(ids[:_SURVEY_WINDOWS].split(1), None)
        if recipe.allocation == "owl":
            return owl(
                layer_scores(stream, layers, outlier_share), weights, recipe.sparsity, spread
            )
        return dlp(layer_scores(stream, layers, median_score), weights, recipe.sparsity, spread)


def _finely(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The curve with points every 0.5 % of sparsity; the greedy search would stop at those measured otherwise."""
    points = curve[:1]
    for (left, low), (right, high) in pairwise(curve):
        steps = max(1, round((right - left) / 0.005))
        for step in range(1, steps):
            share = step / steps
            error = (
                low * (high / low) ** share if low > 0 and high > 0 else low + share * (high - low)
            )
            points.append((left + share * (right - left), error))
        points.append((right, high))
    return points


def _check_room(job: PruningJob, windows: int, seqlen: int) -> None:
    tokens, hidden = job.skeleton.window_shape(0, seqlen)
    need = windows * tokens * hidden * job.dtype.itemsize
    if need > job.budget:
        raise ValueError(
            f"the trials of --allocation search hold {need / 1e9:.1f} GB of hidden states at the end, the memory budget "
            f"is {job.budget / 1e9:.1f} GB: choose --allocation-by block, owl or dlp, or raise --memory"
        )


def _shapes(job: PruningJob, layer: Layer) -> list[tuple[int, int]]:
    shapes = {linear.name: linear.shape for linear in job.skeleton.linears(layer.block)}
    return [shapes[name] for name in layer.linears]
